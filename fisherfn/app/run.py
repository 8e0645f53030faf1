"""The batches of one run, those of an earlier process included."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fisherfn.app import checkpoint
from fisherfn.app.clock import Clock, peak_memory
from fisherfn.app.errors import OutputError
from fisherfn.app.job import Job, from_tensors, to_tensors
from fisherfn.app.output import sweep
from fisherfn.app.progress import progress
from fisherfn.app.signals import Stopped
from fisherfn.app.versions import version
from fisherfn.app.weights import fingerprint
from fisherfn.curvature import Diagonal


class Run:
    """A job on its way: how far it is, what it has accumulated, and where it keeps that."""

    def __init__(self, job: Job, directory: Path, command: Sequence[str], err: Console) -> None:
        """Start at the beginning, or where a checkpoint of the same setup stands.

        Args:
            job: What to compute.
            directory: Where the checkpoint is.
            command: The command line without the program, to say how to resume.
            err: For notes and progress.

        Raises:
            OptionError: The checkpoint to resume is that of another setup.
            OutputError: It is broken.
        """
        self.job, self.directory, self.command, self.err = job, directory, command, err
        self.setup = setup_of(job)
        self.state: tuple[Diagonal | None, int] = (None, 0)
        self.seconds_before = 0.0
        self.peak_before = 0
        self.begun = time.perf_counter()
        sweep(directory)
        if job.options.resume:
            self._resume()
        elif (record := checkpoint.peek(directory)) is not None:
            self.note(
                f"{directory / checkpoint.FILE} holds {record.done} of {record.batches} batches of "
                "an unfinished run, which this one replaces. To go on with it instead, press "
                "Ctrl-C now and add --resume."
            )

    @property
    def done(self) -> int:
        """Batches finished, here or earlier."""
        return self.state[1]

    @property
    def seconds(self) -> float:
        """Seconds spent on batches, here and earlier."""
        return self.seconds_before + time.perf_counter() - self.begun

    @property
    def peak(self) -> int:
        """Bytes held at most, here or earlier."""
        return max(self.peak_before, peak_memory(self.job.device))

    def finish(self, clock: Clock) -> Diagonal:
        """Go through the batches that are left.

        Args:
            clock: Takes the time of batches and checkpoints.

        Returns:
            The diagonal of all samples.

        Raises:
            Stopped: A signal came. The finished batches are in `state`; see `stop`.
        """
        job = self.job
        before = sum(job.work(index)[0] for index in range(self.done))
        with progress(self.err, len(job.samples.tokens), before) as tick:
            self.begun = saved = time.perf_counter()
            longest = 0.0
            for index in range(self.done, job.batches):
                start = time.perf_counter()
                with clock.phase("batches"):
                    total = job.add(self.state[0], job.compute(index), index)
                    self.state = (total, index + 1)  # one assignment: no signal comes in between
                tick(*job.work(index))
                now = time.perf_counter()
                longest = max(longest, now - start)
                # A kill costs what was done since the last save and the batch it falls into.
                if self.done < job.batches and now - saved + longest > job.options.save_every:
                    with clock.phase("checkpoints"):
                        self._save_if_possible()
                    saved = time.perf_counter()
        clock.add("batches", self.seconds_before)
        total = self.state[0]
        assert total is not None, "a run has at least one batch"
        return total

    def stop(self, stop: Stopped) -> int:
        """Keep what is finished and say how to go on.

        Returns:
            The exit code.

        Raises:
            OutputError: It cannot be kept.
        """
        if self.done == 0:
            self.note("stopped before the first batch was finished; nothing was written.")
            return stop.code
        self._save()
        again = [*self.command] if "--resume" in self.command else [*self.command, "--resume"]
        self.note(
            f"stopped after {self.done} of {self.job.batches} batches, kept in "
            f"{self.directory / checkpoint.FILE}. Go on with: fisherfn {shlex.join(again)}"
        )
        return stop.code

    def note(self, text: str) -> None:
        """Print a line about the run."""
        self.err.print(f"fim: {text}", highlight=False, markup=False, soft_wrap=True)

    def _resume(self) -> None:
        loaded = checkpoint.load(self.directory)
        if loaded is None:
            self.note(f"no unfinished run in {self.directory}: beginning with the first batch.")
            return
        tensors, record = loaded
        checkpoint.check_same(self.directory, record.setup, self.setup)
        self.state = (from_tensors(tensors, self.job.options, self.job.device), record.done)
        self.seconds_before, self.peak_before = record.seconds, record.peak_memory
        self.note(f"resuming after {record.done} of {record.batches} batches.")

    def _save(self) -> None:
        total, done = self.state
        if total is None:
            return
        record = checkpoint.Record(self.setup, done, self.job.batches, self.seconds, self.peak)
        checkpoint.save(self.directory, to_tensors(total), record)

    def _save_if_possible(self) -> None:
        """Save; a disk that is full for now must not end hours of work."""
        try:
            self._save()
        except OutputError as error:
            self.note(f"progress could not be saved ({error}) Going on without.")


def setup_of(job: Job) -> dict[str, Any]:
    """Return everything that the numbers depend on, under names that a user knows."""
    options = job.options
    return {
        "the model (digest of its weights)": fingerprint(job.params | job.buffers)[:16],
        "the texts (digest of their tokens)": job.samples.fingerprint()[:16],
        "--fisher": options.fisher,
        "--unit": options.unit,
        "--num-samples": options.num_samples,
        "--label-samples": options.label_samples,
        "--batch-size": options.batch_size,
        "--max-length": options.max_length,
        "--dtype": options.dtype,
        "--select": options.select,
        "--seed": options.seed,
        "the device": job.device.type,
        "torch": torch.__version__,
        "fisherfn": version("fisherfn"),
    }
