"""The script that counts storage runs, and counts right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import storage


def test_counts_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> torch.nn.Module:
        with torch.device("meta"):
            return torch.nn.Sequential(torch.nn.Embedding(2500, 8), torch.nn.Linear(8, 4))

    monkeypatch.setitem(storage.MODELS, "tiny", build)
    assert storage.main(["--model", "tiny", "--output", str(tmp_path)]) == 0
    (model,) = json.loads((tmp_path / "storage.json").read_text())["models"]
    parameters = 2500 * 8 + 8 * 4 + 4
    assert (model["parameters"], model["diagonal_bytes"]) == (parameters, 4 * parameters)
    fine, coarse, layers = model["rows"]
    assert fine["by_kind"] == {"row": 2500, "channel": 4, "element": 4}
    assert coarse["by_kind"] == {"bucket": 3, "channel": 4, "element": 4}
    assert layers["number"] == 1  # names without layers: everything is "other"
    for row in model["rows"]:
        assert row["bytes"] == 4 * row["number"] < row["file_bytes"]
        assert row["factor"] == pytest.approx(parameters / row["number"])
        assert row["not_understood"] == {}


def test_what_is_not_understood_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.empty(3, 4, device="meta"))

    monkeypatch.setitem(storage.MODELS, "own", Own)
    assert storage.main(["--model", "own", "--output", str(tmp_path)]) == 1


@pytest.mark.slow  # imports transformers
def test_a_gpt_of_1300_million_parameters() -> None:
    model = storage.weigh("gpt", storage.gpt_1b3())
    assert model["parameters"] == 1_315_723_264
    fine = model["rows"][0]
    # 24 layers of 3 * 16 + 16 heads and 5 * 2048 channels; rows of both tables
    assert fine["by_kind"]["head"] == 24 * 64
    assert fine["by_kind"]["channel"] == 24 * 5 * 2048
    assert fine["by_kind"]["row"] == 50257 + 2048
    assert fine["by_kind"]["element"] == 24 * (3 + 1 + 4 + 1 + 4) * 2048 + 2 * 2048
    assert fine["factor"] > 1000


@pytest.mark.lm
def test_the_packaged_model() -> None:
    model = storage.weigh("smollm2", storage.smollm2())
    assert (model["parameters"], model["tensors"]) == (134_515_008, 272)
    assert model["rows"][0]["by_kind"]["head"] == 30 * (9 + 3 + 3 + 9)
