"""A matrix that is kept as weighted rows: its structure, sums, and products with vectors.

F = Σ_r w_r s_r s_rᵀ, rows s_r as a tree with leaves [R, *shape]; what needs no factorisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide, widest, working_dtype
from fisherfn.core.errors import ShapeError, UnsupportedError, at
from fisherfn.core.trees import Tree
from fisherfn.curvature import gram
from fisherfn.curvature.base import Curvature
from fisherfn.curvature.common import norm, total
from fisherfn.curvature.diagonal import check_tensors


class Rows(Curvature):
    """Base of the representation that keeps rows.

    Attributes:
        rows: Tree like the parameters, each leaf [R, *shape].
        weights: [R].
        signed: Whether weights may be below zero.
    """

    rows: Tree
    weights: Tensor
    signed: bool

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum([prod(leaf.shape[1:]) for leaf in trees.leaves(self.rows)])

    def _summary(self) -> str:
        if not isinstance(self.weights, Tensor):
            return "no rows"
        rank = self.weights.shape[-1] if self.weights.ndim else 0
        entries = sum([prod(x.shape[self.weights.ndim :]) for x in trees.leaves(self.rows)])
        return f"{rank} {'row' if rank == 1 else 'rows'}, {entries} entries"

    def _check(self, caller: str) -> None:
        self._check_count(caller)
        check_rows(caller, self.rows, self.weights)

    def _check_same(self, caller: str, other: Any) -> None:
        ours, theirs = template(self.rows), template(other.rows)
        trees.check_like(caller, "the second rows", theirs, ours, like_name="the first")

    def _vector(self, caller: str, v: Tree) -> list[Tensor]:
        """Return the leaves of a tree like the parameters, checked, each as a vector."""
        self._check(caller)
        trees.check_like(caller, "v", v, template(self.rows))
        check_tensors(caller, "v", v)
        aligned = trees.map(lambda _, x: x.reshape(-1), self.rows, v)
        return trees.leaves(aligned)

    @property
    def _flat(self) -> list[Tensor]:
        """The leaves of the rows as matrices [R, p]."""
        return [x.reshape(len(x), prod(x.shape[1:])) for x in trees.leaves(self.rows)]

    @property
    def _dtype(self) -> torch.dtype:
        return widest([*trees.leaves(self.rows), self.weights])

    @property
    def _thin(self) -> bool:
        """Whether the space of the rows is smaller than that of the parameters."""
        return len(self.weights) < self.size

    def _tree(self, vectors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Tree:
        """Return vectors, one a leaf, as a tree like the parameters in these dtypes."""
        like, treedef = trees.flatten(self.rows)
        shaped = [
            x.reshape(leaf.shape[1:]).to(dtype)
            for x, leaf, dtype in zip(vectors, like, dtypes, strict=True)
        ]
        return trees.unflatten(treedef, shaped)

    def _wide(self, vectors: Sequence[Tensor], given: Sequence[Tensor]) -> Tree:
        """Return vectors as a tree, in the common dtype of the rows and of what was given."""
        return self._tree(vectors, [torch.promote_types(self._dtype, x.dtype) for x in given])

    # --- from the rows as they are ----------------------------------------------------------------

    def mv(self, v: Tree) -> Tree:
        """Return F v, a tree like `v`."""
        vectors = self._vector("LowRank.mv", v)
        return self._wide(self._times(vectors, widest([*vectors, *self._flat])), vectors)

    def _times(self, vectors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if not vectors:
            return []
        inside = gram.project(self._flat, vectors, dtype)
        return gram.expand(self._flat, inside * self.weights.to(inside))

    def quadratic(self, v: Tree) -> Tensor:
        """Return vᵀ F v, a 0-d tensor."""
        vectors = self._vector("LowRank.quadratic", v)
        if not vectors:
            return total([], self.count)
        inside = gram.project(self._flat, vectors, widest([*vectors, *self._flat, self.weights]))
        return (inside.square() * self.weights.to(inside)).sum()

    def trace(self) -> Tensor:
        """Return the trace of F, a 0-d tensor."""
        self._check("LowRank.trace")
        squares = [wide(m).square().sum(1) @ self.weights.to(wide(m)) for m in self._flat]
        return total(squares, self.count)

    def frobenius(self) -> Tensor:
        """Return the Frobenius norm of F, a 0-d tensor."""
        self._check("LowRank.frobenius")
        if not self._thin:
            return norm([self._matrix()], self.count).to(self._dtype)
        k = self._kernel()
        if not self.signed:
            return norm([k.matrix], self.count).to(self._dtype)
        return norm([gram.factored(k, signed=True).values], self.count).to(self._dtype)

    def diagonal(self) -> Tree:
        """Return the diagonal of F, a tree like the parameters."""
        self._check("LowRank.diagonal")
        found = [self.weights.to(wide(m)) @ wide(m).square() for m in self._flat]
        return self._tree(found, [wide(m).dtype for m in self._flat])

    def to_dense(self) -> Tensor:
        """Return F as a matrix [P, P]; parameters in insertion order, each row-major."""
        self._check("LowRank.to_dense")
        return self._matrix().to(self._dtype)

    def gram(self) -> Tensor:
        """Return √w S Sᵀ √w [R, R], float64: the empirical neural tangent kernel of the rows.

        Its eigenvalues that are not zero are those of F.

        Returns:
            Symmetric matrix; the rows are those of `rows`.

        Raises:
            UnsupportedError: Weights may be negative, and no such matrix exists.
        """
        self._check("LowRank.gram")
        if self.signed:
            raise UnsupportedError(
                "LowRank.gram: expected weights that are not negative, got those of a difference "
                "or of a product with a tensor. Use eigenvalues(), or scale by a positive number."
            )
        return self._kernel().matrix

    def _kernel(self) -> gram.Kernel:
        return gram.kernel(self._flat, self.weights)

    def _matrix(self) -> Tensor:
        """Return F [P, P] in float64."""
        dtype = working_dtype(self.weights)
        w = self.weights.to(dtype)
        if not self._flat:
            return w.new_zeros(0, 0)
        rows = torch.cat([m.to(w) for m in self._flat], dim=1)
        matrix = (rows * w[:, None]).mT @ rows
        return 0.5 * (matrix + matrix.mT)


def template(rows: Tree) -> Tree:
    """Return a tree of tensors that have the shapes and dtypes of one row."""
    return trees.map(lambda x: x.new_empty(x.shape[1:]), rows)


def check_rows(caller: str, rows: Tree, weights: Any) -> None:
    """Check that there is one weight for each row, and one row of every leaf for each weight.

    Raises:
        ShapeError: There is not, or one of them is not floating point.
        TreeMismatchError: A leaf is no tensor.
    """
    if not isinstance(weights, Tensor) or weights.ndim != 1 or not weights.is_floating_point():
        got = (
            f"{weights.dtype} of shape {tuple(weights.shape)}"
            if isinstance(weights, Tensor)
            else type(weights).__name__
        )
        raise ShapeError(
            f"{caller}: expected weights to be floating point of shape [R], got {got}. Give one "
            "for each row; ones if F is the plain sum."
        )
    check_tensors(caller, "rows", rows)
    leaves = trees.leaves(rows)
    if all([leaf.ndim > 0 and len(leaf) == len(weights) for leaf in leaves]):
        return
    for path, leaf in zip(trees.paths(rows), leaves, strict=True):
        if leaf.ndim == 0 or len(leaf) != len(weights):
            raise ShapeError(
                f"{caller}: expected {len(weights)} rows, one for each weight, got shape "
                f"{tuple(leaf.shape)}{at(path)}. The rows are the first axis of every leaf."
            )


def weakest(rows: Tree, flat: Sequence[Tensor], k: gram.Kernel, f: gram.Factored) -> str:
    """Return the path of the leaf that is most to blame for F + λI having no inverse.

    That is one that is not finite; or the one in which the direction of the lowest eigenvalue is
    strongest, if that is below zero; or the one that the rows cover least.
    """
    paths = trees.paths(rows)
    finite = [bool(m.isfinite().all()) for m in flat]
    if not all(finite) or not bool(f.good) or not len(k.roots):
        return paths[finite.index(False)] if not all(finite) else paths[0]
    lowest = f.values.argmin()
    negative = bool(f.values[lowest] < -1e-12 * f.values.abs().max())
    scores = []
    for m in flat:
        columns = f.vectors[:, lowest : lowest + 1] if negative else f.vectors
        covered = (m.to(columns).mT @ (k.roots[:, None] * columns)).square().sum(1)
        found = covered if negative else 1.0 - covered
        scores.append(found.max().item() if len(found) else -1.0)
    return paths[scores.index(max(scores))]
