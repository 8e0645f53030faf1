"""Calls of torch that capture does not take as they come.

Multi-head attention is rewritten, so that its parameters can be seen; what makes outputs random or
mixes the examples of a batch is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fisherfn.layers import attention
from fisherfn.layers.composing import REPLACED

_MHA = F.multi_head_attention_forward
_MHA_NAMES = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v "
    "add_zero_attn dropout_p out_proj_weight out_proj_bias training key_padding_mask need_weights "
    "attn_mask use_separate_proj_weight q_proj_weight k_proj_weight v_proj_weight static_k "
    "static_v average_attn_weights is_causal"
).split()
_MHA_DEFAULTS = {
    "training": True,
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "use_separate_proj_weight": False,
    "static_k": None,
    "static_v": None,
    "average_attn_weights": True,
}
_SDPA = F.scaled_dot_product_attention
_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
)
_NOISY = frozenset([*_DROPOUTS, F.batch_norm, _SDPA])
#: What a watcher must see even where no parameter is among the arguments.
LOOKED_AT = _NOISY | {_MHA} | REPLACED


def rewritten(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a call that capture rewrites, or None for any other call."""
    if function is not _MHA:
        return None
    arguments = {**_MHA_DEFAULTS, **dict(zip(_MHA_NAMES, args, strict=False)), **kwargs}
    if arguments["static_k"] is not None or arguments["static_v"] is not None:
        return None
    if arguments["is_causal"] and arguments["attn_mask"] is None:
        return None  # the original refuses that
    return arguments


def is_attention(function: Any) -> bool:
    """Return True for fused attention, which neither composes nor batches."""
    return function is _SDPA


def refuse_noise(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse calls that make outputs random or mix the examples of a batch."""
    if function not in _NOISY:
        return
    name = getattr(function, "__name__", "")
    if function in _DROPOUTS:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        on = kwargs.get("training", args[2] if len(args) > 2 else name != "dropout")
        if on and p:
            attention.refuse_random(name, f"p={p} in training mode")
    elif function is F.batch_norm and kwargs.get("training", len(args) > 5 and args[5]):
        attention.refuse_random("batch_norm", "statistics of the batch (training mode)")
    elif function is _SDPA:
        p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        if p:
            attention.refuse_random(name, f"dropout_p={p}")


class CallMode(TorchFunctionMode):
    """Sees every call of torch in its context, after such rewriting and refusing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one call, or what takes its place."""
        return self.call(func, *args, **(kwargs or {}))

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one call, or what takes its place."""
        arguments = rewritten(function, args, kwargs)
        if arguments is not None:
            return attention.multi_head_attention(self.call, arguments)
        refuse_noise(function, args, kwargs)
        return self.admitted(function, args, kwargs)

    @abstractmethod
    def admitted(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that was neither rewritten nor refused."""
