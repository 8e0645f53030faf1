"""Attention written from operations that compose.

Fused attention has no forward-mode derivative, no second derivative and no batched pull-back, and
`multi_head_attention_forward` hides its parameters behind time-major rows. Both are rewritten here
from plain operations: the same function, batch-major, each product through `call`, so that whoever
watches calls sees the parameters.

Tensor format: `[*batch, heads, T, head size]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core.errors import UnsupportedError


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return `softmax(q kᵀ · scale + mask) v`, as `scaled_dot_product_attention` does.

    Args:
        query: `[*, H, T, D]`.
        key: `[*, H or fewer, S, D]`.
        value: `[*, H or fewer, S, V]`.
        attn_mask: bool (True takes part) or additive, broadcastable to `[*, H, T, S]`.
        dropout_p: Must be 0.
        is_causal: Mask positions after the query's own, aligned at the first position.
        scale: Factor of the logits, `1/√D` by default.
        enable_gqa: Repeat key and value heads to match the query's.

    Returns:
        `[*, H, T, V]`; a row that may look nowhere gives zeros, like the fused kernels.

    Raises:
        UnsupportedError: dropout is on.
    """
    if dropout_p:
        refuse_random("scaled_dot_product_attention", f"dropout_p={dropout_p}")
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(repeats, -3)
        value = value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query * factor) @ key.transpose(-1, -2)
    if is_causal:
        t, s = logits.shape[-2:]
        allowed = torch.ones(t, s, dtype=torch.bool, device=query.device).tril()
        logits = torch.where(allowed, logits, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = torch.where(attn_mask, logits, float("-inf"))
        else:
            logits = logits + attn_mask
    if attn_mask is None:
        return torch.softmax(logits, -1) @ value
    # a row without any admissible key has no distribution; the kernels give zeros there
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(torch.where(empty, 0.0, logits), -1)
    return torch.where(empty, 0.0, weights) @ value


def refuse_random(function: str, got: str) -> None:
    """Raise: a function with random or batch-coupled results has no per-example score."""
    raise UnsupportedError(
        f"capture: expected a deterministic model that treats examples apart, got {function} with "
        f"{got}. Call module.eval() first, or set the rate to 0."
    )


def multi_head_attention(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Rewrite `multi_head_attention_forward`, batch-major.

    Args:
        call: Runs a torch function on arguments, watching it.
        arguments: The arguments of the original, by name.

    Returns:
        What the original returns: `(output [T, B, E], weights or None)`.
    """
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    if arguments["dropout_p"] and arguments["training"]:
        refuse_random("multi_head_attention_forward", f"dropout_p={arguments['dropout_p']}")
    same = k is q and v is q
    batched = q.dim() == 3
    # time-major [T, B, E] in, batch-major [B, T, E] from here on
    front = (lambda t: t.transpose(0, 1)) if batched else (lambda t: t.unsqueeze(0))
    q, k, v = front(q), front(k), front(v)
    b, t, e = q.shape
    heads = arguments["num_heads"]
    q, k, v = _projections(call, arguments, q, k, v, same)
    bias_k, bias_v = arguments["bias_k"], arguments["bias_v"]
    extra = 0
    if bias_k is not None:
        k = torch.cat([k, call(torch.Tensor.expand, bias_k, b, 1, e)], 1)
        v = torch.cat([v, call(torch.Tensor.expand, bias_v, b, 1, e)], 1)
        extra += 1
    if arguments["add_zero_attn"]:
        k = F.pad(k, [0, 0, 0, 1])
        v = F.pad(v, [0, 0, 0, 1])
        extra += 1
    size = e // heads
    q, k, v = (x.reshape(b, -1, heads, size).transpose(1, 2) for x in (q, k, v))
    mixed, weights = _mixed(arguments, q, k, v, extra)
    mixed = mixed.transpose(1, 2).reshape(b, t, e)
    out = call(F.linear, mixed, arguments["out_proj_weight"], arguments["out_proj_bias"])
    out = out.transpose(0, 1) if batched else out[0]
    if weights is None:
        return out, None
    if arguments["average_attn_weights"]:
        weights = weights.mean(1)
    return out, weights if batched else weights[0]


def _mixed(
    arguments: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, extra: int
) -> tuple[Tensor, Tensor | None]:
    """Return the values that attention mixes, and the weights if they are asked for.

    Without them the original calls fused attention: a row that may look nowhere gives zeros and not
    NaN. `is_causal` then takes the place of the mask it describes, and the keys that were added
    come after every query.
    """
    if arguments["need_weights"]:
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        mask = _mask(arguments, q, extra)
        weights = torch.softmax(logits if mask is None else logits + mask, -1)
        return weights @ v, weights
    if arguments["is_causal"] and arguments["key_padding_mask"] is None:
        return plain_attention(q, k, v, is_causal=True), None
    return plain_attention(q, k, v, attn_mask=_mask(arguments, q, extra)), None


def packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `linear(input, weight, bias)`, whose outputs are queries, keys and values."""
    return F.linear(input, weight, bias)


def _projections(
    call: Callable[..., Any], arguments: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, same: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = arguments["in_proj_bias"]
    if not arguments["use_separate_proj_weight"] and same:
        packed = call(packed_linear, q, arguments["in_proj_weight"], bias)
        first, second, third = packed.chunk(3, -1)
        return first, second, third
    if arguments["use_separate_proj_weight"]:
        weights = [arguments[f"{n}_proj_weight"] for n in "qkv"]
    else:
        weights = call(torch.Tensor.chunk, arguments["in_proj_weight"], 3)
    biases = (None, None, None) if bias is None else call(torch.Tensor.chunk, bias, 3)
    first, second, third = (
        call(F.linear, x, w, c) for x, w, c in zip((q, k, v), weights, biases, strict=True)
    )
    return first, second, third


def _mask(arguments: dict[str, Any], q: Tensor, extra: int) -> Tensor | None:
    """Return the additive mask `[B or 1, H or 1, T or 1, S]` of both masks together."""
    mask, padding = arguments["attn_mask"], arguments["key_padding_mask"]
    total, dtype = None, q.dtype
    if mask is not None:
        mask = _additive(mask, dtype)
        mask = mask.reshape(*q.shape[:2], *mask.shape[-2:]) if mask.dim() == 3 else mask[None, None]
        total = F.pad(mask, [0, extra])
    if padding is not None:
        padding = _additive(padding, dtype)
        padding = F.pad(padding.reshape(-1, 1, 1, padding.shape[-1]), [0, extra])
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask, True where attention is forbidden, into one that is added."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
