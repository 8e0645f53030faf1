"""The schemas of the files: scripts read them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fisherfn.app.report import Report, write_diagonal

VALUES = {
    f"model.layers.{i}.mlp.up_proj.weight": torch.full((2, 3), float(i + 1)) for i in range(12)
}
RUN = {"fisher": "mc", "seconds": 1.5}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    Report.of(VALUES).write(tmp_path, RUN)
    return tmp_path


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def test_layer_importance(written: Path) -> None:
    layers = read(written / "layer_importance.json")
    assert next(iter(layers)) == "layer_11"
    assert list(layers.values()) == sorted(layers.values(), reverse=True)
    assert sum(layers.values()) == pytest.approx(1.0)


def test_component_importance(written: Path) -> None:
    components = read(written / "component_importance.json")
    assert components["layer_11.mlp.up_proj"] == {
        "fisher_sum": 72.0,
        "percentage": pytest.approx(72 / 468),
        "fisher_mean": 12.0,
        "parameters": 6,
    }


def test_summary(written: Path) -> None:
    summary = read(written / "summary.json")
    assert set(summary) == {
        "total_parameters",
        "total_fisher_information",
        "top_10_parameters",
        "top_10_components",
        "parameter_count",
        "layers",
        *RUN,
    }
    assert summary["total_parameters"] == 12  # tensors, as ever
    assert summary["parameter_count"] == 72
    assert summary["total_fisher_information"] == 468.0
    parameters, components = summary["top_10_parameters"], summary["top_10_components"]
    assert len(parameters) == len(components) == 10
    assert parameters[0] == ["model.layers.11.mlp.up_proj.weight", 72.0]
    assert set(components[0]) >= {"component", "fisher_sum", "percentage"}


def test_csv(written: Path) -> None:
    with (written / "fisher.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "layer total_fisher percentage mean std max min num_params"
    assert list(rows[0]) == columns.split()
    assert rows[0]["layer"] == "model.layers.11.mlp.up_proj"
    assert float(rows[0]["percentage"]) == pytest.approx(100 * 72 / 468)
    assert int(rows[0]["num_params"]) == 6


def test_diagonal_in_both_formats(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_diagonal(tmp_path / "d.safetensors", VALUES, "safetensors", {"fisher": "mc"})
    write_diagonal(tmp_path / "d.pt", VALUES, "pt", {"fisher": "mc"})
    for loaded in (load_file(tmp_path / "d.safetensors"), torch.load(tmp_path / "d.pt")):
        assert set(loaded) == set(VALUES)
        for name, value in VALUES.items():
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], value)
