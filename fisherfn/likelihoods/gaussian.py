"""Independent normal errors of known scale.

With outputs the mean and s the standard deviation:

    log p(y) = -(y - z)^2 / (2 s^2) - log s - log(2 pi) / 2    score = (y - z) / s^2    h = 1 / s^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core.errors import OptionError, ShapeError
from fisherfn.core.modes import concrete
from fisherfn.likelihoods.independent import Independent


def gaussian(scale: float | Tensor, event_ndim: int = 1) -> Gaussian:
    """Make the likelihood of independent normal errors; the outputs are means.

    A mean squared error is no likelihood until the noise has a scale: the Fisher goes with
    1 / scale^2.

    Args:
        scale: Standard deviation of the noise, a number or a tensor that broadcasts to one event.
        event_ndim: Number of trailing axes of the outputs that make up one observation.

    Returns:
        The likelihood. Targets have the shape of the outputs, `[B, *positions, *event]`.

    Raises:
        OptionError: The scale is no number or floating point tensor, not positive, or not finite.

    Example:
        >>> lik = gaussian(scale=0.5)
        >>> lik.score(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]]))
        tensor([[2., 0.]])
    """
    return Gaussian(scale, event_ndim=event_ndim)


@dataclass(frozen=True, eq=False)
class Gaussian(Independent):
    """See `gaussian`. Equal to another if the numbers are, or if the scale is the same tensor."""

    name: ClassVar[str] = "gaussian"
    scale: float | Tensor

    def __post_init__(self) -> None:
        """Refuse a scale that is no standard deviation."""
        super().__post_init__()
        s = self.scale
        if isinstance(s, Tensor) and s.is_floating_point():
            bad = concrete(s) and not bool(((s > 0) & torch.isfinite(s)).all())
        else:
            bad = isinstance(s, bool) or not isinstance(s, int | float) or not 0 < s < math.inf
        if bad:
            raise OptionError(
                f"gaussian: expected a positive finite number or floating point tensor, got {s!r} "
                "at scale. It is the standard deviation of the noise."
            )

    def __eq__(self, other: object) -> bool:
        """Compare numbers by value and tensors by identity."""
        if not isinstance(other, Gaussian):
            return NotImplemented
        a, b = self.scale, other.scale
        same = a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
        return same and self.event_ndim == other.event_ndim

    def __hash__(self) -> int:
        """Hash in keeping with `__eq__`."""
        return hash((Gaussian, self.scale, self.event_ndim))

    def check_outputs(self, caller: str, outputs: Any) -> None:
        """Raise unless the scale broadcasts to one event of the outputs."""
        super().check_outputs(caller, outputs)
        if not isinstance(self.scale, Tensor):
            return
        event, scale = self.event_shape(outputs), tuple(self.scale.shape)
        tail = event[len(event) - len(scale) :]
        if len(scale) > len(event) or any(
            s not in (1, e) for s, e in zip(scale, tail, strict=True)
        ):
            raise ShapeError(
                f"{caller}: expected a scale that broadcasts to one event, shape {event}, got "
                f"{scale} at scale. The event is the last {self.event_ndim} axes of the outputs."
            )

    def describe_targets(self, outputs: Tensor) -> tuple[str, str]:
        """Return that targets are finite."""
        return "finite targets", "Leave missing values out by a mask."

    def _scale(self, x: Tensor) -> Tensor:
        if isinstance(self.scale, Tensor):
            return self.scale.to(x.device, x.dtype)
        return torch.full((), float(self.scale), dtype=x.dtype, device=x.device)

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        s = self._scale(x)
        return -0.5 * ((y - x) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)

    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        s = self._scale(x)
        return (y - x) / s / s

    def _deviation(self, x: Tensor) -> Tensor:
        return self._scale(x).reciprocal().expand(x.shape)

    def _draw(self, x: Tensor, keys: Tensor, event: tuple[int, ...]) -> Tensor:
        return x + self._scale(x).detach() * random.normal(keys, event, x.dtype)

    def _invalid(self, y: Tensor) -> Tensor:
        return ~torch.isfinite(y)
