"""The benchmarks run, and notice a wrong value: on a problem too small to measure anything."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import oracle, run, streams, timing
from benchmarks.peers import PEERS
from benchmarks.quantities import QUANTITIES, Quantity
from benchmarks.workloads import BUILDERS, build


def measured(directory: Path, *arguments: str, problem: str = "tiny") -> dict[str, Any]:
    code = run.main(
        ["--problem", problem, "--repeats", "2", "--output", str(directory), *arguments]
    )
    result = json.loads((directory / f"{problem}-cpu.json").read_text())
    return {"code": code, **result}


def test_all_quantities_agree_with_the_oracle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measured(tmp_path)
    assert result["code"] == 0
    rows = [row for row in result["rows"] if row["source"] == "fisherfn"]
    assert {row["quantity"] for row in rows} == set(QUANTITIES)
    for row in rows:
        assert row["agrees"], row
        assert row["error"] < 1e-10
        assert row["gradients"] > 0
        assert row["timing"]["samples"] == 2
    assert result["versions"]["torch"] == torch.__version__
    assert result["sizes"]["parameters"] == 6 * 5 + 5 + 5 * 3 + 3
    assert "diagonal/mc" in capsys.readouterr().out


def test_torch_alone_is_a_peer_that_agrees(tmp_path: Path) -> None:
    kinds = [name for name in QUANTITIES if name.startswith("diagonal/")]
    result = measured(tmp_path, "--peers", "--quantity", *kinds)
    rows = [row for row in result["rows"] if row["source"] == "vmap(grad)"]
    assert [row["agrees"] for row in rows] == [True, True, True]


def test_a_wrong_value_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = QUANTITIES["score_norms"]
    wrong = Quantity(right.make, right.oracle, lambda r: {"norms": 1.001 * r})
    monkeypatch.setitem(QUANTITIES, "score_norms", wrong)
    result = measured(tmp_path, "--quantity", "score_norms")
    assert result["code"] == 1
    row = result["rows"][-1]
    assert row["agrees"] is False
    assert row["error"] == pytest.approx(1e-3)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(PEERS["ASDL"]), "version", None)
    result = measured(tmp_path, "--peers", "--quantity", "score_gram")
    rows = {row["source"]: row for row in result["rows"]}
    assert rows["ASDL"]["status"] == "not offered"
    assert rows["ASDL"]["message"] == "asdfghjkl is not installed"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_the_result(tmp_path: Path) -> None:
    result = measured(tmp_path, "--memory", "--quantity", "score_norms")
    assert all(row["memory"] >= 0 for row in result["rows"]), result["rows"]


@pytest.mark.slow
def test_compiled_cases_agree(tmp_path: Path) -> None:
    result = measured(tmp_path, "--compile", "--quantity", "diagonal/mc", "score_norms")
    compiled = [row for row in result["rows"] if row["compiled"] and row["source"] == "fisherfn"]
    assert len(compiled) == 2
    assert all(row["agrees"] for row in compiled)


@pytest.mark.peers
@pytest.mark.moves_global_rng  # peers draw labels from it
def test_peers_agree_on_a_network_that_all_of_them_know(tmp_path: Path) -> None:
    for library in ("asdl", "backpack", "curvlinops", "nngeometry"):
        assert importlib.util.find_spec(library), f"{library} is not installed"
    result = measured(tmp_path, "--peers", "--quantity", "diagonal/empirical", "diagonal/exact")
    found = {(row["source"], row["quantity"]): row for row in result["rows"]}
    for peer in ("BackPACK", "ASDL", "NNGeometry"):
        assert found[peer, "diagonal/empirical"]["agrees"]
        assert found[peer, "diagonal/exact"]["agrees"]
    assert found["curvlinops", "diagonal/exact"]["status"] == "not offered"


def test_workloads_are_the_same_for_the_same_seed() -> None:
    one, same, other = (build("tiny", "cpu", seed) for seed in (3, 3, 4))
    assert torch.equal(one.batch.inputs, same.batch.inputs)
    assert not torch.equal(one.batch.inputs, other.batch.inputs)
    assert one.loss(one.module) == same.loss(same.module)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "resnet18"])
def test_workload_has_its_sizes(name: str) -> None:
    workload = build(name, "cpu")
    parameters = {"mlp": 669_706, "cnn": 895_210, "gpt": 1_057_536, "resnet18": 11_173_962}
    assert workload.sizes["parameters"] == parameters[name]
    assert set(BUILDERS) >= {"smollm2", "gpt2", "tiny"}


def test_worst_error_is_relative_to_each_tensor() -> None:
    wanted = {"a": torch.tensor([100.0, 1.0]), "b": torch.tensor([0.01])}
    got = {"a": torch.tensor([100.0, 1.0]), "b": torch.tensor([0.02])}
    assert oracle.worst_error(got, wanted) == pytest.approx(1.0)
    assert oracle.worst_error({"a": wanted["a"]}, wanted) == float("inf")
    assert oracle.worst_error({**wanted, "b": torch.tensor([float("nan")])}, wanted) == float("inf")


def test_interleaving_calls_all_runs_equally_often() -> None:
    calls: dict[str, int] = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1
        torch.ones(300, 300).mm(torch.ones(300, 300))

    runs = {name: (lambda name=name: count(name)) for name in calls}
    timings = timing.interleaved(runs, torch.device("cpu"), repeats=3)
    for name, found in timings.items():
        assert found.samples == 3
        assert found.minimum <= found.lower_quartile <= found.median <= found.upper_quartile
        assert calls[name] == 1 + 3 * found.calls_per_sample


def test_streams_are_measured(tmp_path: Path) -> None:
    small = ["--problem", "tiny", "--entries", "1000", "--repeats", "2"]
    assert streams.main([*small, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "streams-cpu.json").read_text())
    assert {(row["quantity"], row["state"]) for row in found["folds"]} == {
        (quantity, state) for quantity in ("diagonal", "grouped") for state in ("ema", "welford")
    }
    assert all(row["ratio"] > 0 for row in found["folds"] + found["traffic"])
    assert [row["bytes"] for row in found["offload"]] == [4000, 2000, 2000]
