"""One forward with taps, one backward, and the cotangent at every tap.

Two engines do the same thing. The functional one adds a zero to the output of every tapped call and
takes `torch.func.vjp` with respect to the zeros: it composes with every transformation and with
`torch.compile`. The eager one reads the same cotangents from autograd's own graph, without the
additions
and without the wrappers of `torch.func`; it may not be used under a transformation or where the
result
must be differentiable itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherfn.capture.plan import Axis, Plan, Tap
from fisherfn.capture.sites import Tracker, is_attention, rewritten
from fisherfn.core.errors import UnsupportedError
from fisherfn.layers import attention
from fisherfn.layers.form import Form
from fisherfn.layers.registry import bind, rule_for
from fisherfn.layers.views import View


class PlanMismatchError(UnsupportedError):
    """A run of the model made other calls than its plan says."""


class Tape(TorchFunctionMode):
    """Replays a plan: taps the outputs of planned calls and keeps what rules need."""

    def __init__(
        self,
        plan: Plan,
        leaves: Sequence[Tensor],
        tap: Callable[[int, Tap, Tensor], Tensor],
        *,
        plain: bool,
    ) -> None:
        """Call `tap(index, tap, output)` at each tapped call; `plain` rewrites fused attention."""
        super().__init__()
        self.tracker = Tracker(leaves)
        self.taps = {t.number: (i, t) for i, t in enumerate(plan.taps)}
        self.tap = tap
        self.plain = plain
        self.number = 0
        self.kept: list[tuple[Tensor, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one call, tapped if the plan says so."""
        return self.call(func, *args, **(kwargs or {}))

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a torch function, tapped if the plan says so."""
        arguments = rewritten(function, args, kwargs)
        if arguments is not None:
            return attention.multi_head_attention(self.call, arguments)
        if self.plain and is_attention(function):
            return attention.plain_attention(*args, **kwargs)
        touched = self.tracker.touched(args, kwargs)
        out = function(*args, **kwargs)
        if not touched or self.tracker.follow(function, touched, args, kwargs, out) != "use":
            return out
        rule = rule_for(function)
        if rule is None:
            return out
        planned = self.taps.get(self.number)
        self.number += 1
        if planned is None:
            return out
        index, tap = planned
        if tap.function is not function or out.dim() != tap.rank or index != len(self.kept):
            raise PlanMismatchError(
                f"capture: expected use {tap.number} to be {tap.rule} with {tap.rank} axes, got "
                f"{getattr(function, '__name__', function)} with {out.dim()}. The model's layers "
                "depend on the data."
            )
        arguments = bind(rule, args, kwargs)
        self.kept.append(tuple(arguments[n] for n in tap.kept))
        return self.tap(index, tap, out)

    def finish(self, plan: Plan) -> None:
        """Check that every planned call happened."""
        if len(self.kept) != len(plan.taps):
            raise PlanMismatchError(
                f"capture: expected {len(plan.taps)} tapped calls, got {len(self.kept)}. The "
                "model's "
                "layers depend on the data."
            )


def canonical(t: Tensor, axis: Axis | None, batch: int, lead: int = 0) -> Tensor:
    """Bring the examples to the front: `[*lead, B, M, *rest]`; `[1, 1, *t]` without any."""
    if axis is None:
        return t.reshape(*t.shape[:lead], 1, 1, *t.shape[lead:])
    place = lead + axis.index
    if not axis.flat:
        return t.movedim(place, lead).unsqueeze(lead + 1)
    t = t.movedim(place, lead)
    many = t.shape[lead] // batch
    shape = (many, batch) if axis.inner else (batch, many)
    t = t.reshape(*t.shape[:lead], *shape, *t.shape[lead + 1 :])
    return t.transpose(lead, lead + 1) if axis.inner else t


def kept_canonical(t: Tensor, axis: Axis | None, tap: Tap, batch: int) -> Tensor:
    """Bring a kept tensor to `[B or 1, M, *rest]` such that it broadcasts with the cotangent."""
    missing = tap.rank - t.dim()
    if axis is not None:
        if missing > 0:
            t = t.reshape(*[1] * missing, *t.shape)
            axis = Axis(axis.index + missing, axis.flat, axis.inner)
        return canonical(t, axis, batch)
    if tap.axis is not None and not missing and t.shape[tap.axis.index] == 1:
        return canonical(t, Axis(tap.axis.index), batch)
    return canonical(t, None, batch)


def forms_of(
    tap: Tap, kept: Sequence[Tensor], g: Tensor, batch: int
) -> list[tuple[int, Form, View]]:
    """Return the forms of the parameters used at a tap, from the cotangent `[K, *output]`."""
    if tap.axis is None:
        g = g.unsqueeze(2)
        index = 0
    else:
        g = canonical(g, tap.axis, batch, lead=1)
        index = tap.axis.index
    found = []
    axes = tap.kept_axes
    ready = [kept_canonical(t, x, tap, batch) for t, x in zip(kept, axes, strict=True)]
    for use in tap.uses:
        form, view = use.builder(ready, g, index)
        found.append((use.leaf, form, (*use.view, *view)))
    return found


def spread(out: Tensor, tap: Tap, batch: int) -> Tensor:
    """Give an output without examples an axis of them, in front."""
    if tap.axis is not None:
        return out
    if out.dim() and out.shape[0] == 1:
        return out.expand(batch, *out.shape[1:])
    return out.expand(batch, *out.shape)
