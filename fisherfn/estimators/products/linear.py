"""The derivative of a function at a point, as a linear map and its transpose.

    push(t) = J t        forward mode        pull(c) = Jᵀ c        reverse mode

In eager mode one run of the function serves both: it runs on dual numbers whose primal values
autograd records. Where results have to compose (`torch.compile`, `torch.vmap`, `torch.func.grad`)
it is `torch.func.jvp` and `torch.func.vjp`. A function without forward-mode derivative is pushed
through by reverse mode twice: u ↦ Jᵀu is linear, and its own transpose is J.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fisherfn.capture.engines import needs_composition, refuse_checkpointing
from fisherfn.core.modes import transformed
from fisherfn.estimators.products.fallback import (
    DOUBLE,
    FORWARD,
    check_twice,
    no_derivative,
    no_forward_mode,
)
from fisherfn.estimators.products.plain import Function
from fisherfn.estimators.products.tape import Recorder, Tape, UnrecordableError

_LOG = logging.getLogger(__name__)

# Where one tangent is larger than what a core keeps close, vectors side by side on a CPU only add
# copies: torch's batching rules lay them out anew for every product.
_CACHE = 2**20

Map: TypeAlias = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Linear:
    """A function's outputs at a point, its derivative there, and the transpose.

    Attributes:
        outputs: What the function returned.
        push: t ↦ J t.
        pull: c ↦ Jᵀ c.
        push_many: The same for a leading axis of vectors.
        pull_many: The same for a leading axis of cotangents.
        engine: How `push` works, `FORWARD` or `DOUBLE`.
        reason: Why it is not the forward mode, or "".
    """

    outputs: list[Tensor]
    push: Map
    pull: Map
    push_many: Map
    pull_many: Map
    engine: str = FORWARD
    reason: str = ""


@dataclass(frozen=True)
class Ready:
    """A matrix that is ready for many vectors: how to multiply one, and how a stack of them.

    Attributes:
        multiply: v ↦ F v.
        multiply_many: The same for a leading axis of vectors.
        engine: How derivatives are pushed forward.
        reason: Why it is not the forward mode, or "".
    """

    multiply: Map
    multiply_many: Map
    engine: str = FORWARD
    reason: str = ""


@functools.cache
def load_forward_mode() -> None:
    """Let torch load its rules of forward mode, which it writes in TorchScript, deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad._maybe_load_decompositions()


def composing(*values: Any) -> bool:
    """Return True where a product has to compose with other transformations."""
    return transformed() or needs_composition(*values)


def at(function: Function, leaves: list[Tensor], *, compose: bool, reuse: bool) -> Linear:
    """Return the derivative of a function at a point.

    Args:
        function: Tensors to tensors.
        leaves: The point.
        compose: Use `torch.func` only, so that results compose.
        reuse: Many vectors will be pushed; pay now to make each of them cheaper.

    Raises:
        UnsupportedError: the function has no derivative that could be used.
    """
    if compose:
        return _functional(function, leaves)
    return _recorded(function, leaves) if reuse else graph(function, leaves)


def once(
    function: Function, leaves: list[Tensor], tangents: list[Tensor], *, compose: bool
) -> tuple[Linear, list[Tensor]]:
    """Return the derivative at a point and its product with one vector, from a single run."""
    if compose:
        linear = _functional(function, leaves)
        return linear, linear.push(tangents)
    try:
        outputs, pushed, pull = dual(function, leaves, tangents)
    except Exception as error:
        reason = no_forward_mode(error)
        linear = graph(function, leaves, reason)
        return linear, linear.push(tangents)

    def push(t: list[Tensor]) -> list[Tensor]:
        return dual(function, leaves, t)[1]

    return Linear(outputs, push, pull, loop(push), loop(pull)), pushed


def backward(
    function: Function, leaves: list[Tensor], *, compose: bool
) -> tuple[list[Tensor], Map]:
    """Return the outputs and the pull-back alone."""
    if compose:
        found: Any = torch.func.vjp(function, leaves)
        outputs, vjp = found
        return outputs, lambda cotangents: vjp(cotangents)[0]
    live = roots(leaves)
    with torch.enable_grad():
        outputs = function(live)
    return [z.detach() for z in outputs], puller(outputs, live)


# ---- eager ---------------------------------------------------------------------------------------


def roots(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the same tensors as leaves of a graph of their own."""
    return [t.detach().requires_grad_() for t in leaves]


def dual(
    function: Function, leaves: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], Map]:
    """Run once on dual numbers that autograd records; return outputs, J t and the pull-back."""
    load_forward_mode()
    live = roots(leaves)
    with torch.enable_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(live, tangents, strict=True)]
        pairs = [forward_ad.unpack_dual(out) for out in function(duals)]
    outputs = [pair.primal for pair in pairs]
    pushed = [
        torch.zeros_like(z) if d is None else d.detach()
        for z, d in zip(outputs, (pair.tangent for pair in pairs), strict=True)
    ]
    return [z.detach() for z in outputs], pushed, puller(outputs, live)


def puller(outputs: Sequence[Tensor], live: Sequence[Tensor], reason: str | None = None) -> Map:
    """Return c ↦ Jᵀ c from the graph of the outputs.

    Where the outputs are derivatives themselves, `reason` says why they are differentiated again.
    """
    differentiable = [i for i, z in enumerate(outputs) if z.requires_grad]

    def pull(cotangents: list[Tensor], batched: bool = False) -> list[Tensor]:
        lead = (len(cotangents[0]),) if batched else ()
        if not differentiable:
            return [p.new_zeros((*lead, *p.shape)) for p in live]
        try:
            found = torch.autograd.grad(
                [outputs[i] for i in differentiable],
                list(live),
                [cotangents[i] for i in differentiable],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        except RuntimeError as error:
            if reason is not None:
                raise no_derivative(error, reason) from error
            refuse_checkpointing(error)
            raise
        return [
            p.new_zeros((*lead, *p.shape)) if g is None else g.detach()
            for p, g in zip(live, found, strict=True)
        ]

    return pull


def graph(function: Function, leaves: list[Tensor], reason: str = "") -> Linear:
    """Return push and pull from one graph, differentiated twice."""
    live = roots(leaves)
    with torch.enable_grad():
        outputs = function(live)
        differentiable = [z for z in outputs if z.requires_grad]
        dummies = [torch.zeros_like(z, requires_grad=True) for z in differentiable]
        try:
            pulled = torch.autograd.grad(
                differentiable, live, dummies, create_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            refuse_checkpointing(error)
            raise no_derivative(error, reason) from error
    check_twice(pulled, reason)
    used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]

    def push(tangents: list[Tensor], batched: bool = False) -> list[Tensor]:
        lead = (len(tangents[0]),) if batched else ()
        try:
            found = torch.autograd.grad(
                [pulled[i] for i in used],
                dummies,
                [tangents[i] for i in used],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        except RuntimeError as error:
            raise no_derivative(error, reason) from error
        rest = iter(found)
        return [
            z.new_zeros((*lead, *z.shape))
            if not z.requires_grad or (d := next(rest)) is None
            else d.detach()
            for z in outputs
        ]

    pull = puller(outputs, live)
    detached = [z.detach() for z in outputs]
    return Linear(detached, push, pull, batched(push), batched(pull), DOUBLE, reason)


def _recorded(function: Function, leaves: list[Tensor]) -> Linear:
    """Return push from a tape of the operations on tangents, and pull from the same run's graph."""
    live = roots(leaves)
    zeros = [torch.zeros_like(p) for p in live]
    try:
        outputs, tape = record(function, live, zeros)
    except UnrecordableError as error:
        _LOG.info("the forward-mode derivative cannot be recorded: %s; using %s", error, DOUBLE)
        return graph(function, leaves, str(error))
    except Exception as error:
        return graph(function, leaves, no_forward_mode(error))
    detached = [z.detach() for z in outputs]
    push = player(tape, detached)
    pull = puller(outputs, live)
    if one_by_one(tape, leaves):
        return Linear(detached, push, pull, loop(push), loop(pull))
    return Linear(detached, push, pull, mapped(push), batched(pull))


def one_by_one(tape: Tape, leaves: Sequence[Tensor]) -> bool:
    """Return whether vectors are multiplied faster alone, up to twice, than side by side."""
    return tape.convolves or (leaves[0].device.type == "cpu" and tape.largest > _CACHE)


def record(
    function: Function, live: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[list[Tensor], Tape]:
    """Run once on dual numbers; return the outputs, with graph, and the tape of the tangents."""
    load_forward_mode()
    with torch.enable_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(live, tangents, strict=True)]
        # as autograd holds them: it may have copied a tangent whose strides differ
        held = [forward_ad.unpack_dual(d).tangent for d in duals]
        seeds = [t if h is None else h for t, h in zip(tangents, held, strict=True)]
        recorder = Recorder(seeds)
        with recorder:
            found = function(duals)
        pairs = [forward_ad.unpack_dual(out) for out in found]
        return [p.primal for p in pairs], recorder.tape([p.tangent for p in pairs])


def player(tape: Tape, outputs: Sequence[Tensor]) -> Map:
    """Return the map that a tape has recorded; zeros are like the outputs."""

    def push(tangents: list[Tensor]) -> list[Tensor]:
        found = tape.play(tangents)
        return [
            torch.zeros_like(z) if d is None else d for z, d in zip(outputs, found, strict=True)
        ]

    return push


# ---- many vectors --------------------------------------------------------------------------------


def loop(one: Map) -> Map:
    """Return the map of a stack of vectors, one after the other."""

    def many(stacked: list[Tensor]) -> list[Tensor]:
        rows = [one([t[k] for t in stacked]) for k in range(len(stacked[0]))]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    return many


def mapped(one: Map) -> Map:
    """Return the map of a stack of vectors by `vmap`, or a loop where it cannot go."""
    return _try_first(torch.func.vmap(one), loop(one))


def batched(one: Callable[..., list[Tensor]]) -> Map:
    """Return a batched pull-back, or a loop where an operation has no batching rule."""
    return _try_first(lambda stacked: one(stacked, batched=True), loop(one))


def _try_first(fast: Map, slow: Map) -> Map:
    def many(stacked: list[Tensor]) -> list[Tensor]:
        with warnings.catch_warnings():
            # an operation without a batching rule warns and falls back to a slow loop
            warnings.simplefilter("error")
            try:
                return fast(stacked)
            except (RuntimeError, UserWarning) as error:
                _LOG.debug("a block of vectors goes one by one: %s", error)
        return slow(stacked)

    return many


# ---- torch.func ----------------------------------------------------------------------------------


def _functional(function: Function, leaves: list[Tensor]) -> Linear:
    load_forward_mode()
    try:
        found: Any = torch.func.vjp(function, leaves)
    except RuntimeError as error:
        refuse_checkpointing(error)
        raise
    outputs, vjp = found

    def pull(cotangents: list[Tensor]) -> list[Tensor]:
        return vjp(cotangents)[0]

    def forward(tangents: list[Tensor]) -> list[Tensor]:
        return torch.func.jvp(function, (leaves,), (tangents,))[1]

    def twice(tangents: list[Tensor]) -> list[Tensor]:
        def transpose(cotangents: list[Tensor]) -> list[Tensor]:
            return torch.func.vjp(function, leaves)[1](cotangents)[0]

        zeros = [torch.zeros_like(z) for z in outputs]
        return torch.func.vjp(transpose, zeros)[1](tangents)[0]

    def push(tangents: list[Tensor]) -> list[Tensor]:
        try:
            return forward(tangents)
        except Exception as error:
            no_forward_mode(error, compose=True)
        return twice(tangents)

    return Linear(outputs, push, pull, torch.func.vmap(push), torch.func.vmap(pull))
