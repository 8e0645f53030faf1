"""What the trace and diagonal estimators with a low-rank part share: the range of an operator.

With test vectors Ω, Y = A Ω = Q R. Leaving out test vector i leaves the range of the other columns
of Y, whose projector is Q (I − s_i s_iᵀ) Qᵀ: s_i is the unit vector orthogonal to all columns of R
but column i, which is column i of R⁻ᵀ, normalised. So each leave-one-out estimate costs small
matrices only, no product and no factorisation of its own.

Reference: Epperly, Tropp & Webber (2024), XTrace: Making the most of every sample in stochastic
trace estimation, SIAM J. Matrix Anal. Appl. 45(1), sections 2.1 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core.modes import transformed
from fisherfn.linalg.probes import Probes, draw
from fisherfn.linalg.space import Basis, Block, Operator, Space, choose, rows


@dataclass
class Sketch:
    """Test vectors Ω, Q and R of A Ω = Q R; grows without a product being wasted."""

    space: Space
    mv: Operator
    key: Tensor
    probes: str
    chunk_size: int
    capacity: int
    density: float = 1.0

    def __post_init__(self) -> None:
        """Start without a test vector."""
        self._probes = Probes(self.space, self.key, self.capacity, self.probes, self.density)
        self.basis: Basis | None = None
        self.omega: Basis | None = None
        self.r = torch.zeros(0, 0, dtype=self.space.small, device=self.space.device)

    @property
    def count(self) -> int:
        """Number of test vectors."""
        return self.r.shape[0]

    def grow(self, upto: int) -> None:
        """Multiply test vectors until there are `upto`, and orthonormalise the products."""
        space = self.space
        while self.count < upto:
            stop = min(upto, self.count + self.chunk_size)
            v = self._probes.take(self.count, stop)
            y = space.apply(self.mv, v, self.chunk_size)
            if self.basis is None or self.omega is None:
                private = not any(part.requires_grad for part in y)
                self.basis = Basis(space, self.capacity, buffered=private)
                self.omega = Basis(space, self.capacity, buffered=private)
            self.omega.append(v)
            for i in range(stop - self.count):
                self._add(rows(y, i, i + 1), rows(v, i, i + 1))

    def _add(self, y: Block, v: Block) -> None:
        """Add one column to Q and R."""
        space, basis = self.space, self.basis
        assert basis is not None
        rest, coefficients = basis.reject(y)
        size, left = space.norms(y), space.norms(rest)
        # A product inside the range so far: any direction will do, and its own test vector is one
        # that the other test vectors know nothing of.
        # (What is left then is rounding, no direction to rely on.)
        inside = left <= 64 * space.eps * size
        if transformed() or bool(inside):
            other, _ = basis.reject(v)
            # In few dimensions random signs depend on each other, too.
            known = space.norms(other) <= space.eps**0.5 * space.norms(v)
            if transformed() or bool(known):
                aside = random.fold_in(self.key, self.capacity)
                drawn = draw(space, aside, self.count, self.count + 1, "gaussian")
                fresh, _ = basis.reject(drawn)
                other = choose(known, fresh, other)
            rest = choose(inside, other, rest)
            rest = space.scale(rest, 1.0 / space.norms(rest))
            rest, _ = basis.reject(rest)
        length = space.norms(rest)
        safe = torch.where(length > 0, length, torch.ones_like(length))
        basis.append(space.scale(rest, 1.0 / safe))
        n = self.count
        column = torch.cat([coefficients, left.unsqueeze(0)])
        zeros = torch.zeros(1, n, dtype=self.r.dtype, device=self.r.device)
        self.r = torch.cat([torch.cat([self.r, zeros]), column], dim=1)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Return S, whose column i is s_i, and s_iᵀ r_i for each i."""
        eye = torch.eye(self.count, dtype=self.r.dtype, device=self.r.device)
        # A pivot of zero would make the directions NaN; this small, it says that there is nothing
        # of the range in that direction.
        largest = self.r.abs().max()
        tiny = self.space.eps * torch.where(largest > 0, largest, torch.ones_like(largest))
        pivots = self.r.diagonal()
        r = self.r + torch.diag(torch.where(pivots < tiny, tiny - pivots, 0.0))
        inverse = torch.linalg.solve_triangular(r, eye, upper=True)
        s = inverse.T / torch.linalg.vector_norm(inverse, dim=1)
        return s, (s * self.r).sum(0)
