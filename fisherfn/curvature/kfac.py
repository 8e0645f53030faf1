"""Kronecker-factored blocks, and a diagonal for everything else.

A block is G ⊗ A: W [O, I] goes to G W A. With inputs a and cotangents g at the rows that share the
weight, N units and weights w,

    expand: A = (1/R) Σ w a aᵀ over all R rows,             G = (1/N) Σ w g gᵀ over all rows
    reduce: A = (1/R) Σ w ā āᵀ over R units, ā a mean,      G = (1/N) Σ w ĝ ĝᵀ, ĝ a sum over rows

so that the block is (Σ w A)(Σ w G) / (N R). Martens & Grosse (2015), Optimizing neural networks
with Kronecker-factored approximate curvature, section 3; Eschenhagen et al. (2023),
Kronecker-factored approximate curvature for modern neural network architectures, section 3.

F + λI has no Kronecker form, but it is diagonal in the Kronecker eigenbasis (`eigh`).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide, widest
from fisherfn.core.errors import OptionError
from fisherfn.core.merging import merge_weights
from fisherfn.core.trees import Tree
from fisherfn.curvature import kronecker_spectra as spectra
from fisherfn.curvature.common import (
    Scalar,
    check_number,
    norm,
    poison,
    require,
    scalar_like,
    total,
)
from fisherfn.curvature.ekfac import EKFAC
from fisherfn.curvature.kronecker import Block
from fisherfn.curvature.kronecker_base import Kronecker
from fisherfn.curvature.kronecker_factors import (
    Side,
    added,
    average,
    decomposed,
    diagonal_of,
    full_of,
    is_zero,
    multiplier,
    norms_of,
    output_side,
    padded,
    scaled,
    shape_of,
    tikhonov,
)
from fisherfn.curvature.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Self

# Up to here, an integer power is that many products.
_STEPS = 4


@dataclass(frozen=True, eq=False, repr=False)
class KFAC(Kronecker):
    """Kronecker blocks: see `fisherfn.curvature.base` for the algebra and its conventions.

    `c * F` multiplies the input factors. `F + G` exists where all factors of one side agree, as in
    `c * F + d * F`, and raises elsewhere. `merge` is the result on the joined data.

    Attributes:
        inputs: A for each block: [R or 1, I, I], or what `Block.input_form` says.
        outputs: G for each block: [R, O, O], or what `Block.output_form` says.
        rows: How many rows each A is an average over, 0-d float tensors.
        rest: For each leaf that no block takes, by path, its exact diagonal.
        count: N, the units averaged over; 0-d float tensor.
        layout: Static structure of the parameters.
        blocks: Static description of the blocks.
        approx: "expand" or "reduce".
        fisher: Which labels were used; "forward_only" if G is the identity.
        unit: What is counted.

    Example:
        >>> from fisherfn.curvature.kronecker import Block, Piece
        >>> layout = Layout.of({"w": torch.zeros(1, 2)})
        >>> block = Block("w", Piece("w", (("reshape", (1, 2), (1, 1, 2)),)), None, 1, 1, 2)
        >>> A, G = {"w": torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])}, {"w": torch.ones(1, 1, 1)}
        >>> F = KFAC(A, G, {"w": torch.tensor(8.0)}, {}, torch.tensor(8.0), layout, (block,))
        >>> F.eigenvalues(), F.solve({"w": torch.tensor([[3.0, 3.0]])})
        (tensor([3., 1.]), {'w': tensor([[1., 1.]])})
        >>> F
        KFAC(1 block, 0 diagonal leaves, expand, count=8, fisher='exact', unit='example')
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    rows: dict[str, Tensor]
    rest: dict[str, Tensor]
    count: Tensor
    layout: Layout
    blocks: tuple[Block, ...]
    approx: str = "expand"
    _: KW_ONLY
    fisher: str = "exact"
    unit: str = "example"

    _by_block: ClassVar[tuple[str, ...]] = ("inputs", "outputs", "rows")

    def _summary(self) -> str:
        return f"{super()._summary()}, {self.approx}"

    def _check_blocks(self, caller: str) -> None:
        self._check_names(caller, "an input factor", self.inputs)
        self._check_names(caller, "an output factor", self.outputs)
        self._check_names(caller, "a number of rows", self.rows)
        for b in self.blocks:
            shapes = [(r, *shape_of(b.inputs, b.input_form)) for r in {1, b.groups}]
            self._check_factor(caller, "the input factor", b.name, self.inputs[b.name], shapes)
            shapes = [(b.groups, *shape_of(b.outputs, b.output_form))]
            self._check_factor(caller, "the output factor", b.name, self.outputs[b.name], shapes)

    def _check_same(self, caller: str, other: Any) -> None:
        super()._check_same(caller, other)
        if self.approx != other.approx:
            raise OptionError(
                f"{caller}: expected two results with the same approx, got {self.approx!r} and "
                f"{other.approx!r}. Compute both with the same options."
            )

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        count = self.count if count is None else count
        rest = self._rest_linear(a, other, b)
        inputs, outputs, rows = {}, {}, {}
        for block in self.blocks:
            name, forms = block.name, (block.input_form, block.output_form)
            A, G, n = self.inputs[name], self.outputs[name], self.rows[name]
            if other is None:
                inputs[name], outputs[name] = scaled(forms, A, G, a, name)
            else:
                B, H = other.inputs[name], other.outputs[name]
                inputs[name], outputs[name] = added(forms, (a, A, G), (b, B, H), name)
                n = n + other.rows[name]
            rows[name] = n
        return replace(self, inputs=inputs, outputs=outputs, rows=rows, rest=rest, count=count)

    def __fisher_merge__(self, other: Any) -> Self:
        self._check_pair("merge", other)
        a, b, count = merge_weights(self.count, other.count)
        inputs, outputs, rows = {}, {}, {}
        for block in self.blocks:
            name = block.name
            c, d, rows[name] = merge_weights(self.rows[name], other.rows[name])
            A, B = self.inputs[name], other.inputs[name]
            inputs[name] = average(block.input_form, c, A, d, B)
            G, H = self.outputs[name], other.outputs[name]
            outputs[name] = average(block.output_form, a, G, b, H)
        rest = self._rest_linear(a, other, b)
        return replace(self, inputs=inputs, outputs=outputs, rows=rows, rest=rest, count=count)

    def eigh(self, *, thin: bool = True) -> EKFAC:
        """Return the same matrix in its Kronecker eigenbasis, to be used many times.

        Asked of the result, all questions about F + λI cost products only. To refresh the inverses
        every k steps, keep this value for k steps.

        Args:
            thin: Leave out the eigenvectors of the eigenvalue zero where they are many, as for a
                factor of fewer rows than its size. Where values are hidden, all are kept.

        Returns:
            An `EKFAC` with basis "factors". A factor that is not finite gives NaN, and an error
            that names the block where a solution is asked for.

        Cost: an eigendecomposition of each factor, in its own dtype (in float64 where that fails);
        factors of one shape together, a shared factor once, and one of few rows through a matrix
        of their number.
        """
        self._check("KFAC.eigh")
        found = decomposed(self.blocks, self.outputs, self.inputs, self.rows if thin else None)
        scales, outputs, inputs, blocks = {}, {}, {}, []
        for b in self.blocks:
            left, right = found[b.name]
            values, outputs[b.name], form = output_side(left, b, self.fisher == "forward_only")
            blocks.append(replace(b, output_form=form, input_form=right.form))
            product = values.unsqueeze(-1) * padded(right.values, right.form).unsqueeze(-2)
            # what is not finite must not pass for singular
            scales[b.name] = torch.where(left.good & right.good, product, torch.nan)
            if right.basis is not None:
                inputs[b.name] = right.basis
        made = scales, outputs, inputs, self.rest, self.count, self.layout, tuple(blocks)
        return EKFAC(*made, "factors", fisher=self.fisher, unit=self.unit)

    def _lower(
        self, caller: str, pairs: list[tuple[Scalar, Scalar]], damping: Scalar
    ) -> list[tuple[Side, Side]]:
        """Return how to divide by G + γI and A + αI, checked; λ is added to `rest` elsewhere."""
        found = []
        good: list[Tensor] = []
        for b, (gamma, alpha) in zip(self.blocks, pairs, strict=True):
            left = Side.of(self.outputs[b.name], b.output_form, gamma)
            right = Side.of(self.inputs[b.name], b.input_form, alpha)
            good.append(left.good & right.good)
            found.append((left, right))
        rest = [wide(x) + scalar_like(damping, wide(x)) > 0 for x in self.rest.values()]
        good += [x.all() for x in rest]
        known = require(caller, "positive definite", self._names, good, damping)
        return [(left.poisoned(known), right.poisoned(known)) for left, right in found]

    def _divide(
        self, caller: str, v: Tree, pairs: list[tuple[Scalar, Scalar]], damping: Scalar
    ) -> Tree:
        matrices, rest = self._gather(caller, v)
        sides = self._lower(caller, pairs, damping)
        found = [
            spectra.both_sides(x, left.solve, right.solve)
            for x, (left, right) in zip(matrices, sides, strict=True)
        ]
        known = torch.ones((), dtype=torch.bool, device=self.count.device)
        for left, right in sides:
            known = known & left.good & right.good
        for path, x in rest.items():
            f = wide(self.rest[path]) + scalar_like(damping, wide(self.rest[path]))
            rest[path] = poison(known & (f > 0).all(), x / f)
        return self._scatter(found, rest)

    def mv(self, v: Tree) -> Tree:
        """Return F v, a tree like `v`."""
        matrices, rest = self._gather("KFAC.mv", v)
        return self._scatter(*self._times(matrices, rest, 0.0))

    def _times(
        self, matrices: list[Tensor], rest: dict[str, Tensor], damping: Scalar
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return (F + λI) times stacks and the leaves of `rest`."""
        found = []
        for b, x in zip(self.blocks, matrices, strict=True):
            G, A = self._factors(b)
            x = x.to(widest([x, A, G]))
            left, right = multiplier(G, b.output_form, x), multiplier(A, b.input_form, x)
            y = spectra.both_sides(x, left, right)
            found.append(y + x * scalar_like(damping, x))
        diagonal = {path: wide(f) for path, f in self.rest.items()}
        return found, {
            path: x * (diagonal[path] + scalar_like(damping, diagonal[path]))
            for path, x in rest.items()
        }

    def solve(
        self, v: Tree, *, damping: Scalar = 0.0, relative: bool = False, factored: bool = False
    ) -> Tree:
        """Return (F + λI)⁻¹ v in the dtype of `v`.

        Args:
            v: Tree like the parameters.
            damping: λ.
            relative: λ is given in units of the mean eigenvalue of F.
            factored: Divide by (G + √λ/π I) ⊗ (A + π√λ I) instead, another matrix, with π² the
                ratio of the mean eigenvalues of A and G (Martens & Grosse 2015, section 6.3).

        Returns:
            Tree like `v`.

        Raises:
            NotPositiveDefiniteError: F + λI is singular or not finite; it names the block.

        Cost: two Cholesky factorisations a block for λ = 0 or `factored`, otherwise `eigh`.
        """
        caller = "KFAC.solve"
        scalar = self._damping(caller, damping, relative)
        if factored or is_zero(scalar):
            pairs = [tikhonov(b, *self._factors(b), scalar) for b in self.blocks]
            found = self._divide(caller, v, pairs, scalar)
        else:
            self.layout.leaves(caller, "v", v)
            found = self._eigen(caller, scalar).solve(v, damping=scalar)
        return self._like(caller, v, found)

    def _eigen(self, caller: str, damping: Scalar) -> EKFAC:
        """Return the eigenbasis; without damping, only of factors that are surely regular."""
        F = self.eigh()
        if not is_zero(damping):
            return F
        self._lower(caller, [(0.0, 0.0)] * len(self.blocks), 0.0)
        return F

    def pow(self, v: Tree, p: float, *, damping: Scalar = 0.0, relative: bool = False) -> Tree:
        """Return (F + λI)ᵖ v for any real number p; see `solve` for `relative`."""
        caller = "KFAC.pow"
        scalar, p = self._damping(caller, damping, relative), check_number(caller, "p", p)
        if p == int(p) and 0 <= p <= _STEPS:
            matrices, rest = self._gather(caller, v)
            pairs = zip(self.blocks, matrices, strict=True)
            matrices = [x.to(widest([x, *self._factors(b)])) for b, x in pairs]
            rest = {path: x.to(widest([x, self.rest[path]])) for path, x in rest.items()}
            for _ in range(int(p)):
                matrices, rest = self._times(matrices, rest, scalar)
            return self._scatter(matrices, rest)
        if p == int(p) and -_STEPS <= p < 0 and is_zero(scalar):
            for _ in range(-int(p)):
                v = self._divide(caller, v, [(0.0, 0.0)] * len(self.blocks), 0.0)
            return v
        self.layout.leaves(caller, "v", v)
        F = self._eigen(caller, scalar) if p < 0 else self.eigh()
        return F.pow(v, p, damping=scalar)

    def quadratic(self, v: Tree) -> Tensor:
        """Return vᵀ F v, a 0-d tensor."""
        matrices, rest = self._gather("KFAC.quadratic", v)
        products, diagonal = self._times(matrices, rest, 0.0)
        parts = [(y * x.to(y.dtype)).sum() for x, y in zip(matrices, products, strict=True)]
        parts += [(y * rest[path].to(y.dtype)).sum() for path, y in diagonal.items()]
        return total(parts, self.count)

    def trace(self) -> Tensor:
        """Return the trace of F, a 0-d tensor."""
        self._check("KFAC.trace")
        parts = [
            (left.sum(-1) * right.sum(-1)).sum()
            for left, right in map(self._diagonals, self.blocks)
        ]
        return total(parts + [wide(f).sum() for f in self.rest.values()], self.count)

    def _diagonals(self, b: Block) -> tuple[Tensor, Tensor]:
        """Return the diagonals of G [R, O] and A [R, I]."""
        right = diagonal_of(wide(self.inputs[b.name]), b.input_form).expand(b.groups, -1)
        return diagonal_of(wide(self.outputs[b.name]), b.output_form), right

    def frobenius(self) -> Tensor:
        """Return the Frobenius norm of F, a 0-d tensor."""
        self._check("KFAC.frobenius")
        parts = []
        for b in self.blocks:
            left = norms_of(self.outputs[b.name], b.output_form)
            right = norms_of(self.inputs[b.name], b.input_form)
            parts.append(torch.linalg.vector_norm(left * right))
        return norm(parts + list(self.rest.values()), self.count).to(widest(self._tensors()))

    def logdet(self, *, damping: Scalar = 0.0, relative: bool = False) -> Tensor:
        """Return log det (F + λI), a 0-d tensor; see `solve` for `relative`."""
        caller = "KFAC.logdet"
        self._check(caller)
        scalar = self._damping(caller, damping, relative)
        if not is_zero(scalar):
            return self.eigh().logdet(damping=scalar)
        sides = self._lower(caller, [(0.0, 0.0)] * len(self.blocks), 0.0)
        parts = [
            (left.logdet() * b.inputs + right.logdet() * b.outputs).expand(b.groups).sum()
            for b, (left, right) in zip(self.blocks, sides, strict=True)
        ]
        parts += [wide(f).log().sum() for f in self.rest.values()]
        return total(parts, self.count).to(widest(self._tensors()))

    def _factors(self, b: Block) -> tuple[Tensor, Tensor]:
        return self.outputs[b.name], self.inputs[b.name]

    def _tensors(self) -> list[Tensor]:
        return [*self.inputs.values(), *self.outputs.values(), *self.rest.values()]

    def diagonal(self) -> Tree:
        """Return the diagonal of F, a tree like the parameters."""
        self._check("KFAC.diagonal")
        pairs = [self._diagonals(b) for b in self.blocks]
        found = [left.unsqueeze(-1) * right.unsqueeze(-2) for left, right in pairs]
        return self._scatter(found, {path: wide(f) for path, f in self.rest.items()})

    def eigenvalues(self) -> Tensor:
        """Return the P eigenvalues of F, largest first."""
        return self.eigh().eigenvalues()

    def sample(self, key: Tensor, *, damping: Scalar = 0.0, relative: bool = False) -> Tree:
        """Return a draw from N(0, (F + λI)⁻¹), a tree like the parameters; see `solve`."""
        caller = "KFAC.sample"
        self._check(caller)
        scalar = self._damping(caller, damping, relative)
        return self._eigen(caller, scalar).sample(key, damping=scalar)

    def to_dense(self) -> Tensor:
        """Return F as a matrix [P, P]; parameters in insertion order, each row-major."""
        self._check("KFAC.to_dense")
        matrices = []
        for b in self.blocks:
            A = full_of(wide(self.inputs[b.name]), b.input_form).expand(b.groups, -1, -1)
            G = full_of(wide(self.outputs[b.name]), b.output_form)
            product = G[:, :, None, :, None] * A[:, None, :, None, :]
            matrices.append(product.reshape(b.groups, b.outputs * b.inputs, -1))
        return self._dense(matrices, widest(self._tensors()))


trees.register_dataclass_node(
    KFAC,
    ("inputs", "outputs", "rows", "rest", "count"),
    ("layout", "blocks", "approx", "fisher", "unit"),
)
