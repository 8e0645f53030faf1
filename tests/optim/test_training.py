"""The comparison with Adam runs, on a problem too small to measure anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import training


@pytest.mark.moves_global_rng  # matplotlib draws names from it
def test_curves_and_medians_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--problem", "tiny", "--seeds", "2", "--every", "1", "--rates", "1e-3", "1e-2"]
    try:
        assert training.main([*arguments, "--threads", "1", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (result,) = json.loads((tmp_path / "training.json").read_text())["results"]
    assert result["adam_rate"] == 1e-2
    assert set(result["table"]) == {"Adam", "K-FAC", "EKFAC"}
    assert len(result["curves"]) == 6
    for curve in result["curves"]:
        assert len(curve["steps"]) == len(curve["seconds"]) == len(curve["losses"])
        assert curve["losses"][-1] < 2.35
        assert curve["losses"][-1] < curve["losses"][0]
    for method in ("K-FAC", "EKFAC"):
        assert result["table"][method]["steps_of_adam"] <= 0.5
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert "tiny: 310 parameters, Adam's rate 0.01" in capsys.readouterr().out


def test_the_first_evaluation_below_the_target_counts() -> None:
    curve = training.Curve("Adam", 0, [0, 5, 10, 15], [0.0, 1.0, 2.0, 3.0], [4.0, 2.0, 1.0, 1.5])
    assert curve.reached(1.7) == (10, 2.0)
    assert curve.reached(0.5) is None
    assert training._median([(10, 2.0), (20, 3.0), None]) == {"steps": 20, "seconds": 3.0}
    assert training._median([(10, 2.0), None, None]) == {"steps": None, "seconds": None}


def test_every_method_starts_alike_and_sees_the_same_batches() -> None:
    problem = training.problems()["tiny"]
    data = training.Data(problem)
    one = [next(data.batches(7, seed)).inputs for seed in (0, 0, 1)]
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one[0], one[2])
    first = training.adam(problem, data, 1e-3, 3, 20).losses[0]
    assert training.natural(problem, data, "K-FAC", 3, 10, 0.0).losses[0] == first
