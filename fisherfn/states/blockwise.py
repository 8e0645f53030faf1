"""Elementwise steps that need several operations, taken in pieces that fit in the cache.

Out of the cache such a step costs what it has to read and write; four operations over a large
tensor, each by itself, cost twice that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfn.core.modes import concrete

#: Entries taken together: six operands of 256 KB fit in the second-level cache of a core.
_PIECE = 1 << 16


def grow(m2: Tensor, mean: Tensor, new: Tensor, spread: Tensor) -> Tensor:
    """Return m2 + spread·(new − mean)², in the dtype of m2.

    >>> grow(torch.ones(1), torch.zeros(1), torch.tensor([3.0]), torch.tensor(2.0))
    tensor([19.])
    """
    mean, new, spread = mean.to(m2.dtype), new.to(m2.dtype), spread.to(m2.dtype)
    if not _in_pieces(m2, mean, new):
        delta = new - mean
        return torch.addcmul(m2, delta, delta * spread)
    grown = torch.empty_like(m2)
    pieces = [t.view(-1).split(_PIECE) for t in (m2, mean, new, grown)]
    room = torch.empty(2, _PIECE, dtype=m2.dtype)
    for m, a, x, out in zip(*pieces, strict=True):
        delta, scaled = room[0, : len(a)], room[1, : len(a)]
        torch.sub(x, a, out=delta)
        torch.mul(delta, spread, out=scaled)
        torch.addcmul(m, delta, scaled, out=out)
    return grown


def _in_pieces(*tensors: Tensor) -> bool:
    """Return whether pieces pay: large, plain tensors on a CPU, and nothing that records."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() < 4 * _PIECE or not concrete(*tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return all(t.is_contiguous() and t.dtype == first.dtype for t in tensors)
