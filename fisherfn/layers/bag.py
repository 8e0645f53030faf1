"""Embedding bags from operations that compose.

`F.embedding_bag` has no forward mode, no second derivative and no pull-back under `torch.func`; its
plain formula has them all, for a tensor `[B, L, D]` of rows.

Tensor format: indices `[B, L]`, rows `[B, L, D]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core.errors import UnsupportedError


def plain_embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return a sum, mean or maximum of rows for each row of `input`, without `padding_idx`.

    Args:
        input: Integers `[B, L]`.
        weight: `[V, D]`.
        offsets: Must be None.
        max_norm: Must be None.
        norm_type: Unused.
        scale_grad_by_freq: Must be False.
        mode: "sum", "mean" or "max".
        sparse: How gradients are stored; products are dense.
        per_sample_weights: `[B, L]`, factors of the rows in a sum.
        include_last_offset: Unused without offsets.
        padding_idx: Row that is left out.

    Returns:
        `[B, D]`.

    Raises:
        UnsupportedError: bags of different lengths, or as for `plain_embedding`.
    """
    refuse_options("embedding_bag", max_norm, scale_grad_by_freq)
    if offsets is not None or input.dim() != 2:
        raise UnsupportedError(
            "capture: expected bags of one length, [B, L], got embedding_bag with offsets. Pad "
            "the bags and pass padding_idx."
        )
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    kept = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        kept = input != padding_idx % weight.shape[0]
    kept = kept.unsqueeze(-1)
    if mode == "max":
        found = torch.where(kept, rows, float("-inf")).amax(1)
        return torch.where(kept.any(1), found, 0.0)
    total = torch.where(kept, rows, 0.0).sum(1)
    return total if mode == "sum" else total / kept.sum(1).clamp(min=1)


def composable(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the plain bag for a call of `F.embedding_bag` that it serves, else the function."""
    if function is not F.embedding_bag:
        return function
    names = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    other = given.get("offsets") is not None or given.get("max_norm") is not None
    if other or given.get("scale_grad_by_freq") or given["input"].dim() != 2:
        return function
    return plain_embedding_bag


def refuse_options(name: str, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    """Raise: a lookup that writes to its table, or whose gradient is no derivative."""
    if max_norm is not None:
        raise UnsupportedError(
            f"capture: expected a model that does not change its parameters, got {name} with "
            f"max_norm={max_norm}. Normalise the weight once, before."
        )
    if scale_grad_by_freq:
        raise UnsupportedError(
            f"capture: expected gradients that are derivatives, got {name} with "
            "scale_grad_by_freq=True. Switch it off."
        )
