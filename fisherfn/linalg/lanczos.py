"""Extreme eigenvalues: Lanczos with full reorthogonalisation and thick restarts.

The basis V is orthonormal to rounding (every new vector is orthogonalised against all others,
twice), so an eigenvalue never appears more often than it is one: there are no ghosts. With
H = Vᵀ A V and the next vectors N, A V = V H + N C, and the residual of a Ritz pair (θ, V y) is
‖C y‖.

- An invariant subspace (C = 0) is no failure: the next vector is then any one orthogonal to V, and
  the iteration ends once the subspace holds the pairs that are asked for.
- A full basis is compressed to the best Ritz vectors, for which the relation still holds (thick
  restart: Wu & Simon 2000, Thick-restart Lanczos method for large symmetric eigenvalue problems).
- One starting vector finds one eigenvector of a multiple eigenvalue. So, once all pairs have
  converged, some steps from a fresh vector orthogonal to them look for what was missed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.core.options import check_count
from fisherfn.core.trees import Tree
from fisherfn.linalg.probes import draw
from fisherfn.linalg.results import Eigenpairs
from fisherfn.linalg.space import (
    Basis,
    Block,
    Operator,
    Space,
    check_key,
    joined,
    refuse_transformed,
    rows,
)

WHICH = ("largest", "smallest", "both")
_BASIS_BYTES = 4 * 2**30
_BASIS_VECTORS = 64
_MOST_STEPS = 300
# Of the tolerance, while iterating: looking for missed pairs gives up a residual of this size.
_SHARE = 0.25


def lanczos(
    mv: Operator,
    like: Tree,
    *,
    k: int = 5,
    key: Tensor,
    which: str = "largest",
    max_steps: int | None = None,
    tolerance: float = 1e-5,
    max_basis: int | None = None,
    block_size: int = 1,
    verify: int | None = None,
    start: Tree | None = None,
) -> Eigenpairs:
    """Compute extreme eigenvalues and eigenvectors of a symmetric operator.

    Args:
        mv: Function tree -> tree, v to A v, symmetric.
        like: Tree like v; only shapes, dtypes and devices matter.
        k: Pairs to compute, from each end that is asked for.
        key: Random key of the starting vectors.
        which: "largest" or "smallest" (algebraically), or "both" ends, k pairs of each.
        max_steps: Products, at most; not more than dimensions. Default: 300, or 4 a pair.
        tolerance: Largest residual ‖A v − θ v‖, as a share of the largest |θ|. The error of an
            eigenvalue is at most its residual, and about residual² over the gap to the others.
        max_basis: Vectors kept at the same time, which is what memory goes into. Default: 64, or
            fewer where they would take more than 4 GiB.
        block_size: Vectors multiplied together (by `torch.vmap`) in each step; a block finds
            multiple eigenvalues at once, for more products in total.
        verify: Products, after convergence, that look for pairs that were missed, as far as
            max_steps allows. Default: 5 + k.
        start: Starting vector; random if not given.

    Returns:
        `Eigenpairs`. If the steps do not suffice, `converged` is False and the residuals say how
        far each pair has come.

    Raises:
        OptionError: an option does not exist, or asks for more than there are dimensions.
        TreeMismatchError: mv does not return a tree like its argument, or start is none.
        UnsupportedError: called inside `torch.compile` or a `torch.func` transformation.

    Cost: the products, max_basis vectors of memory, and 8 P max_basis operations for each product.

    Reference: Parlett (1998), The Symmetric Eigenvalue Problem, chapter 13; Wu & Simon (2000).

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> scale = torch.tensor([3.0, 7.0, 7.0, 1.0, 0.0])
        >>> mv = lambda v: {"w": scale * v["w"]}
        >>> found = ff.linalg.lanczos(mv, {"w": torch.zeros(5)}, k=3, key=ff.random.key(0))
        >>> found.eigenvalues, bool(found.converged)
        (tensor([7.0000, 7.0000, 3.0000]), True)
    """
    refuse_transformed("lanczos", "for a trace of a function there, use slq.")
    space = Space("lanczos", like, mv)
    plan = _plan(space, k, which, max_steps, tolerance, max_basis, block_size, verify)
    check_key("lanczos", key)
    if start is not None:
        trees.check_like("lanczos", "start", start, like, like_name="like")
    return _Iteration(space, mv, key, plan, start).run()


@dataclass(frozen=True)
class _Plan:
    """The options, checked."""

    low: int
    high: int
    max_steps: int
    tolerance: float
    capacity: int
    block: int
    verify: int

    @property
    def wanted(self) -> int:
        return self.low + self.high

    def best(self, count: int, extra: int = 0) -> list[int]:
        """Return which of `count` ascending Ritz values are wanted, with `extra` others."""
        low = self.low + (extra * self.low) // self.wanted
        high = self.high + extra - (extra * self.low) // self.wanted
        if low + high >= count:
            return list(range(count))
        return [*range(low), *range(count - high, count)]


def check_pairs(caller: str, k: Any, which: Any, tolerance: Any, ends: tuple[str, ...]) -> None:
    """Check what eigensolvers share."""
    check_count(caller, "k", k, 1, "It is the number of eigenpairs.")
    if which not in ends:
        raise OptionError(
            f"{caller}: expected which= to be one of {', '.join(map(repr, ends))}, got {which!r}. "
            "Ends are algebraic: the most negative eigenvalue is the smallest."
        )
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not number or not 0 <= tolerance < 1:
        raise OptionError(
            f"{caller}: expected tolerance= to be a number in [0, 1), got {tolerance!r}. It is the "
            "largest residual as a share of the largest eigenvalue."
        )


def _plan(
    space: Space,
    k: Any,
    which: Any,
    max_steps: Any,
    tolerance: Any,
    max_basis: Any,
    block: Any,
    verify: Any,
) -> _Plan:
    """Check the options and fill in the defaults."""
    check_pairs("lanczos", k, which, tolerance, WHICH)
    low, high = (0 if which == "largest" else k), (0 if which == "smallest" else k)
    wanted = low + high
    check_count("lanczos", "block_size", block, 1, "It is the number of vectors in a block.")
    for name, value in (("eigenpairs", wanted), ("vectors in a block", block)):
        if value > space.size:
            raise OptionError(
                f"lanczos: expected at most {space.size} {name}, the dimensions, got {value}. Ask "
                "for fewer."
            )
    if max_steps is None:
        max_steps = max(_MOST_STEPS, 4 * wanted)
    elif check_count("lanczos", "max_steps", max_steps, 1, "It is the number of products.") > (
        space.size
    ):
        raise OptionError(
            f"lanczos: expected max_steps= of at most {space.size}, the dimensions, got "
            f"{max_steps}. So many products give all eigenvalues."
        )
    least = min(space.size, wanted + 2 * block)
    if max_basis is None:
        room = min(_BASIS_VECTORS, _BASIS_BYTES // space.vector_bytes)
        max_basis = min(space.size, max(2 * wanted + 2 * block, room))
    check_count("lanczos", "max_basis", max_basis, 1, "It is the number of vectors kept.")
    if max_basis < least:
        raise OptionError(
            f"lanczos: expected max_basis= of at least {least} for {wanted} eigenpairs in blocks "
            f"of {block}, got {max_basis}. Twice the eigenpairs converge well."
        )
    verify = 5 + k if verify is None else verify
    check_count("lanczos", "verify", verify, 0, "It is a number of products.")
    capacity = min(max_basis, space.size)
    return _Plan(low, high, max_steps, float(tolerance), capacity, block, verify)


@dataclass
class _Iteration:
    """The state: V, H, N, C, and how many products have been taken."""

    space: Space
    mv: Operator
    key: Tensor
    plan: _Plan
    start: Tree | None
    steps: int = 0
    drawn: int = 0
    checking: int | None = field(default=None)

    def run(self) -> Eigenpairs:
        """Iterate until the wanted pairs have converged, or the steps are spent."""
        space, plan = self.space, self.plan
        self.basis = Basis(space, plan.capacity, buffered=True)
        self.h = torch.zeros(0, 0, dtype=space.small, device=space.device)
        self.c = self.h
        self.lost = self.h  # couplings to vectors that were given up, for the residuals
        first = self._fresh(plan.block)
        if self.start is not None:
            first = joined(space.block(self.start), rows(first, 0, plan.block - 1))
        self.next, _ = self._orthonormal(first, space.norms(first).max())
        theta, y, residuals = self._step()
        while not self._finished(theta, y, residuals):
            theta, y, residuals = self._step()
        return self._pairs(theta, y, residuals)

    def _step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply the next vectors, extend the relation, and return values, vectors, residuals."""
        space, basis = self.space, self.basis
        old, new = basis.count, self.next
        count = new[0].shape[0]
        basis.append(new)
        product = [part.detach() for part in space.apply(self.mv, new, count)]
        self.steps += count
        rest, coefficients = basis.reject(product)
        n = old + count
        h = torch.zeros(n, n, dtype=space.small, device=space.device)
        h[:old, :old] = self.h
        h[:, old:] = coefficients
        h[old:, :old] = coefficients[:old].T
        h[old:, old:] = (h[old:, old:] + h[old:, old:].T) / 2
        self.h = h
        pad = torch.zeros(self.lost.shape[0], count, dtype=space.small, device=space.device)
        self.lost = torch.cat([self.lost, pad], dim=1)
        if not bool(h.isfinite().all()):
            nan = torch.full((n,), float("nan"), dtype=space.small, device=space.device)
            return nan, torch.eye(n, dtype=space.small, device=space.device), nan
        theta, y = torch.linalg.eigh(h)
        self.next, r = self._orthonormal(rest, theta.abs().max())
        self.c = torch.zeros(r.shape[0], n, dtype=space.small, device=space.device)
        self.c[:, old:] = r
        return theta, y, torch.linalg.vector_norm(self.c @ y, dim=0)

    def _finished(self, theta: Tensor, y: Tensor, residuals: Tensor) -> bool:
        """Decide whether to go on; compress the basis if that needs room, or a fresh start."""
        plan, count = self.plan, len(theta)
        if not bool(theta.isfinite().all()) or not self.next[0].shape[0]:
            return True  # broken, or complete
        if self.steps + self.next[0].shape[0] > plan.max_steps:
            return True
        good = count >= plan.wanted and self._all_good(theta, residuals, _SHARE)
        if good and self.checking is None and plan.verify:
            self._look_for_missed(theta, y)
            return False
        if good:
            if self.checking is None or self.checking <= 0:
                return True
            self.checking -= self.next[0].shape[0]
        elif self.checking is not None:
            self.checking = None  # something was missed: converge, then look again
        if count + self.next[0].shape[0] > plan.capacity:
            spare = plan.capacity - self.next[0].shape[0] - plan.wanted
            self._compress(theta, y, plan.best(count, spare // 2))
        return False

    def _all_good(self, theta: Tensor, residuals: Tensor, share: float) -> bool:
        limit = max(share * self.plan.tolerance, 64 * self.space.eps) * theta.abs().max()
        return bool((residuals[self.plan.best(len(theta))] <= limit).all())

    def _compress(self, theta: Tensor, y: Tensor, kept: list[int]) -> None:
        """Keep some Ritz vectors only; the relation A V = V H + N C goes on holding."""
        y = y[:, kept]
        self.basis.replace(y.T)
        self.h = torch.diag(theta[kept])
        self.c, self.lost = self.c @ y, self.lost @ y

    def _look_for_missed(self, theta: Tensor, y: Tensor) -> None:
        """Go on from a random vector orthogonal to the wanted pairs."""
        self.checking = self.plan.verify
        if not bool(self.c.any()):
            return  # the next vector is one already: the subspace is invariant
        self._compress(theta, y, self.plan.best(len(theta)))
        self.lost = torch.cat([self.lost, self.c])
        fresh = self._fresh(self.plan.block)
        self.next, _ = self._orthonormal(self.basis.reject(fresh)[0], self.space.norms(fresh).max())

    def _fresh(self, count: int) -> Block:
        """Return random vectors that no step has seen yet."""
        self.drawn += count
        return draw(self.space, self.key, self.drawn - count, self.drawn, "gaussian")

    def _orthonormal(self, block: Block, scale: Tensor) -> tuple[Block, Tensor]:
        """Orthonormalise vectors that are orthogonal to the basis; return the factor as well.

        Args:
            block: Vectors.
            scale: What is rounding beside it counts as zero, and a random direction takes its
                place, as long as there are directions left.

        Returns:
            Orthonormal vectors N, and R with `block = N R` up to what counted as zero.
        """
        space, count = self.space, block[0].shape[0]
        room = space.size - self.basis.count
        found = Basis(space, count, buffered=True)
        factor: list[Tensor] = []
        for i in range(count):
            if found.count == room:
                break
            rest, own = found.reject(rows(block, i, i + 1))
            length = space.norms(rest)
            if not bool(length > 64 * space.eps * scale):
                length = torch.zeros_like(length)
                rest = self._fresh(1)
            for _ in range(2):  # as long as random, or small, once is not enough
                rest, _ = self.basis.reject(rest, 1)
                rest, _ = found.reject(rest, 1)
                rest = space.scale(rest, 1.0 / space.norms(rest))
            found.append(rest)
            column = torch.cat([own[:, 0], length])
            factor.append(torch.cat([column, column.new_zeros(count - len(column))]))
        kept = found.vectors if factor else [x[:0] for x in block]
        if not factor:
            return kept, torch.zeros(0, count, dtype=space.small, device=space.device)
        r = torch.stack(factor, dim=1)[: len(factor)]
        missing = torch.zeros(len(factor), count - len(factor), dtype=r.dtype, device=r.device)
        return kept, torch.cat([r, missing], dim=1)

    def _pairs(self, theta: Tensor, y: Tensor, residuals: Tensor) -> Eigenpairs:
        """Return the wanted pairs, descending."""
        space, plan = self.space, self.plan
        chosen = plan.best(len(theta))[::-1]
        rounding = space.eps * theta.abs().max()
        residuals = residuals + torch.linalg.vector_norm(self.lost @ y, dim=0) + rounding
        vectors = self.basis.release(y[:, chosen].T)
        missing = plan.wanted - len(chosen)
        good = (
            missing <= 0 and bool(theta.isfinite().all()) and self._all_good(theta, residuals, 1.0)
        )
        return Eigenpairs(
            theta[chosen].to(space.dtype),
            space.stacked(vectors),
            residuals[chosen].to(space.dtype),
            torch.tensor(good, device=space.device),
            torch.tensor(self.steps, device=space.device),
        )
