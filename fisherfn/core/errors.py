"""The one family of errors.

Every message says what was called, what it expected, what it got, where in the tree (path), and
what to do about it. Each class also derives from the built-in that a caller would naturally catch.
"""

from __future__ import annotations


class FisherError(Exception):
    """Base class of every error that this library raises on purpose."""


class TreeMismatchError(FisherError, ValueError):
    """A pytree does not have the structure or the leaf shapes of the one it must match."""


class ShapeError(FisherError, ValueError):
    """A tensor has the wrong shape or data type."""


class OptionError(FisherError, ValueError):
    """An option, or a combination of options, that does not exist or makes no sense."""


class DataError(FisherError, ValueError):
    """Values that cannot be data: targets out of range, NaN, negative weights, nothing to count."""


class UnsupportedError(FisherError, NotImplementedError):
    """A request that is meaningful but cannot be answered for this model or likelihood."""


class NotPositiveDefiniteError(FisherError, ArithmeticError):
    """A matrix that has to be inverted or factored is singular or indefinite at this damping."""


def at(path: str) -> str:
    """Return " at <path>", or nothing for the root.

    >>> at("0.weight"), at("")
    (' at 0.weight', '')
    """
    return f" at {path}" if path else ""
