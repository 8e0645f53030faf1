"""Independent counts, from the logarithm of their rate.

With outputs z and rate e^z:   log p(y) = y z - e^z - log y!     score = y - e^z     h = e^z
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.likelihoods.independent import Independent


def poisson(event_ndim: int = 1) -> Poisson:
    """Make the likelihood of independent counts; the outputs are log-rates.

    Args:
        event_ndim: Number of trailing axes of the outputs that make up one observation.

    Returns:
        The likelihood. Targets are whole numbers >= 0 of any real dtype, in the shape of the
        outputs, `[B, *positions, *event]`; drawn ones are floating point.

    Example:
        >>> lik = poisson()
        >>> lik.score(torch.zeros(1, 2), torch.tensor([[0, 3]]))
        tensor([[-1.,  2.]])
    """
    return Poisson(event_ndim=event_ndim)


@dataclass(frozen=True, kw_only=True)
class Poisson(Independent):
    """See `poisson`."""

    name: ClassVar[str] = "poisson"

    def describe_targets(self, outputs: Tensor) -> tuple[str, str]:
        """Return that targets are counts."""
        return (
            "whole numbers >= 0",
            "Counts are not rates or averages; leave missing values out by a mask.",
        )

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        return y * x - x.exp() - torch.lgamma(y + 1.0)

    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        return y - x.exp()

    def _deviation(self, x: Tensor) -> Tensor:
        return (0.5 * x).exp()

    def _draw(self, x: Tensor, keys: Tensor, event: tuple[int, ...]) -> Tensor:
        return quantile(x.double().exp(), random.uniform(keys, event, torch.float64))

    def _invalid(self, y: Tensor) -> Tensor:
        whole = torch.isfinite(y) & (y == y.floor()) if y.is_floating_point() else True
        return ~((y >= 0) & whole)


def quantile(rate: Tensor, u: Tensor) -> Tensor:
    """Return the smallest count whose cumulative probability exceeds u, in [0, 1).

    A Cornish-Fisher guess, then five bisections of the 32 counts around it. With u a multiple of
    2^-53 the guess is off by 12 at most, so this is exact up to the accuracy of `gammaincc`, 1e-9
    in probability. Only above a rate of 1e6 and beyond 4.5 standard deviations is that function
    worse, and the count off by 16 at most. The number of steps is fixed, so that it compiles.

    Example:
        >>> rate = torch.tensor([3.0], dtype=torch.float64)
        >>> quantile(rate, torch.tensor([0.05], dtype=torch.float64))  # P(Y = 0) = 0.0498
        tensor([1.], dtype=torch.float64)
    """
    z = torch.special.ndtri(u.clamp(2.0**-54, 1.0 - 2.0**-54))
    guess = (rate + rate.sqrt() * z + (z * z - 1.0) / 6.0).floor()
    # Invariant: P(Y <= low) <= u < P(Y <= high).
    low, high = (guess - 16.0).clamp(min=-1.0), (guess + 16.0).clamp(min=15.0)
    for _ in range(5):
        middle = ((low + high) / 2.0).floor()
        above = torch.special.gammaincc(middle + 1.0, rate) > u
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(torch.isfinite(rate), high, torch.nan)
