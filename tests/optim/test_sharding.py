"""Inverses that two processes make together are those that one makes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optim import ranks

import fisherfn as ff
from fisherfn import optim
from fisherfn.core import trees
from fisherfn.core.errors import UnsupportedError
from fisherfn.optim.sharding import dealt

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    places = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    processes = [
        subprocess.Popen(
            [sys.executable, ranks.__file__ or "", str(rank), "2", str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=150)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    first, second = [ff.io.load(tmp_path / f"{rank}") for rank in range(2)]
    for a, b in zip(trees.leaves(first), trees.leaves(second), strict=True):
        assert torch.equal(a, b)
    alone: dict[str, Any] = ranks.run(optim.invert)
    torch.testing.assert_close(first["dense"], alone["dense"])
    for name, x in alone["ekfac"].items():
        torch.testing.assert_close(first["ekfac"][name], x, rtol=1e-8, atol=1e-8)
    for widest in ("8192", "4"):
        got, want = first[widest], alone[widest]
        assert trees.structure(got) == trees.structure(want)
        torch.testing.assert_close(got["inverse"].to_dense(), want["inverse"].to_dense())
        for name, x in want["step"].items():
            torch.testing.assert_close(got["step"][name], x, rtol=1e-8, atol=1e-8)


def test_work_is_dealt_out_by_its_cost() -> None:
    model, params, buffers = ranks.network()
    blocks = ff.kfac(model, ranks.LIK)(params, buffers, ranks.data(0)).blocks
    owners = dealt(blocks, 2)
    assert set(owners) == {b.name for b in blocks}
    load = [0, 0]
    for b in blocks:
        load[owners[b.name]] += b.outputs**3 + b.inputs**3
    assert min(load) > 0
    assert max(load) <= sum(load) - min(load)
    assert set(dealt(blocks, 1).values()) == {0}
    assert dealt(tuple(reversed(blocks)), 2) == owners


def test_without_a_process_group_it_says_so() -> None:
    model, params, buffers = ranks.network()
    F = ff.kfac(model, ranks.LIK)(params, buffers, ranks.data(0))
    with pytest.raises(UnsupportedError, match=r"optim\.sharded_inverse: expected a process group"):
        optim.sharded_inverse(F)
