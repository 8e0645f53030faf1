"""Tiny Hugging Face models, randomly initialised, with padding."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from cases.base import Built, Case, generator, table, tokens

B, T, V = 2, 5, 11

#: Llama, T5 and their kin normalise in float32 even in a double model.
FLOAT32 = 1e-5


def attention_mask(left: bool = False) -> Tensor:
    """One full row and one with two padded places."""
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, : 2 if left else T] = 0
    if not left:
        mask[1, : T - 2] = 1
    return mask


def _inputs(mask: Tensor | None = None) -> dict[str, Tensor]:
    ids = torch.randint(1, V, (B, T), generator=generator(20))
    return {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})


def _wide(model: Any) -> Any:
    """Replace the norms, which compute in float32 whatever the model does, by double ones."""

    def forward(self: Any, h: Tensor) -> Tensor:
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(forward, module)
    return model


def _built(model: Any, padded: bool = True) -> Built:
    if not padded:
        return Built(model.double(), _inputs())
    mask = attention_mask()
    return Built(model.double(), _inputs(mask), mask=mask.bool())


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | options))


def gpt2(**options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {
        "vocab_size": V,
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 8,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**settings | options))


def _bert_config() -> Any:
    from transformers import BertConfig

    settings: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 10,
        "max_position_embeddings": 8,
        "num_labels": 3,
    }
    return BertConfig(**settings)


def bert_masked() -> Any:
    from transformers import BertForMaskedLM

    return BertForMaskedLM(_bert_config())


def bert_classifier() -> Any:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config())


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        "vocab_size": V,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 10,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "use_cache": False,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 4,
        "relative_attention_max_distance": 6,
    }
    return T5ForConditionalGeneration(T5Config(**settings))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 16,
        "use_cache": False,
        "experts_implementation": "eager",
    }
    return MixtralForCausalLM(MixtralConfig(**settings))


def _t5_inputs() -> dict[str, Tensor]:
    return _inputs(attention_mask()) | {"decoder_input_ids": tokens(B, 4, high=V, seed=21)}


ALL = table(
    Case("llama", lambda: _built(_wide(llama()))),
    Case("llama_as_it_is", lambda: _built(llama()), rtol=FLOAT32),
    Case("llama_no_padding", lambda: _built(_wide(llama()), padded=False)),
    Case(
        "llama_untied_biases",
        lambda: _built(_wide(llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True))),
    ),
    Case("llama_eager_attention", lambda: _built(llama(attn_implementation="eager")), rtol=FLOAT32),
    Case("gpt2", lambda: _built(gpt2())),
    Case("gpt2_no_padding", lambda: _built(gpt2(), padded=False)),
    Case("bert_masked", lambda: _built(bert_masked()), general=None),
    Case(
        "bert_classifier",
        lambda: Built(bert_classifier().double(), _inputs(attention_mask())),
        general=None,
    ),
    Case("t5", lambda: Built(t5().double(), _t5_inputs()), rtol=FLOAT32),
    Case("mixtral", lambda: _built(mixtral(), padded=False), general=None, rtol=FLOAT32),
)
