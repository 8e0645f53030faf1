"""A Fisher information matrix as a sum of R outer products.

F = Σ_r w_r s_r s_rᵀ = Sᵀ diag(w) S with the rows s_r of S [R, P], one for each example and column
of labels. F has rank R at most, and everything is found in the space of the rows, from their Gram
matrix S Sᵀ [R, R] (that of the empirical neural tangent kernel): with K = √w S Sᵀ √w,

    (F + λI)⁻¹ = (1/λ) (I - Sᵀ√w (K + λI)⁻¹ √w S)                  Woodbury
    log det (F + λI) = (P - R) log λ + log det (K + λI)             Sylvester

Gram matrices and factorisations are float64. Where the rows are as many as the parameters or more,
the matrix [P, P] is the smaller one, and it is used instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide, working_dtype
from fisherfn.core.errors import OptionError
from fisherfn.core.options import is_count
from fisherfn.core.trees import Tree
from fisherfn.curvature import gram, spd
from fisherfn.curvature.common import (
    Scalar,
    check_damping,
    check_number,
    combine,
    is_number,
    poison,
    relative_to,
    require,
    scalar_like,
)
from fisherfn.curvature.dense import Dense
from fisherfn.curvature.layout import Layout
from fisherfn.curvature.rows import Rows, template, weakest

if TYPE_CHECKING:
    from typing_extensions import Self

# Up to here, an integer power is that many products or solves.
_STEPS = 4


class _Explicit(Dense):
    """The matrix [P, P] itself; its errors speak of the class that was asked."""


_Explicit.__name__ = "LowRank"


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Rows):
    """Σ_r w_r s_r s_rᵀ: see `fisherfn.curvature.base` for the algebra and its conventions.

    `F + G` and `merge(F, G)` put the rows of both behind each other, which is exact; `truncate`
    bounds their number.

    Attributes:
        rows: Tree like the parameters, each leaf [R, *shape].
        weights: [R]; below zero only in what a negative `c * F` made.
        count: N, the units averaged over; 0-d float tensor.
        fisher: Which labels were used.
        unit: What is counted.
        signed: Whether weights may be below zero; known from how the result was made.

    Example:
        >>> F = LowRank({"w": torch.tensor([[1.0, 2.0]])}, torch.tensor([1.0]), torch.tensor(8.0))
        >>> F.trace(), F.solve({"w": torch.tensor([1.0, 2.0])}, damping=5.0)
        (tensor(5.), {'w': tensor([0.1000, 0.2000])})
        >>> F
        LowRank(1 row, 2 entries, count=8, fisher='exact', unit='example')
    """

    rows: Tree
    weights: Tensor
    count: Tensor
    _: KW_ONLY
    fisher: str = "exact"
    unit: str = "example"
    signed: bool = False

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        count = self.count if count is None else count
        weights, signed = combine(a, self.weights), self.signed or _maybe_negative(a)
        if other is None:
            return replace(self, weights=weights, count=count, signed=signed)
        rows = trees.map(lambda x, y: torch.cat(_alike(x, y)), self.rows, other.rows)
        weights = torch.cat(_alike(weights, combine(b, other.weights)))
        signed = signed or other.signed or _maybe_negative(b)
        return replace(self, rows=rows, weights=weights, count=count, signed=signed)

    def __fisher_merge__(self, other: Any) -> Self:
        # The shares of the data are not negative, though their values are not known here.
        merged = super().__fisher_merge__(other)
        return replace(merged, signed=self.signed or other.signed)

    def __fisher_empty__(self) -> Self:
        rows = trees.map(lambda x: x.new_zeros((0, *x.shape[1:])), self.rows)
        weights, count = self.weights.new_zeros(0), torch.zeros_like(self.count)
        return replace(self, rows=rows, weights=weights, count=count, signed=False)

    def _explicit(self, caller: str, damping: Scalar, *, regular: bool) -> Dense:
        """Return the matrix [P, P] in float64; see that it is regular where it has to be.

        Without damping, rows of float32 that depend on each other to rounding make it singular,
        though it may look regular in float64.
        """
        layout, matrix = Layout.of(template(self.rows)), self._matrix()
        whole = _Explicit(matrix, self.count, layout, fisher=self.fisher, unit=self.unit)
        if regular and self._dtype != matrix.dtype and not (is_number(damping) and damping > 0):
            factor = spd.cholesky(matrix.to(self._dtype), 0.0)
            good = factor.good | (torch.as_tensor(damping, device=matrix.device) > 0)

            def names() -> list[str]:
                return [whole._path(whole._parts()[0], int(factor.worst))]

            known = require(caller, "positive definite", names, [good], damping)
            return replace(whole, matrix=poison(known, matrix))
        return whole

    def _factor(self, caller: str, damping: Scalar) -> tuple[gram.Kernel, spd.Factor]:
        """Return K and the factor of K + λI; raise, or poison it, if there is no inverse."""
        k = self._kernel()
        factor = spd.cholesky(k.matrix, damping)
        # F itself is singular: its rank is at most R < P.
        good = factor.good & (torch.as_tensor(damping, device=k.matrix.device) > 0)
        known = require(caller, "positive definite", lambda: [self._weakest()], [good], damping)
        return k, factor._replace(lower=poison(known, factor.lower))

    def _weakest(self) -> str:
        k = self._kernel()
        return weakest(self.rows, self._flat, k, gram.factored(k, self.signed))

    def _damping(self, caller: str, damping: Any, relative: bool) -> Scalar:
        """Return λ, which may be given in units of the mean eigenvalue of F."""
        return relative_to(check_damping(caller, damping), self.trace, self.size, relative)

    def solve(self, v: Tree, *, damping: Scalar = 0.0, relative: bool = False) -> Tree:
        """Return (F + λI)⁻¹ v in the dtype of `v`.

        Args:
            v: Tree like the parameters.
            damping: λ; with `relative`, λ in units of the mean eigenvalue of F.
            relative: Whether damping is relative.

        Returns:
            Tree like `v`.
        """
        caller = "LowRank.solve"
        vectors, scalar = self._vector(caller, v), self._damping(caller, damping, relative)
        if not self._thin:
            return self._explicit(caller, scalar, regular=True).solve(v, damping=scalar)
        return self._tree(self._inverse(caller, vectors, scalar), [x.dtype for x in vectors])

    def _inverse(
        self, caller: str, vectors: list[Tensor], damping: Scalar, steps: int = 1
    ) -> list[Tensor]:
        """Return (F + λI)^-steps v, in float64."""
        if self.signed:
            return self._function(caller, vectors, -steps, damping)
        k, factor = self._factor(caller, damping)
        for _ in range(steps):
            vectors = gram.woodbury(self._flat, k, factor, vectors, damping)
        return vectors

    def _function(
        self, caller: str, vectors: Sequence[Tensor], p: float, damping: Scalar
    ) -> list[Tensor]:
        """Return (F + λI)ᵖ v by the spectrum, in float64."""
        k = self._kernel()
        f = gram.factored(k, self.signed)
        shift = torch.as_tensor(damping, dtype=f.values.dtype, device=f.values.device)
        level = f.values.detach().abs().sum() * torch.finfo(self._dtype).eps * 10
        values = torch.where((f.values < 0) & (f.values >= -level), 0.0, f.values) + shift
        good, need = f.good & (values >= 0).all(), "positive semi-definite"
        if p < 0:
            floor = f.values.detach().abs().sum() * torch.finfo(f.values.dtype).eps * 10
            good, need = f.good & (values > floor).all() & (shift > floor), "positive definite"
        known = require(caller, need, lambda: [self._weakest()], [good], damping)
        scales = torch.where(good, values, torch.ones_like(values)) ** p
        rest = torch.where(good, shift, torch.ones_like(shift)) ** p
        return [poison(known, x) for x in gram.apply(self._flat, k, f, scales, rest, vectors)]

    def pow(self, v: Tree, p: float, *, damping: Scalar = 0.0, relative: bool = False) -> Tree:
        """Return (F + λI)ᵖ v for any real number p; see `solve` for `relative`."""
        caller = "LowRank.pow"
        vectors = self._vector(caller, v)
        scalar, p = self._damping(caller, damping, relative), check_number(caller, "p", p)
        if not self._thin:
            whole = self._explicit(caller, scalar, regular=p < 0)
            found = trees.leaves(whole.pow(v, p, damping=scalar))
            return self._wide(found, vectors)
        if p != int(p) or abs(p) > _STEPS:
            return self._wide(self._function(caller, vectors, p, scalar), vectors)
        if p < 0:
            return self._wide(self._inverse(caller, vectors, scalar, -int(p)), vectors)
        found = vectors
        for _ in range(int(p)):
            dtype = working_dtype(self.weights)
            once = [x.to(dtype) for x in found]
            shift = [x * scalar_like(scalar, x) for x in once]
            found = [x + y for x, y in zip(self._times(once, dtype), shift, strict=True)]
        return self._wide(found, vectors)

    def logdet(self, *, damping: Scalar = 0.0, relative: bool = False) -> Tensor:
        """Return log det (F + λI), a 0-d tensor; see `solve` for `relative`."""
        caller = "LowRank.logdet"
        self._check(caller)
        scalar = self._damping(caller, damping, relative)
        if not self._thin:
            whole = self._explicit(caller, scalar, regular=True)
            return whole.logdet(damping=scalar).to(self._dtype)
        rest = self.size - len(self.weights)
        if self.signed:
            f = gram.factored(self._kernel(), signed=True)
            values = f.values + scalar_like(scalar, f.values)
            shift = torch.as_tensor(scalar, dtype=values.dtype, device=values.device)
            good = f.good & (values > 0).all() & (shift > 0)
            known = require(caller, "positive definite", lambda: [self._weakest()], [good], scalar)
            safe = torch.where(good, values, torch.ones_like(values)).log().sum()
            shift = torch.where(good, shift, torch.ones_like(shift))
            return poison(known, safe + rest * shift.log()).to(self._dtype)
        _, factor = self._factor(caller, scalar)
        lower = spd.logdet(factor)
        shift = torch.as_tensor(scalar, dtype=lower.dtype, device=lower.device)
        return (lower + rest * shift.log()).to(self._dtype)

    def eigenvalues(self) -> Tensor:
        """Return the P eigenvalues of F, largest first."""
        self._check("LowRank.eigenvalues")
        if not self._thin:
            found = self._explicit("LowRank.eigenvalues", 0.0, regular=False).eigenvalues()
            return found.to(self._dtype)
        k = self._kernel()
        if self.signed:
            found = gram.factored(k, signed=True)
            values = torch.where(found.good, found.values, torch.full_like(found.values, torch.nan))
        else:
            values = spd.eigenvalues(k.matrix).clamp_min(0.0)
        zeros = values.new_zeros(self.size - len(values))
        zeros = torch.where(values.isnan().any(), torch.full_like(zeros, torch.nan), zeros)
        return torch.cat([values, zeros]).sort(descending=True).values.to(self._dtype)

    def sample(self, key: Tensor, *, damping: Scalar = 0.0, relative: bool = False) -> Tree:
        """Return a draw from N(0, (F + λI)⁻¹), a tree like the parameters; see `solve`."""
        caller = "LowRank.sample"
        self._check(caller)
        scalar = self._damping(caller, damping, relative)
        dtypes = [wide(m).dtype for m in self._flat]
        if not self._thin:
            whole = self._explicit(caller, scalar, regular=True)
            return self._tree(trees.leaves(whole.sample(key, damping=scalar)), dtypes)
        like = trees.map(wide, template(self.rows))
        normals = [z.reshape(-1) for z in trees.leaves(trees.random_like(key, like))]
        if self.signed:
            return self._tree(self._function(caller, normals, -0.5, scalar), dtypes)
        k, factor = self._factor(caller, scalar)
        return self._tree(gram.whiten(self._flat, k, factor, normals, scalar), dtypes)

    def truncate(self, rank: int) -> Self:
        """Return the best approximation of F by `rank` rows, in the Frobenius norm.

        It keeps the eigenvalues of largest absolute value (Eckart & Young 1936); F itself, if it
        has no more rows than that.

        Args:
            rank: Largest number of rows, at least 1.

        Returns:
            A result with orthogonal rows, the strongest first.

        Raises:
            OptionError: `rank` is no positive integer.
        """
        caller = "LowRank.truncate"
        self._check(caller)
        if not is_count(rank):
            raise OptionError(
                f"{caller}: expected rank to be an integer of at least 1, got {rank!r}. It is the "
                "number of rows to keep."
            )
        if rank >= len(self.weights):
            return self
        k = self._kernel()
        f = gram.factored(k, self.signed)
        order = f.values.detach().abs().argsort(descending=True)[:rank]
        values = poison(f.good, f.values[order])
        # orthonormal rows times the roots of the eigenvalues
        mixing = (k.roots[:, None] * f.vectors[:, order] * values.abs().sqrt()).mT
        rows = [
            (mixing.to(wide(m)) @ wide(m)).reshape(rank, *x.shape[1:])
            for m, x in zip(self._flat, trees.leaves(self.rows), strict=True)
        ]
        signs = torch.where(values < 0, -1.0, torch.ones_like(values)).to(wide(self.weights))
        return replace(self, rows=trees.unflatten(trees.structure(self.rows), rows), weights=signs)


def _maybe_negative(c: Scalar) -> bool:
    """Return whether a factor may be below zero, by its type alone where it is a tensor."""
    return isinstance(c, Tensor) or not c >= 0


def _alike(x: Tensor, y: Tensor) -> list[Tensor]:
    """Return two tensors in their common dtype, for `cat`."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return [x.to(dtype), y.to(x.device, dtype)]


trees.register_dataclass_node(LowRank, ("rows", "weights", "count"), ("fisher", "unit", "signed"))
