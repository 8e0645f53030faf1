"""What the configurations of Hugging Face models say about their parameters.

One table an architecture, by the names of its parameters; an architecture without a table is not
understood, whatever its names look like. The tables are written from the models' source:

- Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma 1 to 3 (text): q, k, v and o projections are linear
  layers, `num_key_value_heads` may be smaller than `num_attention_heads`, and `head_dim` may differ
  from hidden / heads.
- GPT-2: every projection is a `Conv1D`, whose weight is `[in, out]`; `c_attn` is q, k, v in this
  order, or k, v in cross-attention.
- BERT: query, key, value and `attention.output.dense` are linear layers.
- Phi-3: `qkv_proj` is q, k, v in this order, with fewer heads of k and v; RoBERTa: as BERT.
- GPT-NeoX (Pythia): `query_key_value` is, head by head, q, k, v.
- OPT: q, k, v and out projections are linear layers.
- T5: q, k, v, o have `num_heads` heads of `d_kv` entries; the relative position bias
  `[buckets, heads]` has a column a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fisherfn.core.errors import OptionError, ShapeError
from fisherfn.groups.heads import heads
from fisherfn.groups.spec import GroupSpec, channels, rows


@dataclass(frozen=True)
class Role:
    """What a parameter is in an architecture.

    `owner` says whose heads it has: "query", "key", "fused" (q, k, v), "kv" (k, v fused),
    "interleaved" (q, k, v of each head), "column" (one entry a head); "channel" and "row" are no
    heads.
    """

    owner: str
    axis: int = 0


@dataclass(frozen=True)
class Heads:
    """Numbers of heads of a configuration, and the entries of one."""

    query: int
    key: int
    size: int


_DECODER = {
    r"self_attn\.q_proj\.weight": Role("query"),
    r"self_attn\.[kv]_proj\.weight": Role("key"),
    r"self_attn\.o_proj\.weight": Role("query", 1),
    r"mlp\.(?:gate|up|down)_proj\.weight": Role("channel"),
    r"embed_tokens\.weight": Role("row"),
    r"(?:lm_head|score|qa_outputs)\.weight": Role("channel"),
}
_GPT2 = {
    r"attn\.c_attn\.weight": Role("fused", 1),
    r"crossattention\.c_attn\.weight": Role("kv", 1),
    r"crossattention\.q_attn\.weight": Role("query", 1),
    r"(?:attn|crossattention)\.c_proj\.weight": Role("query", 0),
    r"mlp\.c_(?:fc|proj)\.weight": Role("channel", 1),
    r"w[tp]e\.weight": Role("row"),
    r"(?:lm_head|score|classifier)\.weight": Role("channel"),
}
_BERT = {
    r"(?:attention|crossattention)\.self\.(?:query|key|value)\.weight": Role("query"),
    r"(?:attention|crossattention)\.output\.dense\.weight": Role("query", 1),
    r"(?:intermediate|\d+\.output|pooler|transform)\.dense\.weight": Role("channel"),
    r"embeddings\.(?:word|position|token_type)_embeddings\.weight": Role("row"),
    r"(?:cls\.predictions\.decoder|cls\.seq_relationship|classifier|qa_outputs)\.weight": Role(
        "channel"
    ),
}
_ROBERTA = {
    **_BERT,
    r"lm_head\.(?:dense|decoder)\.weight": Role("channel"),
    r"classifier\.(?:dense|out_proj)\.weight": Role("channel"),
}
_PHI3 = {
    r"self_attn\.qkv_proj\.weight": Role("fused"),
    r"self_attn\.o_proj\.weight": Role("query", 1),
    r"mlp\.(?:gate_up|down)_proj\.weight": Role("channel"),
    r"embed_tokens\.weight": Role("row"),
    r"(?:lm_head|score)\.weight": Role("channel"),
}
_GPT_NEOX = {
    r"attention\.query_key_value\.weight": Role("interleaved"),
    r"attention\.dense\.weight": Role("query", 1),
    r"mlp\.dense_(?:h_to_4h|4h_to_h)\.weight": Role("channel"),
    r"embed_in\.weight": Role("row"),
    r"(?:embed_out|lm_head|score|classifier|qa_outputs)\.weight": Role("channel"),
}
_OPT = {
    r"self_attn\.[qkv]_proj\.weight": Role("query"),
    r"self_attn\.out_proj\.weight": Role("query", 1),
    r"layers\.\d+\.fc[12]\.weight": Role("channel"),
    r"project_(?:in|out)\.weight": Role("channel"),
    r"embed_(?:tokens|positions)\.weight": Role("row"),
    r"(?:lm_head|score|qa_outputs)\.weight": Role("channel"),
}
_T5 = {
    r"(?:SelfAttention|EncDecAttention)\.[qkv]\.weight": Role("query"),
    r"(?:SelfAttention|EncDecAttention)\.o\.weight": Role("query", 1),
    r"SelfAttention\.relative_attention_bias\.weight": Role("column", 1),
    r"DenseReluDense\.(?:wi|wi_0|wi_1|wo)\.weight": Role("channel"),
    r"(?:shared|embed_tokens)\.weight": Role("row"),
    r"(?:lm_head|classifier|classification_head\.(?:dense|out_proj))\.weight": Role("channel"),
}
_FAMILIES: dict[str, Mapping[str, Role]] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "mixtral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": _DECODER,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "phi3": _PHI3,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "t5": _T5,
}
#: The architectures that have a table.
MODEL_TYPES = tuple(_FAMILIES)


@dataclass(frozen=True)
class Architecture:
    """A configuration that has a table."""

    name: str
    heads: Heads

    @staticmethod
    def of(config: Any) -> Architecture | None:
        """Return the architecture of a configuration object or mapping, None without a table.

        Raises:
            OptionError: The configuration does not say how many heads there are.
        """
        name = _get(config, "model_type")
        if name not in _FAMILIES:
            return None
        query = _get(config, "num_attention_heads", "n_head", "num_heads")
        hidden = _get(config, "hidden_size", "n_embd", "d_model")
        if not isinstance(query, int) or not isinstance(hidden, int) or query < 1:
            raise OptionError(
                f"groups.infer: expected a configuration with numbers of heads and hidden units, "
                f"got {query!r} and {hidden!r} for {name!r}. Pass the model's own configuration."
            )
        key = _get(config, "num_key_value_heads") or query
        size = _get(config, "head_dim", "d_kv") or hidden // query
        return Architecture(name, Heads(query, key, size))

    def role(self, path: str) -> Role | None:
        """Return what a parameter is, None if the table does not know it."""
        path = path.replace(".base_layer.", ".")  # adapters wrap the layer that they adapt
        for pattern, role in _FAMILIES[self.name].items():
            if re.search(rf"(?:^|\.)(?:{pattern})$", path):
                return role
        return None

    def spec(self, path: str, role: Role, shape: tuple[int, ...]) -> GroupSpec:
        """Return the spec of a parameter that plays a role.

        Raises:
            ShapeError: The parameter does not have the heads of the configuration.
        """
        if role.owner == "channel":
            return channels(shape, axis=role.axis)
        if role.owner == "row":
            return rows(shape, axis=role.axis)
        n, size = self.heads, self.heads.size
        try:
            if role.owner == "column":
                return heads(shape, n.query, axis=role.axis, head_dim=1)
            if role.owner in ("query", "key"):
                return heads(shape, getattr(n, role.owner), axis=role.axis, head_dim=size)
            layout = {"fused": "qkv"}.get(role.owner, role.owner)
            return heads(
                shape,
                n.query,
                axis=role.axis,
                layout=layout,
                num_kv_heads=n.key,
                head_dim=size,
            )
        except ShapeError as error:
            raise ShapeError(
                f"groups.infer: expected the heads of the {self.name} configuration ({n.query} "
                f"queries, {n.key} keys, {size} entries each), got shape {shape} at '{path}'. Pass "
                "the configuration that the model was built with."
            ) from error


def is_config(thing: Any) -> bool:
    """Return whether this is a configuration: an object or a mapping with a `model_type`."""
    return isinstance(_get(thing, "model_type"), str)


def model_type(config: Any) -> str:
    """Return the name of a configuration's architecture."""
    return str(_get(config, "model_type"))


def _get(config: Any, *names: str) -> Any:
    """Return the first entry of these names that is there and not None."""
    for name in names:
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if found is not None:
            return found
    return None
