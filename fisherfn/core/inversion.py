"""Classes from uniform numbers: a discrete distribution function, inverted on two levels.

First a block of √V to 2√V classes by its sum, then a class inside the block, each with a number of
its own, so that float32 resolves the small probabilities inside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ONE_LEVEL = 128  # up to so many classes, one pass is faster than picking a block first


def invert(weights: Tensor, uniform: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Return a class for each row of weights, which are trusted not to be negative.

    Args:
        weights: [*R, V], need not sum to 1.
        uniform: Gives numbers in (0, 1) of a shape for each row, `[*K, *shape]`.

    Returns:
        int64, [*R] broadcast with [*K].

    >>> invert(torch.tensor([[1.0, 3.0]]), lambda shape: torch.full((1, *shape), 0.3))
    tensor([1])
    """
    classes = weights.shape[-1]
    if classes <= _ONE_LEVEL:
        return _pick(weights, uniform(()))
    width = 1
    while width * width < classes:
        width *= 2
    whole = classes - classes % width
    sums = weights[..., :whole].unflatten(-1, (-1, width)).sum(-1)
    if whole < classes:
        sums = torch.cat([sums, weights[..., whole:].sum(-1, keepdim=True)], -1)
    first, second = uniform((2,)).unbind(-1)
    block = _pick(sums, first)
    index = (block * width).unsqueeze(-1) + torch.arange(width, device=weights.device)
    inside = weights.expand(*block.shape, classes).gather(-1, index.clamp(max=classes - 1))
    return block * width + _pick(inside * (index < classes), second)


def _pick(weights: Tensor, u: Tensor) -> Tensor:
    """Return the first index whose cumulative weight exceeds u times the total; 0 if there is none.

    Entries of weight zero count as never reached, and the total is the largest sum reached: a
    parallel cumulative sum need not be monotone, nor its last entry its largest.
    """
    reached = weights.cumsum(-1) * (weights > 0)
    target = reached.amax(-1, keepdim=True) * u.unsqueeze(-1)
    return (reached > target).to(torch.uint8).argmax(-1)
