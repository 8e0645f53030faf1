"""What a run leaves to be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fisherfn as ff
from fisherfn.app import checkpoint
from fisherfn.states import AccumulateState

CPU = torch.device("cpu")
SETUP = {"--fisher": "mc", "--seed": 0, "--select": None}


def make() -> checkpoint.FimCheckpoint:
    diagonal = ff.Diagonal(
        {"a.weight": torch.tensor([0.1, 1e-30])},
        torch.tensor(4.0),
        {"a.weight": torch.tensor([0.5, 0.0])},
        fisher="mc",
    )
    state = AccumulateState(diagonal, torch.tensor(2), torch.tensor(4))
    return checkpoint.FimCheckpoint(SETUP, state, 12.5, 1000)


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    assert not checkpoint.exists(tmp_path)
    before = make()
    checkpoint.save(tmp_path, before)
    assert checkpoint.exists(tmp_path)
    loaded = checkpoint.load(tmp_path, CPU)
    assert (loaded.setup, loaded.seconds, loaded.peak_memory) == (SETUP, 12.5, 1000)
    assert loaded.done == 2
    old, new = before.state.result, loaded.state.result
    assert (new.fisher, new.unit, new.count.item()) == ("mc", "example", 4.0)
    assert torch.equal(old.values["a.weight"], new.values["a.weight"])
    assert torch.equal(old.stderr["a.weight"], new.stderr["a.weight"])
    (tmp_path / f".{checkpoint.FILE}.half").touch()  # of a writer that was killed
    checkpoint.remove(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"garbage that is no header", b"\x02" + bytes(7) + b"{}"])
def test_broken_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / checkpoint.FILE).write_bytes(content)
    with pytest.raises(ff.DataError, match=r"--resume: .* cannot be read\. Delete it"):
        checkpoint.load(tmp_path, CPU)


def test_file_of_something_else(tmp_path: Path) -> None:
    ff.io.save(tmp_path / checkpoint.FILE, {"w": torch.ones(2)})
    with pytest.raises(ff.DataError, match=r"is no checkpoint of fim"):
        checkpoint.load(tmp_path, CPU)


def test_another_setup_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint.check_same(tmp_path, SETUP, dict(SETUP))
    with pytest.raises(
        ff.OptionError, match=r"--fisher was mc, is exact; --seed was 0, is 1\. Rep"
    ):
        checkpoint.check_same(tmp_path, SETUP, {**SETUP, "--fisher": "exact", "--seed": 1})
    with pytest.raises(ff.OptionError, match=r"--unit was \(absent\), is example"):
        checkpoint.check_same(tmp_path, SETUP, {**SETUP, "--unit": "example"})
