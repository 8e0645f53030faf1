"""An unfinished run on disk: what was accumulated, and what it was a run of.

It is resumed only by a run of the same setup (model, data, options that change numbers); otherwise
the differences are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fisherfn as ff

FILE = "checkpoint.safetensors"


@ff.io.register
@dataclass(frozen=True)
class FimCheckpoint:
    """Where a run stands.

    `setup` holds everything that changes its numbers; `seconds` were spent on the batches in
    `state`, and `peak_memory` (bytes) was the most it took.
    """

    setup: dict[str, Any]
    state: Any
    seconds: float
    peak_memory: int

    @property
    def done(self) -> int:
        """Batches in `state`."""
        return int(self.state.batches)


def exists(directory: Path) -> bool:
    """Return True iff there is an unfinished run."""
    return (directory / FILE).exists()


def save(directory: Path, checkpoint: FimCheckpoint) -> None:
    """Write the checkpoint of a run, in place of the one before.

    Raises:
        FisherError: It cannot be written; the one before is then still whole.
    """
    ff.io.save(directory / FILE, checkpoint)


def load(directory: Path, device: torch.device) -> FimCheckpoint:
    """Return the checkpoint in a directory.

    Raises:
        DataError: It is broken, or none.
    """
    path = directory / FILE
    try:
        loaded = ff.io.load(path, device=device)
    except ff.FisherError as error:
        raise ff.DataError(
            f"--resume: {path} cannot be read. Delete it to begin again. ({error})"
        ) from error
    if not isinstance(loaded, FimCheckpoint):
        raise ff.DataError(f"--resume: {path} is no checkpoint of fim. Name another --output.")
    return loaded


def remove(directory: Path) -> None:
    """Delete the checkpoint."""
    sweep(directory)
    (directory / FILE).unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Delete what killed writers left of checkpoints."""
    for path in directory.glob(f".{FILE}.*"):
        path.unlink(missing_ok=True)


def check_same(directory: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another setup than the checkpoint's.

    Raises:
        OptionError: Naming everything that differs, and how.
    """
    absent = "(absent)"
    names = [*now, *(name for name in before if name not in now)]
    differences = [
        f"{name} was {before.get(name, absent)}, is {now.get(name, absent)}"
        for name in names
        if before.get(name, absent) != now.get(name, absent)
    ]
    if differences:
        raise ff.OptionError(
            f"--resume: {directory / FILE} belongs to another run: {'; '.join(differences)}. "
            "Repeat its options, or leave --resume out to begin again."
        )
