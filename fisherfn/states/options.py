"""The options of `accumulate`, checked before the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fisherfn.core.errors import DataError, OptionError
from fisherfn.states.ema import EmaState
from fisherfn.states.every import EveryState
from fisherfn.states.transform import Transform
from fisherfn.states.welford import WelfordState, welford
from fisherfn.states.window import WindowState

NONFINITE = ("raise", "skip", None)
#: The states of the transforms of this package.
STATES = (EmaState, EveryState, WelfordState, WindowState)


@dataclass(frozen=True)
class Options:
    """What a fold is made with."""

    estimator: Callable[..., Any] | tuple[Callable[..., Any], Callable[..., Any]]
    transform: Transform | None
    max_units: float | None
    target_stderr: float | None
    on_nonfinite: str | None


def options_of(
    estimator: Any,
    batches: Any,
    transform: Any,
    progress: Any,
    on_update: Any,
    max_units: Any,
    target_stderr: Any,
    on_nonfinite: Any,
) -> Options:
    """Check arguments that would otherwise fail late or in silence.

    Returns:
        The options.

    Raises:
        OptionError: One is of the wrong type, does not exist, or does not go with another.
        DataError: `batches` is no iterable.
    """
    pair = isinstance(estimator, list | tuple)
    parts = list(estimator) if pair else [estimator]
    if not all(map(callable, parts)) or (pair and len(parts) != 2):
        raise OptionError(
            f"accumulate: expected an estimator, got {type(estimator).__name__}. "
            "Pass for instance ff.diagonal(model, likelihood)."
        )
    if not isinstance(batches, Iterable):
        raise DataError(
            f"accumulate: expected an iterable of batches, got {type(batches).__name__}. "
            "Put a single batch into a list."
        )
    if not isinstance(progress, bool) and not callable(progress):
        raise OptionError(
            f"accumulate: expected progress to be True, False or a function, got {progress!r}. "
            "A function is called with the batches done and their total."
        )
    if on_update is not None and not callable(on_update):
        raise OptionError(
            f"accumulate: expected on_update to be a function, got {on_update!r}. "
            "It is called with the state after each batch."
        )
    if on_nonfinite not in NONFINITE:
        raise OptionError(
            f"accumulate: expected on_nonfinite to be one of {list(NONFINITE)}, got "
            f"{on_nonfinite!r}. 'raise' names the batch and the leaf."
        )
    _check_positive("max_units", max_units)
    _check_positive("target_stderr", target_stderr)
    if transform is not None and not isinstance(transform, Transform):
        raise OptionError(
            f"accumulate: expected transform to be one of ff.states, got "
            f"{type(transform).__name__}. Pass for instance states.welford()."
        )
    if pair and transform is None:
        raise OptionError(
            "accumulate: expected one estimator, got a pair. A pair goes with "
            "transform=states.every(n, a, otherwise=b)."
        )
    if target_stderr is not None:
        transform = welford() if transform is None else transform
        if kind_of(transform) not in (WelfordState, None):
            refuse_target()
    return Options(
        (parts[0], parts[1]) if pair else estimator,
        transform,
        max_units,
        target_stderr,
        on_nonfinite,
    )


def kind_of(transform: Transform) -> type[Any] | None:
    """Return the class of the states of a transform, None where only its members could tell.

    >>> kind_of(welford()).__name__
    'WelfordState'
    """
    try:
        return type(transform.init(torch.zeros(())))
    except Exception:  # of a caller's own, which takes no bare tensor
        return None


def refuse_target() -> NoReturn:
    """Refuse a transform that cannot say when to stop.

    Raises:
        OptionError: Always.
    """
    raise OptionError(
        "accumulate: expected transform=states.welford() with target_stderr, got another "
        "one. Only it knows a standard error."
    )


def _check_positive(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError(
            f"accumulate: expected {name} to be a positive number, got {value!r}. "
            "Leave it out to use every batch."
        )
