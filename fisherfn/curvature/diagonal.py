"""The diagonal of the Fisher information, as a tree like the parameters.

`values` holds F_ii = (1/N) sum_n E_y[ s_ni^2 ]; the matrix represented is diag(values).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.errors import TreeMismatchError, at
from fisherfn.core.trees import Tree
from fisherfn.curvature.base import Curvature
from fisherfn.curvature.common import (
    Scalar,
    check_damping,
    check_floating,
    check_number,
    combine,
    hypot,
    norm,
    poison,
    require,
    scalar_like,
    total,
)

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Curvature):
    """diag(values): see `fisherfn.curvature.base` for the algebra and its conventions.

    Attributes:
        values: Tree like the parameters, entries F_ii.
        count: N, the units averaged over; 0-d float tensor.
        stderr: Tree like `values`, the standard error of each entry as an estimate of the
            expectation over labels, or None if it is exact or not known.
        fisher: Which labels were used.
        unit: What is counted.

    Example:
        >>> import torch
        >>> F = Diagonal({"w": torch.tensor([1.0, 3.0])}, torch.tensor(8.0))
        >>> F.trace(), F.solve({"w": torch.ones(2)}, damping=1.0)
        (tensor(4.), {'w': tensor([0.5000, 0.2500])})
        >>> (2 * F + F).values
        {'w': tensor([3., 9.])}
        >>> F
        Diagonal(1 leaf, 2 entries, count=8, fisher='exact', unit='example')
    """

    values: Tree
    count: Tensor
    stderr: Tree | None = None
    _: KW_ONLY
    fisher: str = "exact"
    unit: str = "example"

    _averages = ("values",)
    _entrywise = True

    def _summary(self) -> str:
        leaves = trees.leaves(self.values)
        entries = sum([leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)])
        return f"{len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'}, {entries} entries"

    def _check(self, caller: str) -> None:
        self._check_count(caller)
        check_tensors(caller, "values", self.values)
        if self.stderr is not None:
            trees.check_like(caller, "stderr", self.stderr, self.values, like_name="values")

    def _check_same(self, caller: str, other: Any) -> None:
        trees.check_like(
            caller, "the second values", other.values, self.values, like_name="the first"
        )

    def _check_vector(self, caller: str, v: Tree) -> None:
        self._check_count(caller)
        trees.check_like(caller, "v", v, self.values)
        check_tensors(caller, "v", v)

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        count = self.count if count is None else count
        if other is None:
            values = trees.map(lambda x: combine(a, x), self.values)
            stderr = self.stderr
            if stderr is not None:
                stderr = trees.map(lambda x: combine(a, x).abs(), stderr)
            return replace(self, values=values, count=count, stderr=stderr)
        values = trees.map(lambda x, y: combine(a, x, b, y), self.values, other.values)
        stderr = None
        if self.stderr is not None and other.stderr is not None:
            stderr = trees.map(
                lambda x, y: hypot(combine(a, x), combine(b, y)), self.stderr, other.stderr
            )
        return replace(self, values=values, count=count, stderr=stderr)

    def _shifted(
        self, caller: str, damping: Any, need: str, holds: Callable[[Tensor], Tensor] | None
    ) -> Tree:
        """Return values + λ where every entry passes a test, or say where one does not."""
        self._check_count(caller)
        scalar = check_damping(caller, damping)

        def shift(x: Tensor) -> Tensor:
            x = wide(x)
            return x + scalar_like(scalar, x)

        shifted = trees.map(shift, self.values)
        if holds is None:
            return shifted
        leaves, treedef = trees.flatten(shifted)
        good = [holds(x).all() for x in leaves]
        known = require(caller, need, lambda: trees.paths(shifted), good, scalar)
        return trees.unflatten(treedef, [poison(known, x) for x in leaves])

    def _positive(self, caller: str, damping: Any) -> Tree:
        return self._shifted(caller, damping, "positive definite", lambda x: x > 0)

    def mv(self, v: Tree) -> Tree:
        """Return F v, a tree like `v`."""
        self._check_vector("Diagonal.mv", v)
        return trees.map(lambda f, x: wide(f) * wide(x), self.values, v)

    def solve(self, v: Tree, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)⁻¹ v in the dtype of `v`."""
        self._check_vector("Diagonal.solve", v)
        shifted = self._positive("Diagonal.solve", damping)
        return trees.map(lambda f, x: (wide(x) / f).to(x.dtype), shifted, v)

    def pow(self, v: Tree, p: float, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)ᵖ v for any real number p."""
        caller = "Diagonal.pow"
        self._check_vector(caller, v)
        p = check_number(caller, "p", p)
        if p < 0:
            shifted = self._positive(caller, damping)
        elif p == int(p):
            shifted = self._shifted(caller, damping, "", None)
        else:
            shifted = self._shifted(caller, damping, "positive semi-definite", lambda x: x >= 0)
        return trees.map(lambda f, x: f**p * wide(x), shifted, v)

    def quadratic(self, v: Tree) -> Tensor:
        """Return vᵀ F v, a 0-d tensor."""
        self._check_vector("Diagonal.quadratic", v)
        parts = trees.map(lambda f, x: (wide(f) * wide(x).square()).sum(), self.values, v)
        return total(trees.leaves(parts), self.count)

    def trace(self) -> Tensor:
        """Return the trace of F, a 0-d tensor."""
        self._check_count("Diagonal.trace")
        return total([wide(f).sum() for f in trees.leaves(self.values)], self.count)

    def frobenius(self) -> Tensor:
        """Return the Frobenius norm of F, a 0-d tensor."""
        self._check_count("Diagonal.frobenius")
        return norm(trees.leaves(self.values), self.count)

    def logdet(self, *, damping: Scalar = 0.0) -> Tensor:
        """Return log det (F + λI), a 0-d tensor."""
        shifted = self._positive("Diagonal.logdet", damping)
        return total([f.log().sum() for f in trees.leaves(shifted)], self.count)

    def diagonal(self) -> Tree:
        """Return the diagonal of F, a tree like the parameters."""
        self._check_count("Diagonal.diagonal")
        return trees.map(wide, self.values)

    def eigenvalues(self) -> Tensor:
        """Return the P eigenvalues of F, largest first."""
        self._check_count("Diagonal.eigenvalues")
        return wide(trees.ravel(self.values)[0]).sort(descending=True).values

    def sample(self, key: Tensor, *, damping: Scalar = 0.0) -> Tree:
        """Return a draw from N(0, (F + λI)⁻¹), a tree like the parameters."""
        shifted = self._positive("Diagonal.sample", damping)
        normals = trees.random_like(key, shifted)
        return trees.map(lambda f, z: z * f.rsqrt(), shifted, normals)

    def to_dense(self) -> Tensor:
        """Return F as a matrix [P, P]; parameters in insertion order, each row-major."""
        self._check_count("Diagonal.to_dense")
        return wide(trees.ravel(self.values)[0]).diag()


def check_tensors(caller: str, name: str, tree: Tree) -> None:
    """Check that the leaves of a tree are real floating-point tensors.

    Raises:
        TreeMismatchError: A leaf is no tensor.
        ShapeError: A leaf is not floating point.
    """
    leaves = trees.leaves(tree)
    if all([isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]):
        return
    paths = trees.paths(tree)
    for leaf, path in zip(leaves, paths, strict=True):
        if not isinstance(leaf, Tensor):
            raise TreeMismatchError(
                f"{caller}: expected {name} to be a tree of tensors, got "
                f"{type(leaf).__name__}{at(path)}. Give one tensor for each parameter."
            )
    check_floating(caller, name, leaves, paths)


trees.register_dataclass_node(Diagonal, ("values", "count", "stderr"), ("fisher", "unit"))
