"""What a run leaves to be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fisherfn as ff
from fisherfn.app import checkpoint
from fisherfn.app.errors import OutputError

RECORD = checkpoint.Record({"--fisher": "mc", "--seed": 0}, 2, 5, 12.5, 1000)


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    tensors = {"values/a.weight": torch.tensor([0.1, 1e-30]), "count": torch.tensor(4.0)}
    checkpoint.save(tmp_path, tensors, RECORD)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded[1] == RECORD == checkpoint.peek(tmp_path)
    assert all(torch.equal(loaded[0][name], value) for name, value in tensors.items())
    assert loaded[0]["count"].shape == ()
    checkpoint.remove(tmp_path)
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.peek(tmp_path) is None
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"garbage that is no header", b"\x02" + b"\0" * 7 + b"{}"]
)
def test_broken_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / checkpoint.FILE).write_bytes(content)
    with pytest.raises(OutputError, match=r"--resume: .* cannot be read .*Delete it"):
        checkpoint.load(tmp_path)
    assert checkpoint.peek(tmp_path) is None


def test_another_setup_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint.check_same(tmp_path, RECORD.setup, {"--fisher": "mc", "--seed": 0})
    with pytest.raises(
        ff.OptionError, match=r"--fisher was mc, is exact; --seed was 0, is 1\. Rep"
    ):
        checkpoint.check_same(tmp_path, RECORD.setup, {"--fisher": "exact", "--seed": 1})
    with pytest.raises(ff.OptionError, match=r"--unit was \(absent\), is example"):
        checkpoint.check_same(tmp_path, RECORD.setup, {**RECORD.setup, "--unit": "example"})
