"""The output directory: checked before the work, filled all at once after it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from fisherfn.app.errors import OutputError

STAGING = ".writing-"


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Create the directory and try to write in it; take it away again if it stays empty.

    Yields:
        The directory.

    Raises:
        OutputError: It cannot be created or written.
    """
    existed = path.exists()
    if existed and not path.is_dir():
        raise OutputError(f"--output: {path} is a file. Name a directory.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if not existed and path.is_dir():
            path.rmdir()
        cannot_write(path, error)
    try:
        yield path
    finally:
        if not existed and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def check_space(path: Path, needed: int) -> None:
    """Refuse to begin a run whose results cannot fit.

    Args:
        path: The output directory.
        needed: Bytes of the results and of a checkpoint.

    Raises:
        OutputError: Less is free.
    """
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OutputError(
            f"--output: the run needs {needed / 1e6:.0f} MB in {path}, {free / 1e6:.0f} MB are "
            "free. Free some, choose another --output, or fewer parameters with --select."
        )


@contextmanager
def staged(directory: Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Let files be written aside, and replace those of `directory` when all are.

    Each file is replaced by one rename; if writing fails, none is. Other files are left alone.

    Args:
        directory: The output directory.
        stale: Files of an earlier run that the new ones make wrong: removed at the end.

    Yields:
        A temporary directory to write to.

    Raises:
        OutputError: Something could not be written; nothing has changed then.
    """
    from safetensors import SafetensorError

    staging: Path | None = None
    try:
        staging = Path(tempfile.mkdtemp(dir=directory, prefix=STAGING))
        yield staging
        for file in sorted(staging.iterdir()):
            sync(file)
        for file in sorted(staging.iterdir()):
            os.replace(file, directory / file.name)
        for name in stale:
            (directory / name).unlink(missing_ok=True)
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        cannot_write(directory, error)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file to the disk, with the permissions of any other new file."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sweep(directory: Path) -> None:
    """Remove what killed runs left half written."""
    for path in directory.glob(f"{STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


def cannot_write(path: Path, error: Exception) -> NoReturn:
    """Raise the error that says why something at or below `path` cannot be written.

    Raises:
        OutputError: Always.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    raise OutputError(f"--output: cannot write to {path}: {reason}.") from error
