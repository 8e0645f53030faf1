"""`fisherfn fim` under `torchrun`: the numbers of one process, and one set of files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fisherfn.app import checkpoint
from fisherfn.app.processes import Processes, processes
from fisherfn.core.errors import OptionError

Tiny = Callable[[str], Path]
ROOT = Path(__file__).resolve().parents[2]


def torchrun(*arguments: object, world: int = 2) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "fisherfn", "fim", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def same(a: Path, b: Path) -> None:
    ours, theirs = (load_file(path / "fisher_diagonal.safetensors") for path in (a, b))
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("fisher", "batch_size"),
    [
        ("mc", 3),  # batches of 3, 3 and 1 samples: uneven
        pytest.param("empirical", 2, marks=pytest.mark.slow),
        pytest.param("mc", 7, marks=pytest.mark.slow),  # one batch: a process without data
    ],
)
def test_two_processes_give_the_numbers_of_one(
    fim: Any, tiny: Tiny, texts: Path, tmp_path: Path, fisher: str, batch_size: int
) -> None:
    options = ("--model", tiny("gpt2"), "--data", texts, "--batch-size", batch_size)
    options += ("--fisher", fisher, "--label-samples", 3 if fisher == "mc" else 1)
    assert fim(*options, "--output", tmp_path / "one").code == 0
    process = torchrun(*options, "--output", tmp_path / "two")
    printed, errors = process.communicate(timeout=170)
    assert process.returncode == 0, errors
    same(tmp_path / "one", tmp_path / "two")
    one, two = (
        json.loads((tmp_path / name / "summary.json").read_text("utf-8")) for name in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["count"] == two["count"] == 7
    assert one["predictions"] == two["predictions"]
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == files
    assert printed.count("written to") == 1  # only the first process prints


@pytest.mark.slow
def test_killed_processes_go_on_where_each_of_them_was(
    fim: Any, tiny: Tiny, tmp_path: Path
) -> None:
    data = tmp_path / "many.txt"
    lines = (f"x = {i % 4} + y * {(i // 4) % 4} return z" for i in range(600))
    data.write_text("\n".join(lines), "utf-8")
    options = ("--model", tiny("gpt2"), "--data", data, "--num-samples", 600, "--batch-size", 10)
    out = tmp_path / "out"
    arguments = (*options, "--output", out, "--save-every", 0)
    process = torchrun(*arguments)
    deadline = time.monotonic() + 120
    while not (checkpoint.exists(out) and checkpoint.exists(out / "process-1")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert checkpoint.exists(out)
    alone = fim(*arguments, "--resume")
    assert alone.code == 2
    assert "processes was 2, is (absent)" in alone.err
    process = torchrun(*arguments, "--resume")
    _, errors = process.communicate(timeout=170)
    assert process.returncode == 0, errors
    assert "resuming after" in errors
    assert not (out / "process-1").exists()
    assert fim(*options, "--output", tmp_path / "whole").code == 0
    same(out, tmp_path / "whole")


def test_batches_are_dealt_in_turn(tmp_path: Path) -> None:
    assert Processes(0, 3).directory(tmp_path) == tmp_path
    assert Processes(2, 3).directory(tmp_path) == tmp_path / "process-2"
    for batches in (0, 1, 5, 6):
        dealt = [list(Processes(rank, 3).own(batches)) for rank in range(3)]
        assert sorted(n for numbers in dealt for n in numbers) == list(range(batches))


def test_one_gpu_for_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(OptionError, match=r"--device: expected cuda or cpu for 2 processes"):
        with processes("cuda:0"):
            pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(OptionError, match=r"a GPU for each process .* got 0 for process 0"):
        with processes("cuda"):
            pass


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes("auto") as (team, device):
        assert (team.rank, team.world, device) == (0, 1, "auto")
        assert team.together("x") == "x"
