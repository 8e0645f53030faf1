"""Checks of the options that optimizers and their damping rules have in common."""

from __future__ import annotations

from typing import Any

from fisherfn.core.errors import OptionError
from fisherfn.core.options import is_count
from fisherfn.curvature.common import is_number


def check_size(caller: str, name: str, value: Any, *, zero: bool = True) -> None:
    """Raise unless an option is a finite number of at least 0, or above it without `zero`."""
    if not is_number(value) or not 0 <= value < float("inf") or not (zero or value > 0):
        what = "a number of at least 0" if zero else "a positive number"
        raise OptionError(
            f"{caller}: expected {name} to be {what}, got {value!r}. Pass a plain number."
        )


def check_steps(caller: str, name: str, value: Any) -> None:
    """Raise unless an option is a number of steps."""
    if not is_count(value):
        raise OptionError(
            f"{caller}: expected {name} to be an integer of at least 1, got {value!r}. It counts "
            "steps."
        )
