"""Without other processes: clear errors, and files of clients that merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import scenarios
from states.test_ema import close

import fisherfn as ff
from fisherfn.core.errors import (
    DataError,
    FisherError,
    OptionError,
    TreeMismatchError,
    UnsupportedError,
)
from fisherfn.distributed.wire import cut


def test_without_a_process_group_it_says_what_to_do() -> None:
    message = r"expected an initialised process group, got none\. Start the processes with torchrun"
    F = ff.Diagonal({"w": torch.ones(2)}, torch.tensor(1.0))
    for call in (
        lambda: ff.distributed.all_reduce(F),
        lambda: ff.distributed.unshard(F),
        lambda: next(ff.distributed.local_batches([])),
    ):
        with pytest.raises(UnsupportedError, match=message):
            call()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_rows_are_cut_as_dtensors_are(world: int) -> None:
    for n in (0, 1, 5, 12):
        x = torch.arange(n).reshape(n, 1)
        parts = cut(x, world)
        assert len(parts) == world
        assert torch.equal(torch.cat(parts), x)


@pytest.mark.parametrize("name", scenarios.estimators())
@pytest.mark.parametrize("transform", [None, ff.states.welford()])
def test_files_of_clients_merge(tmp_path: Path, name: str, transform: Any) -> None:
    if transform is not None and name == "low_rank":
        return
    estimator, data = scenarios.estimators()[name], scenarios.batches()
    want = scenarios.fold(estimator, data, transform)
    seen, paths = 0, []
    for i, batch in enumerate(data):
        ids = torch.arange(len(batch.inputs)) + seen
        seen += len(ids)
        state = scenarios.fold(
            estimator, [ff.Batch(batch.inputs, batch.targets, ids=ids)], transform
        )
        paths.append(tmp_path / f"{i}.safetensors")
        ff.io.save(paths[-1], state)
    for order in (paths, paths[::-1]):
        found = ff.distributed.merge_files(order)
        if name == "low_rank":
            close(found.result.to_dense(), want.result.to_dense(), 1e-12)
        else:
            close(found, want, 1e-11)


def test_files_that_do_not_merge_are_named(tmp_path: Path) -> None:
    def saved(name: str, obj: Any) -> Path:
        ff.io.save(tmp_path / name, obj)
        return tmp_path / name

    a = saved("a", ff.Diagonal({"w": torch.ones(2)}, torch.tensor(1.0)))
    cases: list[tuple[Path, type[FisherError], str]] = [
        (
            saved("b", ff.Diagonal({"w": torch.ones(3)}, torch.tensor(1.0))),
            TreeMismatchError,
            r"got shape \(3,\)",
        ),
        (
            saved("c", ff.Diagonal({"w": torch.ones(2)}, torch.tensor(1.0), fisher="mc")),
            OptionError,
            "with the same fisher",
        ),
        (saved("d", {"w": torch.ones(2)}), OptionError, "expected two results of one class"),
    ]
    for path, error, message in cases:
        with pytest.raises(
            error, match=rf"merge_files: .* got '.*{path.name}' beside '.*a': .*{message}"
        ):
            ff.distributed.merge_files([a, path])
    with pytest.raises(UnsupportedError, match=r"merge_files: .* got '.*d': .*can be merged"):
        ff.distributed.merge_files([tmp_path / "d"])
    with pytest.raises(DataError, match="expected at least one file, got none"):
        ff.distributed.merge_files([])
    with pytest.raises(DataError, match=r"io.load: expected a file, got .*missing"):
        ff.distributed.merge_files([a, tmp_path / "missing"])


def test_one_path_is_no_list_of_paths(tmp_path: Path) -> None:
    for one in (tmp_path, str(tmp_path)):
        with pytest.raises(DataError, match="merge_files: expected several paths, got the one"):
            ff.distributed.merge_files(one)  # type: ignore[arg-type]
