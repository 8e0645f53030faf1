"""Eigenbases and Cholesky factors of stacks of symmetric matrices, and functions in an eigenbasis.

Pure mathematics on plain tensors. Format: a factor is a stack [R, n, n], its diagonal [R, n], or
rows [R, m, n] that stand for rowsᵀ rows; its eigenbasis is [R, n, k] with orthonormal columns. A
factor kept as rows has k = min(m, n) eigenvectors, and the eigenvalue zero on the complement of
their span. In the eigenbasis of a block there are scales [R, k_O, k_I], with one more row (column)
for the complement if G (A) is kept as rows; the matrix n x n of such a factor is never formed.

Factors of one shape are decomposed together. LAPACK fails to converge on some float32 matrices; the
decomposition is then repeated in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core.dtypes import wide, working_dtype
from fisherfn.core.matmul import stacked_product
from fisherfn.core.modes import concrete, in_functorch
from fisherfn.curvature.common import Scalar

# Matrices up to this size are copied into one stack; beyond it a batched call gains nothing.
_STACKED = 1024
_GUARD = 100.0
# Smaller bases are not worth cutting.
_THIN = 64
# Random vectors beyond the rank that is looked for.
_SPARE = 8


class Eigen(NamedTuple):
    """Eigendecomposition of a factor."""

    values: Tensor  # [R, k], ascending; what is zero to rounding is zero
    basis: Tensor | None  # [R, n, k]; None: the coordinates themselves
    good: Tensor  # [], bool: the factor is finite
    form: str  # "rows" if the basis has a complement, on which the factor is zero


def decompose(
    factors: Sequence[Tensor], forms: Sequence[str], ranks: Sequence[int | None] | None = None
) -> list[Eigen]:
    """Return the eigendecomposition of each factor; those of one shape are done in one call.

    Args:
        factors: Factors of any sizes and dtypes.
        forms: How each is kept: "matrix", "diagonal" or "rows".
        ranks: For a matrix, what its rank may well be at most. If that is small and true, only the
            eigenvectors of its range are found, and it comes back as if it had been kept as rows.

    Returns:
        One decomposition for each, in float32 or wider.

    >>> found = decompose([torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])], ["matrix"])
    >>> found[0].values
    tensor([[1., 2.]])
    """
    found: list[Eigen | None] = [None] * len(factors)
    stacks: dict[tuple[object, ...], list[int]] = {}
    for i, (x, form) in enumerate(zip(factors, forms, strict=True)):
        x = wide(x)
        if form == "diagonal":
            good = torch.isfinite(x).all()
            found[i] = Eigen(torch.where(good, x, torch.full_like(x, torch.nan)), None, good, form)
        elif form == "rows":
            found[i] = _thin(x)
        else:
            n = x.shape[-1]
            found[i] = None if ranks is None else _of_rank(x, ranks[i])
            if found[i] is not None:
                continue
            stacks.setdefault((n, x.dtype, x.device, i if n > _STACKED else -1), []).append(i)
    for members in stacks.values():
        parts = [wide(factors[i]) for i in members]
        values, vectors, good = _eigh(torch.cat(parts) if len(parts) > 1 else parts[0])
        sizes = [x.shape[0] for x in parts]
        split = zip(values.split(sizes), vectors.split(sizes), good.split(sizes), strict=True)
        for i, (value, basis, fine) in zip(members, split, strict=True):
            found[i] = Eigen(value, basis, fine.all(), "matrix")
    return [x for x in found if x is not None]


def _eigh(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues [N, n], eigenvectors [N, n, n] and whether each matrix is finite, [N]."""
    good = torch.isfinite(stack).flatten(1).all(-1)
    fine = concrete(stack) and bool(good.all())
    safe = stack if fine else torch.where(good[:, None, None], stack, torch.zeros_like(stack))
    values, vectors = _eigh_or_retry(safe)
    level = stack.shape[-1] * torch.finfo(stack.dtype).eps * _largest(values)
    if stack.requires_grad or in_functorch():
        vectors = _without_slope(values, vectors, safe, level)
    nothing = (values <= _rounding(values, stack.shape[-1])) & (values >= -level)
    values = torch.where(nothing, torch.zeros_like(values), values)
    return torch.where(good[:, None], values, torch.full_like(values, torch.nan)), vectors, good


def _eigh_or_retry(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, from float64 where the own dtype does not converge."""
    dtype = working_dtype(stack)
    if not concrete(stack) or stack.dtype == dtype:
        return torch.linalg.eigh(stack)
    try:
        values, vectors = torch.linalg.eigh(stack)
        if bool(values.isfinite().all() & vectors.isfinite().all()):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    values, vectors = torch.linalg.eigh(stack.to(dtype))
    return values.to(stack.dtype), vectors.to(stack.dtype)


def _largest(values: Tensor) -> Tensor:
    """Return the largest magnitude of each row [N, n], [N, 1]."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[0], 1)
    return values.detach().abs().amax(-1, keepdim=True)


def _rounding(values: Tensor, n: int) -> Tensor:
    """Return up to where an eigenvalue of a singular matrix [n, n] may be an error, [N, 1].

    The bound for it grows with n, but the zeros of singular matrices came out below 4 eps times the
    largest eigenvalue for n up to 1024; what is larger is needed beside a small damping.
    """
    return min(n, 2.0 * n**0.5) * torch.finfo(values.dtype).eps * _largest(values)


def _without_slope(values: Tensor, vectors: Tensor, safe: Tensor, level: Tensor) -> Tensor:
    """Make the derivative NaN where eigenvalues repeat: autograd would divide rounding errors."""
    if values.shape[-1] < 2:
        return vectors
    repeated = values.detach().diff(dim=-1).amin(-1) <= level[..., 0]
    total = safe.sum((-1, -2))
    # zero, with a derivative of inf · 0 where eigenvalues repeat and of 0 where they do not
    zero = torch.where(repeated, 0.0 * total, torch.ones_like(total)).sqrt()
    return vectors + torch.where(repeated, zero, torch.zeros_like(zero))[:, None, None]


def _thin(rows: Tensor) -> Eigen:
    """Return the eigendecomposition of rowsᵀ rows on the span of the rows, [R, n, min(m, n)]."""
    good = torch.isfinite(rows).all()
    safe = torch.where(good, rows, torch.zeros_like(rows))
    # through an orthonormal basis of the span, which stays orthonormal where eigenvalues are small
    q, r = torch.linalg.qr(safe.mT)
    values, turn, _ = _eigh(r @ r.mT)
    values = torch.where(good, values, torch.full_like(values, torch.nan))
    return Eigen(values, q @ turn, good, "rows")


def _of_rank(x: Tensor, rank: int | None) -> Eigen | None:
    """Return the eigendecomposition on the range of x [R, n, n]; None if it may be of higher rank.

    The range is that of the products with more random vectors than it has dimensions (Halko,
    Martinsson & Tropp 2011, section 4); what it leaves of the trace tells whether that was so.
    """
    n = x.shape[-1]
    if rank is None or n < _THIN or 2 * rank > n:
        return None
    if not concrete(x) or x.requires_grad or not bool(torch.isfinite(x).all()):
        return None
    key = random.key(0, device=x.device)
    vectors = random.rademacher(key, (n, min(n, rank + _SPARE)), x.dtype)
    q = torch.linalg.qr(x @ vectors).Q
    small = q.mT @ (x @ q)
    values, turn, good = _eigh(0.5 * (small + small.mT))
    level = n * torch.finfo(x.dtype).eps * _largest(values)
    beside = x.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - values.sum(-1, keepdim=True)
    if not bool(((beside.abs() <= level) & (values >= -level)).all()):
        return None
    level = _rounding(values, n)
    k = max(1, int((values > level).sum(-1).max()))
    values = torch.where(values <= level, torch.zeros_like(values), values)[..., -k:]
    return Eigen(values, (q @ turn)[..., -k:].contiguous(), good.all(), "rows")


def without_zeros(x: Eigen) -> Eigen:
    """Leave out eigenvectors of the eigenvalue zero where they are a quarter or more of all."""
    n = x.values.shape[-1]
    if x.form != "matrix" or x.basis is None or n < _THIN or not concrete(x.values, x.basis):
        return x
    if x.values.requires_grad or not bool(x.good & (x.values >= 0).all()):
        return x
    k = max(1, int((x.values > 0).sum(-1).max()))
    if 4 * k > 3 * n:
        return x
    return Eigen(x.values[..., n - k :], x.basis[..., n - k :].contiguous(), x.good, "rows")


class Lower(NamedTuple):
    """Cholesky factors of a stack."""

    lower: Tensor  # [R, n, n], float64
    good: Tensor  # [], bool


def cholesky(stack: Tensor, damping: Scalar = 0.0) -> Lower:
    """Return the Cholesky factors of a stack of matrices + damping·I, and whether all exist.

    A matrix counts as singular where relative errors of its entries grow by more than
    1 / (100 eps); see `fisherfn.curvature.spd`.

    >>> cholesky(torch.tensor([[[4.0]]])).lower
    tensor([[[2.]]], dtype=torch.float64)
    """
    dtype = working_dtype(stack)
    work = stack.to(dtype)
    eye = torch.eye(stack.shape[-1], dtype=dtype, device=stack.device)
    damped = isinstance(damping, Tensor) or damping != 0
    if damped:
        work = work + damping * eye
    finite = torch.isfinite(work).all()
    lower, info = torch.linalg.cholesky_ex(torch.where(finite, work, eye))
    inverse = torch.linalg.solve_triangular(lower.detach(), eye.expand_as(lower), upper=False)
    growth = (inverse.square() @ work.detach().diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).squeeze(-1)
    eps = torch.finfo(dtype if damped else stack.dtype).eps
    good = finite & (info == 0).all() & (growth * eps * _GUARD < 1).all()
    return Lower(torch.where(good, lower, torch.full_like(lower, torch.nan)), good)


def both_sides(
    matrix: Tensor,
    outputs: Callable[[Tensor], Tensor] | None,
    inputs: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Apply a map of columns on the left and one on the right of W [..., O, I]."""
    if outputs is not None:
        matrix = outputs(matrix)
    return matrix if inputs is None else inputs(matrix.mT).mT


def times(factor: Tensor, form: str, columns: Tensor) -> Tensor:
    """Return a factor times columns [..., R, n, c]."""
    if form == "diagonal":
        return factor.unsqueeze(-1) * columns
    if form == "rows":
        return stacked_product(factor.mT, stacked_product(factor, columns))
    return stacked_product(factor, columns)


def in_basis(
    matrix: Tensor,
    scales: Tensor,
    outputs: Tensor,
    inputs: Tensor | None,
    thin: tuple[bool, bool],
) -> Tensor:
    """Multiply a stack by the matrix with these scales in a Kronecker basis.

    Args:
        matrix: [..., R, O, I].
        scales: [R, k_O, k_I], one more row or column where the basis is thin.
        outputs: Basis [R, O, k_O].
        inputs: Basis [R or 1, I, k_I], or None for the coordinates themselves.
        thin: Whether the basis of the outputs, and that of the inputs, has a complement.

    Returns:
        [..., R, O, I].
    """

    def left(columns: Tensor, weights: Tensor) -> Tensor:
        inside = stacked_product(outputs.mT, columns)
        if not thin[0]:
            return stacked_product(outputs, weights * inside)
        k = outputs.shape[-1]
        change = weights[..., :k, :] - weights[..., k:, :]
        return stacked_product(outputs, change * inside) + weights[..., k:, :] * columns

    if inputs is None:
        return left(matrix, scales)
    inside = stacked_product(matrix, inputs)
    if not thin[1]:
        return stacked_product(left(inside, scales), inputs.mT)
    k = inputs.shape[-1]
    beside = matrix - stacked_product(inside, inputs.mT)
    return stacked_product(left(inside, scales[..., :k]), inputs.mT) + left(beside, scales[..., k:])
