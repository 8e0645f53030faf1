"""The algebra of a block-diagonal matrix; `Dense` is the case of a single block.

Block k covers some leaves of the parameters, one after the other, each row-major. Blocks may cover
leaves in any order; results always come back as trees, and vectors and matrices over all parameters
in the parameters' own insertion order.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisherfn.core.dtypes import wide, widest
from fisherfn.core.errors import ShapeError, at
from fisherfn.core.trees import Tree
from fisherfn.curvature import spd
from fisherfn.curvature.base import Curvature
from fisherfn.curvature.common import (
    Scalar,
    check_damping,
    check_floating,
    check_number,
    norm,
    poison,
    require,
    total,
)
from fisherfn.curvature.layout import Layout

# Up to here, an integer power is that many products or solves; beyond, an eigendecomposition is
# both cheaper and more accurate.
_STEPS = 4


class Part(NamedTuple):
    """One block: the matrix [n, n], and which leaves (by position) its n coordinates are."""

    name: str
    matrix: Tensor
    leaves: tuple[int, ...]


class Blocks(Curvature):
    """Base of the representations that keep matrices over groups of leaves.

    Attributes:
        layout: Static structure of the parameters.
    """

    layout: Layout

    @abc.abstractmethod
    def _parts(self) -> list[Part]:
        """Return the blocks, in order; together they cover each leaf once."""

    def _check(self, caller: str) -> None:
        self._check_count(caller)
        sizes = self.layout.sizes
        for part in self._parts():
            n = sum([sizes[i] for i in part.leaves])
            matrix = part.matrix
            if not isinstance(matrix, Tensor) or tuple(matrix.shape) != (n, n):
                got = (
                    f"shape {tuple(matrix.shape)}"
                    if isinstance(matrix, Tensor)
                    else f"a {type(matrix).__name__}"
                )
                raise ShapeError(
                    f"{caller}: expected a matrix of shape {(n, n)}{at(part.name)}, got {got}. It "
                    "needs one row for each scalar of the parameters that it covers."
                )
            check_floating(caller, "the matrix", [matrix], [part.name])

    def _gather(self, caller: str, v: Tree) -> list[Tensor]:
        """Return a tree as one vector for each block, float32 or wider."""
        self._check(caller)
        found = self.layout.leaves(caller, "v", v)
        return [
            wide(torch.cat([found[i].reshape(-1) for i in part.leaves])) for part in self._parts()
        ]

    def _scatter(
        self, vectors: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None
    ) -> Tree:
        """Return vectors, one for each block, as a tree; in the leaves' `dtypes` if given."""
        leaves: list[Tensor] = [torch.empty(0)] * len(self.layout.sizes)
        for part, vector in zip(self._parts(), vectors, strict=True):
            pieces = vector.split([self.layout.sizes[i] for i in part.leaves])
            for i, piece in zip(part.leaves, pieces, strict=True):
                leaves[i] = piece.reshape(self.layout.shapes[i])
        if dtypes is not None:
            leaves = [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        return self.layout.build(leaves)

    def _factors(self, caller: str, damping: Scalar) -> list[spd.Factor]:
        """Return the Cholesky factors of F + λI; if a block has none, raise, or make all NaN."""
        self._check(caller)
        parts = self._parts()
        factors = [spd.cholesky(part.matrix, damping) for part in parts]

        good = self._require(caller, "positive definite", factors, damping)
        return [factor._replace(lower=poison(good, factor.lower)) for factor in factors]

    def _require(
        self,
        caller: str,
        need: str,
        found: Sequence[spd.Factor | spd.Applied],
        damping: Scalar,
    ) -> Tensor | None:
        """Raise if a block is not good, naming the leaf; or return whether all are."""

        def names() -> list[str]:
            pairs = zip(self._parts(), found, strict=True)
            return [self._path(part, int(x.worst)) for part, x in pairs]

        return require(caller, need, names, [x.good for x in found], damping)

    def _path(self, part: Part, coordinate: int) -> str:
        """Return the path of the leaf to which a coordinate of a block belongs."""
        for i in part.leaves:
            coordinate -= self.layout.sizes[i]
            if coordinate < 0:
                return self.layout.paths[i]
        return part.name

    def mv(self, v: Tree) -> Tree:
        """Return F v, a tree like `v`."""
        vectors = self._gather(f"{type(self).__name__}.mv", v)
        return self._scatter(
            [_times(part.matrix, x) for part, x in zip(self._parts(), vectors, strict=True)]
        )

    def solve(self, v: Tree, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)⁻¹ v in the dtype of `v`."""
        caller = f"{type(self).__name__}.solve"
        vectors = self._gather(caller, v)
        factors = self._factors(caller, check_damping(caller, damping))
        found = [spd.solve(factor, x) for factor, x in zip(factors, vectors, strict=True)]
        return self._scatter(found, [x.dtype for x in self.layout.leaves(caller, "v", v)])

    def pow(self, v: Tree, p: float, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)ᵖ v for any real number p."""
        caller = f"{type(self).__name__}.pow"
        vectors = self._gather(caller, v)
        scalar, p = check_damping(caller, damping), check_number(caller, "p", p)
        parts = self._parts()
        dtypes = [_common(part.matrix, x) for part, x in zip(parts, vectors, strict=True)]
        if p == int(p) and abs(p) <= _STEPS:
            vectors = self._integer_power(caller, vectors, int(p), scalar)
        else:
            found = [
                spd.power(part.matrix, x, p, scalar) for part, x in zip(parts, vectors, strict=True)
            ]
            need = "positive definite" if p < 0 else "positive semi-definite"
            good = self._require(caller, need, found, scalar)
            vectors = [poison(good, x.value) for x in found]
        return self._scatter([x.to(dtype) for x, dtype in zip(vectors, dtypes, strict=True)])

    def _integer_power(
        self, caller: str, vectors: list[Tensor], p: int, damping: Scalar
    ) -> list[Tensor]:
        """Return (F + λI)ᵖ v by products or solves, which also have derivatives everywhere."""
        if p < 0:
            factors = self._factors(caller, damping)
            for _ in range(-p):
                vectors = [spd.solve(f, x) for f, x in zip(factors, vectors, strict=True)]
            return vectors
        parts = self._parts()
        for _ in range(p):
            vectors = [
                spd.multiply(part.matrix, x, damping)
                for part, x in zip(parts, vectors, strict=True)
            ]
        return vectors

    def quadratic(self, v: Tree) -> Tensor:
        """Return vᵀ F v, a 0-d tensor."""
        vectors = self._gather(f"{type(self).__name__}.quadratic", v)
        products = [_times(part.matrix, x) for part, x in zip(self._parts(), vectors, strict=True)]
        parts = [y @ x.to(y.dtype) for x, y in zip(vectors, products, strict=True)]
        return total(parts, self.count)

    def trace(self) -> Tensor:
        """Return the trace of F, a 0-d tensor."""
        self._check(f"{type(self).__name__}.trace")
        parts = [wide(part.matrix).diagonal().sum() for part in self._parts()]
        return total(parts, self.count)

    def frobenius(self) -> Tensor:
        """Return the Frobenius norm of F, a 0-d tensor."""
        self._check(f"{type(self).__name__}.frobenius")
        return norm([part.matrix for part in self._parts()], self.count)

    def logdet(self, *, damping: Scalar = 0.0) -> Tensor:
        """Return log det (F + λI), a 0-d tensor."""
        caller = f"{type(self).__name__}.logdet"
        factors = self._factors(caller, check_damping(caller, damping))
        dtype = widest([part.matrix for part in self._parts()])
        return total([spd.logdet(factor) for factor in factors], self.count).to(dtype)

    def diagonal(self) -> Tree:
        """Return the diagonal of F, a tree like the parameters."""
        self._check(f"{type(self).__name__}.diagonal")
        return self._scatter([wide(part.matrix).diagonal() for part in self._parts()])

    def eigenvalues(self) -> Tensor:
        """Return the P eigenvalues of F, largest first."""
        self._check(f"{type(self).__name__}.eigenvalues")
        parts = self._parts()
        if not parts:
            return torch.zeros(0, device=self.count.device)
        found = torch.cat([spd.eigenvalues(part.matrix) for part in parts])
        return found.sort(descending=True).values.to(widest([part.matrix for part in parts]))

    def sample(self, key: Tensor, *, damping: Scalar = 0.0) -> Tree:
        """Return a draw from N(0, (F + λI)⁻¹), a tree like the parameters."""
        caller = f"{type(self).__name__}.sample"
        factors = self._factors(caller, check_damping(caller, damping))
        draws: list[Tensor] = []
        for part, factor in zip(self._parts(), factors, strict=True):
            dtype = wide(part.matrix).dtype
            normals = torch.cat([self.layout.normal(key, i, part.matrix) for i in part.leaves])
            draws.append(spd.whiten(factor, normals).to(dtype))
        return self._scatter(draws)

    def to_dense(self) -> Tensor:
        """Return F as a matrix [P, P]; parameters in insertion order, each row-major."""
        self._check(f"{type(self).__name__}.to_dense")
        parts = self._parts()
        if not parts:
            return torch.zeros(0, 0, device=self.count.device)
        dtype = widest([part.matrix for part in parts])
        matrix = torch.block_diag(*[part.matrix.to(dtype) for part in parts])
        order = [i for part in parts for i in part.leaves]
        if order == sorted(order):
            return matrix
        # Coordinate j of the blocks is coordinate place[j] of the parameters.
        sizes = self.layout.sizes
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        place = [starts[i] + j for i in order for j in range(sizes[i])]
        back = torch.tensor(place, device=matrix.device).argsort()
        return matrix[back][:, back]


def _common(matrix: Tensor, vector: Tensor) -> torch.dtype:
    return torch.promote_types(wide(matrix).dtype, vector.dtype)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    dtype = _common(matrix, vector)
    return matrix.to(dtype) @ vector.to(dtype)
