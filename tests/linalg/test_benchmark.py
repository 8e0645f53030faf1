"""The benchmark of traces and spectra runs, and is right on a small model."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from benchmarks import spectra


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_small_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "spectra.json"
    arguments = ["--problem", "tiny", "--training", "2", "--repeats", "1", "--threads", "1"]
    assert spectra.main([*arguments, "--output", str(out)]) == 0
    found = json.loads(out.read_text("utf-8"))["tiny"]
    assert set(found) == {"after 0 steps of training", "after 2 steps of training"}
    for measured in found.values():
        xtrace = measured["trace"]["xtrace"]
        assert abs(xtrace["relative error"]) < 6 * xtrace["relative stderr"] + 1e-5
        assert measured["spectrum"]["within 40 products"]["largest relative error"] < 1e-3
    assert "tiny, after 0 steps of training" in capsys.readouterr().out


@pytest.mark.lm
@pytest.mark.slow
def test_language_model_within_twelve_gibibytes(tmp_path: Path) -> None:
    out = tmp_path / "spectra.json"
    assert spectra.main(["--problem", "smollm2", "--output", str(out)]) == 0
    found = json.loads(out.read_text("utf-8"))["smollm2"]
    trace = found["trace, 4 draws of labels"]
    assert 0 < trace["stderr"] < trace["value"]
    probes = found["trace, random vectors"]
    assert abs(probes["value"] - trace["value"]) < 5 * (probes["stderr"] + trace["stderr"])
    pairs = found["five largest eigenvalues"]
    values = pairs["eigenvalues"]
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] <= values[0] < trace["value"] + 5 * trace["stderr"]
    assert max(pairs["residuals"]) < 0.2 * values[0]
    assert found["solve"]["residual"] < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 < 12.0
