"""Attention modules of torch.nn, batch first and time first, packed and separate, with masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases.base import Built, Case, Net, normal, table

B, T, S, E, H = 3, 4, 5, 4, 2


def _causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def _padding(rows: int = B, length: int = T) -> Tensor:
    """True where a key is padding; a different length in every row."""
    return torch.arange(length) >= (length - torch.arange(rows) % length).unsqueeze(1)


def _self(
    batch_first: bool = True,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    rows: int = B,
    need_weights: bool = False,
    is_causal: bool = False,
    **options: Any,
) -> Built:
    """Self-attention; the data is always batch first outside."""
    hints: dict[str, bool] = {"need_weights": need_weights, "is_causal": is_causal}

    def forward(m: Any, x: Tensor, pad: Tensor | None = None) -> Tensor:
        h = torch.sin(x) if batch_first else torch.sin(x).transpose(0, 1)
        h, _ = m.attn(h, h, h, key_padding_mask=pad, attn_mask=mask, **hints)
        return m.head(torch.tanh(h if batch_first else h.transpose(0, 1)))

    attn = nn.MultiheadAttention(E, H, batch_first=batch_first, **options)
    net = Net(forward, attn=attn, head=nn.Linear(E, 3)).double()
    x = normal(rows, T, E, seed=8)
    return Built(net, x if padding is None else (x, padding))


def _cross(kdim: int = E, vdim: int = E, batch_first: bool = True, **options: Any) -> Built:
    def forward(m: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = torch.sin(x), torch.cos(k), torch.cos(v)
        if not batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        h, _ = m.attn(q, k, v, need_weights=False)
        return m.head(torch.tanh(h if batch_first else h.transpose(0, 1)))

    attn = nn.MultiheadAttention(E, H, kdim=kdim, vdim=vdim, batch_first=batch_first, **options)
    net = Net(forward, attn=attn, head=nn.Linear(E, 3)).double()
    return Built(net, (normal(B, T, E), normal(B, S, kdim, seed=1), normal(B, S, vdim, seed=2)))


def _weights_as_output() -> Built:
    """The averaged attention weights themselves are the logits."""
    net = Net(lambda m, x: m.attn(x, x, x)[1], attn=nn.MultiheadAttention(E, H, batch_first=True))
    return Built(net.double(), normal(B, T, E))


def _learned_query() -> Built:
    """A query that is a parameter, without a batch axis of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.attn(m.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)
        return m.head(h)

    attn = nn.MultiheadAttention(E, H, batch_first=True)
    net = Net(forward, attn=attn, head=nn.Linear(E, 3), query=normal(1, 2, E, seed=3)).double()
    return Built(net, normal(B, T, E))


def _layer(
    build: Callable[..., nn.Module],
    *,
    rows: int = B,
    memory: bool = False,
    pad: bool = False,
    batch_first: bool = True,
    **options: Any,
) -> Built:
    """A whole layer of `nn.Transformer...`, then a head."""
    layer = build(E, H, 6, batch_first=batch_first, **options)

    def turn(x: Tensor) -> Tensor:
        return x if batch_first else x.transpose(0, 1)

    def forward(m: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        if memory:
            assert y is not None
            return m.head(turn(m.layer(turn(x), turn(y))))
        masks = {} if y is None else {"src_key_padding_mask": y}
        return m.head(turn(m.layer(turn(x), **masks)))

    net = Net(forward, layer=layer, head=nn.Linear(E, 3)).double()
    x = normal(rows, T, E, seed=9)
    if memory:
        return Built(net, (x, normal(rows, S, E, seed=10)))
    return Built(net, (x, _padding(rows)) if pad else x)


def _encoder() -> Built:
    layer = nn.TransformerEncoderLayer(E, H, 6, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E), enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    net = Net(
        lambda m, x: m.head(m.stack(x, mask=mask, is_causal=True)),
        stack=stack,
        head=nn.Linear(E, 3),
    )
    return Built(net.double(), normal(B, T, E))


def _grouped_query() -> Built:
    """Two query heads on one key head, causal, by the fused function."""

    def heads(h: Tensor, count: int) -> Tensor:
        return h.unflatten(-1, (count, -1)).transpose(1, 2)

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x), H), heads(m.k(x), 1), heads(m.v(x), 1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return m.head(h.transpose(1, 2).flatten(2))

    net = Net(
        forward, q=nn.Linear(E, E), k=nn.Linear(E, 2), v=nn.Linear(E, 2), head=nn.Linear(E, 3)
    )
    return Built(net.double(), normal(B, T, E))


def _query_by_einsum() -> Built:
    """A parameter that no rule serves, in front of fused attention."""

    def heads(h: Tensor) -> Tensor:
        return h.unflatten(-1, (H, -1)).transpose(1, 2)

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(torch.einsum("bte,fe->btf", x, m.q)), heads(m.k(x)), heads(x)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.head(h.transpose(1, 2).flatten(2))

    net = Net(forward, q=normal(E, E, seed=12), k=nn.Linear(E, E), head=nn.Linear(E, 3))
    return Built(net.double(), normal(B, T, E))


ALL = table(
    Case("mha", lambda: _self()),
    Case("mha_time_first", lambda: _self(batch_first=False)),
    Case("mha_with_weights", lambda: _self(need_weights=True)),
    Case("mha_time_first_with_weights", lambda: _self(batch_first=False, need_weights=True)),
    Case("mha_no_bias", lambda: _self(bias=False)),
    Case("mha_coincident_sizes", lambda: _self(rows=T)),
    Case("mha_time_first_coincident_sizes", lambda: _self(batch_first=False, rows=T)),
    Case("mha_causal", lambda: _self(mask=_causal(T))),
    Case("mha_float_mask", lambda: _self(mask=normal(T, T, seed=11))),
    Case("mha_key_padding", lambda: _self(padding=_padding())),
    Case("mha_key_padding_time_first", lambda: _self(batch_first=False, padding=_padding())),
    Case("mha_both_masks", lambda: _self(mask=_causal(T), padding=_padding(), need_weights=True)),
    Case("query_by_einsum", _query_by_einsum, general=("q",)),
    Case("mha_bias_kv", lambda: _self(add_bias_kv=True)),
    Case("mha_zero_attn", lambda: _self(add_zero_attn=True)),
    Case(
        "mha_causal_hint_zero_attn",
        lambda: _self(mask=_causal(T), is_causal=True, add_zero_attn=True),
    ),
    Case("mha_cross_packed", lambda: _cross()),
    Case("mha_cross_separate", lambda: _cross(kdim=3, vdim=6)),
    Case("mha_cross_separate_time_first", lambda: _cross(kdim=3, vdim=6, batch_first=False)),
    Case("mha_weights_as_output", _weights_as_output),
    Case("mha_learned_query", _learned_query, general=None),
    Case("encoder_layer", lambda: _layer(nn.TransformerEncoderLayer)),
    Case("encoder_layer_time_first", lambda: _layer(nn.TransformerEncoderLayer, batch_first=False)),
    Case(
        "encoder_layer_norm_first",
        lambda: _layer(nn.TransformerEncoderLayer, norm_first=True, activation="gelu"),
    ),
    Case("encoder_layer_padding", lambda: _layer(nn.TransformerEncoderLayer, pad=True)),
    Case("encoder_layer_coincident_sizes", lambda: _layer(nn.TransformerEncoderLayer, rows=T)),
    Case("encoder_layer_no_bias", lambda: _layer(nn.TransformerEncoderLayer, bias=False)),
    Case("decoder_layer", lambda: _layer(nn.TransformerDecoderLayer, memory=True)),
    Case("encoder_stack_causal", _encoder),
    Case("grouped_query_attention", _grouped_query),
)
