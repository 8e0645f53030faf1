"""One forward with taps, one backward, and the cotangent at every tap.

Two engines do the same thing. The functional one adds a zero to the output of every tapped call and
takes `torch.func.vjp` with respect to the zeros: it composes with every transformation and with
`torch.compile`. The eager one reads the same cotangents from autograd's own graph, without the
additions and without the wrappers of `torch.func`; it may not be used under a transformation or
where the result must be differentiable itself.

Every run is compared with its plan, use by use: which parameter, through which view, in which call,
with the examples along which axis. A model that behaves otherwise than when it was planned is
noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherfn.capture.calls import is_attention, refuse_noise, rewritten
from fisherfn.capture.plan import Axis, Plan, Tap
from fisherfn.capture.sites import Tracker
from fisherfn.core.errors import UnsupportedError
from fisherfn.core.modes import version
from fisherfn.layers import attention
from fisherfn.layers.composing import composable
from fisherfn.layers.form import Form
from fisherfn.layers.registry import bind, rule_for
from fisherfn.layers.views import View


class PlanMismatchError(UnsupportedError):
    """A run of the model made other calls than its plan says."""


def _mismatch(what: str) -> PlanMismatchError:
    return PlanMismatchError(
        f"capture: expected the calls of the plan, but {what}. The model's layers depend on the "
        "data; call the estimator once outside of the transformation with such data."
    )


class Tape(TorchFunctionMode):
    """Replays a plan: taps the outputs of planned calls and keeps what rules need."""

    def __init__(
        self,
        plan: Plan,
        leaves: Sequence[Tensor],
        batch: int,
        tap: Callable[[int, Tap, Tensor], Tensor],
        *,
        plain: bool,
    ) -> None:
        """Call `tap(index, tap, output)` at each tapped call; `plain` rewrites what is fused."""
        super().__init__()
        self.tracker = Tracker(leaves)
        self.taps = {t.number: (i, t) for i, t in enumerate(plan.taps)}
        self.general = plan.general
        self.batch = batch
        self.tap = tap
        self.plain = plain
        self.number = 0
        self.kept: list[tuple[Tensor, ...]] = []
        #: For each tap, a mark of its first kept input: equal for one object, while all are kept.
        self.sources: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one call, tapped if the plan says so."""
        if self.tracker.indifferent(func, args, kwargs):
            return func(*args)
        return self.call(func, *args, **(kwargs or {}))

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a torch function, tapped if the plan says so."""
        arguments = rewritten(function, args, kwargs)
        if arguments is not None:
            return attention.multi_head_attention(self.call, arguments)
        if self.plain and is_attention(function):
            return attention.plain_attention(*args, **kwargs)
        refuse_noise(function, args, kwargs)
        touched = self.tracker.touched(args, kwargs)
        run = composable(function, args, kwargs) if self.plain else function
        out = run(*args, **kwargs)
        if not touched or self.tracker.follow(function, touched, args, kwargs, out) != "use":
            return out
        rule = rule_for(function)
        planned = None
        if rule is not None:
            planned = self.taps.get(self.number)
            self.number += 1
        captured = [leaf for _, leaf, _ in touched if leaf not in self.general]
        if planned is None or rule is None:
            if captured:
                raise _mismatch(f"a parameter is used in {getattr(function, '__name__', function)}")
            return out
        index, tap = planned
        arguments = bind(rule, args, kwargs)
        kept = tuple(t for n in tap.kept if isinstance(t := arguments.get(n), Tensor))
        self._compare(tap, function, arguments, captured, out)
        if index != len(self.kept) or len(kept) != len(tap.kept):
            raise _mismatch(f"{tap.rule} comes in another order or with other arguments")
        self.kept.append(kept)
        self.sources.append((id(kept[0]), version(kept[0])) if kept else None)
        return self.tap(index, tap, out)

    def _compare(
        self, tap: Tap, function: Any, arguments: dict[str, Any], captured: list[int], out: Any
    ) -> None:
        """Raise unless a call is the one that was planned."""
        if tap.function is not function or not isinstance(out, Tensor) or out.dim() != tap.rank:
            raise _mismatch(f"{tap.rule} was planned, {getattr(function, '__name__', '?')} came")
        for use in tap.uses:
            seen = self.tracker.known.get(id(arguments.get(use.argument)))
            if seen != (use.leaf, use.view):
                raise _mismatch(f"{tap.rule} uses another parameter, or another part of it")
        if not set(captured) <= {use.leaf for use in tap.uses}:
            raise _mismatch(f"{tap.rule} uses one more parameter")
        if tap.axis is None:
            if tap.leading and out.shape[0] != 1:
                raise _mismatch(f"{tap.rule} has another leading axis")
        elif tap.axis.flat:
            if out.shape[tap.axis.index] % self.batch:
                raise _mismatch(f"{tap.rule} has no whole number of rows an example")
        elif out.shape[tap.axis.index] != self.batch:
            raise _mismatch(f"{tap.rule} has the examples along another axis")

    def finish(self, plan: Plan) -> None:
        """Check that every planned call happened."""
        if len(self.kept) != len(plan.taps):
            raise _mismatch(f"{len(plan.taps)} uses were planned, {len(self.kept)} came")


def canonical(t: Tensor, axis: Axis | None, batch: int, lead: int = 0) -> Tensor:
    """Bring the examples to the front: `[*lead, B, M, *rest]`; `[1, 1, *t]` without any."""
    if axis is None:
        return t.reshape(*t.shape[:lead], 1, 1, *t.shape[lead:])
    place = lead + axis.index
    if not axis.flat:
        return (t if place == lead else t.movedim(place, lead)).unsqueeze(lead + 1)
    t = t if place == lead else t.movedim(place, lead)
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
    if tap.leading:
        return out.expand(batch, *out.shape[1:])
    return out.expand(batch, *out.shape)
