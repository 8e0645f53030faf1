"""How strongly the curvature is damped: the λ of F + λI at each step.

A rule is a number, a function of the optimizer's state, or one of those made here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from fisherfn.core.errors import OptionError
from fisherfn.curvature import Curvature
from fisherfn.curvature.common import Scalar, check_damping, is_number
from fisherfn.optim.options import check_size, check_steps

Damping: TypeAlias = "float | Tensor | Callable[[Any], Any] | LevenbergMarquardt | Jeffreys"


@dataclass(frozen=True)
class LevenbergMarquardt:
    """See `levenberg_marquardt`."""

    initial: float
    every: int
    factor: float
    lower: float
    upper: float

    def adapted(self, damping: Tensor, rho: Tensor) -> Tensor:
        """Return the damping after a step that achieved `rho` times what the model promised."""
        omega = self.factor**self.every
        # where the loss is not finite, the step was too long
        bad = ~(rho >= 0.25)
        found = torch.where(bad, damping / omega, torch.where(rho > 0.75, damping * omega, damping))
        return found.clamp(self.lower, self.upper)


def levenberg_marquardt(
    initial: float = 1.0,
    *,
    every: int = 5,
    factor: float = 19 / 20,
    lower: float = 1e-8,
    upper: float = 1e8,
) -> LevenbergMarquardt:
    """Adapt the damping to how well the quadratic model predicts the loss.

    Every T steps, with ρ = (h(θ+δ) - h(θ)) / M(δ) for the step δ just made and
    M(δ) = gᵀδ + ½ δᵀ(F + λI)δ: λ becomes ω^T λ if ρ > 3/4 and λ / ω^T if ρ < 1/4.

    Args:
        initial: The first λ, in the units of F.
        every: T, the steps between two adaptations; each takes two forward passes.
        factor: ω, in (0, 1).
        lower: λ never falls below this.
        upper: λ never rises above this.

    Returns:
        A rule for `damping=`.

    Raises:
        OptionError: A number out of range.

    Reference: Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored
    approximate curvature, section 6.5.

    Example:
        >>> rule = levenberg_marquardt(2.0, every=1, factor=0.5)
        >>> rule.adapted(torch.tensor(2.0), torch.tensor(0.9))
        tensor(1.)
    """
    caller = "optim.levenberg_marquardt"
    for name, value in (("initial", initial), ("lower", lower), ("upper", upper)):
        check_size(caller, name, value, zero=False)
    if not lower <= initial <= upper:
        raise OptionError(
            f"{caller}: expected lower <= initial <= upper, got {lower}, {initial}, {upper}. "
            "Widen the range."
        )
    check_steps(caller, "every", every)
    if not is_number(factor) or not 0 < factor < 1:
        raise OptionError(
            f"{caller}: expected factor in (0, 1), got {factor!r}. It is what λ is multiplied by, "
            "each step, while the model predicts well."
        )
    return LevenbergMarquardt(float(initial), every, float(factor), float(lower), float(upper))


@dataclass(frozen=True)
class Jeffreys:
    """See `jeffreys`."""

    scale: float
    floor: float

    def of(self, curvature: Curvature, size: int) -> Tensor:
        """Return the damping for a matrix of `size` parameters."""
        return self.scale * (curvature.logdet(damping=self.floor) / size).exp()


def jeffreys(scale: float = 1.0, *, floor: float = 1e-8) -> Jeffreys:
    """Scale the damping by the density of Jeffreys' prior at the parameters.

    With log π(θ) = ½ log det (F + εI), the density up to a constant, λ = c·exp(2 log π / P): c
    times the geometric mean of the eigenvalues of F + εI. It is in the units of F, and follows F
    when the loss is scaled and when F grows or shrinks in training. It is a density, so its value
    is not comparable across parameterisations.

    Args:
        scale: c.
        floor: ε, in the units of F: what takes the place of eigenvalues that are zero.

    Returns:
        A rule for `damping=`.

    Raises:
        OptionError: A number that is not positive.

    Reference: Jeffreys (1946), An invariant form for the prior probability in estimation problems.

    Example:
        >>> from fisherfn.curvature import Diagonal
        >>> F = Diagonal({"w": torch.tensor([1.0, 100.0])}, torch.tensor(1.0))
        >>> jeffreys(0.1).of(F, 2)
        tensor(1.)
    """
    for name, value in (("scale", scale), ("floor", floor)):
        check_size("optim.jeffreys", name, value, zero=False)
    return Jeffreys(float(scale), float(floor))


def check_rule(caller: str, damping: Any) -> Damping:
    """Return the rule, checked.

    Raises:
        OptionError: It is none.
    """
    if isinstance(damping, LevenbergMarquardt | Jeffreys):
        return damping
    if callable(damping) and not isinstance(damping, Tensor):
        return damping
    return check_damping(caller, damping)


def current(caller: str, rule: Damping, state: Any, size: int, like: Tensor) -> Scalar:
    """Return the λ of this step: a number where the rule is one, else a 0-d tensor.

    Args:
        caller: The function on whose behalf errors are raised.
        rule: Any but `levenberg_marquardt`, whose λ is kept by the optimizer.
        state: The optimizer's, with the curvature of this step.
        size: Number of parameters.
        like: A tensor of the dtype and on the device of the result of a function.

    Raises:
        OptionError: The function returned something else than a number of at least 0.
    """
    if isinstance(rule, Jeffreys):
        return rule.of(state.curvature.inverse.matrix, size)
    if is_number(rule):
        return cast(float, rule)
    value = rule(state) if callable(rule) and not isinstance(rule, Tensor) else rule
    checked = check_damping(caller, value)
    if isinstance(checked, Tensor):
        return checked.to(like.device, like.dtype)
    return torch.full_like(like, checked)
