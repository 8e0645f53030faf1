"""Sums of squared scores over groups of a parameter, without its diagonal where that is cheaper.

A group is told by the indices of the parameter's entries. Seen through the views of a layer, it
depends on the outputs alone (rows), on the inputs alone (columns), on neither (everything), or on
both. With `a` `[B, R, T, I]` and `g` `[K, B, R, T, O]` as in `Outer`, and score_b = g_bᵀ a_b,

    row sums      Σ_b Σ_i score_b[o, i]² = Σ_b diag(g_bᵀ (a_b a_bᵀ) g_b)[o];  with T = 1: g² |a|²
    column sums   the same with a and g exchanged
    everything    Σ_b |score_b|²

each through positions, T² (I + O) multiplications an example, or through the score, T O I, as is
cheaper. Where a group depends on both, the diagonal is formed and summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fisherfn.groups.spec import GroupSpec, sum_runs
from fisherfn.layers.convolution import Unfolded
from fisherfn.layers.form import Form
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.numerics import accumulate, blocks, convolution_precision, in_place_allowed
from fisherfn.layers.outer import Outer
from fisherfn.layers.views import (
    Permute,
    Reshape,
    Slice,
    View,
    factor,
    pull,
    with_plain_sizes,
)

Index: TypeAlias = "np.ndarray[Any, Any]"
Shape: TypeAlias = tuple[int, ...]

# From this many positions on, symmetric products are taken in halves; shorter ones gain nothing.
_SPLIT = 128


def group_sum(scores: LeafScores, spec: GroupSpec) -> Tensor:
    """Return the sum over columns, examples and each group of squared scores, `[num_groups]`."""
    if len(scores.uses) == 1 or scores.separate():
        total = None
        for form, view in scores.uses:
            total = accumulate(total, _one_use(form, view, spec))
        assert total is not None
        return total
    pair = scores.tied()
    if pair is not None and grouping(spec, (), scores.shape).kind == "rows":
        outer, lookup = pair
        own = (lookup.g * lookup.gathered()).sum((0, -1))
        picked = own + 2.0 * scores.tied_products().sum((0, -1))
        rows = row_sums(outer).reshape(-1).index_add(0, lookup.index.reshape(-1), picked.flatten())
        return grouping(spec, (), scores.shape).fold(rows)
    return spec.fold(scores.square_sum())


def multiplications(scores: LeafScores, spec: GroupSpec) -> int:
    """Return the multiplications of `group_sum`."""
    if len(scores.uses) > 1 and not scores.separate() and scores.tied() is None:
        return scores.multiplications()
    total = 0
    for form, view in scores.uses:
        if isinstance(form, Outer) and grouping(spec, view, form.shape).kind != "both":
            total += _cost([form.a], form.g)[0]
        else:
            total += form.multiplications()
    return total


# ---- one use of a parameter ----------------------------------------------------------------------


def _one_use(form: Form, view: View, spec: GroupSpec) -> Tensor:
    if not view and spec.layout == "elements":
        return spec.fold(form.square_sum())
    found = grouping(spec, view, form.shape)
    values = _sums(form, found.kind)
    if values is None:
        return spec.fold(pull(view, form.square_sum(), power=2).reshape(spec.shape))
    scale = factor(view)
    return found.fold(values) if scale == 1.0 else found.fold(values) * scale**2


def _sums(form: Form, kind: str) -> Tensor | None:
    """Return row or column sums, or the sum of everything; None where the diagonal is needed."""
    if kind == "both" or not isinstance(form, Outer | Unfolded | Lookup):
        return None
    if kind == "everything":
        return form.norms().sum()
    if isinstance(form, Lookup):
        values = (form.g * form.gathered()).sum(0)
        if kind == "columns":
            return values.sum((0, 1))
        values = values.sum(-1)
        return values.new_zeros(form.rows).index_add(0, form.index.reshape(-1), values.flatten())
    pieces = _pieces(form, kind)
    if pieces is not None:
        total = None
        with convolution_precision(form.sample()):
            for bands in pieces:
                total = accumulate(total, _summed([band.a for band in bands], bands[0].g, -1))
        return total
    total, sums = None, row_sums if kind == "rows" else column_sums
    for block in form.outers() if isinstance(form, Unfolded) else (form,):
        total = accumulate(total, sums(block))
    return total


def _pieces(form: Form, kind: str) -> Iterator[list[Outer]] | None:
    """Return forms that share their cotangents and have a part of the inputs each, if there are."""
    if isinstance(form, Unfolded) and kind == "rows" and not form.transposed:
        return form.pieces()
    return None


def row_sums(form: Outer) -> Tensor:
    """Return the sums of squared scores over columns, examples and inputs, `[R, O]`."""
    return _summed([form.a], form.g, -1)


def column_sums(form: Outer) -> Tensor:
    """Return the sums of squared scores over columns, examples and outputs, `[R, I]`."""
    return _summed([form.a], form.g, -2)


def _summed(parts: Sequence[Tensor], g: Tensor, axis: int) -> Tensor:
    """Return squared scores `[R, O, I]` summed over an axis, a few examples at a time.

    The inputs may come in parts `[B, R, T, *]`, side by side, if they are summed over.
    """
    if g.shape[-2] == 1:
        return _of_single_positions(parts, g, axis)
    total, (_, through_positions) = None, _cost(parts, g)
    if through_positions:
        kept = g if axis == -1 else parts[0]
        each = len(g) * g.shape[-2] ** 2 * g.shape[2] + 2 * kept.numel() // g.shape[1]
    else:
        each = len(g) * g.shape[-1] * max(a.shape[-1] for a in parts) * g.shape[2]
    for start, stop in blocks(g.shape[1], each * g.element_size(), g):
        some, own = [a[start:stop].unsqueeze(0) for a in parts], g[:, start:stop]
        if not through_positions:
            for a in some:
                total = accumulate(total, _squares(own.mT @ a, axis))
        elif axis == -1:
            total = accumulate(total, _quadratic(some, own))
        else:
            total = accumulate(total, _quadratic([own], some[0]))
    assert total is not None
    return total


def _of_single_positions(parts: Sequence[Tensor], g: Tensor, axis: int) -> Tensor:
    if axis == -1:
        a2 = _added([(a * a).sum(-1)[:, :, 0] for a in parts])
        g2 = (g * g).sum(0)[:, :, 0]
        return (a2.T.unsqueeze(1) @ g2.transpose(0, 1)).squeeze(1)
    g2 = (g * g).sum((0, -1))[:, :, 0]
    a2 = (parts[0] * parts[0])[:, :, 0]
    return (g2.T.unsqueeze(1) @ a2.transpose(0, 1)).squeeze(1)


def _added(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = accumulate(total, term)
    return total


def _squares(s: Tensor, axis: int) -> Tensor:
    """Return squares of `[K, B, R, O, I]`, which may be used up, summed over K, B and an axis."""
    if not in_place_allowed():
        return (s * s).sum((0, 1, axis))
    if s.device.type != "cpu":
        return torch.linalg.vector_norm(s, dim=(0, 1, axis)).square_()
    s = s.square_()
    s = s.sum((0, 1)) if s.shape[:2] != (1, 1) else s[0, 0]
    return s.sum(axis)


def _quadratic(x: Sequence[Tensor], y: Tensor) -> Tensor:
    """Return Σ y ⊙ (Σ_k x_k x_kᵀ) y over columns, examples and positions, `[R, size of y]`.

    `x` and `y` are `[K, B, R, T, ...]`, `x` maybe in parts. The products are symmetric, so that of
    two halves of the positions the mixed products are needed once.
    """
    t = y.shape[-2]
    if not _splits(t, y):
        return _weighted(x, x, y, y)
    h = t // 2
    x1, x2, y1, y2 = (
        [p[..., :h, :] for p in x],
        [p[..., h:, :] for p in x],
        y[..., :h, :],
        y[..., h:, :],
    )
    return _quadratic(x1, y1) + _quadratic(x2, y2) + 2.0 * _weighted(x1, x2, y1, y2)


def _weighted(x1: Sequence[Tensor], x2: Sequence[Tensor], y1: Tensor, y2: Tensor) -> Tensor:
    products = _added([p @ q.mT for p, q in zip(x1, x2, strict=True)])
    mixed = (products.sum(0) if len(products) > 1 else products[0]) @ y2
    mixed = mixed.mul_(y1) if in_place_allowed() else mixed * y1
    if mixed.shape[2] == 1:  # one axis is added up faster than three
        return mixed.reshape(-1, mixed.shape[-1]).sum(0, keepdim=True)
    return mixed.sum((0, 1, 3))


def _splits(t: int, like: Tensor) -> bool:
    """Return whether products of T positions are taken in halves; on a GPU calls cost more."""
    return t >= _SPLIT and like.device.type == "cpu"


def _pairs(t: int, like: Tensor) -> int:
    """Return the pairs of positions that `_quadratic` multiplies."""
    if not _splits(t, like):
        return t * t
    h = t // 2
    return _pairs(h, like) + _pairs(t - h, like) + h * (t - h)


def _cost(parts: Sequence[Tensor], g: Tensor) -> tuple[int, bool]:
    """Return the multiplications of the cheaper way, and whether that is through positions."""
    (k, b, r, t, o), i = g.shape, sum(a.shape[-1] for a in parts)
    if t == 1:
        return b * r * (k * o + i), True
    # the products of inputs serve all K columns; so do the summed products of cotangents
    products = _pairs(t, g) * (k * o + i)
    score = k * t * o * i
    return b * r * min(products, score), products <= score


# ---- groups through views ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fold:
    """How the entries of a vector are added to groups: in runs of equal length, or by an index."""

    num_groups: int
    run: int | None
    index: tuple[int, ...]

    @staticmethod
    def of(index: Index, num_groups: int) -> Fold:
        """Recognise runs, which need neither an index nor a scattered addition."""
        flat = index.reshape(-1)
        n = len(flat)
        run = -(-n // num_groups) if n and num_groups else 1
        if -(-n // run) == num_groups and bool((flat == np.arange(n) // run).all()):
            return Fold(num_groups, run, ())
        return Fold(num_groups, None, tuple(flat.tolist()))

    def __call__(self, values: Tensor) -> Tensor:
        """Return the sums over groups, `[num_groups]`."""
        values = values.reshape(-1)
        if self.run is not None:
            return sum_runs(values, self.run)
        index = torch.tensor(self.index, dtype=torch.int64, device=values.device)
        return values.new_zeros(self.num_groups).index_add(0, index, values)


@dataclass(frozen=True, eq=False)
class Grouping:
    """What the groups of a form depend on, and how sums over the rest are added to them."""

    kind: str
    fold: Fold


def grouping(spec: GroupSpec, view: View, shape: Shape) -> Grouping:
    """Return the groups of a parameter as they lie in one view of it.

    Args:
        spec: The groups.
        view: The chain of steps from the parameter to the form.
        shape: Shape of the form; its last axis is that of the inputs.

    Returns:
        "rows", "columns", "everything" or "both", and the way from sums to groups.
    """
    return _grouping(spec, with_plain_sizes(view), tuple(int(n) for n in shape))


@lru_cache(maxsize=4096)
def _grouping(spec: GroupSpec, view: View, shape: Shape) -> Grouping:
    nothing = Fold(spec.num_groups, None, ())
    if prod(spec.shape) == 0 or len(shape) < 2 or spec.layout == "elements":
        return Grouping("both", nothing)
    index = _seen_through(view, spec.index(), shape)
    varies = [n > 1 for n in index.shape]
    if not any(varies):
        kind, target = "everything", (1,) * len(shape)
    elif not varies[-1]:
        kind, target = "rows", (*shape[:-1], 1)
    elif not varies[-2]:
        kind, target = "columns", (*shape[:-2], 1, shape[-1])
    else:
        return Grouping("both", nothing)
    return Grouping(kind, Fold.of(np.broadcast_to(index, target), spec.num_groups))


def _seen_through(view: View, index: Index, shape: Shape) -> Index:
    """Return an index that broadcasts to the parameter as one that broadcasts to the view."""
    after = [shape]
    for step in reversed(view):
        last = after[-1]
        if isinstance(step, Reshape):
            last = step.source
        elif isinstance(step, Permute):
            last = tuple(last[i] for i in np.argsort(step.dims))
        elif isinstance(step, Slice):
            last = (*last[: step.dim], step.size, *last[step.dim + 1 :])
        after.append(last)
    after.reverse()
    for step, before, now in zip(view, after[:-1], after[1:], strict=True):
        if isinstance(step, Permute):
            index = index.transpose(step.dims)
        elif isinstance(step, Slice) and index.shape[step.dim] > 1:
            index = index.take(range(step.start, step.stop), step.dim)
        elif isinstance(step, Reshape):
            index = _reshaped(index, before, now)
    return index


def _reshaped(index: Index, before: Shape, now: Shape) -> Index:
    """Reshape an index that broadcasts to `before`, repeating it only where axes are joined."""
    full, shape = list(index.shape), []
    for old, new in _stretches(before, now):
        if any([n > 1 for n in index.shape[old]]):
            full[old] = before[old]
            shape += now[new]
        else:
            shape += [1] * len(now[new])
    index = np.broadcast_to(index, full).reshape(shape)
    for axis in range(index.ndim):
        first = index.take([0], axis)
        if bool((index == first).all()):
            index = first
    return index


def _stretches(before: Shape, now: Shape) -> Iterator[tuple[slice, slice]]:
    """Yield the smallest stretches of axes of two shapes whose products are equal."""
    i = j = 0
    while i < len(before) or j < len(now):
        i1, j1 = min(i + 1, len(before)), min(j + 1, len(now))
        while (x := prod(before[i:i1])) != (y := prod(now[j:j1])):
            if x < y:
                i1 += 1
            else:
                j1 += 1
        yield slice(i, i1), slice(j, j1)
        i, j = i1, j1
