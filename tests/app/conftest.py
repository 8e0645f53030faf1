"""Tiny language models on disk, and the command line as a function."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fisherfn.app.cli import main

importlib.import_module("rich.progress")  # draws from Python's random state when it is imported

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "def class return if else for in while import from as with try pass lambda self x y z n i "
    "a b c d e f g h ( ) : = + - * / , . 0 1 2 3"
).split()
VOCABULARY = 64


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str


Fim = Callable[..., Outcome]


@pytest.fixture
def fim(capsys: pytest.CaptureFixture[str]) -> Fim:
    """Return a function that runs `fisherfn fim` with the arguments given, in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main(["fim", *map(str, arguments)])
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts `python -m fisherfn fim` in a process of its own."""
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "fisherfn", "fim", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def caches_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's cache, and off the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a layout's name to the directory of a tiny random model of it."""
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            save_model(layout, made[layout])
        return made[layout]

    return get


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Return a file of seven samples of different lengths, one a line."""
    lines = [" ".join(WORDS[start : start + 3 + start % 5]) for start in range(0, 35, 5)]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def save_model(layout: str, directory: Path) -> None:
    """Save a random model of a layout, with a tokenizer of whole words."""
    import transformers

    small: dict[str, Any] = {"vocab_size": VOCABULARY}
    config, kind = {
        "llama": lambda: (
            transformers.LlamaConfig(
                **small,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                tie_word_embeddings=True,
            ),
            "LlamaForCausalLM",
        ),
        "gpt2": lambda: (
            transformers.GPT2Config(**small, n_embd=16, n_layer=2, n_head=2, n_positions=32),
            "GPT2LMHeadModel",
        ),
        "bert": lambda: (
            transformers.BertConfig(
                **small,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
            ),
            "BertLMHeadModel",
        ),
        "bert-decoder": lambda: (
            transformers.BertConfig(
                **small,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                is_decoder=True,
            ),
            "BertLMHeadModel",
        ),
        "t5": lambda: (
            transformers.T5Config(**small, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
            "T5ForConditionalGeneration",
        ),
    }[layout]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config)
        for parameter in model.parameters():  # the default 0.02 makes a nearly uniform model
            torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    model.save_pretrained(directory)
    save_tokenizer(directory)


def save_tokenizer(directory: Path) -> None:
    """Save a tokenizer of whole words without a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(directory)


@pytest.fixture
def results() -> Callable[[Path], dict[str, Any]]:
    """Return a function that reads the JSON files of an output directory."""

    def read(directory: Path) -> dict[str, Any]:
        return {path.stem: json.loads(path.read_text("utf-8")) for path in directory.glob("*.json")}

    return read
