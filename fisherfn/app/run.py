"""The batches of one run, those of an earlier process included."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fisherfn as ff
from fisherfn.app import checkpoint
from fisherfn.app.clock import Clock, peak_memory
from fisherfn.app.errors import is_out_of_memory
from fisherfn.app.job import Job
from fisherfn.app.output import sweep
from fisherfn.app.progress import note, progress
from fisherfn.app.signals import Stopped
from fisherfn.app.versions import version
from fisherfn.app.weights import fingerprint


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
            DataError: The checkpoint to resume is broken.
            OptionError: It is that of another setup.
        """
        self.job, self.directory, self.command, self.err = job, directory, command, err
        self.setup = setup_of(job)
        self.state: Any = None
        self.seconds_before = 0.0
        self.peak_before = 0
        self.begun = time.perf_counter()
        sweep(directory)
        checkpoint.sweep(directory)
        if job.options.resume:
            self._resume()
        elif checkpoint.exists(directory):
            self.note(
                f"{directory / checkpoint.FILE} holds an unfinished run, which this one replaces. "
                "To go on with it instead, press Ctrl-C now and add --resume."
            )

    @property
    def done(self) -> int:
        """Batches finished, here or earlier."""
        return 0 if self.state is None else int(self.state.batches)

    @property
    def seconds(self) -> float:
        """Seconds spent on batches, here and earlier."""
        return self.seconds_before + time.perf_counter() - self.begun

    @property
    def peak(self) -> int:
        """Bytes held at most, here or earlier."""
        return max(self.peak_before, peak_memory(self.job.device))

    def finish(self, clock: Clock) -> ff.Diagonal | None:
        """Go through the batches that are left.

        Args:
            clock: Takes the time of batches and checkpoints.

        Returns:
            The diagonal of all samples of this process, None if there are none.

        Raises:
            OutOfMemoryError: Naming the options to lower.
            Stopped: A signal came. The finished batches are in `state`; see `stop`.
        """
        job, first = self.job, self.done
        samples = [job.size(index)[0] for index in range(job.batches)]
        if first == job.batches:
            clock.add("batches", self.seconds_before)
            return None if self.state is None else self.state.result
        with clock.phase("checking the plan"):
            self._guarded(job.prepare)
        self.begun = time.perf_counter()
        with progress(self.err, sum(samples), sum(samples[:first])) as tick:
            pace = _Pace(job.options.save_every)

            def finished(state: Any) -> None:
                self.state = state
                tick(*job.size(self.done - 1))
                if pace.is_due() and self.done < job.batches:
                    with clock.phase("checkpoints"):
                        self._save_if_possible()
                    pace.saved()

            self._guarded(
                lambda: ff.states.accumulate(
                    job.estimate,
                    job.params,
                    job.buffers,
                    job.batches_from(first),
                    state=self.state,
                    key=job.key,
                    on_update=finished,
                    on_nonfinite=None,  # the estimator looks, and names the option to change
                )
            )
        clock.add("batches", self.seconds - clock.seconds.get("checkpoints", 0.0))
        return self.state.result

    def stop(self, stop: Stopped) -> int:
        """Keep what is finished and say how to go on.

        Returns:
            The exit code.

        Raises:
            FisherError: It cannot be kept.
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
        note(self.err, text)

    def _guarded(self, work: Callable[[], Any]) -> None:
        """Do some work, and say what to lower if memory runs out."""
        try:
            work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self.job.out_of_memory(self.done) from error

    def _resume(self) -> None:
        if not checkpoint.exists(self.directory):
            self.note(f"no unfinished run in {self.directory}: beginning with the first batch.")
            return
        before = checkpoint.load(self.directory, self.job.device)
        checkpoint.check_same(self.directory, before.setup, self.setup)
        self.state = before.state
        self.seconds_before, self.peak_before = before.seconds, before.peak_memory
        self.note(f"resuming after {self.done} of {self.job.batches} batches.")

    def _save(self) -> None:
        now = checkpoint.FimCheckpoint(self.setup, self.state, self.seconds, self.peak)
        checkpoint.save(self.directory, now)

    def _save_if_possible(self) -> None:
        """Save; a disk that is full for now must not end hours of work."""
        try:
            self._save()
        except ff.FisherError as error:
            self.note(f"progress could not be saved, going on without: {error}")


class _Pace:
    """When to save, so that a kill costs no more than so many seconds of work.

    It costs what was done since the last save, and the batch that it falls into.
    """

    def __init__(self, save_every: float) -> None:
        self.save_every = save_every
        self.longest = 0.0
        self.last_save = self.last_batch = time.perf_counter()

    def is_due(self) -> bool:
        """Return True iff the next batch could end too late. Call it once after each batch."""
        now = time.perf_counter()
        self.longest = max(self.longest, now - self.last_batch)
        self.last_batch = now
        return now - self.last_save + self.longest > self.save_every

    def saved(self) -> None:
        """Begin anew: all that was done is safe."""
        self.last_save = self.last_batch = time.perf_counter()


def setup_of(job: Job) -> dict[str, Any]:
    """Return everything that the numbers depend on, under names that a user knows."""
    options = job.options
    team = {"processes": job.team.world} if job.team.world > 1 else {}
    return team | {
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
