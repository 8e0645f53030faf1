"""The plan of a model: what to tap, where the examples lie, what needs the general path.

Two passes over the model, with two different numbers of examples, show which axis of each site is
the batch axis: the one whose size changes. A plan holds no tensors and knows no sizes that depend
on the batch; it serves every batch of the same structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.capture.sites import Recording, SiteCall, record
from fisherfn.core import trees
from fisherfn.core.errors import UnsupportedError
from fisherfn.core.modes import version
from fisherfn.layers.registry import Builder
from fisherfn.layers.views import View

#: Why a parameter that no watched call has touched takes the general path.
INVISIBLE = "no visible use"


@dataclass(frozen=True)
class Axis:
    """Where the examples lie in a tensor; `flat` if other axes are folded into that axis.

    In a folded axis the examples are outermost (`[B, T]` flattened), or innermost if `inner`.
    """

    index: int
    flat: bool = False
    inner: bool = False


@dataclass(frozen=True)
class Use:
    """One use of a parameter at a tap."""

    leaf: int
    argument: str
    view: View
    builder: Builder


@dataclass(frozen=True)
class Tap:
    """One call whose output receives a zero and whose inputs are kept."""

    number: int
    function: Any
    rule: str
    kept: tuple[str, ...]
    kept_axes: tuple[Axis | None, ...]
    rank: int
    axis: Axis | None
    leading: bool
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Plan:
    """What to do with each parameter of a model.

    Attributes:
        taps: The tapped calls, in the order in which they happen.
        general: For each leaf that takes the general path, why.
        unused: Leaves that the outputs do not depend on.
        attention: The model calls fused attention.
        looped: The general path goes example by example, since `vmap` cannot.
        checked: The plan's scores were compared with autograd's, and those were finite.
    """

    taps: tuple[Tap, ...]
    general: dict[int, str]
    unused: frozenset[int]
    attention: bool
    looped: bool = False
    checked: bool = False

    def without(self, reasons: dict[int, str]) -> Plan:
        """Return the plan with more leaves on the general path."""
        general = {**self.general, **{k: v for k, v in reasons.items() if k not in self.general}}
        taps = []
        for tap in self.taps:
            uses = tuple(u for u in tap.uses if u.leaf not in general)
            if uses:
                taps.append(replace(tap, uses=uses))
        return replace(self, taps=tuple(taps), general=general)


def examples(inputs: Any, count: int) -> Any:
    """Return `count` examples of `inputs`: the first, the second, the first again.

    No sorting by data leaves such a sequence as it is, unless the two are equal.
    """
    leaves, structure = trees.flatten(inputs)
    taken = []
    for t in leaves:
        if isinstance(t, Tensor):
            index = torch.arange(count, device=t.device) % min(2, t.shape[0])
            t = t.index_select(0, index)
        taken.append(t)
    return trees.unflatten(structure, taken)


def build(
    model: Any, params: Any, buffers: Any, inputs: Any, counts: tuple[int, int]
) -> tuple[Plan, tuple[Any, Any]]:
    """Learn a plan from two passes with `counts` examples; return it and both outputs."""
    recordings: list[Recording] = []
    outputs: list[Any] = []
    leaves = trees.leaves(params)
    before = [_writes(t) for t in leaves]
    for count in counts:
        copies = trees.map(lambda t: t.clone() if isinstance(t, Tensor) else t, buffers)
        few = examples(inputs, count)
        out, recording = record(lambda c=copies, f=few: model(params, c, f), leaves)
        _check_unwritten("buffers", copies)
        _check_unwritten("inputs", few)
        _check_unwritten("params", params, before)
        recordings.append(recording)
        outputs.append(out)
    return _combine(recordings, counts, leaves), (outputs[0], outputs[1])


def _writes(t: Any) -> int:
    """Return how often a tensor was written to, as far as torch counts."""
    return version(t) if isinstance(t, Tensor) and not t.is_inference() else 0


def _check_unwritten(what: str, tree: Any, before: Sequence[int] | None = None) -> None:
    found = trees.leaves(tree)
    # a copy starts at version 0
    for path, t, n in zip(trees.paths(tree), found, before or [0] * len(found), strict=True):
        if _writes(t) > n:
            where = f"{what}['{path}']" if path else what
            raise UnsupportedError(
                f"capture: expected a model that only reads its {what}, got one that writes to "
                f"{where}. Call module.eval(), or let the function work on a copy."
            )


def _combine(
    recordings: Sequence[Recording], counts: tuple[int, int], leaves: Sequence[Tensor]
) -> Plan:
    first, second = recordings
    reasons: dict[int, str] = {**second.reasons, **first.reasons}
    pairs = list(zip(first.calls, second.calls, strict=False))
    aligned = len(first.calls) == len(second.calls) and all(
        a.function is b.function and a.number == b.number for a, b in pairs
    )
    if not aligned:
        for i in range(len(leaves)):
            reasons.setdefault(i, "its layers depend on the data or on the batch size")
        pairs = []
    taps = []
    for a, b in pairs:
        tap = _tap(a, b, counts, reasons)
        if tap is not None:
            taps.append(tap)
    plan = Plan(tuple(taps), {}, frozenset(), first.attention or second.attention)
    plan = plan.without(reasons)
    captured = {use.leaf for tap in plan.taps for use in tap.uses}
    seen = first.seen | second.seen
    missing = {
        i: "used in a way that gives no output" if i in seen else INVISIBLE
        for i in range(len(leaves))
        if i not in captured
    }
    return plan.without(missing)


def _tap(a: SiteCall, b: SiteCall, counts: tuple[int, int], reasons: dict[int, str]) -> Tap | None:
    rank = len(a.output_shape)
    axis = find_axis(a.output_shape, b.output_shape, counts)
    if axis == "none" and a.batchless:
        where: Axis | None = None
    elif isinstance(axis, Axis):
        where = axis
    else:
        for role in a.roles:
            reasons.setdefault(role.leaf, f"{a.rule} whose output has no clear axis of examples")
        return None
    kept_axes = []
    for x, y in zip(a.kept_shapes, b.kept_shapes, strict=True):
        found = find_axis(x, y, counts)
        if found == "unclear":
            for role in a.roles:
                reasons.setdefault(role.leaf, f"{a.rule} whose input has no clear axis of examples")
            return None
        kept_axes.append(found if isinstance(found, Axis) else None)
    uses = []
    for role in a.roles:
        index = 0 if where is None else where.index
        if where is None or role.builder.accepts(index, rank):
            uses.append(Use(role.leaf, role.argument, role.view, role.builder))
        else:
            reasons.setdefault(role.leaf, f"{a.rule} that acts along the axis of examples")
    # a table indexed by [1, T] gives [1, T, D]; one indexed by [T] has no axis to spare
    leading = where is None and len(a.kept_shapes[0]) > 1 and a.output_shape[0] == 1
    return Tap(
        a.number, a.function, a.rule, a.kept, tuple(kept_axes), rank, where, leading, tuple(uses)
    )


def find_axis(a: Sequence[int], b: Sequence[int], counts: tuple[int, int]) -> Axis | str:
    """Return the axis whose size follows the number of examples, "none", or "unclear".

    >>> find_axis((2, 7), (3, 7), (2, 3)), find_axis((14, 5), (21, 5), (2, 3))
    (Axis(index=0, flat=False, inner=False), Axis(index=0, flat=True, inner=False))
    >>> find_axis((7, 5), (7, 5), (2, 3)), find_axis((2, 2), (3, 3), (2, 3))
    ('none', 'unclear')
    """
    if len(a) != len(b):
        return "unclear"
    changed = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    if not changed:
        return "none"
    if len(changed) > 1:
        return "unclear"
    i = changed[0]
    if a[i] % counts[0] or b[i] % counts[1] or a[i] // counts[0] != b[i] // counts[1]:
        return "unclear"
    return Axis(i, a[i] != counts[0])
