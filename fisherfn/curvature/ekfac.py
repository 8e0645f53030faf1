"""Blocks that are diagonal in a Kronecker basis, and a diagonal for everything else.

A block is (Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ with orthonormal Q_G [O, O] and Q_A [I, I] and scales S
[O, I], the second moments of the scores in that basis: W goes to Q_G (S ∘ (Q_Gᵀ W Q_A)) Q_Aᵀ. Among
all matrices that are diagonal in the basis it is the nearest to the Fisher information in Frobenius
norm (George et al. 2018, Fast approximate natural gradient descent in a Kronecker-factored
eigenbasis, section 3). F + λI only adds λ to S, so damping is exact, and so is every function of F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide, widest
from fisherfn.core.errors import OptionError, at
from fisherfn.core.merging import merge_weights
from fisherfn.core.modes import concrete
from fisherfn.core.trees import Tree
from fisherfn.curvature.common import (
    Scalar,
    check_number,
    combine,
    norm,
    poison,
    require,
    scalar_like,
    total,
)
from fisherfn.curvature.kronecker import Block
from fisherfn.curvature.kronecker_base import Kronecker
from fisherfn.curvature.kronecker_spectra import in_basis
from fisherfn.curvature.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class EKFAC(Kronecker):
    """Diagonal in a Kronecker basis: see `fisherfn.curvature.base` for the algebra.

    Attributes:
        scales: S for each block, [R, k_O, k_I] in the order of the bases' columns. Where a basis is
            thin (its side is kept as "rows") one more row or column holds the scale on the
            complement of its span.
        output_basis: Q_G for each block, [R, O, k_O], orthonormal columns.
        input_basis: Q_A for each block, [R or 1, I, k_I]; a side that is kept as "diagonal" has
            none, its basis are the coordinates themselves.
        rest: For each leaf that no block takes, by path, its exact diagonal.
        count: N, the units averaged over; 0-d float tensor.
        layout: Static structure of the parameters.
        blocks: Static description of the blocks.
        basis: Where the bases come from: "batch" (the factors of the very data), "given" (another
            result's, so S is exact in a basis that may be old), or "factors" (S is the product of
            the factors' eigenvalues: this is K-FAC itself, decomposed).
        fisher: Which labels were used.
        unit: What is counted.

    Example:
        >>> from fisherfn.curvature.kronecker import Block, Piece
        >>> layout = Layout.of({"w": torch.zeros(1, 2)})
        >>> piece = Piece("w", (("reshape", (1, 2), (1, 1, 2)),))
        >>> block = Block("w", piece, None, 1, 1, 2)
        >>> scales = {"w": torch.tensor([[[1.0, 3.0]]])}
        >>> F = EKFAC(
        ...     scales, {"w": torch.ones(1, 1, 1)}, {"w": torch.eye(2).unsqueeze(0)}, {},
        ...     torch.tensor(8.0), layout, (block,),
        ... )
        >>> F.solve({"w": torch.ones(1, 2)}, damping=1.0)
        {'w': tensor([[0.5000, 0.2500]])}
        >>> F
        EKFAC(1 block, 0 diagonal leaves, basis='batch', count=8, fisher='exact', unit='example')
    """

    scales: dict[str, Tensor]
    output_basis: dict[str, Tensor]
    input_basis: dict[str, Tensor]
    rest: dict[str, Tensor]
    count: Tensor
    layout: Layout
    blocks: tuple[Block, ...]
    basis: str = "batch"
    _: KW_ONLY
    fisher: str = "exact"
    unit: str = "example"

    _by_block: ClassVar[tuple[str, ...]] = ("scales", "output_basis", "input_basis")
    _averages = ("scales", "rest")
    _tallies = ()

    def _summary(self) -> str:
        return f"{super()._summary()}, basis={self.basis!r}"

    def _given(self) -> tuple[str, ...]:
        return ("output_basis", "input_basis") if self.basis == "given" else ()

    def _check_blocks(self, caller: str) -> None:
        self._check_names(caller, "scales", self.scales)
        self._check_names(caller, "a basis of outputs", self.output_basis)
        full = [b.name for b in self.blocks if b.input_form != "diagonal"]
        if set(self.input_basis) != set(full):
            raise OptionError(
                f"{caller}: expected a basis of inputs for each of the blocks {full}, got "
                f"{list(self.input_basis)}. Name them like the blocks."
            )
        for b in self.blocks:
            left = self.output_basis[b.name]
            wanted = [(b.groups, b.outputs, None if _thin(b)[0] else b.outputs)]
            self._check_factor(caller, "the basis of outputs", b.name, left, wanted)
            rows, columns = left.shape[-1] + _thin(b)[0], b.inputs
            if b.name in self.input_basis:
                right = self.input_basis[b.name]
                wide_ = None if _thin(b)[1] else b.inputs
                shapes = [(r, b.inputs, wide_) for r in {1, b.groups}]
                self._check_factor(caller, "the basis of inputs", b.name, right, shapes)
                columns = right.shape[-1] + _thin(b)[1]
            shape = (b.groups, rows, columns)
            self._check_factor(caller, "the scales", b.name, self.scales[b.name], [shape])

    def _same_bases(self, caller: str, other: Self) -> Tensor | None:
        """Raise unless both have the same bases; return whether, where values are hidden."""
        good = []
        for b in self.blocks:
            for name in ("output_basis", "input_basis"):
                x, y = getattr(self, name).get(b.name), getattr(other, name).get(b.name)
                if x is y:
                    continue
                if x.shape == y.shape and not concrete(x, y):
                    good.append((x == y).all())
                elif x.shape != y.shape or not torch.equal(x, y):
                    raise OptionError(
                        f"{caller}: expected two results in the same bases, got others"
                        f"{at(b.name)}. Compute both with ekfac(..., basis=) of one result."
                    )
        return torch.stack(good).all() if good else None

    def _check_same(self, caller: str, other: Any) -> None:
        super()._check_same(caller, other)
        self._same_bases(caller, other)

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        good = None if other is None else self._same_bases("merge", other)
        scales = {
            name: poison(good, combine(a, x, b, None if other is None else other.scales[name]))
            for name, x in self.scales.items()
        }
        basis = self.basis if other is None or other.basis == self.basis else "given"
        return replace(
            self,
            scales=scales,
            rest=self._rest_linear(a, other, b),
            count=self.count if count is None else count,
            basis=basis,
        )

    def __fisher_merge__(self, other: Any) -> Self:
        self._check_pair("merge", other)
        a, b, count = merge_weights(self.count, other.count)
        return self._linear(a, other, b, count)

    def __fisher_empty__(self) -> Self:
        zero = {name: torch.zeros_like(x) for name, x in self.scales.items()}
        rest = {path: torch.zeros_like(x) for path, x in self.rest.items()}
        return replace(self, scales=zero, rest=rest, count=torch.zeros_like(self.count))

    # --- functions of F + λI ----------------------------------------------------------------------

    def _apply(self, matrices: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        """Return stacks [..., R, O, I] multiplied by the matrices with these scales."""
        return [self._turn(*each) for each in zip(self.blocks, matrices, scales, strict=True)]

    def _turn(self, b: Block, x: Tensor, s: Tensor) -> Tensor:
        left, right = self.output_basis[b.name], self.input_basis.get(b.name)
        dtype = widest([x, left, s])
        right = None if right is None else right.to(dtype)
        return in_basis(x.to(dtype), s.to(dtype), left.to(dtype), right, _thin(b))

    def _multiplicities(self, b: Block) -> tuple[int, int]:
        """Return the dimensions of the complements of both bases."""
        right = self.input_basis.get(b.name)
        inside = b.inputs if right is None else right.shape[-1]
        return b.outputs - self.output_basis[b.name].shape[-1], b.inputs - inside

    def _parts(self, b: Block, x: Tensor) -> list[tuple[Tensor, int]]:
        """Return the scales of a block cut where they count once or several times."""
        rows, columns = self._multiplicities(b)
        k_o = self.output_basis[b.name].shape[-1]
        k_i = b.inputs - columns
        parts = [(x[..., :k_o, :k_i], 1)]
        if _thin(b)[0] and rows:
            parts.append((x[..., k_o:, :k_i], rows))
        if _thin(b)[1] and columns:
            parts.append((x[..., :k_o, k_i:], columns))
            if _thin(b)[0] and rows:
                parts.append((x[..., k_o:, k_i:], rows * columns))
        return parts

    def _shifted(
        self, caller: str, damping: Any, need: str, relative: bool
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return S + λ and the diagonal + λ; raise, or make all NaN, where `need` fails."""
        self._check(caller)
        scalar = self._damping(caller, damping, relative)
        shifted = []
        good: list[Tensor] = []
        for b in self.blocks:
            s = wide(self.scales[b.name])
            x = s + scalar_like(scalar, s)
            shifted.append(x)
            if need:
                level = _level(b, s, scalar)
                strict = need == "positive definite"
                parts = [p for p, _ in self._parts(b, x)]
                fine = [((p > level) if strict else (p >= 0)).all() for p in parts]
                good.append(torch.stack(fine).all())
        rest = {}
        for path, values in self.rest.items():
            x = wide(values)
            x = rest[path] = x + scalar_like(scalar, x)
            if need:
                good.append(((x > 0) if need == "positive definite" else (x >= 0)).all())
        if need:
            known = require(caller, need, self._names, good, scalar)
            shifted = [poison(known, x) for x in shifted]
            rest = {path: poison(known, x) for path, x in rest.items()}
        return shifted, rest

    def _function(
        self, v: Tree, caller: str, damping: Any, need: str, relative: bool, f: Callable[..., Any]
    ) -> Tree:
        matrices, rest = self._gather(caller, v)
        scales, diagonal = self._shifted(caller, damping, need, relative)
        found = self._apply(matrices, [f(s) for s in scales])
        return self._scatter(found, {path: f(x) * rest[path] for path, x in diagonal.items()})

    def mv(self, v: Tree) -> Tree:
        """Return F v, a tree like `v`."""
        return self._function(v, "EKFAC.mv", 0.0, "", False, lambda s: s)

    def solve(self, v: Tree, *, damping: Scalar = 0.0, relative: bool = False) -> Tree:
        """Return (F + λI)⁻¹ v in the dtype of `v`.

        Args:
            v: Tree like the parameters.
            damping: λ; with `relative`, λ in units of the mean eigenvalue of F.
            relative: Whether damping is relative.

        Returns:
            Tree like `v`.
        """
        caller = "EKFAC.solve"
        found = self._function(v, caller, damping, "positive definite", relative, torch.reciprocal)
        return self._like(caller, v, found)

    def pow(self, v: Tree, p: float, *, damping: Scalar = 0.0, relative: bool = False) -> Tree:
        """Return (F + λI)ᵖ v for any real number p; see `solve` for `relative`."""
        p = check_number("EKFAC.pow", "p", p)
        need = "positive definite" if p < 0 else "" if p == int(p) else "positive semi-definite"
        return self._function(v, "EKFAC.pow", damping, need, relative, lambda s: s**p)

    def quadratic(self, v: Tree) -> Tensor:
        """Return vᵀ F v, a 0-d tensor."""
        caller = "EKFAC.quadratic"
        matrices, rest = self._gather(caller, v)
        found = self._apply(matrices, [wide(self.scales[b.name]) for b in self.blocks])
        parts = [(y * x.to(y.dtype)).sum() for x, y in zip(matrices, found, strict=True)]
        parts += [(wide(f) * rest[path].square()).sum() for path, f in self.rest.items()]
        return total(parts, self.count)

    def _sums(self, f: Callable[[Tensor], Tensor], scales: list[Tensor]) -> list[Tensor]:
        return [
            f(part).sum() * many
            for b, s in zip(self.blocks, scales, strict=True)
            for part, many in self._parts(b, s)
        ]

    def trace(self) -> Tensor:
        """Return the trace of F, a 0-d tensor."""
        self._check("EKFAC.trace")
        parts = self._sums(lambda s: s, [wide(self.scales[b.name]) for b in self.blocks])
        return total(parts + [wide(f).sum() for f in self.rest.values()], self.count)

    def frobenius(self) -> Tensor:
        """Return the Frobenius norm of F, a 0-d tensor."""
        self._check("EKFAC.frobenius")
        parts = [
            wide(part) * many**0.5
            for b in self.blocks
            for part, many in self._parts(b, self.scales[b.name])
        ]
        return norm(parts + list(self.rest.values()), self.count)

    def logdet(self, *, damping: Scalar = 0.0, relative: bool = False) -> Tensor:
        """Return log det (F + λI), a 0-d tensor; see `solve` for `relative`."""
        scales, rest = self._shifted("EKFAC.logdet", damping, "positive definite", relative)
        parts = self._sums(torch.log, scales)
        return total(parts + [f.log().sum() for f in rest.values()], self.count)

    def diagonal(self) -> Tree:
        """Return the diagonal of F, a tree like the parameters."""
        self._check("EKFAC.diagonal")
        found = []
        for b in self.blocks:
            x = _squares(wide(self.output_basis[b.name]), _thin(b)[0]) @ wide(self.scales[b.name])
            right = self.input_basis.get(b.name)
            if right is not None:
                x = x @ _squares(wide(right), _thin(b)[1]).mT
            found.append(x)
        return self._scatter(found, {path: wide(f) for path, f in self.rest.items()})

    def eigenvalues(self) -> Tensor:
        """Return the P eigenvalues of F, largest first."""
        self._check("EKFAC.eigenvalues")
        parts = [
            wide(part).reshape(-1, 1).expand(-1, many).reshape(-1)
            for b in self.blocks
            for part, many in self._parts(b, self.scales[b.name])
        ]
        parts += [wide(f).reshape(-1) for f in self.rest.values()]
        if not parts:
            return torch.zeros(0, device=self.count.device)
        dtype = widest(parts)
        return torch.cat([x.to(dtype) for x in parts]).sort(descending=True).values

    def sample(self, key: Tensor, *, damping: Scalar = 0.0, relative: bool = False) -> Tree:
        """Return a draw from N(0, (F + λI)⁻¹), a tree like the parameters; see `solve`."""
        scales = list(self.scales.values())
        z = self._normal(key, torch.empty(0, dtype=widest(scales)).to(self.count.device))
        caller = "EKFAC.sample"
        return self._function(z, caller, damping, "positive definite", relative, torch.rsqrt)

    def to_dense(self) -> Tensor:
        """Return F as a matrix [P, P]; parameters in insertion order, each row-major."""
        self._check("EKFAC.to_dense")
        matrices = []
        for b in self.blocks:
            n = b.outputs * b.inputs
            scales = wide(self.scales[b.name])
            eye = torch.eye(n, dtype=scales.dtype, device=scales.device)
            units = eye.reshape(n, 1, b.outputs, b.inputs).expand(-1, b.groups, -1, -1)
            found = self._turn(b, units, scales)
            matrices.append(found.reshape(n, b.groups, n).permute(1, 2, 0))
        return self._dense(matrices, widest([*matrices, *self.rest.values()]))


trees.register_dataclass_node(
    EKFAC,
    ("scales", "output_basis", "input_basis", "rest", "count"),
    ("layout", "blocks", "basis", "fisher", "unit"),
)


def _thin(b: Block) -> tuple[bool, bool]:
    """Return whether the basis of the outputs, and that of the inputs, has a complement."""
    return b.output_form == "rows", b.input_form == "rows"


def _squares(basis: Tensor, thin: bool) -> Tensor:
    """Return the squares of a basis, and what of each coordinate lies beside a thin one."""
    squares = basis.square()
    if not thin:
        return squares
    return torch.cat([squares, (1.0 - squares.sum(-1, keepdim=True)).clamp_min(0.0)], -1)


def _level(b: Block, s: Tensor, damping: Scalar) -> Tensor | float:
    """Return below what a scale is a rounding error, where nothing is added to it.

    A score that is zero in some direction is eps times its norm there after a rotation, and what is
    kept is its square.
    """
    if not isinstance(damping, Tensor) and damping != 0:
        return 0.0
    eps = 4.0 * max(b.outputs, b.inputs) * torch.finfo(s.dtype).eps
    level = s.detach().abs().amax() * eps**2 if s.numel() else s.new_zeros(())
    if not isinstance(damping, Tensor):
        return level
    return torch.where(damping.to(s.device) == 0, level, torch.zeros_like(level))
