"""Checks of options that occur on every floor: counts and random keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn.core.errors import OptionError, ShapeError


def is_count(value: Any, low: int = 1) -> bool:
    """Return whether a value is an integer of at least `low`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def check_count(
    caller: str, name: str, value: Any, low: int, advice: str, *, optional: bool = False
) -> Any:
    """Return an option, or raise unless it is an integer of at least `low`, or None if `optional`.

    Raises:
        OptionError: It is something else; the message ends in `advice`, which says what it counts.
    """
    if is_count(value, low) or (optional and value is None):
        return value
    what = "None or an integer" if optional else "an integer"
    raise OptionError(
        f"{caller}: expected {name}= to be {what} of at least {low}, got {value!r}. {advice}"
    )


def check_key(caller: str, key: Any, use: str, drawn: str) -> None:
    """Raise unless there is one random key.

    Args:
        caller: The public function on whose behalf it is checked.
        key: What was given.
        use: What it is needed for, such as "random vectors".
        drawn: What equal keys draw alike, such as "vectors".

    Raises:
        OptionError: It is no tensor.
        ShapeError: It is a tensor, but not one key.
    """
    if not isinstance(key, Tensor):
        got = "None" if key is None else type(key).__name__
        raise OptionError(
            f"{caller}: expected key= for {use}, got {got}. Pass key=random.key(seed); the same "
            f"key draws the same {drawn}."
        )
    if key.dtype != torch.int64 or tuple(key.shape) != (2,):
        raise ShapeError(
            f"{caller}: expected key= to be one key, int64 of shape (2,), got {key.dtype} of shape "
            f"{tuple(key.shape)}. Make it with random.key(seed)."
        )
