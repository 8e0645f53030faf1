"""Functions of a matrix F = Σ_r w_r s_r s_rᵀ [P, P] that is known by its R rows, R < P.

The rows S [R, P] come as matrices [R, p], one for each leaf of the parameters, and vectors as lists
of vectors [p]. With S' = √|w| S and J = diag(sign w), F = S'ᵀ J S', and its spectrum is found in
the space of the rows: with K = S' S'ᵀ = Q Λ Qᵀ, U = S'ᵀ Q Λ^-½ is orthonormal, and
F = U (Λ^½ Qᵀ J Q Λ^½) Uᵀ with a symmetric matrix [R, R] inside, which is Λ where no weight is
negative. All of it is float64, and nothing raises for values: see `spd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisherfn.core.dtypes import working_dtype
from fisherfn.curvature import spd
from fisherfn.curvature.common import Scalar, scalar_like

# Entries of the rows that are converted to float64 at once.
_BLOCK = 2**22


class Kernel(NamedTuple):
    """The rows in their own space."""

    matrix: Tensor  # [R, R], float64: K = S' S'ᵀ
    roots: Tensor  # [R], float64: √|w|
    signs: Tensor  # [R], float64: the diagonal of J, 1 where w is 0


class Factored(NamedTuple):
    """F = S'ᵀ T diag(values) Tᵀ S' with orthonormal S'ᵀ T, but for columns that are zero."""

    values: Tensor  # [R], float64
    vectors: Tensor  # [R, R], float64: T, columns
    good: Tensor  # [], bool: F is finite


def kernel(rows: Sequence[Tensor], weights: Tensor) -> Kernel:
    """Return the Gram matrix of the weighted rows.

    >>> kernel([torch.tensor([[3.0, 4.0]])], torch.tensor([2.0])).matrix
    tensor([[50.]], dtype=torch.float64)
    """
    dtype = working_dtype(weights)
    w = weights.to(dtype)
    none = w == 0
    # the root has no derivative at 0, and a row of weight 0 has none either
    roots = torch.where(none, torch.zeros_like(w), torch.where(none, 1.0, w.abs()).sqrt())
    signs = torch.where(w < 0, -torch.ones_like(w), torch.ones_like(w))
    gram = w.new_zeros(len(weights), len(weights))
    for _, block in _blocks(rows, dtype):
        gram = gram + (block @ block.mT).to(w.device)
    return Kernel(gram * roots * roots[:, None], roots, signs)


def project(rows: Sequence[Tensor], vectors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return S v, [R]."""
    starts = [0] * len(rows)
    found = rows[0].new_zeros(len(rows[0]), dtype=dtype)
    for leaf, block in _blocks(rows, dtype):
        start = starts[leaf]
        starts[leaf] = start + block.shape[1]
        part = vectors[leaf][start : starts[leaf]].to(dtype)
        found = found + (block @ part).to(found.device)
    return found


def expand(rows: Sequence[Tensor], coordinates: Tensor) -> list[Tensor]:
    """Return Sᵀ c, a vector [p] for each leaf, in the dtype of c."""
    pieces: list[list[Tensor]] = [[] for _ in rows]
    for leaf, block in _blocks(rows, coordinates.dtype):
        pieces[leaf].append(block.mT @ coordinates.to(block.device))
    empty = coordinates[:0]
    return [torch.cat(parts) if parts else empty for parts in pieces]


def _blocks(rows: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows in this dtype, a bounded number of columns at a time, with their leaf."""
    for leaf, matrix in enumerate(rows):
        step = matrix.shape[1] or 1
        if matrix.dtype != dtype:
            step = max(1, _BLOCK // max(1, len(matrix)))
        for start in range(0, matrix.shape[1], step):
            yield leaf, matrix[:, start : start + step].to(dtype)


def factored(k: Kernel, signed: bool) -> Factored:
    """Return the spectrum of F; where `signed` is False no weight is negative."""
    eigen = spd.spectrum(k.matrix)
    # Beneath this, an eigenvalue is a rounding error, and so is its vector.
    level = len(k.roots) * torch.finfo(eigen.values.dtype).eps * eigen.values.detach().abs().sum()
    kept = eigen.values > level
    safe = torch.where(kept, eigen.values, torch.ones_like(eigen.values)).sqrt()
    zero = torch.zeros_like(safe)
    up = eigen.vectors * torch.where(kept, 1.0 / safe, zero)
    if not signed:
        return Factored(torch.where(kept, eigen.values, zero), up, eigen.good)
    half = eigen.vectors * torch.where(kept, safe, zero)
    inner = spd.spectrum(half.mT @ (k.signs[:, None] * half))
    return Factored(inner.values, up @ inner.vectors, eigen.good & inner.good)


def apply(
    rows: Sequence[Tensor],
    k: Kernel,
    f: Factored,
    scales: Tensor,
    rest: Scalar,
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    """Return U diag(scales) Uᵀ v + rest (I - U Uᵀ) v, for a function of F with these values."""
    wide = [x.to(scales.dtype) for x in vectors]
    rest = scalar_like(rest, scales)
    inside = f.vectors.mT @ (k.roots * project(rows, wide, scales.dtype))
    back = expand(rows, k.roots * (f.vectors @ ((scales - rest) * inside)))
    return [rest * x + y for x, y in zip(wide, back, strict=True)]


def woodbury(
    rows: Sequence[Tensor],
    k: Kernel,
    factor: spd.Factor,
    vectors: Sequence[Tensor],
    damping: Scalar,
) -> list[Tensor]:
    """Return (F + λI)⁻¹ v from the Cholesky factor of K + λI; no weight is negative."""
    wide = [x.to(factor.lower.dtype) for x in vectors]
    inside = spd.solve(factor, k.roots * project(rows, wide, factor.lower.dtype))
    back = expand(rows, k.roots * inside)
    scalar = scalar_like(damping, factor.lower)
    return [(x - y) / scalar for x, y in zip(wide, back, strict=True)]


def whiten(
    rows: Sequence[Tensor],
    k: Kernel,
    factor: spd.Factor,
    normals: Sequence[Tensor],
    damping: Scalar,
) -> list[Tensor]:
    """Return A z with A Aᵀ = (F + λI)⁻¹, from the Cholesky factor L of K + λI.

    A = λ^-½ (I - S'ᵀ L^-ᵀ (L + √λ I)⁻¹ S'); that A Aᵀ is Woodbury's formula follows from
    L (L + √λ)ᵀ + (L + √λ) Lᵀ - K = (L + √λ)(L + √λ)ᵀ.
    """
    lower = factor.lower
    wide = [z.to(lower.dtype) for z in normals]
    root = torch.as_tensor(damping, dtype=lower.dtype, device=lower.device).sqrt()
    inside = (k.roots * project(rows, wide, lower.dtype)).unsqueeze(-1)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inside = torch.linalg.solve_triangular(lower + root * eye, inside, upper=False)
    inside = torch.linalg.solve_triangular(lower.mT, inside, upper=True).squeeze(-1)
    back = expand(rows, k.roots * inside)
    return [(z - y) / root for z, y in zip(wide, back, strict=True)]
