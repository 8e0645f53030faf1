"""Under which transformation is this code running?

Values may be looked at (and errors raised for them) only in plain eager execution: inside
`torch.compile` a data-dependent raise cannot be traced, and inside `torch.func` transformations a
tensor has no single value.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor

P = ParamSpec("P")
R = TypeVar("R")


def unmixed(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that runs without autocast: what it multiplies is no activation.

    >>> product = unmixed(torch.mm)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     product(torch.ones(1, 2), torch.ones(2, 1)).dtype
    torch.float32
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


class Unmixed:
    """A class whose methods of certain names run without autocast, in every subclass."""

    _unmixed: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the methods that the subclass defines."""
        super().__init_subclass__(**kwargs)
        for name in cls._unmixed:
            method = cls.__dict__.get(name)
            if inspect.isfunction(method):
                setattr(cls, name, unmixed(method))


def compiling() -> bool:
    """Return True while `torch.compile` traces, in Dynamo or in AOTAutograd."""
    # before torch 2.12 the first says no in AOTAutograd's own traces
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def in_functorch() -> bool:
    """Return True inside a `torch.func` transformation."""
    return peek_interpreter_stack() is not None


def version(t: torch.Tensor) -> int:
    """Return how often a tensor was written to; 0 for one that a transformation has wrapped."""
    return 0 if is_functorch_wrapped_tensor(t) else t._version


def is_dtensor(x: Any) -> bool:
    """Return True for a tensor that is spread over processes; by name, so that none is loaded.

    >>> is_dtensor(torch.ones(2))
    False
    """
    return type(x).__name__ == "DTensor"


def transformed() -> bool:
    """Return True inside `torch.compile` or any `torch.func` transformation."""
    return compiling() or in_functorch()


def concrete(*values: Any) -> bool:
    """Return True iff the values of these tensors may be looked at here.

    >>> concrete(torch.ones(2))
    True
    >>> concrete(torch.ones(2, device="meta"))
    False
    """
    if transformed():
        return False
    return not any(
        isinstance(v, FakeTensor) or (isinstance(v, torch.Tensor) and v.is_meta) for v in values
    )
