"""Which layer and which component a parameter belongs to, by its name alone.

Layers: `embeddings`, `layer_0`, `layer_1`, ..., `final_norm`, `lm_head`, `other`. A model with two
stacks of layers (T5) has `encoder_layer_0` and `decoder_layer_0` instead. Understood are the
layouts of Llama and its many relatives (`model.layers.0.self_attn.q_proj`), GPT-2
(`transformer.h.0.attn.c_attn`), BERT (`bert.encoder.layer.0.attention.self.query`) and T5
(`decoder.block.0.layer.1.EncDecAttention.q`).

Components say what a module does, with the same word in every layout: `layer_0.q_proj`,
`layer_0.mlp.fc1`, `embeddings.wpe`. A module that is not known keeps its own path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

STACK = re.compile(
    r"(?:^|\.)(?:(?P<side>encoder|decoder)\.)?(?:layers|layer|h|blocks|block)\."
    r"(?P<index>\d+)\.(?P<rest>.+)$"
)
HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_projection|cls\.predictions)(?:\.(?P<part>.+))?$"
)
EMBEDDING = re.compile(
    r"(?:^|\.)(?:embeddings?|shared|wte|wpe|[a-z_]*embed[a-z]*_?[a-z]*|[a-z]+_embeddings?)(?:\.|$)"
)
NORM = re.compile(r"(?:^|\.)(?:[a-z_]*norm|ln_f)(?:_?\d+)?$", re.IGNORECASE)

_SELF = (
    r"(?:self_attn|self_attention|attn|attention|attn\.attention|attention\.self"
    r"|layer\.\d\.SelfAttention)"
)
_CROSS = (
    r"(?:encoder_attn|cross_attn|crossattention|crossattention\.self|layer\.\d\.EncDecAttention)"
)
_MLP = r"(?:mlp|feed_forward|ffn|layer\.\d\.DenseReluDense)"
_QUERY = "(?:q_proj|query|q|q_lin)"
_KEY = "(?:k_proj|key|k|k_lin)"
_VALUE = "(?:v_proj|value|v|v_lin)"
_OUT = "(?:o_proj|out_proj|o|out_lin|c_proj|dense)"
_PACKED = "(?:qkv_proj|c_attn|query_key_value|Wqkv|qkv)"
# (pattern, component); compiled where they are first used, not when the library is imported
COMPONENTS = (
    (rf"{_SELF}\.{_QUERY}", "q_proj"),
    (rf"{_SELF}\.{_KEY}", "k_proj"),
    (rf"{_SELF}\.{_VALUE}", "v_proj"),
    (rf"{_SELF}\.{_PACKED}", "qkv_proj"),
    (rf"{_SELF}\.{_OUT}|attention\.output\.dense", "o_proj"),
    (rf"{_CROSS}\.{_QUERY}|crossattention\.q_attn", "cross_attention.q_proj"),
    (rf"{_CROSS}\.{_KEY}", "cross_attention.k_proj"),
    (rf"{_CROSS}\.{_VALUE}", "cross_attention.v_proj"),
    (rf"{_CROSS}\.{_OUT}|crossattention\.output\.dense", "cross_attention.o_proj"),
    (rf"{_MLP}\.(?:gate_proj|wi_0|w1)", "mlp.gate_proj"),
    (rf"{_MLP}\.(?:up_proj|wi_1|w3)", "mlp.up_proj"),
    (rf"{_MLP}\.(?:down_proj|w2)", "mlp.down_proj"),
    (
        rf"(?:{_MLP}\.)?(?:fc1|lin1|c_fc|fc_in|wi|dense_h_to_4h)|intermediate\.dense",
        "mlp.fc1",
    ),
    (
        rf"(?:{_MLP}\.)?(?:fc2|lin2|fc_out|wo|dense_4h_to_h)|mlp\.c_proj|output\.dense",
        "mlp.fc2",
    ),
    (r"input_layernorm|ln_1|layer\.0\.layer_norm", "input_layernorm"),
    (
        r"post_attention_layernorm|ln_2|attention\.output\.LayerNorm|layer\.2\.layer_norm",
        "post_attention_layernorm",
    ),
    (r"ln_cross_attn|crossattention\.output\.LayerNorm", "cross_attention.layernorm"),
    (r"output\.LayerNorm", "post_mlp_layernorm"),
    (rf"{_SELF}\.relative_attention_bias", "relative_attention_bias"),
)


@dataclass(frozen=True)
class Place:
    """Where a parameter sits: its layer, and its component, which begins with the layer."""

    layer: str
    component: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """Return the place of every parameter of one model.

    All names are needed at once: only they tell whether there are two stacks of layers.

    Args:
        names: Qualified names of the parameters.

    Returns:
        `{name: place}` in the order of `names`.

    Example:
        >>> name = "model.layers.3.self_attn.q_proj.weight"
        >>> places([name])[name]
        Place(layer='layer_3', component='layer_3.q_proj')
    """
    names = list(names)
    sides = {match["side"] for name in names if (match := STACK.search(_module(name)))}
    two_stacks = {"encoder", "decoder"} <= sides
    return {name: _place(_module(name), two_stacks=two_stacks) for name in names}


def component(rest: str, *, decoder: bool = False) -> str:
    """Return what a module does.

    Args:
        rest: Its path inside a layer, such as `self_attn.q_proj`.
        decoder: Whether the layer is a decoder's: in T5 its second sub-layer is cross-attention.

    Returns:
        The component without the layer.
    """
    if rest == "layer.1.layer_norm":
        return "cross_attention.layernorm" if decoder else "post_attention_layernorm"
    for pattern, name in COMPONENTS:
        if re.fullmatch(pattern, rest):
            return name
    return rest


def _place(module: str, *, two_stacks: bool) -> Place:
    match = STACK.search(module)
    if match is not None:
        side = f"{match['side']}_" if two_stacks and match["side"] else ""
        layer = f"{side}layer_{match['index']}"
        part = component(match["rest"], decoder=match["side"] == "decoder")
        return Place(layer, f"{layer}.{part}")
    head = HEAD.search(module)
    if head is not None:
        return Place("lm_head", f"lm_head.{head['part']}" if head["part"] else "lm_head")
    if EMBEDDING.search(module):
        return Place("embeddings", f"embeddings.{module.rsplit('.', 1)[-1]}")
    if NORM.search(module):
        side = next((f"{s}_" for s in ("encoder", "decoder") if two_stacks and s in module), "")
        return Place("final_norm", f"{side}final_norm")
    return Place("other", f"other.{module}")


def _module(parameter: str) -> str:
    """Drop the parameter's own name: `a.b.weight` becomes `a.b`; a bare `weight` stays."""
    return parameter.rpartition(".")[0] or parameter
