"""Embedding tables.

Tensor format: the index is `[B or 1, M, *positions]`, the cotangent `[K, B, M, *positions, D]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core.dtypes import wide
from fisherfn.layers.form import Form
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.registry import Call, Match, Role, register_rule
from fisherfn.layers.views import View


@dataclass(frozen=True)
class EmbeddingBuilder:
    """Rows of a table; the row `padding_idx`, if any, never gets a gradient."""

    rows: int
    padding_idx: int | None

    def accepts(self, axis: int, rank: int) -> bool:
        """Any axis but that of the embedding."""
        return axis < rank - 1

    def __call__(self, kept: Sequence[Tensor], g: Tensor, axis: int) -> tuple[Form, View]:
        """Return the lookup form."""
        index = kept[0].reshape(kept[0].shape[0], -1).expand(g.shape[1], -1).long()
        rows = wide(g.reshape(*g.shape[:2], -1, g.shape[-1]))
        if self.padding_idx is not None:
            real = (index != self.padding_idx).to(rows.dtype)
            rows = rows * real.unsqueeze(-1)
        return Lookup(index, rows, self.rows, self.padding_idx), ()


def match_embedding(call: Call) -> Match | None:
    """`embedding(input, weight, padding_idx, max_norm, ...)`."""
    if "weight" not in call.tracked or call["max_norm"] is not None:
        return None
    if call["scale_grad_by_freq"]:
        return None
    rows = call.tracked["weight"].shape[0]
    padding = call["padding_idx"]
    if padding is not None:
        padding = padding % rows
    builder = EmbeddingBuilder(rows, padding)
    return Match(("input",), (Role("weight", builder),), batchless=True)


register_rule(
    [F.embedding],
    ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    match_embedding,
    name="embedding",
)


def match_row_selection(call: Call) -> Match | None:
    """`weight[index]` with an integer tensor: a table without the module."""
    index = call["index"]
    if "input" not in call.tracked or not isinstance(index, Tensor):
        return None
    if index.dtype not in (torch.int64, torch.int32) or call.tracked["input"].dim() != 2:
        return None
    builder = EmbeddingBuilder(call.tracked["input"].shape[0], None)
    return Match(("index",), (Role("input", builder),), batchless=True)


register_rule([torch.Tensor.__getitem__], ("input", "index"), match_row_selection, name="embedding")
