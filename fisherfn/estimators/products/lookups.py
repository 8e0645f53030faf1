"""Embedding tables as functions whose forward and reverse derivatives agree.

`F.embedding` gives the row of `padding_idx` no gradient in reverse mode, but a derivative in
forward mode; `F.embedding_bag` has no forward mode and no second derivative. Here both are looked
up plainly, and what reverse mode makes constant is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.layers.bag import plain_embedding_bag, refuse_options


def plain_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return the rows `weight[input]`; that of `padding_idx` is a constant.

    Args:
        input: Integers `[*]`.
        weight: `[V, D]`.
        padding_idx: Row without derivative.
        max_norm: Must be None.
        norm_type: Unused.
        scale_grad_by_freq: Must be False.
        sparse: How gradients are stored; products are dense.

    Returns:
        `[*, D]`.

    Raises:
        UnsupportedError: the module changes its weight, or its gradient is not its derivative.
    """
    refuse_options("embedding", max_norm, scale_grad_by_freq)
    rows = F.embedding(input, weight)
    if padding_idx is None:
        return rows
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


REWRITTEN: dict[Any, Any] = {
    F.embedding: plain_embedding,
    F.embedding_bag: plain_embedding_bag,
}
