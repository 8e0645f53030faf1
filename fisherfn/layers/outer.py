"""Sums of outer products: every layer that multiplies by a matrix.

Tensor format: `a` is `[B, R, T, I]`, inputs; `g` is `[K, B, R, T, O]`, cotangents of the outputs; R
independent groups, T positions that share the weight. The score of example b is
`score[r] = Σ_t g[b, r, t] a[b, r, t]ᵀ`, `[R, O, I]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.core import matmul
from fisherfn.core.matmul import as_columns, by_rows, dense, padded, product, quick, summed_product
from fisherfn.layers.form import Form
from fisherfn.layers.numerics import (
    accumulate,
    block_bytes,
    blocks,
    in_place_allowed,
    sum_of_squares,
)

# On a CPU a score of this many bytes is formed, squared and added while it is in the cache; batched
# products of smaller ones cost less than their calls.
_CPU_SCORE = 256 * 2**10
# The faster library makes scores of so many multiplications or more one by one.
_QUICK = 7 * 2**19
# Sums over fewer positions than this leave a thread idle unless rows are the longer side.
_SHORT = 256


@dataclass(frozen=True)
class Outer(Form):
    """Scores `Σ_t g_t a_tᵀ` of a weight with `R` groups of `O x I` entries."""

    a: Tensor
    g: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """`(R, O, I)`."""
        return (self.a.shape[1], self.g.shape[-1], self.a.shape[-1])

    @property
    def positions(self) -> int:
        """T."""
        return self.a.shape[2]

    def scores(self) -> Tensor:
        """Return the scores `[K, B, R, O, I]`."""
        return self.g.transpose(-1, -2) @ self.a

    def square_sum(self, total: Tensor | None = None) -> Tensor:
        """Return the sum of squared scores `[R, O, I]`.

        With one position the square factors, `(g²)ᵀ a²`; otherwise the scores of a block of
        examples are formed, squared and added. Both are exact.
        """
        if self.positions == 1:
            return accumulate(total, self._factored())
        if in_place_allowed():
            if self._quick():
                return self._quickly(total)
            if self._wide():
                return self._turned(total)
            if self._large():
                return self._one_by_one(total)
        each = self.score_bytes // self.columns
        for k in range(self.columns):  # a product of all columns would copy the inputs for each
            column = Outer(self.a, self.g[k : k + 1])
            for start, stop in blocks(self.batch, each, self.a):
                s = column.part(start, stop).scores()
                total = accumulate(total, sum_of_squares(s, own=True))
        assert total is not None
        return total

    def _factored(self) -> Tensor:
        g2 = (self.g * self.g).sum(0) if self.columns > 1 else (self.g * self.g)[0]
        a2 = self.a * self.a
        return summed_product(g2[:, :, 0].transpose(0, 1), a2[:, :, 0].transpose(0, 1))

    def _large(self) -> bool:
        """Return True if one score is worth a launch of its own."""
        least = _CPU_SCORE if self.a.device.type == "cpu" else block_bytes(self.a) // 2
        return self.score_bytes // self.columns >= least

    def _quick(self) -> bool:
        """Return True if products of one example each are worth the faster library."""
        _, o, i = self.shape
        t = self.positions
        return o * t * i >= _QUICK and quick(self.a, o, t, i) and quick(self.g, o, t, i)

    def _wide(self) -> bool:
        """Return True if the transpose of a score is formed faster, on a CPU.

        Threads share the rows of one product; a short one with more columns takes twice as long.
        Products of batches are faster if the longer side is stored position by position.
        """
        if self.a.device.type != "cpu" or self.shape[2] <= self.shape[1]:
            return False
        if self._large():
            return self.positions <= _SHORT and torch.get_num_threads() > 1
        return self.a.stride(-1) != 1

    def _turned(self, total: Tensor | None) -> Tensor:
        """Return what `square_sum` does, from scores with the longer side first."""
        turned = None
        for k in range(self.columns):
            turned = Outer(self.g[k], self.a.unsqueeze(0)).square_sum(turned)
        assert turned is not None
        found = turned.transpose(-1, -2)
        return found.contiguous() if total is None else total.add_(found)

    def _one_by_one(self, total: Tensor | None) -> Tensor:
        """Form one score at a time, some rows of it, in a buffer that stays in the cache."""
        found = self.a.new_empty(self.shape) if total is None else total
        for k in range(self.columns):
            _add_squares(found, self.g[k], self.a, fresh=total is None and k == 0)
        return found

    def _quickly(self, total: Tensor | None) -> Tensor:
        """Return what `square_sum` does, from products of the faster library.

        It wants the rows of the left factor contiguous, so that one may have to be copied.
        """
        _, o, i = self.shape
        by_position = by_rows(self.g), by_rows(self.a)
        if by_position[0] == by_position[1]:
            turned = i < o if by_position[0] else o < i
        else:
            turned = by_position[0]
        left, right = (self.a.unsqueeze(0), self.g) if turned else (self.g, self.a.unsqueeze(0))
        shape = (left.shape[2], left.shape[-1], right.shape[-1])
        found = self.a.new_empty(shape) if turned or total is None else total
        for k in range(self.columns):
            x, y = left[k % len(left)], right[k % len(right)]
            _add_quick_squares(found, x, y, fresh=k == 0 and found is not total)
        if not turned:
            return found
        found = found.mT
        return found.contiguous() if total is None else total.add_(found)

    def sum(self) -> Tensor:
        """Return the sum of the scores, `[R, O, I]`."""
        g = self.g.sum(0)
        r, o, i = self.shape
        rows_g = g.transpose(0, 1).reshape(r, -1, o)
        rows_a = self.a.transpose(0, 1).reshape(r, -1, i)
        return summed_product(rows_g, rows_a)

    def norms(self) -> Tensor:
        """Return squared norms `[K, B]`, through positions or through scores, as is cheaper."""
        t, (_, o, i) = self.positions, self.shape
        if t == 1:
            return ((self.g * self.g).sum((-1, -2)) * (self.a * self.a).sum((-1, -2))).sum(-1)
        if t * (o + i) <= o * i:
            aa = self.a @ self.a.transpose(-1, -2)
            gg = self.g @ self.g.transpose(-1, -2)
            return (aa * gg).sum((-1, -2, -3))
        parts = []
        for start, stop in blocks(self.batch, self.score_bytes, self.a):
            s = self.part(start, stop).scores()
            parts.append((s * s).sum((-1, -2, -3)))
        return torch.cat(parts, dim=1)

    def gram(self) -> Tensor:
        """Return inner products `[B, B]`, through positions or through scores, as is cheaper."""
        b, t, (r, o, i) = self.batch, self.positions, self.shape
        if b * t * t * (o + i) <= t * o * i + b * o * i:
            return self._gram_by_positions()
        result = None
        # blocks of output rows: scores of all examples for a few rows at a time
        for start, stop in blocks(o, b * r * i * self.columns * 8, self.a):
            s = Outer(self.a, self.g[..., start:stop]).scores()
            rows = s.transpose(0, 1).reshape(b, -1)
            result = accumulate(result, product(rows, rows.T))
        assert result is not None
        return result

    def _gram_by_positions(self) -> Tensor:
        b, t, (r, o, i) = self.batch, self.positions, self.shape
        a = self.a.transpose(0, 1).reshape(r, b * t, i)
        g = self.g.permute(0, 2, 1, 3, 4).reshape(self.columns, r, b * t, o)
        pairs = (a @ a.transpose(-1, -2)) * (g @ g.transpose(-1, -2)).sum(0)
        return pairs.sum(0).reshape(b, t, b, t).sum((1, 3))

    def scaled(self, weight: Tensor) -> Outer:
        """Return the scores times `weight`, `[B]`."""
        return Outer(self.a, self.g * weight.to(self.g.dtype).reshape(1, -1, 1, 1, 1))

    def part(self, start: int, stop: int) -> Outer:
        """Return the examples `start` to `stop`."""
        return Outer(self.a[start:stop], self.g[:, start:stop])

    def joined(self, other: Form) -> Form | None:
        """Return the form of both sets of positions, for another use of the same weight."""
        if not isinstance(other, Outer) or other.shape != self.shape:
            return None
        return Outer(torch.cat([self.a, other.a], dim=2), torch.cat([self.g, other.g], dim=3))

    def followed_by(self, others: Sequence[Form]) -> Outer:
        """Return all examples together."""
        same = [o for o in others if isinstance(o, Outer)]
        a = torch.cat([self.a, *(o.a for o in same)])
        return Outer(a, torch.cat([self.g, *(o.g for o in same)], dim=1))

    def sample(self) -> Tensor:
        """Return `g`."""
        return self.g

    def multiplications(self) -> int:
        """Through the score: `K B R T O I`; factored with one position: `B R O I`."""
        r, o, i = self.shape
        columns = 1 if self.positions == 1 else self.columns
        return columns * self.batch * r * self.positions * o * i


def _add_squares(found: Tensor, left: Tensor, right: Tensor, *, fresh: bool) -> None:
    """Add the squares of `Σ_t left_t right_tᵀ` of every example, `[B, R, T, *]`, in place.

    A `fresh` tensor is written over: it needs no zeros.
    """
    r, rows, columns = found.shape
    step = min(rows, max(1, block_bytes(found) // (2 * r * columns * found.element_size())))
    buffer = found.new_empty((r, step, columns))
    # unbound at once: indexing one example takes as long as multiplying it
    single = r == 1
    ends = (right[:, 0] if single else right).unbind(0)
    product = torch.mm if single else torch.bmm
    for start in range(0, rows, step):
        total, score = found[:, start : start + step], buffer[:, : min(step, rows - start)]
        if single:
            total, score = total[0], score[0]
        some = left[..., start : start + step].transpose(-1, -2)
        pairs = zip((some[:, 0] if single else some).unbind(0), ends, strict=True)
        if fresh:
            product(*next(pairs), out=score)
            torch.mul(score, score, out=total)
        for x, y in pairs:
            product(x, y, out=score)
            total.addcmul_(score, score)


def _add_quick_squares(found: Tensor, left: Tensor, right: Tensor, *, fresh: bool) -> None:
    """Do what `_add_squares` does, by products of the faster library."""
    multiply = matmul.dense_product()
    assert multiply is not None
    r, rows, columns = found.shape
    step = min(rows, max(1, block_bytes(found) // (2 * columns * found.element_size())))
    each = left[0].numel() * left.element_size()
    for start, stop in blocks(len(left), each, left):
        lefts, rights = as_columns(left[start:stop]), right[start:stop]
        rights = dense(rights) if lefts.shape[-1] == left.shape[2] else padded(rights, 2)
        for group in range(r):
            ends = rights[:, group].mT.unbind(0)
            for row in range(0, rows, step):
                total = found[group, row : row + step]
                pairs = zip(lefts[:, group, row : row + step].unbind(0), ends, strict=True)
                if fresh and start == 0:
                    score = multiply(*next(pairs))
                    torch.mul(score, score, out=total)
                for x, y in pairs:
                    score = multiply(x, y)
                    total.addcmul_(score, score)
