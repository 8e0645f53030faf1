"""Names of layers and components in the layouts of Llama, GPT-2, BERT and T5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fisherfn.groups.names import places


def check(table: dict[str, tuple[str, str]]) -> None:
    found = places([f"{module}.weight" for module in table])
    for module, (layer, component) in table.items():
        place = found[f"{module}.weight"]
        assert (place.layer, place.component) == (layer, component), module


def test_llama() -> None:
    inside = "model.layers.11"
    check(
        {
            "model.embed_tokens": ("embeddings", "embeddings.embed_tokens"),
            f"{inside}.self_attn.q_proj": ("layer_11", "layer_11.q_proj"),
            f"{inside}.self_attn.k_proj": ("layer_11", "layer_11.k_proj"),
            f"{inside}.self_attn.v_proj": ("layer_11", "layer_11.v_proj"),
            f"{inside}.self_attn.o_proj": ("layer_11", "layer_11.o_proj"),
            f"{inside}.self_attn.q_norm": ("layer_11", "layer_11.self_attn.q_norm"),
            f"{inside}.mlp.gate_proj": ("layer_11", "layer_11.mlp.gate_proj"),
            f"{inside}.mlp.up_proj": ("layer_11", "layer_11.mlp.up_proj"),
            f"{inside}.mlp.down_proj": ("layer_11", "layer_11.mlp.down_proj"),
            f"{inside}.mlp.experts.3.up_proj": ("layer_11", "layer_11.mlp.experts.3.up_proj"),
            f"{inside}.input_layernorm": ("layer_11", "layer_11.input_layernorm"),
            f"{inside}.post_attention_layernorm": ("layer_11", "layer_11.post_attention_layernorm"),
            "model.norm": ("final_norm", "final_norm"),
            "lm_head": ("lm_head", "lm_head"),
        }
    )


def test_gpt2() -> None:
    inside = "transformer.h.0"
    check(
        {
            "transformer.wte": ("embeddings", "embeddings.wte"),
            "transformer.wpe": ("embeddings", "embeddings.wpe"),
            f"{inside}.ln_1": ("layer_0", "layer_0.input_layernorm"),
            f"{inside}.attn.c_attn": ("layer_0", "layer_0.qkv_proj"),
            f"{inside}.attn.c_proj": ("layer_0", "layer_0.o_proj"),
            f"{inside}.ln_2": ("layer_0", "layer_0.post_attention_layernorm"),
            f"{inside}.mlp.c_fc": ("layer_0", "layer_0.mlp.fc1"),
            f"{inside}.mlp.c_proj": ("layer_0", "layer_0.mlp.fc2"),
            "transformer.ln_f": ("final_norm", "final_norm"),
        }
    )


def test_bert() -> None:
    inside = "bert.encoder.layer.4"
    check(
        {
            "bert.embeddings.word_embeddings": ("embeddings", "embeddings.word_embeddings"),
            "bert.embeddings.LayerNorm": ("embeddings", "embeddings.LayerNorm"),
            f"{inside}.attention.self.query": ("layer_4", "layer_4.q_proj"),
            f"{inside}.attention.self.key": ("layer_4", "layer_4.k_proj"),
            f"{inside}.attention.self.value": ("layer_4", "layer_4.v_proj"),
            f"{inside}.attention.output.dense": ("layer_4", "layer_4.o_proj"),
            f"{inside}.attention.output.LayerNorm": (
                "layer_4",
                "layer_4.post_attention_layernorm",
            ),
            f"{inside}.intermediate.dense": ("layer_4", "layer_4.mlp.fc1"),
            f"{inside}.output.dense": ("layer_4", "layer_4.mlp.fc2"),
            f"{inside}.output.LayerNorm": ("layer_4", "layer_4.post_mlp_layernorm"),
            "bert.pooler.dense": ("other", "other.bert.pooler.dense"),
            "cls.predictions.transform.dense": ("lm_head", "lm_head.transform.dense"),
            "cls.predictions": ("lm_head", "lm_head"),
        }
    )


def test_t5_has_two_stacks() -> None:
    encoder, decoder = "encoder.block.1", "decoder.block.1"
    check(
        {
            "shared": ("embeddings", "embeddings.shared"),
            f"{encoder}.layer.0.SelfAttention.q": ("encoder_layer_1", "encoder_layer_1.q_proj"),
            f"{encoder}.layer.0.SelfAttention.relative_attention_bias": (
                "encoder_layer_1",
                "encoder_layer_1.relative_attention_bias",
            ),
            f"{encoder}.layer.0.layer_norm": (
                "encoder_layer_1",
                "encoder_layer_1.input_layernorm",
            ),
            f"{encoder}.layer.1.DenseReluDense.wi": ("encoder_layer_1", "encoder_layer_1.mlp.fc1"),
            f"{encoder}.layer.1.DenseReluDense.wo": ("encoder_layer_1", "encoder_layer_1.mlp.fc2"),
            f"{encoder}.layer.1.layer_norm": (
                "encoder_layer_1",
                "encoder_layer_1.post_attention_layernorm",
            ),
            "encoder.final_layer_norm": ("final_norm", "encoder_final_norm"),
            f"{decoder}.layer.0.SelfAttention.v": ("decoder_layer_1", "decoder_layer_1.v_proj"),
            f"{decoder}.layer.1.EncDecAttention.o": (
                "decoder_layer_1",
                "decoder_layer_1.cross_attention.o_proj",
            ),
            f"{decoder}.layer.1.layer_norm": (
                "decoder_layer_1",
                "decoder_layer_1.cross_attention.layernorm",
            ),
            f"{decoder}.layer.2.DenseReluDense.wi_0": (
                "decoder_layer_1",
                "decoder_layer_1.mlp.gate_proj",
            ),
            f"{decoder}.layer.2.layer_norm": (
                "decoder_layer_1",
                "decoder_layer_1.post_attention_layernorm",
            ),
            "decoder.final_layer_norm": ("final_norm", "decoder_final_norm"),
            "lm_head": ("lm_head", "lm_head"),
        }
    )


def test_one_stack_called_decoder_is_just_layers() -> None:
    check({"model.decoder.layers.0.fc1": ("layer_0", "layer_0.mlp.fc1")})


@pytest.mark.parametrize("name", ["weight", "0.weight", "something.else.bias"])
def test_unknown_names_are_other(name: str) -> None:
    assert places([name])[name].layer == "other"


def test_weight_and_bias_share_a_component() -> None:
    found = places(["transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"])
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert-decoder", "t5"])
def test_every_parameter_of_a_real_model_has_a_place(
    tiny: Callable[[str], Path], layout: str
) -> None:
    from safetensors import safe_open

    with safe_open(tiny(layout) / "model.safetensors", "pt") as file:
        found = places(file.keys())
    layers = {place.layer for place in found.values()}
    assert "other" not in layers
    stacks = ("encoder_", "decoder_") if layout == "t5" else ("",)
    assert {f"{stack}layer_{i}" for stack in stacks for i in range(2)} <= layers
    unknown = [
        place.component
        for place in found.values()
        if place.layer.startswith(("layer", "encoder", "decoder"))
        and place.component.count(".") > 2
    ]
    assert not unknown
