"""What the representations share beneath their algebra: checks of arguments, and plain sums.

Every sum is float32 or wider.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fisherfn.core.dtypes import wide, widest, working_dtype
from fisherfn.core.errors import NotPositiveDefiniteError, OptionError, ShapeError, at
from fisherfn.core.modes import concrete

Scalar: TypeAlias = "float | Tensor"

_FAULTS = {
    "positive definite": "singular, indefinite or NaN",
    "positive semi-definite": "indefinite or NaN",
}


def check_damping(caller: str, damping: Any) -> Scalar:
    """Return the damping, checked: finite and not negative.

    A tensor whose value cannot be looked at becomes NaN where it is neither.

    Raises:
        OptionError: Not a real number, or a bad one.
    """
    advice = "Pass the λ of F + λI: a finite number >= 0, or a 0-d tensor."
    if isinstance(damping, Tensor):
        if damping.ndim != 0 or damping.is_complex() or damping.dtype == torch.bool:
            raise OptionError(
                f"{caller}: expected damping to be a real number, got {damping.dtype} of shape "
                f"{tuple(damping.shape)}. {advice}"
            )
        good = (damping >= 0) & torch.isfinite(damping)
        if not concrete(damping):
            value = damping if damping.is_floating_point() else damping.float()
            return torch.where(good, value, torch.full_like(value, math.nan))
        if not good:
            raise OptionError(f"{caller}: expected damping >= 0, got {damping.item()}. {advice}")
        return damping
    if not is_number(damping):
        raise OptionError(
            f"{caller}: expected damping to be a real number, got {damping!r} of type "
            f"{type(damping).__name__}. {advice}"
        )
    if not 0 <= damping < math.inf:
        raise OptionError(f"{caller}: expected damping >= 0, got {damping}. {advice}")
    return damping


def relative_to(damping: Scalar, trace: Callable[[], Tensor], size: int, relative: bool) -> Scalar:
    """Return λ, which is given in units of the mean eigenvalue of F if `relative`.

    A matrix without a mean, or with one below zero, keeps the number: it has no solutions, and what
    looks for them says where that is.
    """
    if not relative:
        return damping
    mean = trace() / max(1, size)
    return torch.where(mean >= 0, mean, torch.ones_like(mean)) * scalar_like(damping, mean)


def check_number(caller: str, name: str, x: Any) -> float:
    """Return an option, checked: a finite real number.

    Raises:
        OptionError: Anything else.
    """
    if not is_number(x) or not -math.inf < x < math.inf:
        raise OptionError(
            f"{caller}: expected {name} to be a finite real number, got {x!r} of type "
            f"{type(x).__name__}. Pass a plain number."
        )
    return x


def is_number(x: Any) -> bool:
    """Return whether x is a real Python or numpy number."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def scalar_like(c: Scalar, x: Tensor) -> Scalar:
    """Return a scalar that does not change the dtype of x when the two are combined."""
    return c.to(x.dtype) if isinstance(c, Tensor) else c


def combine(a: Scalar, x: Tensor, b: Scalar = 0.0, y: Tensor | None = None) -> Tensor:
    """Return a·x + b·y in float32 or wider.

    >>> combine(2.0, torch.ones(2), 3.0, torch.ones(2))
    tensor([5., 5.])
    """
    x = wide(x)
    scaled = x * scalar_like(a, x)
    if y is None:
        return scaled
    y = wide(y)
    return scaled + y * scalar_like(b, y)


def hypot(x: Tensor, y: Tensor) -> Tensor:
    """Return √(x² + y²), with derivative 0 where both are 0."""
    none = (x == 0) & (y == 0)
    return torch.hypot(torch.where(none, torch.ones_like(x), x), y).masked_fill(none, 0.0)


def total(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the sum of 0-d tensors, float32 or wider; `like` gives the device of an empty sum.

    >>> total([torch.tensor(1.0), torch.tensor(2.0)], torch.tensor(0.0))
    tensor(3.)
    """
    if not parts:
        return torch.zeros((), device=like.device)
    dtype = widest(parts)
    return torch.stack([part.to(parts[0].device, dtype) for part in parts]).sum()


def norm(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the Euclidean norm of all entries of some tensors, float32 or wider.

    The squares are added in float64: in float32 those of entries below 1e-22 are zero.

    >>> norm([torch.tensor([3e-30]), torch.tensor([4e-30])], torch.tensor(0.0))
    tensor(5.0000e-30)
    """
    parts = [torch.linalg.vector_norm(x, dtype=working_dtype(x)) for x in tensors]
    if not parts:
        return torch.zeros((), device=like.device)
    stacked = torch.stack([part.to(parts[0].device) for part in parts])
    return torch.linalg.vector_norm(stacked).to(widest(tensors))


def require(
    caller: str,
    need: str,
    names: Callable[[], Sequence[str]],
    good: Sequence[Tensor],
    damping: Scalar,
) -> Tensor | None:
    """Raise where a condition fails; return it as a 0-d bool where values cannot be looked at.

    Args:
        caller: The public function that needs the condition.
        need: What it needs: "positive definite" or "positive semi-definite".
        names: Gives the path of the leaf or block of each condition; called for the message only.
        good: 0-d bool tensors.
        damping: The λ in use, for the message and to tell whether it is traced.

    Returns:
        None if all conditions are known to hold, otherwise whether they do, with which to poison.

    Raises:
        NotPositiveDefiniteError: A condition fails; the message names the first.
    """
    if not good:
        return None
    together = torch.stack([g.to(good[0].device) for g in good])
    if not concrete(together, damping):
        return together.all()
    if together.all():
        return None
    first = int(together.logical_not().int().argmax())
    shown = damping.item() if isinstance(damping, Tensor) else damping
    raise NotPositiveDefiniteError(
        f"{caller}: expected F + damping·I to be {need}, got one that is {_FAULTS[need]}"
        f"{at(names()[first])} with damping {shown:g}. Pass a larger damping."
    )


def poison(good: Tensor | None, x: Tensor) -> Tensor:
    """Return x, or NaN everywhere if `good` is False."""
    if good is None:
        return x
    return torch.where(good.to(x.device), x, torch.full_like(x, math.nan))


def check_floating(caller: str, name: str, leaves: Sequence[Tensor], paths: Sequence[str]) -> None:
    """Check that leaves are real floating-point tensors.

    Raises:
        ShapeError: One is not; the message has its path.
    """
    for i, leaf in enumerate(leaves):
        if not leaf.is_floating_point():
            raise ShapeError(
                f"{caller}: expected {name} to be floating point, got {leaf.dtype}{at(paths[i])}. "
                "Convert it with .float()."
            )
