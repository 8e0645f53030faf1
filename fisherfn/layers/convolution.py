"""Convolutions in one to three dimensions, and transposed ones.

Tensor format: the input is `[B, M, C, *space]`, the cotangent `[K, B, M, O, *space]`. The input's
patches, one row for each output position, turn a convolution into a matrix product; each group has
its own rows. A transposed convolution is the adjoint: the patches are those of the cotangent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core import matmul
from fisherfn.core.dtypes import wide
from fisherfn.core.matmul import quick
from fisherfn.layers.bands import Geometry
from fisherfn.layers.elementwise import Alignment, ShiftBuilder
from fisherfn.layers.form import Form
from fisherfn.layers.memo import Memo
from fisherfn.layers.numerics import (
    accumulate,
    blocks,
    convolution_precision,
    in_place_allowed,
)
from fisherfn.layers.outer import Outer
from fisherfn.layers.registry import Call, Match, Role, register_rule
from fisherfn.layers.views import Permute, Reshape, View


def _rows(t: Tensor, groups: int) -> Tensor:
    """Return `[N, C, *space]` as `[N, groups, positions, C/groups]`."""
    n, c = t.shape[:2]
    return t.reshape(n, groups, c // groups, -1).transpose(-1, -2)


def _examples(t: Tensor, m: int) -> Tensor:
    """Return `[N*M, R, T, C]` as `[N, R, M*T, C]`."""
    if m == 1:
        return t
    t = t.reshape(-1, m, *t.shape[1:]).transpose(1, 2)
    return t.reshape(*t.shape[:2], -1, t.shape[-1])


# So many bytes of patches are copied at once where they are used up before the next.
_CACHED = 2**21
# A product with fewer columns than this is slower than copying whole patches.
_NARROW = 32


@dataclass(frozen=True)
class Unfolded(Form):
    """Scores of a convolution; patches are made for a block of examples at a time.

    `x` is `[B, M, C, *space]`, `g` `[K, B, M, O, *space]`. A transposed convolution swaps their
    parts.
    """

    x: Tensor
    g: Tensor
    geometry: Geometry
    transposed: bool
    memo: Memo | None = field(default=None, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(groups, O/groups, C/groups * window)`, or inputs last if transposed."""
        groups, window = self.geometry.groups, math.prod(self.geometry.kernel)
        c, o = self.x.shape[2] // groups, self.g.shape[3] // groups
        return (groups, o * window, c) if self.transposed else (groups, o, c * window)

    def outer(self) -> Outer:
        """Return the outer form, with all patches."""

        def patches(t: Tensor, places: Sequence[int]) -> list[Tensor]:
            if self.memo is None:
                return [self.geometry.patches(t, places)]
            return [self.memo.get("patches", lambda: self.geometry.patches(t, places))]

        (whole,) = self._cut(patches)
        return whole

    def inputs(self) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Yield the inputs `[B, R, T, I]` of blocks of examples, and which these are."""
        (b, m), groups = self.x.shape[:2], self.geometry.groups
        if self.transposed:
            flat = self.x.reshape(b * m, *self.x.shape[2:])
            yield _examples(_rows(flat, groups), m), (0, b)
            return
        patches = self.x.numel() // max(1, b) * math.prod(self.geometry.kernel)
        for start, stop in blocks(b, patches * self.x.element_size(), self.x):
            x = self.x[start:stop].reshape(-1, *self.x.shape[2:])
            yield _examples(self.geometry.patches(x, self.g.shape[4:]), m), (start, stop)

    def cotangents(self) -> Iterator[Tensor]:
        """Yield the cotangents `[K, B, R, T, O]` of blocks of examples."""
        k, b, m = self.g.shape[:3]
        each = self.g.numel() // max(1, b) * math.prod(self.geometry.kernel)
        ranges = list(blocks(b, each * self.g.element_size(), self.g))
        for start, stop in ranges if self.transposed else [(0, b)]:
            g = self.g[:, start:stop].reshape(-1, *self.g.shape[3:])
            if self.transposed:
                rows = self.geometry.patches(g, self.x.shape[3:])
            else:
                rows = _rows(g, self.geometry.groups)
            rows = _examples(rows, m)
            yield rows.reshape(k, stop - start, *rows.shape[1:])

    def outers(self) -> Iterator[Outer]:
        """Yield the outer forms of a few examples at a time, as memory allows."""
        for part in self._parts(1):
            yield part.outer()

    def pieces(self) -> Iterator[list[Outer]]:
        """Yield, a few examples at a time, the outer forms of rows of the window."""
        places = math.prod(self.g.shape[4:])
        _, o, i = self.shape
        # through pairs of positions no score is made, beside which copying would be little
        pairs = places * (o + i) <= o * i
        rows = self._rows_of_bands if pairs else self._rows_of_window
        for part in self._parts(rows):
            yield list(part._bands(rows))

    def scores(self) -> Tensor:
        """Return the scores `[K, B, *shape]`."""
        with convolution_precision(self.g):
            rows = self._rows_of_window
            return self._assembled([band.scores() for band in self._bands(rows)])

    def square_sum(self, total: Tensor | None = None) -> Tensor:
        """Return `total` plus the sum of squared scores."""
        if self.memo is None and self.g.shape[2] == 1 and in_place_allowed() and self._quick():
            return accumulate(total, self._quick_square_sum())
        rows = self._rows_of_window
        sums: list[Tensor | None] = [None] * rows
        with convolution_precision(self.g):
            for part in self._parts(rows):
                for row, band in enumerate(part._bands(rows)):
                    sums[row] = band.square_sum(sums[row])
        return accumulate(total, self._assembled([t for t in sums if t is not None]))

    def sum(self) -> Tensor:
        """Return the sum of the scores."""
        rows = self._rows_of_window
        sums: list[Tensor | None] = [None] * rows
        with convolution_precision(self.g):
            for part in self._parts(rows):
                for row, band in enumerate(part._bands(rows)):
                    sums[row] = accumulate(sums[row], band.sum())
        return self._assembled([t for t in sums if t is not None])

    def norms(self) -> Tensor:
        """Return squared norms `[K, B]`."""
        found, rows = [], self._rows_of_window
        with convolution_precision(self.g):
            for part in self._parts(rows):
                total = None
                for band in part._bands(rows):
                    total = accumulate(total, band.norms())
                assert total is not None
                found.append(total)
        return torch.cat(found, dim=1)

    @property
    def _rows_of_bands(self) -> int:
        """How many rows of the window can be contracted apart: all, or one, the whole window.

        It is one where rows are narrow, and where patches are kept.
        """
        kernel, moving = self.geometry.kernel, self.g if self.transposed else self.x
        channels = moving.shape[3 if self.transposed else 2]
        width = channels // self.geometry.groups * math.prod(kernel[1:])
        return 1 if self.memo is not None or width < _NARROW else kernel[0]

    @property
    def _rows_of_window(self) -> int:
        """How many rows of the window are contracted apart where scores are made.

        It is one, too, on a CPU where copying patches takes little beside what is made of them.
        """
        fixed = self.x if self.transposed else self.g
        channels, *inner = fixed.shape[2 if self.transposed else 3 :]
        few = 2 * math.prod(inner) < channels // self.geometry.groups
        return 1 if few and self.g.device.type == "cpu" else self._rows_of_bands

    @property
    def positions(self) -> int:
        """How many windows an example has."""
        return self.g.shape[2] * math.prod(
            self.x.shape[3:] if self.transposed else self.g.shape[4:]
        )

    def _quick(self) -> bool:
        """Return whether scores of whole windows may go to the faster library."""
        _, o, i = self.shape
        return all(quick(t, o, self.positions, i) for t in (self.x, self.g))

    def _quick_square_sum(self) -> Tensor:
        """Return the sum of squared scores, from patches of a few examples that stay in the cache.

        Patches are the left factors of the products: the scores `[I, O]`, or as the form has them
        if the convolution is transposed.
        """
        multiply = matmul.dense_product()
        assert multiply is not None
        geometry, groups = self.geometry, self.geometry.groups
        x, g = self.x.transpose(0, 1), self.g[:, :, 0]  # [1, B, C, *space], [K, B, O, *space]
        moving, fixed = (g, x) if self.transposed else (x, g)
        places = fixed.shape[3:]
        still = fixed.reshape(*fixed.shape[:2], groups, -1, math.prod(places)).contiguous()
        window = [geometry.windows(t, places) for t in moving]
        step = max(1, _CACHED // (window[0][0].numel() * x.element_size()))
        patches = x.new_empty((min(step, self.batch), *window[0].shape[1:]))
        rows = patches.view(len(patches), groups, -1, math.prod(places))
        total = x.new_zeros((groups, rows.shape[2], still.shape[3]))
        for start in range(0, self.batch, step):
            stop = min(self.batch, start + step)
            for view in window:
                patches[: stop - start].copy_(view[start:stop])
                for other, r in itertools.product(still, range(groups)):
                    lefts, rights = rows[: stop - start, r], other[start:stop, r]
                    for left, right in zip(lefts.unbind(0), rights.unbind(0), strict=True):
                        score = multiply(left, right)
                        total[r].addcmul_(score, score)
        return total if self.transposed else total.mT.contiguous()

    def _bands(self, rows: int) -> Iterator[Outer]:
        """Yield the outer form for each row of the window, or that of the whole window."""
        return self._cut(self.geometry.bands) if rows > 1 else iter([self.outer()])

    def _cut(self, cut: Callable[[Tensor, Sequence[int]], list[Tensor]]) -> Iterator[Outer]:
        """Yield the outer form of each piece that `cut` makes of what the window moves over."""
        k, b, m = self.g.shape[:3]
        x = self.x.reshape(b * m, *self.x.shape[2:])
        g = self.g.reshape(k * b * m, *self.g.shape[3:])
        fixed, moving = (x, g) if self.transposed else (g, x)
        still = _examples(_rows(fixed, self.geometry.groups), m)
        for piece in cut(moving, fixed.shape[2:]):
            band = _examples(piece, m)
            a, rows = (still, band) if self.transposed else (band, still)
            yield Outer(a, rows.reshape(k, b, *rows.shape[1:]))

    def _assembled(self, bands: Sequence[Tensor]) -> Tensor:
        """Put what belongs to the rows of a window, `[*, R, O, I]`, in the weight's order."""
        if len(bands) == 1:
            return bands[0]
        rest = math.prod(self.geometry.kernel[1:])
        if self.transposed:
            cut = [t.unflatten(-2, (-1, rest)) for t in bands]
            return torch.stack(cut, dim=-3).flatten(-4, -2)
        cut = [t.unflatten(-1, (-1, rest)) for t in bands]
        return torch.stack(cut, dim=-2).flatten(-3)

    def _parts(self, rows: int) -> Iterator[Unfolded]:
        """Yield a few examples at a time, as memory allows for so many rows of the window."""
        kernel = self.geometry.kernel
        window = math.prod(kernel if rows == 1 else kernel[1:])
        moving = self.g if self.transposed else self.x
        copied = moving.numel() // max(1, self.batch) * window * moving.element_size()
        each = max(copied, self.score_bytes // rows)
        for start, stop in blocks(self.batch, each, self.x):
            yield self.part(start, stop)

    def gram(self) -> Tensor:
        """Return inner products `[B, B]`."""
        return self.outer().gram()

    def scaled(self, weight: Tensor) -> Unfolded:
        """Return the scores times `weight`, `[B]`."""
        shape = (1, -1, *[1] * (self.g.dim() - 2))
        return replace(self, g=self.g * weight.to(self.g.dtype).reshape(shape))

    def part(self, start: int, stop: int) -> Unfolded:
        """Return the examples `start` to `stop`."""
        memo = None if self.memo is None else self.memo.part((start, stop))
        return replace(self, x=self.x[start:stop], g=self.g[:, start:stop], memo=memo)

    def remembering(self, memo: Memo) -> Unfolded:
        """Return the same form, which keeps the patches of its inputs in `memo` if they fit."""
        if self.transposed:  # its patches are those of the cotangents
            return self
        window, places = math.prod(self.geometry.kernel), math.prod(self.g.shape[4:])
        each = self.x.shape[2] * window * places * self.x.element_size()
        fits = memo.reserve(self.x.shape[0] * self.x.shape[1] * each)
        return replace(self, memo=memo) if fits else self

    def joined(self, other: Form) -> Form | None:
        """Return the form of both sets of positions, for another use of the same weight."""
        return self.outer().joined(other.outer() if isinstance(other, Unfolded) else other)

    def followed_by(self, others: Sequence[Form]) -> Unfolded:
        """Return all examples together."""
        same = [o for o in others if isinstance(o, Unfolded)]
        x = torch.cat([self.x, *(o.x for o in same)])
        return replace(self, x=x, g=torch.cat([self.g, *(o.g for o in same)], dim=1), memo=None)

    def sample(self) -> Tensor:
        """Return `g`."""
        return self.g

    def multiplications(self) -> int:
        """As many as those of the outer form."""
        return self.columns * self.batch * math.prod(self.shape) * self.positions


@dataclass(frozen=True)
class ConvolutionBuilder:
    """Outer products of patches and cotangents, or the reverse for a transposed convolution."""

    geometry: Geometry
    shape: tuple[int, ...]
    transposed: bool

    def accepts(self, axis: int, rank: int) -> bool:
        """Examples lie along the first axis."""
        return axis == 0 and rank == len(self.geometry.kernel) + 2

    def __call__(self, kept: Sequence[Tensor], g: Tensor, axis: int) -> tuple[Form, View]:
        """Return the outer form, `[groups, O/groups, C/groups * window]` for a convolution."""
        x = wide(kept[0]).expand(*g.shape[1:3], *kept[0].shape[2:])
        form = Unfolded(x, wide(g), self.geometry, self.transposed)
        if self.transposed:
            return form, (Reshape(self.shape), Permute((0, 2, 1)))
        return form, (Reshape(self.shape),)


def _sizes(value: Any, nd: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * nd
    value = tuple(value)
    return value * nd if len(value) == 1 else value


def _geometry(call: Call, weight: Tensor) -> Geometry:
    kernel = tuple(int(n) for n in weight.shape[2:])  # plain where the compiler makes symbols
    nd = len(kernel)
    dilation = _sizes(call["dilation"], nd)
    padding = call["padding"]
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = tuple((t // 2, t - t // 2) for t in total)
    else:
        pairs = tuple((p, p) for p in _sizes(padding, nd))
    return Geometry(kernel, _sizes(call["stride"], nd), pairs, dilation, call["groups"])


def _match(call: Call, *, transposed: bool) -> Match | None:
    if "input" in call.tracked:
        return None
    roles = []
    rank = len(call.output_shape)
    if "weight" in call.tracked:
        weight = call.tracked["weight"]
        if rank != weight.dim():
            return None
        builder = ConvolutionBuilder(_geometry(call, weight), tuple(weight.shape), transposed)
        roles.append(Role("weight", builder))
    if "bias" in call.tracked:
        shape = tuple(call.tracked["bias"].shape)
        aligned = Alignment(shape, (1, *shape, *[1] * (rank - 2)))
        roles.append(Role("bias", ShiftBuilder(aligned)))
    return Match(("input",) if "weight" in call.tracked else (), tuple(roles))


def match_convolution(call: Call) -> Match | None:
    """`conv1d`, `conv2d` and `conv3d`."""
    return _match(call, transposed=False)


def match_transposed(call: Call) -> Match | None:
    """`conv_transpose1d`, `conv_transpose2d` and `conv_transpose3d`."""
    return _match(call, transposed=True)


_DEFAULTS: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
register_rule(
    [F.conv1d, F.conv2d, F.conv3d],
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    match_convolution,
    name="convolution",
    defaults=_DEFAULTS,
)
register_rule(
    [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d],
    ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    match_transposed,
    name="transposed convolution",
    defaults=_DEFAULTS,
)
