"""All results or none."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fisherfn.app import output
from fisherfn.app.errors import OutputError
from fisherfn.app.report import write_diagonal

BIG = {"w": torch.zeros(100_000)}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make every longer file fail to write, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_directory_is_made_and_taken_away_if_it_stays_empty(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with output.output_directory(path):
        assert path.is_dir()
    assert not path.exists()
    with output.output_directory(path):
        (path / "kept").touch()
    assert path.is_dir()


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--output: .*file is a file"):
        output.output_directory(tmp_path / "file").__enter__()
    with pytest.raises(OutputError, match=r"cannot write to .*below: Not a directory"):
        output.output_directory(tmp_path / "file" / "below").__enter__()


def test_directory_without_space(tmp_path: Path) -> None:
    output.check_space(tmp_path, 1)
    with pytest.raises(OutputError, match=r"the run needs \d+ MB in .*, \d+ MB are free"):
        output.check_space(tmp_path, 2**62)


def test_files_replace_those_before_and_leave_others(tmp_path: Path) -> None:
    (tmp_path / "result").write_text("old")
    (tmp_path / "stale").write_text("old")
    (tmp_path / "other").write_text("old")
    with output.staged(tmp_path, ["stale", "absent"]) as staging:
        (staging / "result").write_text("new")
        assert (tmp_path / "result").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "result": "new",
        "other": "old",
    }


def test_an_error_while_writing_leaves_everything_as_it_was(tmp_path: Path) -> None:
    def fail() -> None:
        with output.staged(tmp_path) as staging:
            (staging / "result").write_text("new")
            raise ValueError("mine")

    (tmp_path / "result").write_text("old")
    with pytest.raises(ValueError, match="mine"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "old"


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_full_disk(tmp_path: Path, form: str) -> None:
    with (
        largest_file(50_000),
        pytest.raises(OutputError, match=r"--output: cannot write to "),
        output.staged(tmp_path) as staging,
    ):
        write_diagonal(staging / "d", BIG, form, {})
    assert not any(tmp_path.iterdir())


def test_leftovers_of_killed_runs_are_swept(tmp_path: Path) -> None:
    (tmp_path / f"{output.STAGING}x").mkdir()
    (tmp_path / f"{output.STAGING}x" / "half").touch()
    (tmp_path / "kept").touch()
    output.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_new_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with output.staged(tmp_path) as staging:
        write_diagonal(staging / "d.safetensors", {"w": torch.ones(1)}, "safetensors", {})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
