"""A Fisher information matrix that exists only as products: a function bound to its arguments.

It is a sum Σ_i c_i F(arguments_i) of operators, each a function of (arguments, v). Scaling, sums
and `merge` are exact: they keep the terms. As a pytree its leaves are the coefficients, the
arguments (parameters, buffers, batches, keys) and the count, so that it is differentiated, mapped
over and moved like any other result; on the way it forgets what was computed ahead, which is
computed again when needed. `empty_like` has no terms: the zero matrix on no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide, widest
from fisherfn.core.errors import NotPositiveDefiniteError, OptionError, UnsupportedError
from fisherfn.core.modes import concrete
from fisherfn.core.trees import Tree
from fisherfn.curvature.base import Curvature
from fisherfn.curvature.common import Scalar, check_damping, scalar_like
from fisherfn.curvature.layout import Layout
from fisherfn.linalg import cg

if TYPE_CHECKING:
    from typing_extensions import Self

#: Bytes of the largest matrix that `to_dense` makes.
MATRIX_BUDGET = 2 * 2**30
_BLOCK = 256  # unit vectors that `to_dense` multiplies together, at most
_BLOCK_BYTES = 64 * 2**20


class Operator(Protocol):
    """A symmetric matrix as a function of its arguments."""

    def prepare(self, arguments: Any) -> Operator | None:
        """Compute ahead what products at these arguments share; None if that is not wanted."""
        ...

    def multiply(self, arguments: Any, v: Tree) -> Tree:
        """Return the product with one vector."""
        ...

    def multiply_many(self, arguments: Any, v: Tree) -> Tree:
        """Return the products with vectors stacked along a leading axis."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Implicit(Curvature):
    """A matrix-free curvature: `mv`, `quadratic`, `solve`, `to_dense`; the rest is `ff.linalg`'s.

    Attributes:
        coefficients: c_i, 0-d tensors.
        arguments: What each operator is bound to.
        count: N, the units averaged over; 0-d float tensor.
        operators: Static: each a function of (arguments, v).
        layout: Static structure of the parameters, `Layout.of(params)`.
        fisher: Which labels were used; "hessian" for a Hessian.
        unit: What is counted.
    """

    coefficients: tuple[Tensor, ...]
    arguments: tuple[Any, ...]
    count: Tensor
    operators: tuple[Any, ...]
    layout: Layout
    _: KW_ONLY
    fisher: str = "exact"
    unit: str = "example"

    def _summary(self) -> str:
        terms = "" if len(self.operators) == 1 else f", {len(self.operators)} terms"
        return f"{self.layout.size} x {self.layout.size}, matrix-free{terms}"

    def _check(self, caller: str) -> None:
        self._check_count(caller)

    def _check_same(self, caller: str, other: Any) -> None:
        other.layout.check_same(caller, self.layout)

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        count = self.count if count is None else count
        coefficients = tuple([c * scalar_like(a, c) for c in self.coefficients])
        if other is None:
            return replace(self, coefficients=coefficients, count=count)
        more = tuple([c * scalar_like(b, c) for c in other.coefficients])
        return replace(
            self,
            coefficients=coefficients + more,
            arguments=self.arguments + other.arguments,
            operators=self.operators + other.operators,
            count=count,
        )

    def __fisher_empty__(self) -> Self:
        zero = torch.zeros_like(self.count)
        return replace(self, coefficients=(), arguments=(), operators=(), count=zero)

    # ---- answers ---------------------------------------------------------------------------------

    def mv(self, v: Tree) -> Tree:
        """Return F v, a tree like `v`.

        Raises:
            TreeMismatchError: `v` is not like the parameters.
        """
        found = self.layout.leaves("Implicit.mv", "v", v)
        vector = self.layout.build(found)
        return self._sum(lambda i, op: op.multiply(self.arguments[i], vector), found)

    def quadratic(self, v: Tree) -> Tensor:
        """Return vᵀ F v, a 0-d tensor."""
        return trees.dot(v, self.mv(v))

    def solve(
        self,
        v: Tree,
        *,
        damping: Scalar = 0.0,
        max_steps: int | None = None,
        tolerance: float = 1e-8,
        preconditioner: Callable[[Tree], Tree] | None = None,
    ) -> Tree:
        """Return (F + λI)⁻¹ v by conjugate gradients, in the dtype of `v`.

        Args:
            v: Tree like the parameters.
            damping: The λ of F + λI.
            max_steps: Products, at most; has to be given inside transformations.
            tolerance: Largest residual, as a share of ‖v‖; at least the rounding of the dtype.
            preconditioner: v to roughly (F + λI)⁻¹ v, such as the solve of a K-FAC.

        Returns:
            The solution.

        Raises:
            NotPositiveDefiniteError: it did not converge; `ff.linalg.cg(F.mv, v, ...)` gives the
                best there is, as a value. Inside transformations the result is NaN.
        """
        damping = check_damping("Implicit.solve", damping)
        found = self.layout.leaves("Implicit.solve", "v", v)
        rounding = 32 * max([torch.finfo(wide(t).dtype).eps for t in found], default=0.0)
        solution = cg(
            self.mv,
            self.layout.build(found),
            damping=damping,
            preconditioner=preconditioner,
            max_steps=max_steps,
            tolerance=max(tolerance, rounding),
        )
        good = solution.converged
        if concrete(good):
            if not bool(good):
                raise NotPositiveDefiniteError(
                    "Implicit.solve: expected conjugate gradients to converge, got a residual of "
                    f"{float(solution.residual):.2g} after {int(solution.steps)} steps: "
                    f"{solution.reason}. Raise damping= or max_steps=, give a preconditioner=, or "
                    "take the best there is from ff.linalg.cg(F.mv, v)."
                )
            return solution.value
        return trees.map(lambda t: torch.where(good, t, float("nan")), solution.value)

    def pow(self, v: Tree, p: float, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)ᵖ v for p = -1 and for small whole numbers.

        Raises:
            UnsupportedError: any other power.
        """
        if p == -1:
            return self.solve(v, damping=damping)
        if isinstance(p, bool) or p != int(p) or not 0 <= p <= 16:
            raise UnsupportedError(
                f"Implicit.pow: expected p = -1 or a whole number from 0 to 16, got {p!r}. Other "
                "functions of a matrix-free F come from ff.linalg.lanczos(F.mv, params, key=key)."
            )
        damping = check_damping("Implicit.pow", damping)
        v = trees.map(wide, self.layout.build(self.layout.leaves("Implicit.pow", "v", v)))
        for _ in range(int(p)):
            product = self.mv(v)
            v = trees.map(lambda a, b: a + b * scalar_like(damping, b), product, v)
        return v

    def to_dense(self) -> Tensor:
        """Return F as a matrix [P, P], from its products with all unit vectors.

        Raises:
            OptionError: the matrix is larger than `MATRIX_BUDGET`.
        """
        like = self._like()
        size, dtype = self.layout.size, widest(like)
        needed = size * size * torch.empty((), dtype=dtype).element_size()
        if needed > MATRIX_BUDGET:
            raise OptionError(
                f"Implicit.to_dense: expected a matrix of at most {MATRIX_BUDGET / 2**30:.0f} GiB, "
                f"got {needed / 2**30:.3g} GiB. Ask ff.linalg with F.mv, or select fewer "
                "parameters."
            )
        device = like[0].device if like else self.count.device
        rows = []
        step = max(1, min(_BLOCK, size * _BLOCK_BYTES // max(1, needed)))
        for first in range(0, size, step):
            index = torch.arange(first, min(size, first + step), device=device)
            units = (torch.arange(size, device=device) == index.unsqueeze(1)).to(dtype)
            parts = zip(units.split(self.layout.sizes, 1), self.layout.shapes, strict=True)
            stack = [part.reshape(len(index), *shape) for part, shape in parts]
            tree = self.layout.build(stack)
            found = self._sum(lambda i, op, t=tree: op.multiply_many(self.arguments[i], t), stack)
            flat = [leaf.reshape(len(index), -1) for leaf in _in_order(self.layout, found)]
            rows.append(torch.cat(flat, 1))
        matrix = torch.cat(rows) if rows else torch.zeros(0, 0)
        return (matrix + matrix.T) / 2  # symmetric but for rounding

    def linear_operator(self) -> Any:
        """Return F as a `scipy.sparse.linalg.LinearOperator` on numpy vectors [P].

        Raises:
            UnsupportedError: scipy is not installed.
        """
        try:
            from scipy.sparse import linalg as sparse
        except ImportError as error:
            raise UnsupportedError(
                "Implicit.linear_operator: expected scipy, got none. Install it with "
                "pip install scipy."
            ) from error
        like = self._like()
        dtype = widest(like)
        device = like[0].device if like else self.count.device

        def product(x: Any) -> Any:
            vector = torch.as_tensor(x, dtype=dtype).to(device).reshape(-1)
            tree = self.mv(self.layout.unravel(vector))
            flat = self.layout.ravel("Implicit.linear_operator", "F v", tree)
            return flat.detach().cpu().numpy().reshape(x.shape)

        kind = torch.empty((), dtype=dtype).numpy().dtype
        make: Any = sparse.LinearOperator
        return make((self.layout.size,) * 2, matvec=product, rmatvec=product, dtype=kind)

    # ---- what products cannot answer exactly -----------------------------------------------------

    def trace(self) -> NoReturn:
        """Raise: estimate it with `ff.linalg`."""
        self._refuse("trace", "ff.linalg.xtrace(F.mv, params, key=key)")

    def frobenius(self) -> NoReturn:
        """Raise: estimate it with `ff.linalg`."""
        self._refuse(
            "frobenius",
            "the root of ff.linalg.hutchpp(lambda v: F.mv(F.mv(v)), params, key=key).value",
        )

    def logdet(self, *, damping: Scalar = 0.0) -> NoReturn:
        """Raise: estimate it with `ff.linalg`."""
        self._refuse("logdet", "ff.linalg.slq(F.mv, params, key=key)")

    def diagonal(self) -> NoReturn:
        """Raise: estimate it with `ff.linalg`, or ask `ff.diagonal`."""
        self._refuse("diagonal", "ff.diagonal(...), or ff.linalg.xdiag(F.mv, params, key=key)")

    def eigenvalues(self) -> NoReturn:
        """Raise: compute some with `ff.linalg`."""
        self._refuse("eigenvalues", "ff.linalg.lanczos(F.mv, params, k=5, key=key)")

    def sample(self, key: Tensor, *, damping: Scalar = 0.0) -> NoReturn:
        """Raise: draw from a representation with a square root."""
        self._refuse("sample", "ff.low_rank(...) or ff.kfac(...), or ff.linalg.lanczos(F.mv, ...)")

    def _refuse(self, name: str, instead: str) -> NoReturn:
        raise UnsupportedError(
            f"Implicit.{name}: expected a question that products answer exactly, got {name}(). Use "
            f"{instead}; Implicit.to_dense() for small models."
        )

    # ---- inside ----------------------------------------------------------------------------------

    def _like(self) -> list[Tensor]:
        """Return zeros like the parameters, without memory; on the device of the arguments."""
        found = [t for t in trees.leaves(list(self.arguments)) if isinstance(t, Tensor)]
        device = found[0].device if found else self.count.device
        zero = torch.zeros((), device=device)
        return [
            zero.to(dtype).expand(shape)
            for shape, dtype in zip(self.layout.shapes, self.layout.dtypes, strict=True)
        ]

    def prepared(self, ready: Operator) -> Self:
        """Take over what was computed ahead for the only term; returns the same object."""
        object.__setattr__(self, "_prepared", {0: ready})
        return self

    def _ready(self, index: int) -> Any:
        """Return an operator with what could be computed ahead, kept for the next product."""
        operator = self.operators[index]
        if not concrete(*trees.leaves(self.arguments[index])):
            return operator
        known = self.__dict__.get("_prepared")
        if known is None:
            known = {}
            object.__setattr__(self, "_prepared", known)
        if index not in known:
            known[index] = operator.prepare(self.arguments[index])
        return known[index] or operator

    def _sum(self, multiply: Callable[[int, Any], Tree], like: list[Tensor]) -> Tree:
        """Return Σ c_i F_i v, in float32 or wider."""
        total = self.layout.build([torch.zeros_like(wide(t)) for t in like])
        for index, c in enumerate(self.coefficients):
            found = multiply(index, self._ready(index))
            total = trees.map(lambda a, b, c=c: a + wide(b) * scalar_like(c, wide(b)), total, found)
        return total


def _in_order(layout: Layout, tree: Tree) -> list[Tensor]:
    """Return the leaves of a tree in the order of a layout."""
    template = layout.build(list(range(len(layout.sizes))))
    order, found = trees.leaves(template), trees.leaves(trees.map(lambda _, t: t, template, tree))
    placed = sorted(zip(order, found, strict=True), key=lambda pair: pair[0])
    return [t for _, t in placed]


trees.register_dataclass_node(
    Implicit,
    ("coefficients", "arguments", "count"),
    ("operators", "layout", "fisher", "unit"),
)
