"""Showing how far a fold is: a bar of rich, or a function of the caller."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from fisherfn.core.errors import UnsupportedError

Report: TypeAlias = Callable[[int, "int | None"], Any]


@contextlib.contextmanager
def reporting(progress: bool | Report) -> Iterator[Report]:
    """Give the function to call after each batch; a bar is taken down whatever happens."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    with _random_state_kept():
        bar = _bar()
        task = bar.add_task("batches", total=None)
        bar.start()

    def show(done: int, total: int | None) -> None:
        with _random_state_kept():
            bar.update(task, completed=done, total=total, refresh=True)

    try:
        yield show
    finally:
        with _random_state_kept():
            bar.stop()


def _bar() -> Any:
    """Return a progress bar of rich, on the error stream."""
    try:
        from rich import console
        from rich import progress as bars
    except ImportError as error:
        raise UnsupportedError(
            "accumulate: expected the package rich for progress=True, got none. Install it with "
            'pip install "fisherfn[app]", or pass a function.'
        ) from error
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    # No thread that redraws by itself: rich draws from the global random state (see below).
    return bars.Progress(*columns, console=console.Console(stderr=True), auto_refresh=False)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put the global random state of Python back, from which rich draws; it must not move."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)
