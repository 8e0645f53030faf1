"""Models that are there, and models that are not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fisherfn as ff
from fisherfn.app.sources import check_exact, open_source
from fisherfn.app.weights import check_causality, fingerprint, load_weights, tied_names

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """Return a copy of the tiny Llama to damage."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "copy"))


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_source(tiny: Tiny) -> None:
    source = open_source(str(tiny("llama")))
    assert (source.vocabulary, source.context, source.pad) == (64, 32, 0)
    assert len(source.encode("def x ( unknown")) == 4
    assert source.conversion_seconds == 0.0


def test_weights_arrive_in_evaluation_mode_and_in_the_dtype(tiny: Tiny) -> None:
    for layout in ("llama", "gpt2"):
        module = load_weights(open_source(str(tiny(layout))), torch.bfloat16, CPU)
        assert not any(part.training for part in module.modules())
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_tied_parameters_are_named(tiny: Tiny) -> None:
    module = load_weights(open_source(str(tiny("llama"))), torch.float32, CPU)
    assert tied_names(module) == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert-decoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_pass(tiny: Tiny, layout: str, dtype: torch.dtype) -> None:
    source = open_source(str(tiny(layout)))
    check_causality(load_weights(source, dtype, CPU), source, CPU)


def test_encoders_under_a_causal_name_are_noticed(tiny: Tiny) -> None:
    source = open_source(str(tiny("bert")))
    module = load_weights(source, torch.float32, CPU)
    with pytest.raises(ff.UnsupportedError, match=r"looks at later tokens .*is_decoder"):
        check_causality(module, source, CPU)


def test_logits_that_are_not_finite(tiny: Tiny) -> None:
    source = open_source(str(tiny("llama")))
    module = load_weights(source, torch.float32, CPU)
    with torch.no_grad():
        next(module.parameters()).fill_(torch.nan)
    with pytest.raises(ff.DataError, match=r"are not finite in torch\.float32.*--dtype float32"):
        check_causality(module, source, CPU)


def test_encoder_decoders_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ff.UnsupportedError, match=r"got T5ForConditionalGeneration in .*ff\.diag"):
        open_source(str(tiny("t5")))


def test_models_with_another_head_are_refused(copy: Path) -> None:
    edit(copy, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ff.UnsupportedError, match=r"got LlamaForSequenceClassification"):
        open_source(str(copy))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"no config\.json in .*save_pretrained"),
        ("tokenizer.json", r"no tokenizer in .*tokenizer\.save_pretrained"),
        ("model.safetensors", r"no weights in .*\*\.safetensors or pytorch_model"),
    ],
)
def test_missing_files(copy: Path, name: str, message: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ff.DataError, match=message):
        open_source(str(copy))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"cannot read the config in "),
        ("tokenizer.json", r"cannot read the tokenizer in "),
    ],
)
def test_broken_files(copy: Path, name: str, message: str) -> None:
    (copy / name).write_text("garbage", "utf-8")
    with pytest.raises(ff.DataError, match=message):
        open_source(str(copy))


def test_unknown_architecture(copy: Path) -> None:
    edit(copy, model_type="unheard_of", architectures=None)
    with pytest.raises(ff.DataError, match=r"cannot read the config in .*unheard_of"):
        open_source(str(copy))


def test_broken_and_incomplete_weights(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}  # not the file's map
    path.write_bytes(b"garbage")
    with pytest.raises(ff.DataError, match=r"cannot load the weights .*may be broken"):
        load_weights(open_source(str(copy)), torch.float32, CPU)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ff.DataError, match=r"lack model\.norm\.weight: the Fisher of values"):
        load_weights(open_source(str(copy)), torch.float32, CPU)


def test_weights_of_another_shape(copy: Path) -> None:
    edit(copy, intermediate_size=32)
    with pytest.raises(ff.DataError, match=r"--model: "):
        load_weights(open_source(str(copy)), torch.float32, CPU)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", r"no such directory: nowhere"),
        ("/nowhere/at/all", r"no such directory: /nowhere/at/all"),
        (
            "owner/name",
            r"owner/name is no directory here, and the model hub did not give its config",
        ),
    ],
)
def test_models_that_are_nowhere(model: str, message: str) -> None:
    with pytest.raises(ff.DataError, match=message):
        open_source(model)


def test_a_file_is_no_model(copy: Path) -> None:
    with pytest.raises(ff.DataError, match=r"expected a directory, got the file .*config\.json"):
        open_source(str(copy / "config.json"))


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ff.UnsupportedError, match=r"need transformers, .*pip install 'fisherfn\[lm\]'"
    ):
        open_source(None)


def test_exact_is_refused_by_its_columns() -> None:
    check_exact(8, 51, 400)
    with pytest.raises(ff.OptionError, match=r"12582656 columns \(256 positions x 49152 classes"):
        check_exact(256, 49152, 20_000)


def test_fingerprint_sees_names_shapes_and_values() -> None:
    params = {"a": torch.arange(6.0)}
    same = fingerprint({"a": torch.arange(6.0)})
    assert fingerprint(params) == same
    for other in (
        {"b": torch.arange(6.0)},
        {"a": torch.arange(6.0).reshape(2, 3)},
        {"a": torch.arange(6.0) * (1 + 1e-6)},
        {"a": torch.arange(6.0, dtype=torch.float64)},
    ):
        assert fingerprint(other) != same
