"""Scores that are already there: normalisation, scale, shift, and the general path.

Tensor format: `d` is `[K, B, *shape]`, the scores themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.layers.form import Form
from fisherfn.layers.numerics import accumulate, sum_of_squares


@dataclass(frozen=True)
class Direct(Form):
    """Scores `d`, `[K, B, *shape]`, held as they are."""

    d: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.d.shape[2:])

    def scores(self) -> Tensor:
        """Return `d`."""
        return self.d

    def square_sum(self, total: Tensor | None = None) -> Tensor:
        """Return `total` plus the sum of squares, `[*shape]`."""
        return accumulate(total, sum_of_squares(self.d))

    def sum(self) -> Tensor:
        """Return the sum of the scores, `[*shape]`."""
        return self.d.sum((0, 1))

    def norms(self) -> Tensor:
        """Return squared norms `[K, B]`."""
        return (self.d * self.d).flatten(2).sum(-1) if self.shape else self.d * self.d

    def gram(self) -> Tensor:
        """Return inner products `[B, B]`."""
        rows = self.d.transpose(0, 1).reshape(self.batch, -1)
        return rows @ rows.T

    def scaled(self, weight: Tensor) -> Direct:
        """Return the scores times `weight`, `[B]`."""
        return Direct(self.d * weight.to(self.d.dtype).reshape(1, -1, *[1] * len(self.shape)))

    def part(self, start: int, stop: int) -> Direct:
        """Return the examples `start` to `stop`."""
        return Direct(self.d[:, start:stop])

    def joined(self, other: Form) -> Form | None:
        """Return the sum with another `Direct`."""
        return Direct(self.d + other.d) if isinstance(other, Direct) else None

    def followed_by(self, others: Sequence[Form]) -> Direct:
        """Return all examples together."""
        return Direct(torch.cat([self.d, *(o.d for o in others if isinstance(o, Direct))], dim=1))

    def sample(self) -> Tensor:
        """Return `d`."""
        return self.d

    def multiplications(self) -> int:
        """One for each score."""
        return self.d.numel()
