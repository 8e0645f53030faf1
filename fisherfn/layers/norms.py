"""Normalisation by plain formulas, which can be differentiated as often as one likes.

torch's second derivatives of `layer_norm` and `instance_norm` are right, but are not functions that
can be differentiated once more: they hold the mean and the deviation as constants, and third
derivatives come out wrong without a word (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core.dtypes import wide


def plain_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Return what `layer_norm` does.

    Args:
        input: `[*, *normalized_shape]`.
        normalized_shape: Sizes of the axes that are normalised together.
        weight: Factor of that shape.
        bias: Summand of that shape.
        eps: Added to the variance.
        cudnn_enable: Ignored.

    Returns:
        Like `input`.
    """
    axes = tuple(range(-len(normalized_shape), 0))
    out = _standardised(input, axes, eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(input.dtype)


def plain_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return what `instance_norm` does, without updating running statistics.

    Args:
        input: `[B, C, *]`.
        running_mean: `[C]`, used if `use_input_stats` is False.
        running_var: `[C]`, used if `use_input_stats` is False.
        weight: `[C]`.
        bias: `[C]`.
        use_input_stats: Whether each channel of each example is normalised by itself.
        momentum: Ignored.
        eps: Added to the variance.

    Returns:
        Like `input`.
    """
    if not use_input_stats:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    shape = (-1, *[1] * (input.dim() - 2))
    out = _standardised(input, tuple(range(2, input.dim())), eps)
    out = out if weight is None else out * weight.reshape(shape)
    return (out if bias is None else out + bias.reshape(shape)).to(input.dtype)


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    x = wide(x)
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
