"""The two ways to run a tape: `torch.func.vjp`, and autograd's own graph.

Both give outputs and a pull-back that hands the cotangent of each tap to a receiver. They agree to
rounding; which one runs depends only on where the call is made.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisherfn.capture.plan import Plan, Tap
from fisherfn.capture.tape import Tape, spread
from fisherfn.core import trees
from fisherfn.core.errors import UnsupportedError
from fisherfn.core.modes import in_functorch, transformed

#: Takes the index of a tap and the cotangents of its output, `[K, *output]`.
Receiver: TypeAlias = Callable[[int, Tensor], None]


class Run(ABC):
    """One forward of a model under a tape."""

    outputs: Any
    kept: list[tuple[Tensor, ...]]
    #: For each tap, a mark of its first kept input, which is equal where that is the same tensor.
    sources: list[Any]
    #: Whether columns are better pulled back one after the other than together.
    serial: bool = False

    @abstractmethod
    def pull(self, cotangents: Any, receive: Receiver, *, last: bool) -> None:
        """Pull back `cotangents`, like the outputs with a leading axis K, to every tap.

        `last` promises that nothing will be pulled back after this, so that memory can be freed.
        """

    @abstractmethod
    def zero_cotangent(self, index: int) -> Tensor:
        """Return a cotangent of zero for a tap, [1, *output], without memory."""

    @abstractmethod
    def output_bytes(self, index: int) -> int:
        """Return the size of the output of a tap, and so of its cotangent."""


def start(model: Any, params: Any, buffers: Any, inputs: Any, plan: Plan, *, plain: bool) -> Run:
    """Run the model under a tape, in the engine that fits the place.

    Args:
        model: The function `(params, buffers, inputs) -> outputs`.
        params: Its parameters.
        buffers: What else it reads.
        inputs: Inputs of B examples.
        plan: What to tap.
        plain: The pull-back will be batched, so fused attention must be rewritten.

    Returns:
        The run, with outputs and pull-back.
    """
    batch = size_of(inputs)
    if needs_composition(params, buffers, inputs):
        return FunctionalRun(model, params, buffers, inputs, plan, batch, plain=True)
    if transformed():
        return FunctionalRun(model, params, buffers, inputs, plan, batch, plain=plain)
    return EagerRun(model, params, buffers, inputs, plan, batch)


def needs_composition(*values: Any) -> bool:
    """Return True where the result must itself be differentiable or batched."""
    if in_functorch():
        return True
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, Tensor) and t.requires_grad for v in values for t in trees.leaves(v))


def size_of(inputs: Any) -> int:
    """Return B, the size of the leading axis of the first tensor among the inputs."""
    return next(t.shape[0] for t in trees.leaves(inputs) if isinstance(t, Tensor))


class FunctionalRun(Run):
    """Zeros are added to the tapped outputs; the pull-back is the vjp with respect to them."""

    def __init__(
        self,
        model: Any,
        params: Any,
        buffers: Any,
        inputs: Any,
        plan: Plan,
        batch: int,
        *,
        plain: bool,
    ) -> None:
        """Learn the outputs' shapes, then run the forward once."""
        like: list[Tensor] = []

        def note(index: int, tap: Tap, out: Tensor) -> Tensor:
            out = spread(out, tap, batch)
            like.append(out)
            return out

        # only shapes come out of this pass; compiled, it is dead code
        leaves = trees.leaves(params)
        with torch.no_grad(), Tape(plan, leaves, batch, note, plain=plain):
            model(params, buffers, inputs)
        self._bytes = [t.numel() * t.element_size() for t in like]
        zeros = [torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape) for t in like]
        self._zeros = zeros

        def forward(eps: list[Tensor]) -> tuple[Any, list[tuple[Tensor, ...]]]:
            def add(index: int, tap: Tap, out: Tensor) -> Tensor:
                out = spread(out, tap, batch)
                assert out.shape == eps[index].shape, "a tap must not broadcast"
                return out + eps[index]

            tape = Tape(plan, leaves, batch, add, plain=plain)
            with tape:
                outputs = model(params, buffers, inputs)
            tape.finish(plan)
            self.sources = tape.sources
            return outputs, tape.kept

        if not zeros:
            self.outputs, self.kept = forward(zeros)
            self._vjp: Callable[[Any], Any] | None = None
            return
        found: Any = torch.func.vjp(forward, zeros, has_aux=True)
        self.outputs, self._vjp, self.kept = found

    def zero_cotangent(self, index: int) -> Tensor:
        """Return a cotangent of zero."""
        return self._zeros[index].unsqueeze(0)

    def output_bytes(self, index: int) -> int:
        """Return the size of the output of a tap."""
        return self._bytes[index]

    def pull(self, cotangents: Any, receive: Receiver, *, last: bool) -> None:
        """Pull back through the vjp, batched over the columns."""
        if self._vjp is None:
            return
        leaves, structure = trees.flatten(cotangents)
        if leaves[0].shape[0] == 1:
            (found,) = self._vjp(trees.unflatten(structure, [c[0] for c in leaves]))
            found = [g.unsqueeze(0) for g in found]
        else:
            (found,) = torch.func.vmap(self._vjp)(cotangents)
        for index, g in enumerate(found):
            receive(index, g)


class _Mailbox:
    """Where the hooks of a graph deliver, while somebody is waiting."""

    def __init__(self) -> None:
        self._receive: Receiver | None = None
        self._seen: set[int] = set()

    def deliver(self, index: int, g: Tensor) -> None:
        """Hand a cotangent to whoever is waiting."""
        if self._receive is not None:
            self._seen.add(index)
            self._receive(index, g.unsqueeze(0))

    @contextmanager
    def opened(self, receive: Receiver) -> Iterator[set[int]]:
        """Deliver to `receive` within the context; give the set of taps that have delivered."""
        self._receive, self._seen = receive, set()
        try:
            yield self._seen
        finally:
            self._receive = None


class _Root(torch.autograd.Function):
    """Makes an output part of a graph, without a copy, where nothing before it is.

    Differentiation stops at the edge of its output, so that its own backward never runs.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, seed: Tensor) -> Tensor:
        """Return `out` itself; `seed` is what requires a gradient."""
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Nobody differentiates past a root."""
        raise AssertionError("the backward of a capture went past its roots")


class EagerRun(Run):
    """Cotangents are read from autograd's graph as the backward passes the taps."""

    def __init__(
        self, model: Any, params: Any, buffers: Any, inputs: Any, plan: Plan, batch: int
    ) -> None:
        """Run the forward once, remembering the edge of every tapped output."""
        self._edges: list[Any] = []
        self._roots: list[GradientEdge] = []
        self._shapes: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        # hooks belong to the graph, and so must not lead back to whoever holds the graph: such a
        # cycle passes through C++, where the garbage collector cannot see it
        mailbox = self._mailbox = _Mailbox()
        # the backward of a convolution has no batching rule: torch loops over the columns and
        # copies all that it finds, for every layer of the model
        self.serial = any("convolution" in tap.rule for tap in plan.taps)
        seed = torch.empty(0, requires_grad=True)

        def tap(index: int, tap: Tap, out: Tensor) -> Tensor:
            out = spread(out, tap, batch)
            self._shapes.append((out.shape, out.dtype, out.device))
            if not torch.is_grad_enabled():
                # no_grad in the model: a constant to autograd, so its cotangent is zero
                self._edges.append(None)
                return out
            root = not out.requires_grad
            if root:
                # a view is of something that must stay as it is, such as a parameter
                out = _Root.apply(out.clone() if out._is_view() else out, seed)
            # the edge stays right when the output is written to later
            edge = get_gradient_edge(out)
            if root:
                self._roots.append(edge)
            self._edges.append(edge)
            out.register_hook(lambda g: mailbox.deliver(index, g))
            return out

        params, buffers, inputs = (_detached(v) for v in (params, buffers, inputs))
        tape = Tape(plan, trees.leaves(params), batch, tap, plain=False)
        with torch.enable_grad(), tape:
            outputs = model(params, buffers, inputs)
        tape.finish(plan)
        self._live = outputs
        self.outputs = _detached(outputs)
        self.kept = [tuple(t.detach() for t in group) for group in tape.kept]
        self.sources = tape.sources

    def zero_cotangent(self, index: int) -> Tensor:
        """Return a cotangent of zero."""
        shape, dtype, device = self._shapes[index]
        return torch.zeros((), dtype=dtype, device=device).expand(1, *shape)

    def output_bytes(self, index: int) -> int:
        """Return the size of the output of a tap."""
        shape, dtype, _ = self._shapes[index]
        return shape.numel() * dtype.itemsize

    def pull(self, cotangents: Any, receive: Receiver, *, last: bool) -> None:
        """Run the backward, batched over the columns where every operation has a batching rule."""
        pairs = [
            (out, c)
            for out, c in zip(trees.leaves(self._live), trees.leaves(cotangents), strict=True)
            if out.requires_grad
        ]
        if not pairs:
            self._missing(receive, set(), trees.leaves(cotangents)[0].shape[0])
            return
        outputs, many = [out for out, _ in pairs], [c for _, c in pairs]
        columns = many[0].shape[0]
        if columns > 1:
            found = self._batched(outputs, many)
            if found is not None:
                arrived = {i for i, g in enumerate(found) if g is not None}
                self._missing(receive, arrived, columns)
                for index in range(len(found)):
                    g, found[index] = found[index], None
                    if g is not None:
                        receive(index, g)
                return
        arriving: list[list[Tensor]] = [[] for _ in self._shapes]

        def collect(index: int, g: Tensor) -> None:
            arriving[index].append(g)

        deliver = receive if columns == 1 else collect
        for k in range(columns):
            keep = not last or k < columns - 1
            with self._mailbox.opened(deliver) as seen:
                self._backward(outputs, [c[k] for c in many], keep)
            self._missing(deliver, seen, 1)
        for index, parts in enumerate(arriving):  # all columns of a tap belong together
            if parts:
                receive(index, torch.cat(parts))
                parts.clear()

    def _backward(self, outputs: list[Tensor], cotangents: list[Tensor], keep: bool) -> None:
        try:
            if self._roots:
                torch.autograd.grad(
                    outputs, self._roots, cotangents, retain_graph=keep, allow_unused=True
                )
        except RuntimeError as error:
            refuse_checkpointing(error)
            raise

    def _batched(
        self, outputs: list[Tensor], cotangents: list[Tensor]
    ) -> list[Tensor | None] | None:
        """Return the cotangents `[K, *output]` of all taps, or None if batching is impossible."""
        with warnings.catch_warnings():
            # an operation without a batching rule warns and falls back to a slow loop
            warnings.simplefilter("error")
            try:
                found = torch.autograd.grad(
                    outputs,
                    [edge for edge in self._edges if edge is not None],
                    cotangents,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
            except (RuntimeError, UserWarning):
                return None
        rest = iter(found)
        return [None if edge is None else next(rest) for edge in self._edges]

    def _missing(self, receive: Receiver, arrived: set[int], columns: int) -> None:
        """Deliver zeros for taps that the outputs do not depend on."""
        for index, (shape, dtype, device) in enumerate(self._shapes):
            if index not in arrived:
                receive(index, torch.zeros((), dtype=dtype, device=device).expand(columns, *shape))


def refuse_checkpointing(error: RuntimeError) -> None:
    """Raise a clear error if the cause is activation checkpointing; return otherwise."""
    text = f"{type(error).__name__} {error}".lower()
    if "checkpoint" in text or "saved tensor hooks" in text:
        raise UnsupportedError(
            "capture: expected a model without activation checkpointing, got one whose layers run "
            "again in the backward pass. Switch it off (gradient_checkpointing_disable() on "
            "Hugging Face models); chunk_size= bounds the memory instead."
        ) from error


def _detached(tree: Any) -> Any:
    leaves, structure = trees.flatten(tree)
    free = [t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in leaves]
    return trees.unflatten(structure, free)
