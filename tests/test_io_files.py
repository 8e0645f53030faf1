"""Files: all or nothing when writing, and refusal of whatever is not ours when reading."""

from __future__ import annotations

import builtins
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fisherfn import io
from fisherfn.core.errors import DataError, FisherError, OptionError, UnsupportedError
from fisherfn.curvature import Diagonal
from fisherfn.io import files

RESULT = Diagonal({"0.weight": torch.ones(20, 3), "0.bias": torch.ones(3)}, torch.tensor(7.0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.safetensors"


def roundtrip(path: Path, obj: Any) -> Any:
    io.save(path, obj)
    return io.load(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_saving_replaces_and_leaves_nothing_else(path: Path) -> None:
    io.save(path, {"w": torch.ones(2)})
    same(roundtrip(path, {"w": torch.zeros(3)}), {"w": torch.zeros(3)})
    assert os.listdir(path.parent) == [path.name]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_link_stays_a_link(path: Path) -> None:
    link = path.with_name("link")
    io.save(path, {"w": torch.ones(2)})
    link.symlink_to(path)
    io.save(str(link), {"w": torch.zeros(2)})
    assert link.is_symlink()
    same(io.load(path), {"w": torch.zeros(2)})


FULL = """
import resource, sys, torch
from fisherfn import FisherError, io
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
try:
    io.save(sys.argv[1], {"w": torch.ones(100000)})
except FisherError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    io.save(path, {"w": torch.ones(2)})
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert "io.save: expected to write" in done.stdout
    assert "too large" in done.stdout
    assert os.listdir(path.parent) == [path.name]
    same(io.load(path), {"w": torch.ones(2)})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failures_on_the_way_leave_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    io.save(path, {"w": torch.ones(2)})

    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        expected = FisherError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match=r"No space left|^$"):
            io.save(path, {"w": torch.zeros(9)})
    assert os.listdir(path.parent) == [path.name]
    same(io.load(path), {"w": torch.ones(2)})


SAVING = """
import sys, torch
from fisherfn import io
for number in range(10**6):
    io.save(sys.argv[1], {"w": torch.full((1_000_000,), float(number))})
    print(number, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_file(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(path)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert process.stdout is not None
    with process:
        while process.stdout.readline() != "3\n":
            pass
        time.sleep(0.003)  # in the middle of the next file
        process.kill()
    found = io.load(path)["w"]
    assert len(found) == 1_000_000
    assert found[0] >= 3
    assert (found == found[0]).all()


def test_unwritable_targets_are_refused(tmp_path: Path) -> None:
    for target in (tmp_path / "none" / "file", tmp_path):
        with pytest.raises(FisherError, match=r"io.save: expected to write .*nothing was changed"):
            io.save(target, {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_directories_without_permission_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # root may write anywhere
        with pytest.raises(FisherError, match=r"io\.save: .*Permission denied"):
            io.save(path, {"w": torch.ones(2)})
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("bad", [None, 3.5, [], "a\0b"], ids=str)
def test_things_that_are_no_path_are_refused(bad: Any) -> None:
    with pytest.raises(OptionError, match=r"io\.save: expected a path, got"):
        io.save(bad, {})
    with pytest.raises(OptionError, match=r"io\.load: expected a path, got"):
        io.load(bad)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for source in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=r"io.load: expected a file, got .* which is none"):
            io.load(source)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(path: Path, kept: float) -> None:
    io.save(path, RESULT)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"expected a complete safetensors file, got .* truncated"):
        io.load(path)


def test_files_of_other_formats_are_refused(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(DataError, match="truncated or of another format"):
        io.load(path)
    for metadata in (None, {"format": "pt"}, {"format": "fisherfn"}):
        safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(DataError, match=r"expected a file written by io.save, .*load_file"):
            io.load(path)


def write(path: Path, content: Any, version: str = "1") -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    header = {"format": "fisherfn", "version": version, "content": text}
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata=header)


def test_other_versions_are_refused(path: Path) -> None:
    write(path, {"tensor": "w"}, version="2")
    with pytest.raises(UnsupportedError, match=r"format version 1, got '2' in .*or a later one"):
        io.load(path)
    write(path, {"tensor": "w"})
    assert torch.equal(io.load(path), torch.ones(2))


@pytest.mark.parametrize(
    "content",
    [
        "{", {}, [], 3, None, {"tensor": "v"}, {"odd": 1}, {"tensor": "w", "none": True},
        {"dtype": "float3"}, {"dict": [3]}, {"dict": 3}, {"list": {"none": True}},
        {"class": "Diagonal", "fields": {"values": {"tensor": "w"}}},
        {"class": "AccumulateState", "fields": {}}, {"class": "Diagonal"},
    ],
    ids=str,
)  # fmt: skip
def test_altered_files_are_refused(path: Path, content: Any) -> None:
    write(path, content)
    with pytest.raises(DataError, match=r"io.load: expected .* The file was altered"):
        io.load(path)


@pytest.mark.parametrize("about", ["{", "3", "[1]"])
def test_altered_descriptions_are_refused(path: Path, about: str) -> None:
    header = {"format": "fisherfn", "version": "1", "content": "{}", "about": about}
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata=header)
    with pytest.raises(DataError, match=r"expected JSON in the header .* The file was altered"):
        io.describe(path)


@pytest.mark.parametrize("device", ["quantum", "cuda:99", 3.5], ids=str)
def test_devices_that_do_not_exist_are_refused(path: Path, device: Any) -> None:
    io.save(path, {})
    with pytest.raises(OptionError, match=r"io.load: expected a device, got .* Use 'cpu'"):
        io.load(path, device=device)


def test_without_safetensors_it_says_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "safetensors":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(files, "import_module", without)
    message = (
        r'expected the package safetensors, got none. Install it with pip install "fisherfn\[lm'
    )
    with pytest.raises(UnsupportedError, match="io.save: " + message):
        io.save(path, {})
    path.touch()
    with pytest.raises(UnsupportedError, match="io.load: " + message):
        io.load(path)
