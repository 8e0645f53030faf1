"""Quantiles of the normal and of Student's t distribution, in plain tensor operations.

With t = √ν tan θ the density of t becomes C cosᵛ⁻¹ θ on (−π/2, π/2), C = Γ((ν+1)/2) / (√π Γ(ν/2)).
The mass on either side of θ is integrated by Gauss and Legendre: from the middle for ν ≥ 2, from
the end for smaller ν, where with ψ = π/2 − θ and s = ψᵛ the integrand (sin ψ/ψ)ᵛ⁻¹/ν is smooth.
θ is then found by bisection.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

_NODES = 48
_HALVINGS = 60


def normal_quantile(p: float) -> float:
    """Return the number below which a standard normal variable is with probability p.

    >>> round(normal_quantile(0.975), 6)
    1.959964
    """
    return torch.special.ndtri(torch.tensor(p, dtype=torch.float64)).item()


def t_quantile(p: float, freedom: Tensor) -> Tensor:
    """Return the number below which Student's t is with probability p.

    Args:
        p: A probability in (0, 1).
        freedom: ν > 0, float64 of any shape.

    Returns:
        The quantile for each ν; NaN where ν is not positive.

    >>> t_quantile(0.975, torch.tensor([1.0, 19.0], dtype=torch.float64))
    tensor([12.7062,  2.0930], dtype=torch.float64)
    """
    rare = min(p, 1.0 - p)
    narrow = freedom < 2.0  # where ψ is looked for, elsewhere θ, which is least for ν = 2
    widest = (1.0 - 2.0 * rare) / math.sqrt(2.0 * rare * (1.0 - rare))
    low = torch.zeros_like(freedom)
    high = torch.where(narrow, math.pi / 2, torch.atan(widest / freedom.sqrt()))
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        up = (_mass_above(middle, freedom) > rare) ^ narrow
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    found = torch.tan(0.5 * (low + high))
    found = freedom.sqrt() * torch.where(narrow, 1.0 / found, found)
    found = torch.where(freedom > 0, found, torch.nan)
    return found if p >= 0.5 else -found


def _mass_above(angle: Tensor, freedom: Tensor) -> Tensor:
    """Return the mass above θ for ν ≥ 2, where the angle is θ, and for ν < 2, where it is ψ."""
    nodes, weights = (torch.from_numpy(a).to(angle.device) for a in _rule())
    nu, x = freedom.unsqueeze(-1), angle.unsqueeze(-1) * nodes
    middle = 0.5 - _constant(freedom) * angle * (((nu - 1.0) * x.cos().log()).exp() @ weights)
    small = freedom.clamp(max=2.0)
    end, power = angle.pow(small), small.unsqueeze(-1)
    psi = (end.unsqueeze(-1) * nodes).pow(1.0 / power)
    inner = torch.sinc(psi / math.pi).pow(power - 1.0) @ weights
    return torch.where(freedom < 2.0, _constant(small) * inner * end / small, middle)


def _constant(freedom: Tensor) -> Tensor:
    """Return C, for large ν by its series, where the logarithms of Γ cancel."""
    few = freedom.clamp(max=1e4)
    gamma = (torch.lgamma(0.5 * few + 0.5) - torch.lgamma(0.5 * few)).exp()
    many = (0.5 * freedom).sqrt() * (1.0 - 0.25 / freedom + 0.03125 / freedom.square())
    return torch.where(freedom > 1e4, many, gamma) / math.sqrt(math.pi)


@cache
def _rule() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(_NODES)
    return 0.5 * (x + 1.0), 0.5 * w
