"""Functions of one symmetric positive semi-definite matrix A [n, n], and of A + λI.

Pure matrix mathematics on plain tensors: `Dense` and `BlockDiagonal` share it. Factorisations run
in float64 (float32 where a device has no float64), so that a small λ is not lost beside a large A.
Nothing here raises for values. Each factorisation says in a 0-d bool whether it exists, and what
depends on it is NaN where it does not.

**When is A singular?** A rank-deficient A that was computed in floating point has small eigenvalues
of either sign in place of zeros. If all happen to be positive, a Cholesky factor exists, and A⁻¹ is
made of rounding errors. So the factor has to pass a test that does not depend on the scale of the
coordinates: scale A to unit diagonal, with factor L; then the largest squared norm of a row of L⁻¹
tells how much relative errors of A grow. It is 1 for a diagonal matrix, and was at least 0.06 / eps
for random matrices of deficient rank (n from 2 to 300, float32 and float64). From 1 / (100 eps) on
A counts as singular. eps is that of the dtype in which A is stored if λ = 0, where a small pivot
may be an error of storing A, and that of the computation if λ > 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisherfn.core.dtypes import working_dtype
from fisherfn.curvature.common import Scalar, scalar_like

_GUARD = 100.0


class Factor(NamedTuple):
    """Cholesky factor of A + λI."""

    lower: Tensor  # [n, n], float64; NaN if not good
    good: Tensor  # [], bool
    worst: Tensor  # [], int64: the coordinate to name if it is not good


class Spectrum(NamedTuple):
    """Eigendecomposition of A."""

    values: Tensor  # [n], float64, ascending
    vectors: Tensor  # [n, n], float64, columns
    good: Tensor  # [], bool: A is finite


def _storage_eps(a: Tensor) -> float:
    return torch.finfo(a.dtype).eps


def cholesky(a: Tensor, damping: Scalar) -> Factor:
    """Return the Cholesky factor of A + λI, and whether that is positive definite.

    >>> cholesky(torch.tensor([[4.0]]), 5.0).lower
    tensor([[3.]], dtype=torch.float64)
    """
    dtype = working_dtype(a)
    eye = torch.eye(a.shape[0], dtype=dtype, device=a.device)
    shifted = a.to(dtype)
    shifted = shifted + scalar_like(damping, shifted) * eye
    lower, info = torch.linalg.cholesky_ex(shifted)
    inverse = torch.linalg.solve_triangular(lower.detach(), eye, upper=False)
    growth = inverse.square() @ shifted.detach().diagonal()
    good = (info == 0) & (growth * _rank_eps(a, damping) * _GUARD < 1).all()
    # LAPACK counts from 1. An empty matrix has no largest entry.
    worst = growth.argmax() if a.shape[0] else torch.zeros_like(info)
    worst = torch.where(info > 0, info - 1, worst)
    return Factor(torch.where(good, lower, torch.full_like(lower, torch.nan)), good, worst)


def _rank_eps(a: Tensor, damping: Scalar) -> Scalar:
    """Return the relative error below which a pivot means nothing."""
    stored = _storage_eps(a)
    worked = torch.finfo(working_dtype(a)).eps
    if isinstance(damping, Tensor):
        return torch.where(damping == 0, stored, worked).to(a.device)
    return stored if damping == 0 else worked


def solve(factor: Factor, v: Tensor) -> Tensor:
    """Return (A + λI)⁻¹ v for a vector [n], in float64."""
    column = v.to(factor.lower.dtype).unsqueeze(-1)
    return torch.cholesky_solve(column, factor.lower).squeeze(-1)


def multiply(a: Tensor, v: Tensor, damping: Scalar) -> Tensor:
    """Return (A + λI) v for a vector [n], in float64."""
    dtype = working_dtype(a)
    v = v.to(dtype)
    return a.to(dtype) @ v + scalar_like(damping, v) * v


def whiten(factor: Factor, z: Tensor) -> Tensor:
    """Return L⁻ᵀ z, which has covariance (A + λI)⁻¹ for standard normal z [n], in float64."""
    column = z.to(factor.lower.dtype).unsqueeze(-1)
    return torch.linalg.solve_triangular(factor.lower.mT, column, upper=True).squeeze(-1)


def logdet(factor: Factor) -> Tensor:
    """Return log det (A + λI), in float64."""
    return 2.0 * factor.lower.diagonal().log().sum()


def eigenvalues(a: Tensor) -> Tensor:
    """Return the eigenvalues of A, ascending, in float64; NaN if A is not finite."""
    safe, good = _finite(a)
    values = torch.linalg.eigvalsh(safe)
    return torch.where(good, values, torch.full_like(values, torch.nan))


def spectrum(a: Tensor) -> Spectrum:
    """Return the eigendecomposition of A.

    Its derivative with respect to A is that of the eigenvectors, which does not exist where two
    eigenvalues agree to rounding: there it is NaN.
    """
    safe, good = _finite(a)
    values, vectors = torch.linalg.eigh(safe)
    if a.shape[0] > 1:
        level = a.shape[0] * torch.finfo(values.dtype).eps * values.detach().abs().amax()
        repeated = values.detach().diff().amin() <= level
        # Zero, with a derivative of inf · 0 where eigenvalues repeat and of 0 where they do not.
        zero = torch.where(repeated, 0.0 * safe.sum(), torch.ones_like(safe.sum())).sqrt()
        vectors = vectors + torch.where(repeated, zero, torch.zeros_like(zero))
    return Spectrum(values, vectors, good)


def _finite(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return A, or zeros if it is not finite (LAPACK raises for NaN), and whether it is."""
    wide = a.to(working_dtype(a))
    good = torch.isfinite(wide).all()
    return torch.where(good, wide, torch.zeros_like(wide)), good


class Applied(NamedTuple):
    """A function of A + λI applied to a vector."""

    value: Tensor  # [n], float64; NaN if not good
    good: Tensor  # [], bool
    worst: Tensor  # [], int64: the coordinate to name if it is not good


def power(a: Tensor, v: Tensor, p: float, damping: Scalar) -> Applied:
    """Return (A + λI)ᵖ v for a vector [n].

    Eigenvalues below zero by no more than rounding are taken for the zeros of a positive
    semi-definite matrix; the error of an eigenvalue is about n·eps times the largest at most.
    """
    eigen = spectrum(a)
    values = eigen.values
    level = values.detach().abs().sum() * _storage_eps(a) * 10
    values = torch.where((values < 0) & (values >= -level), torch.zeros_like(values), values)
    shifted = values + scalar_like(damping, values)
    good = eigen.good & (shifted >= 0).all()
    if p < 0:
        good = good & cholesky(a, damping).good
    scales = torch.where(good, shifted, torch.ones_like(shifted)) ** p
    found = eigen.vectors @ (scales * (eigen.vectors.mT @ v.to(scales.dtype)))
    found = torch.where(good, found, torch.full_like(found, torch.nan))
    # The eigenvector of the smallest eigenvalue, which comes first, is largest here.
    worst = eigen.vectors[:, :1].abs().argmax() if a.shape[0] else torch.zeros_like(good).long()
    return Applied(found, good, worst)
