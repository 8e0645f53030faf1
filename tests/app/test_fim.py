"""`fisherfn fim` from beginning to end, on tiny models."""

from __future__ import annotations

import csv
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fisherfn as ff
from fisherfn.app.sources import open_source
from fisherfn.app.weights import load_weights

Tiny = Callable[[str], Path]
FILES = {
    "layer_importance.json",
    "component_importance.json",
    "summary.json",
    "fisher.csv",
    "fisher_diagonal.safetensors",
}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def diagonal(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "fisher_diagonal.safetensors")


def reference(
    model_directory: Path, texts: Path, *, positions: bool = False
) -> dict[str, torch.Tensor]:
    """Return the empirical Fisher by one backward per sample (or per predicted token)."""
    source = open_source(str(model_directory))
    module = load_weights(source, torch.float32, torch.device("cpu"))
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    count = 0
    for line in texts.read_text("utf-8").splitlines():
        tokens = torch.tensor([source.encode(line)])
        log_probs = module(tokens).logits.log_softmax(-1)[0, :-1]
        scores = log_probs.gather(1, tokens[0, 1:, None])[:, 0]
        for score in scores if positions else [scores.sum()]:
            gradients = torch.autograd.grad(
                score, list(module.parameters()), retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += gradient**2
            count += 1
    return {name: value / count for name, value in total.items()}


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert-decoder"])
@pytest.mark.parametrize("unit", ["example", "position"])
def test_empirical_is_the_mean_of_squared_scores(
    tiny: Tiny, texts: Path, tmp_path: Path, fim: Any, layout: str, unit: str
) -> None:
    done = fim(
        *("--model", tiny(layout), "--data", texts, "--output", tmp_path / "out"),
        *("--fisher", "empirical", "--unit", unit, "--batch-size", 3, "--max-length", 16),
    )
    assert done.code == 0, done.err
    got = diagonal(tmp_path / "out")
    expected = reference(tiny(layout), texts, positions=unit == "position")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_files_and_table(
    tiny: Tiny, texts: Path, tmp_path: Path, fim: Any, results: Callable[[Path], dict[str, Any]]
) -> None:
    out = tmp_path / "deep" / "out"
    done = fim("--model", tiny("llama"), "--data", texts, "--output", out, "--max-length", 16)
    assert done.code == 0, done.err
    assert names(out) == FILES
    read = results(out)
    layers, summary = read["layer_importance"], read["summary"]
    assert set(layers) == {"embeddings", "layer_0", "layer_1", "final_norm"}
    assert sum(layers.values()) == pytest.approx(1.0)
    values = diagonal(out)
    assert summary["total_parameters"] == len(values)
    assert summary["parameter_count"] == sum(value.numel() for value in values.values())
    trace = sum(value.sum().item() for value in values.values())
    assert summary["total_fisher_information"] == pytest.approx(trace, rel=1e-5)
    assert summary["tied_parameters"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert (summary["count"], summary["unit"], summary["fisher"]) == (7, "example", "mc")
    assert summary["data"] == str(texts)
    for key in ("seconds", "units_per_second", "samples_per_second", "tokens_per_second"):
        assert summary[key] > 0
    assert summary["peak_memory_bytes"] > 1e6
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "layer_1.q_proj" in read["component_importance"]
    with (out / "fisher.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert int(rows["model.layers.0.mlp.up_proj"]["num_params"]) == 16 * 24
    for word in ("layer_1", "embeddings", "batches", "loading the weights", "samples/s", str(out)):
        assert word in done.out
    assert "the data has 7 of the 20 samples asked" in done.err


def test_numbers_depend_on_neither_batches_nor_padding(
    tiny: Tiny, texts: Path, tmp_path: Path, fim: Any
) -> None:
    got: list[dict[str, torch.Tensor]] = []
    for size in (1, 2, 7):
        out = tmp_path / str(size)
        arguments = ("--model", tiny("gpt2"), "--data", texts, "--batch-size", size)
        assert fim(*arguments, "--output", out, "--max-length", 16).code == 0
        got.append(diagonal(out))
    for other in got[1:]:
        for name, value in got[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["mc", "curvature_prop"])
def test_random_kinds_estimate_the_exact_one(
    tiny: Tiny, texts: Path, tmp_path: Path, fim: Any, kind: str
) -> None:
    arguments = ("--model", tiny("llama"), "--data", texts, "--num-samples", 2, "--max-length", 5)
    assert fim(*arguments, "--fisher", "exact", "--output", tmp_path / "exact").code == 0
    draws = ("--fisher", kind, "--label-samples", 200, "--seed", 3)
    assert fim(*arguments, *draws, "--output", tmp_path / "drawn").code == 0
    exact = sum(value.sum().item() for value in diagonal(tmp_path / "exact").values())
    drawn = sum(value.sum().item() for value in diagonal(tmp_path / "drawn").values())
    assert drawn == pytest.approx(exact, rel=0.35)


def test_seed_and_select(tiny: Tiny, texts: Path, tmp_path: Path, fim: Any) -> None:
    arguments = ("--model", tiny("llama"), "--data", texts, "--select", r"mlp\.up")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert fim(*arguments, "--seed", seed, "--output", tmp_path / name).code == 0
    a, b, c = (diagonal(tmp_path / name) for name in "abc")
    assert list(a) == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_give_wide_sums(
    tiny: Tiny, texts: Path, tmp_path: Path, fim: Any, dtype: str
) -> None:
    done = fim(*("--model", tiny("llama"), "--data", texts, "--output", tmp_path, "--dtype", dtype))
    assert done.code == 0, done.err
    assert {value.dtype for value in diagonal(tmp_path).values()} == {torch.float32}


def test_granularity_top_and_the_older_outputs(
    tiny: Tiny, texts: Path, tmp_path: Path, fim: Any, results: Callable[[Path], dict[str, Any]]
) -> None:
    out, table = tmp_path / "out", tmp_path / "table.csv"
    done = fim(
        *("--model_path", tiny("llama"), "--calibration_data", texts, "--output_dir", out),
        *("--granularity", 3, "--top_n", 2, "--save_fisher_dict", "--output_path", table),
    )
    assert done.code == 0, done.err
    assert names(out) == FILES - {"fisher_diagonal.safetensors"} | {"fisher_diagonal.pt"}
    assert table.read_bytes() == (out / "fisher.csv").read_bytes()
    components = results(out)["component_importance"]
    total = sum(entry["parameters"] for entry in components.values())
    assert total == results(out)["summary"]["parameter_count"]
    assert "layer_0.q_proj[2]" in components
    saved = torch.load(out / "fisher_diagonal.pt")
    assert all(value.dtype == torch.float32 for value in saved.values())
    assert "2 of" in done.out


def test_a_second_run_replaces_the_first(tiny: Tiny, texts: Path, tmp_path: Path, fim: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", "utf-8")
    arguments = ("--model", tiny("llama"), "--data", texts, "--output", out)
    assert fim(*arguments, "--format", "pt").code == 0
    assert fim(*arguments).code == 0
    assert names(out) == FILES | {"notes.txt"}  # and no fisher_diagonal.pt, which is stale now


def test_default_text(tiny: Tiny, tmp_path: Path, fim: Any) -> None:
    done = fim("--model", tiny("llama"), "--output", tmp_path / "out", "--max-length", 16)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert summary["data"] == "source of Python's standard library"
    assert summary["count"] == 20
    assert "cut 20 of 20 samples to 16 tokens" in done.err


def test_one_word_lines_are_skipped_and_counted(tiny: Tiny, tmp_path: Path, fim: Any) -> None:
    data = tmp_path / "data.txt"
    data.write_text("def\n\nreturn x\nclass\nx = y\n", "utf-8")
    done = fim("--model", tiny("llama"), "--data", data, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "skipped 2 samples of fewer than two tokens" in done.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert (summary["skipped_samples"], summary["count"]) == (2, 2)


def test_end_of_text_inside_a_sample_counts(tiny: Tiny, tmp_path: Path, fim: Any) -> None:
    data = tmp_path / "data.txt"
    data.write_text("x </s> y\nx = y + z\n", "utf-8")
    arguments = ("--model", tiny("llama"), "--data", data, "--fisher", "empirical")
    assert fim(*arguments, "--output", tmp_path / "out").code == 0
    expected = reference(tiny("llama"), data)
    for name, value in diagonal(tmp_path / "out").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)


def test_zero_everywhere_is_said(tiny: Tiny, tmp_path: Path, fim: Any) -> None:
    data = tmp_path / "data.txt"
    data.write_text("x = y\n", "utf-8")
    model = tmp_path / "model"
    source = open_source(str(tiny("gpt2")))
    module = load_weights(source, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.save_pretrained(model)  # type: ignore[operator]
    source.tokenizer.save_pretrained(model)
    arguments = ("--model", model, "--data", data, "--select", "c_fc")
    done = fim(*arguments, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "warning: the Fisher is zero everywhere" in done.err
    layers = json.loads((tmp_path / "out" / "layer_importance.json").read_text("utf-8"))
    assert set(layers.values()) == {0.0}


def test_library_and_command_agree(tiny: Tiny, texts: Path, tmp_path: Path, fim: Any) -> None:
    out = tmp_path / "out"
    assert fim("--model", tiny("llama"), "--data", texts, "--output", out, "--seed", 5).code == 0
    source = open_source(str(tiny("llama")))
    module = load_weights(source, torch.float32, torch.device("cpu"))
    model, params, buffers = ff.functional(module)
    estimator = ff.diagonal(model, ff.likelihoods.categorical(), fisher="mc")
    total = None
    for number, line in enumerate(texts.read_text("utf-8").splitlines()):
        batch = ff.causal_batch(torch.tensor([source.encode(line)]), ids=torch.tensor([number]))
        one = estimator(params, buffers, batch, key=ff.random.key(5))
        total = one if total is None else ff.merge(total, one)
    assert total is not None
    for name, value in diagonal(out).items():
        torch.testing.assert_close(value, total.values[name], rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
def test_on_a_gpu(tiny: Tiny, texts: Path, tmp_path: Path, fim: Any) -> None:
    arguments = ("--model", tiny("llama"), "--data", texts)
    for device in ("cpu", "cuda"):
        assert fim(*arguments, "--device", device, "--output", tmp_path / device).code == 0
    on_cpu, on_gpu = (diagonal(tmp_path / device) for device in ("cpu", "cuda"))
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
def test_memory_of_a_gpu(tiny: Tiny, tmp_path: Path, fim: Any) -> None:
    data = tmp_path / "data.txt"
    data.write_text("x = y + z * 1\n" * 4, "utf-8")
    gc.collect()
    torch.cuda.empty_cache()  # what is reserved already counts as given
    limit = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(1e6 / limit)
    try:
        done = fim("--model", tiny("llama"), "--data", data, "--device", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.code == 2
    assert "memory" in done.err
