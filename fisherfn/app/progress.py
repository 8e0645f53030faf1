"""How far a run is and how long it will take: a bar, or lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

LINE_EVERY = 10.0


class Ticker(Protocol):
    """What a run tells about its progress."""

    def __call__(self, samples: int, tokens: int) -> None:
        """Report samples and predicted tokens that were finished just now."""
        ...


def note(console: Console, text: str) -> None:
    """Print a line about the run."""
    console.print(f"fim: {text}", highlight=False, markup=False, soft_wrap=True)


class _Rate(TextColumn):
    """Samples and tokens a second, over this process's share of the run."""

    def render(self, task: RichTask) -> Text:
        elapsed = task.elapsed or 0.0
        fresh = task.completed - task.fields["before"]
        if fresh <= 0 or elapsed <= 0:
            return Text("measuring ...")
        return Text(
            f"{fresh / elapsed:.2f} samples/s  {task.fields['tokens'] / elapsed:.0f} tokens/s"
        )


@contextmanager
def progress(console: Console, total: int, before: int = 0) -> Iterator[Ticker]:
    """Show the progress of `total` samples, `before` of which an earlier process has finished.

    Args:
        console: Where; a bar if it is a terminal, else a line at most every ten seconds.
        total: Samples of the run.
        before: Samples already done.

    Yields:
        A function to call with the samples and tokens of each finished batch.
    """
    if not console.is_terminal:
        yield _Lines(console, total, before)
        return
    columns = (
        TextColumn("[bold]fim"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(""),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # A window as long as the run: batches are few and slow, so that the mean is the best estimate.
    with Progress(*columns, console=console, speed_estimate_period=3600.0) as bar:
        task = bar.add_task("fim", total=total, completed=before, before=before, tokens=0)
        seen = 0

        def tick(samples: int, tokens: int) -> None:
            nonlocal seen
            seen += tokens
            bar.update(task, advance=samples, tokens=seen)

        yield tick


class _Lines:
    """A line of text now and then, for logs."""

    def __init__(self, console: Console, total: int, before: int) -> None:
        self.console, self.total, self.done, self.before = console, total, before, before
        self.start = self.last = time.perf_counter()
        self.tokens = 0

    def __call__(self, samples: int, tokens: int) -> None:
        self.done += samples
        self.tokens += tokens
        now = time.perf_counter()
        if now - self.last < LINE_EVERY and self.done < self.total:
            return
        self.last = now
        elapsed = max(now - self.start, 1e-9)
        rate = (self.done - self.before) / elapsed
        left = (self.total - self.done) / rate
        note(
            self.console,
            f"{self.done}/{self.total} samples, {rate:.2f} samples/s, "
            f"{self.tokens / elapsed:.0f} tokens/s, {left:.0f} s left",
        )
