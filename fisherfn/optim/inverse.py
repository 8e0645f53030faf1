"""(F + λI)^-α v from a factorisation that is made once and used for many steps and any λ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import UnsupportedError
from fisherfn.core.modes import concrete, unmixed
from fisherfn.core.trees import Tree
from fisherfn.curvature import KFAC, Curvature, LowRank, gram, spd
from fisherfn.curvature.blocks import Blocks
from fisherfn.curvature.common import Scalar, poison, require, scalar_like
from fisherfn.curvature.implicit import Implicit


class Inverse(NamedTuple):
    """What solutions are taken from."""

    matrix: Any  # Curvature: F as of the last refresh; KFAC in its eigenbasis, as EKFAC
    parts: Any  # spectra of its blocks or rows, or None where `matrix` answers cheaply by itself


@unmixed
def invert(matrix: Curvature, *, reused: bool = True) -> Inverse:
    """Factorise a curvature matrix.

    Args:
        matrix: Any curvature.
        reused: Whether more than one solution will be taken; for one, its own `solve` is cheaper.

    Returns:
        The factorisation, to keep in a state.

    Cost: an eigendecomposition of each factor or block, or of the Gram matrix of the rows.
    """
    if isinstance(matrix, KFAC):
        return Inverse(matrix.eigh(), None)
    if reused and isinstance(matrix, Blocks):
        return Inverse(matrix, tuple([spd.spectrum(part.matrix) for part in matrix._parts()]))
    if reused and isinstance(matrix, LowRank) and matrix._thin and not matrix.signed:
        kernel = matrix._kernel()
        return Inverse(matrix, (kernel, gram.factored(kernel, matrix.signed)))
    return Inverse(matrix, None)


@unmixed
def apply(caller: str, inverse: Inverse, v: Tree, power: float, damping: Scalar) -> Tree:
    """Return (F + λI)^-power v, in the dtype of v.

    Raises:
        NotPositiveDefiniteError: F + λI has no inverse.
        UnsupportedError: A matrix-free F where values are hidden.
    """
    matrix, parts = inverse
    if isinstance(matrix, Blocks) and parts is not None:
        return _blocks(caller, matrix, parts, v, power, damping)
    if isinstance(matrix, LowRank) and parts is not None:
        return _rows(caller, matrix, parts, v, power, damping)
    if isinstance(matrix, Implicit) and not concrete(*trees.leaves(v)):
        raise UnsupportedError(
            f"{caller}: expected values for implicit, got none (torch.compile or torch.func). "
            "Conjugate gradients stop by them: call update outside, or use low_rank or kfac."
        )
    if power == 1:
        return matrix.solve(v, damping=damping)
    found = matrix.pow(v, -power, damping=damping)
    return trees.map(lambda x, y: x.to(y.dtype), found, v)


def _scales(
    caller: str, names: Any, spectra: Sequence[tuple[Tensor, Tensor]], power: float, damping: Scalar
) -> list[Tensor]:
    """Return (values + λ)^-power for each spectrum, NaN or an error where that does not exist."""
    shifted, good = [], []
    for values, finite in spectra:
        found = values + scalar_like(damping, values)
        # beneath this an eigenvalue is a rounding error, whatever its sign
        level = values.detach().abs().amax() * torch.finfo(values.dtype).eps * 10
        good.append(finite & (found > level).all())
        shifted.append(found)
    known = require(caller, "positive definite", names, good, damping)
    safe = [torch.where(g, x, torch.ones_like(x)) for g, x in zip(good, shifted, strict=True)]
    return [poison(known, x**-power) for x in safe]


def _blocks(
    caller: str,
    matrix: Blocks,
    parts: Sequence[spd.Spectrum],
    v: Tree,
    power: float,
    damping: Scalar,
) -> Tree:
    vectors = matrix._gather(caller, v)
    spectra = [(part.values, part.good) for part in parts]
    scales = _scales(caller, lambda: _names(matrix, parts), spectra, power, damping)
    found = [
        part.vectors @ (s * (part.vectors.mT @ x.to(s.dtype)))
        for part, s, x in zip(parts, scales, vectors, strict=True)
    ]
    return matrix._scatter(found, [x.dtype for x in matrix.layout.leaves(caller, "v", v)])


def _names(matrix: Blocks, parts: Sequence[spd.Spectrum]) -> list[str]:
    """Return, for each block, the leaf in which its lowest eigenvector is strongest."""
    lowest = [int(part.vectors[:, 0].abs().argmax()) for part in parts]
    return [matrix._path(p, i) for p, i in zip(matrix._parts(), lowest, strict=True)]


def _rows(caller: str, matrix: LowRank, parts: Any, v: Tree, power: float, damping: Scalar) -> Tree:
    kernel, factored = parts
    vectors = matrix._vector(caller, v)
    # the space that no row reaches has the eigenvalue 0
    values = torch.cat([factored.values, factored.values.new_zeros(1)])
    (scales,) = _scales(
        caller, lambda: [matrix._weakest()], [(values, factored.good)], power, damping
    )
    found = gram.apply(matrix._flat, kernel, factored, scales[:-1], scales[-1], vectors)
    return matrix._tree(found, [x.dtype for x in vectors])
