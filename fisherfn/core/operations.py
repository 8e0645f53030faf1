"""Functions that stay whole in compiled code: operations of torch, in the namespace `fisherfn`.

The compiler sees the shape of what comes out and nothing of what is done. They have no batching
rule, and what they return is a constant to autograd: where either is needed they may not be called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fisherfn", "FRAGMENT")


def operation(
    schema: str, function: Callable[..., Tensor], like: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Make an operation for tensors of a CPU.

    Args:
        schema: Its name and signature, as in `"double(Tensor x) -> Tensor"`.
        function: What it does; must not change its arguments or return one of them.
        like: A tensor like its result, from the same arguments, without values.

    Returns:
        The operation.
    """

    def run(*args: Any) -> Tensor:
        with torch.no_grad():
            return function(*args)

    name = schema.split("(")[0]
    if not hasattr(torch.ops.fisherfn, name):  # it outlives modules that are imported again
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, run, "CPU")
        torch.library.register_fake(f"fisherfn::{name}", like, lib=_LIBRARY)
    return getattr(torch.ops.fisherfn, name).default
