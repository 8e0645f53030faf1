"""One side of a Kronecker block: a factor that is kept as a matrix, a diagonal, or rows.

A stack of R factors of size n is [R, n, n], [R, n], or rows [R, m, n] that stand for rowsᵀ rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.core.dtypes import wide, working_dtype
from fisherfn.core.errors import OptionError, UnsupportedError, at
from fisherfn.core.modes import concrete
from fisherfn.curvature import kronecker_spectra as spectra
from fisherfn.curvature.common import Scalar, combine, poison, scalar_like
from fisherfn.curvature.kronecker import Block


def shape_of(n: int, form: str) -> tuple[int | None, ...]:
    """Return the shape of one factor of size n; None is any number of rows."""
    return {"matrix": (n, n), "diagonal": (n,), "rows": (None, n)}[form]


def diagonal_of(x: Tensor, form: str) -> Tensor:
    """Return the diagonals [R, n]."""
    if form == "matrix":
        return x.diagonal(dim1=-2, dim2=-1)
    return x if form == "diagonal" else x.square().sum(-2)


def mean_of(x: Tensor, form: str) -> Tensor:
    """Return the mean eigenvalue of each factor, [R, 1, 1]."""
    return diagonal_of(x, form).mean(-1)[:, None, None]


def norms_of(x: Tensor, form: str) -> Tensor:
    """Return the Frobenius norms [R], in float64."""
    x = x.to(working_dtype(x))
    if form == "rows":
        x = x @ x.mT
    return torch.linalg.vector_norm(x.flatten(1), dim=-1)


def full_of(x: Tensor, form: str) -> Tensor:
    """Return the matrices [R, n, n]."""
    if form == "matrix":
        return x
    return torch.diag_embed(x) if form == "diagonal" else x.mT @ x


def multiplier(x: Tensor, form: str, columns: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product of a factor with columns of the dtype of `columns`."""
    x = x.to(columns.dtype)
    return lambda c: spectra.times(x, form, c)


def padded(values: Tensor, form: str) -> Tensor:
    """Append the eigenvalue zero of the complement of a factor's rows."""
    if form != "rows":
        return values
    return torch.cat([values, torch.zeros_like(values[..., :1])], -1)


def output_side(x: spectra.Eigen, b: Block, identity: bool) -> tuple[Tensor, Tensor, str]:
    """Return eigenvalues, with one more for a complement, basis and form of an output factor.

    A diagonal that is a multiple of the identity has one eigenvalue, on the complement of nothing:
    no basis [O, O] is formed.
    """
    if x.basis is not None:
        return padded(x.values, x.form), x.basis, x.form
    if identity:
        return x.values[..., :1], x.values.new_zeros(b.groups, b.outputs, 0), "rows"
    eye = torch.eye(b.outputs, dtype=x.values.dtype, device=x.values.device)
    return x.values, eye.expand(b.groups, -1, -1), "matrix"


def average(form: str, a: Scalar, x: Tensor, b: Scalar, y: Tensor) -> Tensor:
    """Return a·X + b·Y for factors of one side, a and b not negative."""
    if form != "rows":
        if x.shape[0] != y.shape[0]:
            x, y = torch.broadcast_tensors(x, y)
        return combine(a, x, b, y)
    parts = [_rooted(x, a), _rooted(y, b)]
    groups = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(groups, -1, -1) for part in parts], -2)


def _rooted(rows: Tensor, c: Scalar) -> Tensor:
    rows = wide(rows)
    root = c.sqrt() if isinstance(c, Tensor) else c**0.5
    return rows * scalar_like(root, rows)


def scaled(
    forms: tuple[str, str], inputs: Tensor, outputs: Tensor, c: Scalar, name: str
) -> tuple[Tensor, Tensor]:
    """Return A and G of c·(G ⊗ A): A takes the number where it can."""
    if forms[0] != "rows":
        return combine(c, inputs), outputs
    if forms[1] != "rows":
        return inputs, combine(c, outputs)
    if (not isinstance(c, Tensor) or concrete(c)) and c < 0:
        raise UnsupportedError(
            f"c * F: expected c >= 0 for factors kept as rows, got {float(c):g}{at(name)}. "
            "Multiply what F is applied to instead."
        )
    return _rooted(inputs, c), outputs


def added(
    forms: tuple[str, str],
    first: tuple[Scalar, Tensor, Tensor],
    second: tuple[Scalar, Tensor, Tensor],
    name: str,
) -> tuple[Tensor, Tensor]:
    """Return A and G of a·(G ⊗ A) + b·(H ⊗ B), which exists where G = H or A = B.

    Raises:
        OptionError: Neither.
    """
    (a, A, G), (b, B, H) = first, second
    same_outputs, same_inputs = _same(G, H), _same(A, B)
    if same_outputs is True:
        return average(forms[0], a, A, b, B), G
    if same_inputs is True:
        return A, average(forms[1], a, G, b, H)
    if isinstance(same_outputs, Tensor) and isinstance(same_inputs, Tensor):
        if forms == ("matrix", "matrix") or "rows" not in forms:
            left = torch.where(same_outputs, combine(a, A, b, B), A)
            right = torch.where(same_outputs, wide(G), combine(a, G, b, H))
            return poison(same_outputs | same_inputs, left), right
    raise OptionError(
        f"F + G: expected blocks that agree in the factors of one side, got others{at(name)}: the "
        "sum of two Kronecker products is none. Join results with ff.merge, or add what F and G "
        "are applied to."
    )


def _same(x: Tensor, y: Tensor) -> bool | Tensor:
    """Return whether two factors are equal; as a tensor where values are hidden."""
    if x is y:
        return True
    if x.shape != y.shape:
        return False
    return torch.equal(x, y) if concrete(x, y) else (x == y).all()


@dataclass(frozen=True)
class Side:
    """Division by a factor + α·I."""

    form: str
    factor: Tensor  # the diagonal + α, or the Cholesky factor, float64
    good: Tensor  # [], bool

    @staticmethod
    def of(x: Tensor, form: str, alpha: Scalar) -> Side:
        """Factor, and say whether that is possible."""
        if form == "diagonal":
            work = x.to(working_dtype(x))
            shift = alpha[..., 0] if isinstance(alpha, Tensor) and alpha.dim() > 1 else alpha
            work = work + shift
            return Side(form, work, (work > 0).all() & torch.isfinite(work).all())
        if form == "rows" and x.shape[-2] < x.shape[-1]:
            # fewer rows than dimensions: surely singular, and too wide to form
            return Side(form, x, torch.zeros((), dtype=torch.bool, device=x.device))
        lower, good = spectra.cholesky(full_of(wide(x), form), alpha)
        return Side(form, lower, good)

    def poisoned(self, known: Tensor | None) -> Side:
        """Make all answers NaN where `known` is False."""
        return self if known is None else Side(self.form, poison(known, self.factor), known)

    def solve(self, columns: Tensor) -> Tensor:
        """Return the columns [..., R, n, c] divided by the factor, in their dtype."""
        work = columns.to(self.factor.dtype)
        if self.form == "diagonal":
            found = work / self.factor.unsqueeze(-1)
        elif self.factor.shape[-1] != self.factor.shape[-2]:
            found = torch.full_like(work, torch.nan)
        else:
            found = torch.cholesky_solve(work, self.factor)
        return found.to(columns.dtype)

    def logdet(self) -> Tensor:
        """Return log det of each, [R], in float64."""
        if self.form == "diagonal":
            return self.factor.log().sum(-1)
        if self.factor.shape[-1] != self.factor.shape[-2]:
            return self.factor.new_full((self.factor.shape[0],), torch.nan)
        return 2.0 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def tikhonov(b: Block, G: Tensor, A: Tensor, damping: Scalar) -> tuple[Scalar, Scalar]:
    """Return what factored damping adds to G and to A: √λ/π and π√λ."""
    if is_zero(damping):
        return 0.0, 0.0
    if "rows" in (b.output_form, b.input_form):
        raise UnsupportedError(
            f"KFAC.solve: expected factors kept as matrices for factored damping, got rows"
            f"{at(b.name)}. Leave factored= out; exact damping needs no matrix."
        )
    ratio = mean_of(wide(A), b.input_form) / mean_of(wide(G), b.output_form)
    fine = torch.isfinite(ratio) & (ratio > 0)
    pi = torch.where(fine, ratio, torch.ones_like(ratio)).sqrt()
    root = damping.to(pi.dtype).sqrt() if isinstance(damping, Tensor) else damping**0.5
    return root / pi, root * pi


def is_zero(damping: Scalar) -> bool:
    """Return whether the damping is known to be zero."""
    if isinstance(damping, Tensor):
        return concrete(damping) and not bool(damping)
    return damping == 0


def decomposed(
    blocks: Sequence[Block],
    outputs: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    rows: Mapping[str, Tensor] | None,
) -> dict[str, tuple[spectra.Eigen, spectra.Eigen]]:
    """Return the eigendecompositions of G and A for each block, of a shared factor once.

    With `rows`, how many rows each A is an average over, eigenvectors of the eigenvalue zero are
    left out where they are many.
    """
    factors: list[Tensor] = []
    forms: list[str] = []
    ranks: list[int | None] = []
    bounds = _bounds(blocks, rows)
    index: dict[str, list[int]] = {}
    for b in blocks:
        sides = ((outputs[b.name], b.output_form), (inputs[b.name], b.input_form))
        index[b.name] = []
        for x, form in sides:
            same = [i for i, y in enumerate(factors) if y is x and forms[i] == form]
            if not same:
                factors.append(x)
                forms.append(form)
                ranks.append(bounds.get(b.name))
            index[b.name].append(same[0] if same else len(factors) - 1)
    found = spectra.decompose(factors, forms, ranks)
    if rows is not None:
        found = [spectra.without_zeros(x) for x in found]
    return {name: (found[i], found[j]) for name, (i, j) in index.items()}


def _bounds(blocks: Sequence[Block], rows: Mapping[str, Tensor] | None) -> dict[str, int]:
    """Return the rank that the factors of each block have if every row weighs 1 or more."""
    if rows is None or not rows or not concrete(*rows.values()):
        return {}
    numbers = torch.stack([rows[b.name].detach().double().cpu() for b in blocks]).ceil().tolist()
    pairs = zip(blocks, numbers, strict=True)
    return {b.name: int(n) for b, n in pairs if math.isfinite(n) and n >= 1}
