"""Which classes may be in a file, and under which names.

Every representation (a subclass of `Result`) and every state goes by its own name. What they are
made of besides, such as a layout or a group specification, goes by module and name, if it is a
dataclass or a NamedTuple of this package; other packages call `register`. A name in a file is
looked up among these and nothing else.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

import fisherfn.states as states
from fisherfn.core.errors import OptionError, UnsupportedError
from fisherfn.curvature import GradientMoments, Layout, Result

PACKAGE = "fisherfn"

_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        GradientMoments,
        Layout,
        states.AccumulateState,
        states.EmaState,
        states.EveryPair,
        states.EveryState,
        states.Interval,
        states.WelfordState,
        states.WindowState,
    )
}


def register(cls: type) -> type:
    """Let objects of a class be saved and loaded, under the name of the class.

    The classes of this package need no registration.

    Args:
        cls: A dataclass or a NamedTuple whose fields can be saved.

    Returns:
        `cls`, so that this can decorate it.

    Raises:
        OptionError: Neither of the two, or its name is taken.

    Example:
        >>> from typing import NamedTuple
        >>> from torch import Tensor
        >>> @register
        ... class Pair(NamedTuple):
        ...     left: Tensor
        ...     right: Tensor
    """
    if not is_record(cls):
        raise OptionError(
            f"io.register: expected a dataclass or a NamedTuple, got {cls!r}. Make it one of them."
        )
    if _short_names().get(cls.__name__, cls) is not cls:
        raise OptionError(
            f"io.register: expected a new class name, got {cls.__name__!r}, which is taken. "
            "Rename the class."
        )
    _CLASSES[cls.__name__] = cls
    return cls


def name_of(cls: Any) -> str | None:
    """Return the name of a class in files, None if it has none.

    >>> name_of(Layout), name_of(int)
    ('Layout', None)
    """
    if not is_record(cls):
        return None
    if _short_names().get(cls.__name__) is cls:
        return cls.__name__
    name = f"{cls.__module__}:{cls.__qualname__}"
    return name if cls.__module__.split(".")[0] == PACKAGE and _found(name) is cls else None


def class_named(name: str) -> type:
    """Return the class of a name in a file.

    Raises:
        UnsupportedError: There is none.
    """
    cls = _found(name) if ":" in name else _short_names().get(name)
    if cls is None:
        raise UnsupportedError(
            f"io.load: expected one of the classes {sorted(_short_names())}, got {name!r}. Import "
            "the package that registers it with io.register first."
        )
    return cls


def fields_of(cls: type) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass or a NamedTuple."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return getattr(cls, "_fields")  # noqa: B009


def is_namedtuple(cls: Any) -> bool:
    """Return whether a thing is the class of a NamedTuple."""
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


def is_record(cls: Any) -> bool:
    """Return whether a thing is the class of a dataclass or a NamedTuple."""
    return isinstance(cls, type) and (dataclasses.is_dataclass(cls) or is_namedtuple(cls))


def _short_names() -> dict[str, type]:
    """Return the registered classes and every representation that has been imported."""
    found: dict[str, type] = {}
    waiting: list[type] = [Result]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if dataclasses.is_dataclass(cls):
                found.setdefault(cls.__name__, cls)
    return found | _CLASSES


def _found(name: str) -> type | None:
    """Return the class of a name `module:qualified name` of this package, None if there is none."""
    module, _, path = name.partition(":")
    if module.split(".")[0] != PACKAGE:
        return None
    try:
        thing: Any = import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError):
        return None
    return thing if is_record(thing) and thing.__module__ == module else None
