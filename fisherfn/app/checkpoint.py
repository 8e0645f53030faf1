"""An unfinished run on disk: what was accumulated, how far it came, and what it was a run of.

One safetensors file, replaced by one rename, whose header carries the record. A run is resumed only
by a run of the same setup (model, data, options that change numbers); otherwise the differences
are named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fisherfn.app.errors import OutputError
from fisherfn.app.output import cannot_write, sync
from fisherfn.core.errors import OptionError

FILE = "checkpoint.safetensors"
RECORD = "fisherfn.fim"


@dataclass(frozen=True)
class Record:
    """Where a run stands.

    `setup` holds everything that changes its numbers, `done` of `batches` are in the tensors,
    `seconds` were spent on them, and `peak_memory` (bytes) was the most it took so far.
    """

    setup: dict[str, Any]
    done: int
    batches: int
    seconds: float
    peak_memory: int


def save(directory: Path, tensors: Mapping[str, Tensor], record: Record) -> None:
    """Write the checkpoint of a run, in place of the one before.

    Raises:
        OutputError: It cannot be written; the one before is then still whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = directory / f".{FILE}.writing"
    try:
        content = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(content, temporary, metadata={RECORD: json.dumps(asdict(record))})
        sync(temporary)
        os.replace(temporary, directory / FILE)
    except (OSError, SafetensorError) as error:
        cannot_write(directory, error)
    finally:
        temporary.unlink(missing_ok=True)


def load(directory: Path) -> tuple[dict[str, Tensor], Record] | None:
    """Read the checkpoint of a run.

    Returns:
        Its tensors and its record, or None if there is none.

    Raises:
        OutputError: It is broken.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            record = Record(**json.loads((file.metadata() or {})[RECORD]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"--resume: {path} cannot be read ({error}). Delete it to begin again."
        ) from error
    return tensors, record


def peek(directory: Path) -> Record | None:
    """Return the record alone, None if there is no checkpoint or it is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / FILE, "pt") as file:
            return Record(**json.loads((file.metadata() or {})[RECORD]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def remove(directory: Path) -> None:
    """Delete the checkpoint, and what a killed writer left of one."""
    (directory / FILE).unlink(missing_ok=True)
    (directory / f".{FILE}.writing").unlink(missing_ok=True)


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
        raise OptionError(
            f"--resume: {directory / FILE} belongs to another run: {'; '.join(differences)}. "
            "Repeat its options, or leave --resume out to begin again."
        )
