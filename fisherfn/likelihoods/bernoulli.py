"""Independent yes-or-no labels, from logits.

With p = sigmoid(z):   log p(y) = y log p + (1-y) log(1-p)     score = y - p     h = p (1-p)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fisherfn.core import random
from fisherfn.likelihoods.independent import Independent


def bernoulli(event_ndim: int = 1) -> Bernoulli:
    """Make the likelihood of independent labels 0 or 1; the outputs are logits.

    Targets may be bool, integer or floating point. Values between 0 and 1 are taken for soft
    labels: their log-probability is minus the cross-entropy, their score y - p its gradient. They
    are never drawn; the empirical Fisher they give is that of these gradients.

    Args:
        event_ndim: Number of trailing axes of the outputs that make up one observation.

    Returns:
        The likelihood. Targets have the shape of the outputs, `[B, *positions, *event]`.

    Example:
        >>> lik = bernoulli()
        >>> lik.score(torch.zeros(1, 2), torch.tensor([[0, 1]]))
        tensor([[-0.5000,  0.5000]])
    """
    return Bernoulli(event_ndim=event_ndim)


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Independent):
    """See `bernoulli`."""

    name: ClassVar[str] = "bernoulli"

    def describe_targets(self, outputs: Tensor) -> tuple[str, str]:
        """Return the range of labels."""
        return (
            "labels from 0 to 1",
            "Map them, as in (targets + 1) / 2 for labels -1 and 1, or leave them out by a mask.",
        )

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        return y * F.logsigmoid(x) + (1.0 - y) * F.logsigmoid(-x)

    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        # y - p, written so that a label predicted with confidence leaves 1-p and not a rounding.
        return y * torch.sigmoid(-x) - (1.0 - y) * torch.sigmoid(x)

    def _deviation(self, x: Tensor) -> Tensor:
        # sqrt(p (1-p)), through logarithms: no derivative of a square root at 0.
        return (0.5 * (F.logsigmoid(x) + F.logsigmoid(-x))).exp()

    def _draw(self, x: Tensor, keys: Tensor, event: tuple[int, ...]) -> Tensor:
        # 53 bits: with the 24 of float32, labels rarer than 6e-8 would be drawn too often.
        return random.uniform(keys, event, torch.float64) < torch.sigmoid(x.double())

    def _invalid(self, y: Tensor) -> Tensor:
        return ~((y >= 0) & (y <= 1))
