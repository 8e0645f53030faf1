"""What takes the place of functions of torch whose derivatives do not compose.

In torch 2.13 the third derivatives of `layer_norm` and `instance_norm` are wrong, and so is the
second of the fused `_weight_norm`, which has no forward mode; `hardsigmoid` and `cdist` have no
second derivative; the pull-back of `cdist` is wrong under `vmap`, and that of `prelu` is wrong, or
fails, under two levels of it. Where a result is to be differentiated or batched once more, these
plain formulas take their place; they have the same values and derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.layers import bag, norms


def plain_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / ‖v‖, the norm over all axes but `dim`, or over all if that is -1.

    Args:
        v: Directions.
        g: Lengths, of size 1 along the axes of the norm.
        dim: The axis that is kept.

    Returns:
        Like `v`.
    """
    axes = tuple(i for i in range(v.dim()) if dim == -1 or i != dim)
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))


def plain_prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Return x where x > 0, and w x elsewhere.

    Args:
        input: `[B, C, *]`, or any shape for a weight of one entry.
        weight: `[C]`, `[1]` or 0-d.

    Returns:
        Like `input`.
    """
    if weight.dim() and input.dim() > 1:
        weight = weight.reshape(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, weight * input)


def plain_hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Return x / 6 + 1/2, at least 0 and at most 1.

    Args:
        input: Any shape.
        inplace: Must be False.

    Returns:
        Like `input`.
    """
    inner = (input > -3) & (input < 3)
    return torch.where(inner, input / 6 + 0.5, (input > 0).to(input.dtype))


def plain_cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """Return the distances of all pairs of rows; that of equal rows has derivative zero.

    Args:
        x1: `[*, P, M]`.
        x2: `[*, R, M]`.
        p: Order of the norm.
        compute_mode: Unused; differences are formed, `[*, P, R, M]`.

    Returns:
        `[*, P, R]`.
    """
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    return torch.linalg.vector_norm(difference, ord=p, dim=-1)


#: For products, always.
ALWAYS: dict[Any, Any] = {torch._weight_norm: plain_weight_norm}
#: For products that have to compose.
COMPOSED: dict[Any, Any] = {
    F.layer_norm: norms.plain_layer_norm,
    torch.layer_norm: norms.plain_layer_norm,
    F.instance_norm: norms.plain_instance_norm,
    torch.prelu: plain_prelu,
    Tensor.prelu: plain_prelu,
}
_PLAIN = {
    **ALWAYS,
    **COMPOSED,
    F.hardsigmoid: plain_hardsigmoid,
    torch.cdist: plain_cdist,
}

#: Every function that may be replaced.
REPLACED = frozenset(_PLAIN) | {F.embedding_bag}


def composable(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what computes the same as a call and can be differentiated and batched at will."""
    if function is F.hardsigmoid and (kwargs.get("inplace") or (args[1:] and args[1])):
        return function  # whoever reads the input next expects to find the result
    return _PLAIN.get(function) or bag.composable(function, args, kwargs)
