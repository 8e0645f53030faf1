"""`fisherfn fim` from beginning to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from fisherfn.app.clock import Clock
from fisherfn.app.corpus import standard_library_texts
from fisherfn.app.data import read_texts
from fisherfn.app.job import Job
from fisherfn.app.options import DTYPES, FimOptions, resolve_device
from fisherfn.app.output import check_space, output_directory
from fisherfn.app.processes import Processes, processes
from fisherfn.app.progress import note
from fisherfn.app.publish import check_csv, publish, show
from fisherfn.app.run import Run
from fisherfn.app.signals import Stopped, stoppable
from fisherfn.app.sources import Source, check_exact, open_source
from fisherfn.app.tokens import Samples, check_tokens, tokenize
from fisherfn.app.weights import check_causality, load_weights
from fisherfn.estimators.observe import EXACT_BUDGET


def fim(options: FimOptions, command: Sequence[str], out: Console, err: Console) -> int:
    """Compute the Fisher diagonal of a causal language model, write it and print it.

    What can fail is tried in the order of its cost: the output directory, the texts, the weights,
    and only then the work.

    Args:
        options: What to compute.
        command: The command line without the program, to say how to resume.
        out: For the tables.
        err: For progress and notes.

    Returns:
        The exit code: 0, or 128 and the number of the signal that stopped it.

    Raises:
        FisherError: No results were written then.
    """
    with processes(options.device) as (team, device):
        out, err = team.quiet(out), team.quiet(err)
        return _fim(options, command, out, err, team, resolve_device(device))


def _fim(
    options: FimOptions,
    command: Sequence[str],
    out: Console,
    err: Console,
    team: Processes,
    device: torch.device,
) -> int:
    """Do what `fim` does, as one process of a team."""
    clock = Clock()
    if options.csv is not None:
        check_csv(options.csv)
    with stoppable(), _output(options, team) as directory:
        if options.model is not None and not Path(options.model).expanduser().exists():
            note(err, f"{options.model} is no directory here; asking the model hub for it.")
        with clock.phase("reading model and texts"):
            source = open_source(options.model)
        if source.conversion_seconds:
            clock.add("reading model and texts", -source.conversion_seconds)
            clock.add("converting the packaged model (once)", source.conversion_seconds)
        with clock.phase("reading model and texts"):
            samples = read_samples(options, source)
        note_samples(err, samples, options)
        if options.fisher == "exact":
            check_exact(samples.longest, source.vocabulary, EXACT_BUDGET)
        with clock.phase("loading the weights"):
            module = load_weights(source, DTYPES[options.dtype], device)
            check_causality(module, source, device)
            job = Job.of(module, samples, options, source.pad, device, team)
            size = sum(p.numel() for p in job.params.values())
            check_space(directory, 4 * size * (3 if options.label_samples > 1 else 2))
            run = Run(job, team.directory(directory), command, err)
        try:
            mine = run.finish(clock)
            with clock.phase("adding up over processes" if team.world > 1 else "batches"):
                total = team.together(mine)
            if not team.is_first:
                return 0
            report, about = publish(run, total, source, module, clock)
        except Stopped as stop:
            return run.stop(stop)
    show(run, report, about, out)
    return 0


@contextmanager
def _output(options: FimOptions, team: Processes) -> Iterator[Path]:
    """Let the first process prepare the output directory, and the others wait for it."""
    if team.is_first:
        with output_directory(options.output) as directory:
            team.wait()
            yield directory
        return
    team.wait()
    yield options.output


def read_samples(options: FimOptions, source: Source) -> Samples:
    """Return the tokens of the data that the user named, or of the default data.

    Raises:
        DataError: It cannot be read, or predicts nothing.
        OptionError: A sample is longer than the model can read.
    """
    texts = standard_library_texts() if options.data is None else read_texts(options.data)
    samples = tokenize(texts, source.encode, options.num_samples, options.max_length)
    check_tokens(samples, source.vocabulary, source.context)
    return samples


def note_samples(err: Console, samples: Samples, options: FimOptions) -> None:
    """Say what was skipped, cut or missing of the data."""
    used = len(samples.tokens)
    notes = (
        (samples.skipped, f"skipped {samples.skipped} samples of fewer than two tokens"),
        (
            samples.truncated,
            f"cut {samples.truncated} of {used} samples to {options.max_length} tokens",
        ),
        (
            used < options.num_samples,
            f"the data has {used} of the {options.num_samples} samples asked",
        ),
    )
    for applies, text in notes:
        if applies:
            note(err, f"{text}.")
