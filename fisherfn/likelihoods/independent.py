"""Likelihoods whose event is a vector of independent numbers.

Their output Fisher is diagonal, H = diag(h), and so is its square root: K is the number of entries
of an event, and column k is sqrt(h_k) at entry k. A member says elementwise what its density,
residual (the score) and deviation (sqrt(h)) are, how to draw, and which targets are invalid.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfn.core.dtypes import wide
from fisherfn.core.errors import OptionError, ShapeError
from fisherfn.core.options import is_count
from fisherfn.likelihoods import base


@dataclass(frozen=True, kw_only=True)
class Independent(base.Likelihood):
    """Outputs `[B, *positions, *event]`, the last `event_ndim` axes being the event.

    Targets have the shape of the outputs. The log-probability is the sum over the event, so
    `event_ndim` says what one observation is: `[B, T, D]` is B x T of them with the default of 1,
    B with 2. Outputs `[B]` of a model that returns one number an example need `event_ndim=0`.
    """

    event_ndim: int = 1

    def __post_init__(self) -> None:
        """Refuse a number of axes that is none."""
        n = self.event_ndim
        if not is_count(n, 0):
            raise OptionError(
                f"{self.name}: expected an integer >= 0, got {n!r} at event_ndim. It counts the "
                "trailing axes of the outputs that make up one event."
            )

    @abstractmethod
    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-density of each entry."""

    @abstractmethod
    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        """Derivative of the log-density with respect to each output."""

    @abstractmethod
    def _deviation(self, x: Tensor) -> Tensor:
        """Standard deviation of the residual, the square root of the Fisher of each entry."""

    @abstractmethod
    def _draw(self, x: Tensor, keys: Tensor, event: tuple[int, ...]) -> Tensor:
        """Draw, from one key a position."""

    @abstractmethod
    def _invalid(self, y: Tensor) -> Tensor:
        """Where a target cannot be drawn."""

    @property
    def event_axes(self) -> tuple[int, ...]:
        """The last `event_ndim` axes."""
        return tuple(range(-self.event_ndim, 0))

    def check_outputs(self, caller: str, outputs: Any) -> None:
        """Raise unless the outputs have the examples and the event axes."""
        if isinstance(outputs, Tensor) and 0 < outputs.ndim <= self.event_ndim:
            raise ShapeError(
                f"{caller}: expected outputs [B, *positions, *event] with {self.event_ndim} event "
                f"axes, got shape {tuple(outputs.shape)} at outputs. Keep the examples as leading "
                f"axis, or use likelihoods.{self.name}(..., event_ndim={outputs.ndim - 1})."
            )
        base.check_tensor_outputs(caller, outputs, 1, "[B, *positions, *event]")

    def event_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the sizes of the last `event_ndim` axes."""
        return tuple(outputs.shape[outputs.ndim - self.event_ndim :])

    def positions_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the sizes of the axes before the event."""
        self.check_outputs(self.name, outputs)
        return tuple(outputs.shape[: outputs.ndim - self.event_ndim])

    def columns(self, outputs: Tensor) -> int:
        """Return the number of entries of an event."""
        self.check_outputs(f"{self.name}.columns", outputs)
        return math.prod(self.event_shape(outputs))

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-density of each event, `[P]`."""
        x, y = self._pair("log_prob", outputs, targets)
        density = self._log_density(x, y)
        return density.reshape(self._flat(outputs)).sum(-1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the residual, like `outputs`."""
        return self._residual(*self._pair("score", outputs, targets))

    def sample(self, outputs: Tensor, keys: Tensor) -> Tensor:
        """Draw targets like `outputs`, in at least float32."""
        self.check_outputs(f"{self.name}.sample", outputs)
        keys = base.example_keys(f"{self.name}.sample", keys, outputs.shape[0])
        keys = base.position_keys(keys, self.positions_shape(outputs))
        x = wide(outputs.detach())
        return self._draw(x, keys, self.event_shape(outputs)).to(x.dtype)

    def root(self, outputs: Tensor, index: int | Tensor) -> Tensor:
        """Return the deviation at entry `index` of each event, zero elsewhere."""
        columns = self.columns(outputs)
        base.check_index(f"{self.name}.root", index, columns)
        entries = torch.arange(columns, device=outputs.device)
        at = (entries == index).reshape(self.event_shape(outputs))
        return torch.where(at, self._deviation(wide(outputs)), 0.0)

    def root_mv(self, outputs: Tensor, u: Tensor) -> Tensor:
        """Return the deviation times u."""
        self.check_outputs(f"{self.name}.root_mv", outputs)
        base.check_vector(f"{self.name}.root_mv", "u", u, self._flat(outputs))
        x = wide(outputs)
        return self._deviation(x) * u.reshape(outputs.shape).to(x.dtype)

    def root_t_mv(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return the deviation times v, the event as one axis."""
        return self._times("root_t_mv", outputs, v).reshape(self._flat(outputs))

    def fisher_mv(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return the squared deviation times v."""
        return self._deviation(wide(outputs)) * self._times("fisher_mv", outputs, v)

    def neutral(self, targets: Tensor, mask: Tensor | None) -> Tensor:
        """Return the targets with 0 where the mask is false."""
        if mask is None:
            return targets
        return torch.where(base.expand_mask(mask, targets), targets, torch.zeros_like(targets))

    def check_structure(self, caller: str, outputs: Any, targets: Any) -> None:
        """Raise unless the targets are real numbers of the shape of the outputs."""
        self.check_outputs(caller, outputs)
        base.check_tensor_targets(
            caller,
            targets,
            tuple(outputs.shape),
            "Targets have the shape of the outputs; nothing is broadcast.",
        )
        if targets.is_complex():
            raise ShapeError(
                f"{caller}: expected real targets, got {targets.dtype} at targets. "
                "Use torch.view_as_real and an event with one more axis."
            )

    def invalid(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """Return where entries that count cannot have been drawn."""
        return base.counted(self._invalid(targets), mask)

    def _flat(self, outputs: Tensor) -> tuple[int, ...]:
        """P + (K,)."""
        event = outputs.ndim - self.event_ndim
        return (*outputs.shape[:event], math.prod(outputs.shape[event:]))

    def _pair(self, what: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets in one dtype, NaN for targets that cannot be drawn."""
        self.check_structure(f"{self.name}.{what}", outputs, targets)
        x = wide(outputs)
        return x, torch.where(self._invalid(targets), math.nan, targets.to(x.dtype))

    def _times(self, what: str, outputs: Tensor, v: Tensor) -> Tensor:
        self.check_outputs(f"{self.name}.{what}", outputs)
        base.check_vector(f"{self.name}.{what}", "v", v, tuple(outputs.shape))
        x = wide(outputs)
        return self._deviation(x) * v.to(x.dtype)
