"""The packaged model, for real: `pytest -m lm`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fisherfn.app.packaged import packaged_model

pytestmark = [pytest.mark.lm, pytest.mark.slow]


def test_the_command_without_a_model(
    tmp_path: Path, fim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "out"
    arguments = ("--num-samples", 3, "--max-length", 48, "--output", out)
    first = fim(*arguments)
    assert first.code == 0, first.err
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert summary["seconds_by_phase"]["converting the packaged model (once)"] <= 60
    assert summary["model"] == "SmolLM2-135M-Instruct"
    assert (summary["total_parameters"], summary["parameter_count"]) == (272, 134_515_008)
    assert summary["tied_parameters"] == {"lm_head.weight": "model.embed_tokens.weight"}
    layers = json.loads((out / "layer_importance.json").read_text("utf-8"))
    assert set(layers) == {"embeddings", "final_norm", *(f"layer_{i}" for i in range(30))}
    assert all(share > 0 for share in layers.values())
    again = fim(*arguments)
    assert again.code == 0, again.err
    assert "converting" not in again.out
    assert json.loads((out / "layer_importance.json").read_text("utf-8")) == layers


def test_it_is_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory, made = packaged_model()
    assert made
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**tokens).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"
