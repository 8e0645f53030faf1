"""Remembering a forward-mode derivative, so that the next one does not run the model again.

The derivative of a model at a point is a linear map, made of operations on tangents in which the
values of the forward pass are constants. While the model runs on dual numbers once, a recorder
beneath autograd sees every operation and writes down those that touch a tangent; playing them again
on other tangents costs what the tangents cost, and nothing for the model.

(`torch.func.linearize` does the same by tracing all operations and folding the constants, which
takes 3 to 18 gradients for small models.)

What cannot be recorded faithfully is refused, never approximated: an operation that writes a
tangent into a constant, or asks for the value of one, or a constant that is written to later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fisherfn.core.matmul import row_product
from fisherfn.core.modes import version

_ABOUT_SHAPES = (
    torch.ops.aten.is_same_size.default,
    torch.ops.aten._has_same_storage_numel.default,
)
# torch's own decompositions use these, for which there are no batching rules; products of matrices
# go to the fastest library
_PLAIN = {
    torch.ops.aten.mm.default: row_product,
    torch.ops.prims.add.default: torch.ops.aten.add.Tensor,
    torch.ops.prims.sub.default: torch.ops.aten.sub.Tensor,
    torch.ops.prims.mul.default: torch.ops.aten.mul.Tensor,
    torch.ops.prims.div.default: torch.ops.aten.div.Tensor,
}


class UnrecordableError(Exception):
    """This derivative cannot be written down as a list of operations on tangents."""


@dataclass(frozen=True)
class Slot:
    """The place of a tangent among the arguments of an operation."""

    index: int


@dataclass(frozen=True)
class Step:
    """One operation on tangents.

    Attributes:
        function: The operation.
        arguments: Its flattened arguments; tangents are slots.
        structure: How to unflatten them.
        results: The slot of each flattened result, None for what is no tensor.
        writes: Whether it writes into an argument.
    """

    function: Any
    arguments: tuple[Any, ...]
    structure: Any
    results: tuple[int | None, ...]
    writes: bool


class Recorder(TorchDispatchMode):
    """Writes down every operation that touches a tangent."""

    def __init__(self, tangents: Sequence[Tensor]) -> None:
        """Know the tangents at the point by identity."""
        super().__init__()
        self._slots: dict[int, int] = {}
        # identity by id is safe only while the tensors live
        self._alive: list[Tensor] = []
        self._constants: list[tuple[Tensor, int]] = []
        self._steps: list[Step] = []
        self._inputs = [self._new(t) for t in tangents]

    def _new(self, t: Tensor) -> int:
        index = len(self._alive)
        self._slots[id(t)] = index
        self._alive.append(t)
        return index

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation, and write it down if it touches a tangent."""
        kwargs = kwargs or {}
        flat, structure = pytree.tree_flatten((args, kwargs))
        touched = [isinstance(a, Tensor) and id(a) in self._slots for a in flat]
        if not any(touched):
            return func(*args, **kwargs)
        writes = bool(func._schema.is_mutable)
        if writes:
            self._check_writes(func, args, kwargs)
        out = func(*args, **kwargs)
        results, _ = pytree.tree_flatten(out)
        if func in _ABOUT_SHAPES:
            return out
        if not any(isinstance(r, Tensor) for r in results):
            raise UnrecordableError(f"{func} asks for the value of a tangent")
        arguments = []
        for value, tangent in zip(flat, touched, strict=True):
            if tangent:
                arguments.append(Slot(self._slots[id(value)]))
                continue
            if isinstance(value, Tensor):
                self._constants.append((value, version(value)))
            arguments.append(value)
        slots = tuple(self._new(r) if isinstance(r, Tensor) else None for r in results)
        self._steps.append(Step(_PLAIN.get(func, func), tuple(arguments), structure, slots, writes))
        return out

    def _check_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse to write tangents into what is not one: the next run would find them there."""
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            targets = value if isinstance(value, (list, tuple)) else [value]
            for target in targets:
                if isinstance(target, Tensor) and id(target) not in self._slots:
                    raise UnrecordableError(f"{func} writes a tangent into a constant")

    def tape(self, outputs: Sequence[Tensor | None]) -> Tape:
        """Return what leads from the tangents at the point to these, None being zero.

        Raises:
            UnrecordableError: a constant has been written to since it was used.
        """
        for constant, before in self._constants:
            if version(constant) != before:
                raise UnrecordableError("a value of the forward pass is overwritten in place")
        ends = [None if t is None else self._slots.get(id(t)) for t in outputs]
        if any(t is not None and end is None for t, end in zip(outputs, ends, strict=True)):
            raise UnrecordableError("a derivative appears that no recorded operation gave")
        steps = self._steps
        if not any(step.writes for step in steps):
            steps = _needed(steps, ends)
        made = [self._alive[r] for step in steps for r in step.results if r is not None]
        largest = max((t.numel() * t.element_size() for t in made), default=0)
        return Tape(self._inputs, steps, ends, largest)


def _needed(steps: Sequence[Step], ends: Sequence[int | None]) -> list[Step]:
    """Return the steps on which the ends depend."""
    wanted = {end for end in ends if end is not None}
    kept = []
    for step in reversed(steps):
        if not wanted.isdisjoint(step.results):
            kept.append(step)
            wanted.update(a.index for a in step.arguments if isinstance(a, Slot))
    return kept[::-1]


@dataclass(frozen=True)
class _Call:
    """A step made ready to run: which arguments to fill in, and how to pass them."""

    function: Any
    arguments: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]
    positional: int
    keywords: tuple[str, ...] | None
    structure: Any
    results: tuple[int | None, ...]
    first: int

    @staticmethod
    def of(step: Step) -> _Call:
        """Prepare a step; nested arguments are put together anew each time."""
        slots = [(i, a.index) for i, a in enumerate(step.arguments) if isinstance(a, Slot)]
        args, kwargs = pytree.tree_unflatten(range(len(step.arguments)), step.structure)
        plain = [*args, *kwargs.values()] == list(range(len(step.arguments)))
        first = next((r for r in step.results if r is not None), -1)
        return _Call(
            step.function,
            step.arguments,
            tuple(slots),
            len(args),
            tuple(kwargs) if plain else None,
            step.structure,
            step.results,
            first,
        )

    def run(self, values: dict[int, Any]) -> Any:
        """Run it on the tangents so far."""
        flat = list(self.arguments)
        for place, slot in self.slots:
            flat[place] = values[slot]
        if self.keywords is None:
            args, kwargs = pytree.tree_unflatten(flat, self.structure)
            return self.function(*args, **kwargs)
        if not self.keywords:
            return self.function(*flat)
        kwargs = dict(zip(self.keywords, flat[self.positional :], strict=True))
        return self.function(*flat[: self.positional], **kwargs)


class Tape:
    """A recorded linear map.

    Attributes:
        largest: Bytes of the largest tangent on the way.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        steps: Sequence[Step],
        ends: Sequence[int | None],
        largest: int,
    ) -> None:
        """Note after which step each tangent is no longer needed."""
        self.largest = largest
        self._inputs, self._steps, self._ends = list(inputs), list(steps), list(ends)
        self._copies = any(step.writes for step in steps)
        last: dict[int, int] = {}
        for number, step in enumerate(self._steps):
            for a in step.arguments:
                if isinstance(a, Slot):
                    last[a.index] = number
            for r in step.results:
                if r is not None:
                    last.setdefault(r, number)
        self._calls = [_Call.of(step) for step in self._steps]
        self._done: list[list[int]] = [[] for _ in self._steps]
        for slot, number in last.items():
            if slot not in self._ends:
                self._done[number].append(slot)

    @property
    def convolves(self) -> bool:
        """Whether a step is a convolution, which a batch of weights makes slow."""
        return any("convolution" in str(step.function) for step in self._steps)

    def play(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the map of these tangents; None stands for zero."""
        # a step may write into what it is given, but never into what the caller owns
        given = [t.clone() for t in tangents] if self._copies else tangents
        values: dict[int, Any] = dict(zip(self._inputs, given, strict=True))
        with torch.no_grad():
            for call, done in zip(self._calls, self._done, strict=True):
                out = call.run(values)
                if isinstance(out, Tensor):
                    values[call.first] = out
                else:
                    named = zip(call.results, pytree.tree_flatten(out)[0], strict=True)
                    values.update((slot, value) for slot, value in named if slot is not None)
                for slot in done:
                    del values[slot]
        return [None if end is None else values[end] for end in self._ends]
