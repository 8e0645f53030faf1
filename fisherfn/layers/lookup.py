"""Rows picked by an index: embeddings.

Tensor format: `index` is int64 `[B, T]`, the row that each position picks; `g` is `[K, B, T, D]`,
the cotangent of what was picked. The score of example b is
`score[v] = Σ_{t: index[b, t] = v} g[b, t]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfn.layers.form import Form
from fisherfn.layers.numerics import in_place_allowed


@dataclass(frozen=True)
class Lookup(Form):
    """Scores of a table of `rows` rows that was indexed; the row `padding` gets none."""

    index: Tensor
    g: Tensor
    rows: int
    padding: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(rows, D)`."""
        return (self.rows, self.g.shape[-1])

    def scores(self) -> Tensor:
        """Return the scores `[K, B, rows, D]`."""
        k, b, t, d = self.g.shape
        start = torch.arange(b, device=self.index.device).unsqueeze(1) * self.rows
        flat = (self.index + start).reshape(-1)
        source = self.g.permute(1, 2, 0, 3).reshape(b * t, k * d)
        table = source.new_zeros(b * self.rows, k * d).index_add(0, flat, source)
        return table.reshape(b, self.rows, k, d).permute(2, 0, 1, 3)

    def gathered(self) -> Tensor:
        """Return the score's row at the index of each position, `[K, B, T, D]`."""
        same = (self.index.unsqueeze(1) == self.index.unsqueeze(2)).to(self.g.dtype)
        return same @ self.g

    def scatter(self, values: Tensor, total: Tensor | None = None) -> Tensor:
        """Return `total` plus `values`, `[B, T, D]`, each added to the row it was picked from.

        `total` may be used up.
        """
        flat = self.index.reshape(-1)
        start = values.new_zeros(self.shape) if total is None else total
        add = start.index_add_ if in_place_allowed() else start.index_add
        return add(0, flat, values.reshape(-1, values.shape[-1]))

    def square_sum(self, total: Tensor | None = None) -> Tensor:
        """Return the sum of squares `[rows, D]`: a position brings `g` times its row's score."""
        return self.scatter((self.g * self.gathered()).sum(0), total)

    def sum(self) -> Tensor:
        """Return the sum of the scores, `[rows, D]`."""
        return self.scatter(self.g.sum(0))

    def norms(self) -> Tensor:
        """Return squared norms `[K, B]`."""
        return (self.g * self.gathered()).sum((-1, -2))

    def gram(self) -> Tensor:
        """Return inner products `[B, B]`, through the pairs of equal indices."""
        b, t = self.index.shape
        flat = self.index.reshape(-1)
        rows = self.g.permute(1, 2, 0, 3).reshape(b * t, -1)
        same = (flat.unsqueeze(0) == flat.unsqueeze(1)).to(self.g.dtype)
        return (same * (rows @ rows.T)).reshape(b, t, b, t).sum((1, 3))

    def scaled(self, weight: Tensor) -> Lookup:
        """Return the scores times `weight`, `[B]`."""
        return replace(self, g=self.g * weight.to(self.g.dtype).reshape(1, -1, 1, 1))

    def part(self, start: int, stop: int) -> Lookup:
        """Return the examples `start` to `stop`."""
        return replace(self, index=self.index[start:stop], g=self.g[:, start:stop])

    def joined(self, other: Form) -> Form | None:
        """Return the form of both sets of positions, for another use of the same table."""
        if not isinstance(other, Lookup) or other.padding != self.padding:
            return None
        index = torch.cat([self.index, other.index], dim=1)
        return replace(self, index=index, g=torch.cat([self.g, other.g], dim=2))

    def followed_by(self, others: Sequence[Form]) -> Lookup:
        """Return all examples together."""
        same = [o for o in others if isinstance(o, Lookup)]
        index = torch.cat([self.index, *(o.index for o in same)])
        return replace(self, index=index, g=torch.cat([self.g, *(o.g for o in same)], dim=1))

    def sample(self) -> Tensor:
        """Return `g`."""
        return self.g

    def multiplications(self) -> int:
        """The equal-index products, `K B T² D`."""
        k, b, t, d = self.g.shape
        return k * b * t * t * d
