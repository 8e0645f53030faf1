"""What is known about a finished run, written and printed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import fisherfn as ff
from fisherfn.app import checkpoint
from fisherfn.app.clock import Clock
from fisherfn.app.errors import OutputError
from fisherfn.app.output import cannot_write, staged, sync
from fisherfn.app.report import DIAGONAL, Report, write_diagonal
from fisherfn.app.run import Run
from fisherfn.app.sources import Source
from fisherfn.app.tables import print_report
from fisherfn.app.versions import versions
from fisherfn.app.weights import tied_names

LIBRARY = "source of Python's standard library"


def publish(
    run: Run, total: ff.Diagonal, source: Source, module: nn.Module, clock: Clock
) -> tuple[Report, dict[str, Any]]:
    """Write the results in one go and remove the checkpoint.

    Returns:
        The report, and what `summary.json` says besides.

    Raises:
        OutputError: They cannot be written; nothing of them is there then, and the checkpoint is as
            it was.
    """
    options = run.job.options
    about = describe(run, total, source, module)
    name = DIAGONAL[options.format]
    stale = [other for other in DIAGONAL.values() if other != name]
    with staged(run.directory, stale) as staging:
        with clock.phase("aggregating and writing"):
            # Contiguous, since sums depend on the strides and a resumed run has lost them.
            values = {name: value.cpu().contiguous() for name, value in total.values.items()}
            report = Report.of(values, options.granularity)
            header = {key: about[key] for key in ("model", "fisher", "unit", "count", "seed")}
            write_diagonal(staging / name, values, options.format, header)
            sync(staging / name)
        about |= timing(run, clock, about["count"])
        report.write(staging, about)
        if options.csv is not None:
            copy_whole(staging / "fisher.csv", options.csv)
    checkpoint.remove(run.directory)
    for other in range(1, run.job.team.world):
        shutil.rmtree(run.directory / f"process-{other}", ignore_errors=True)
    return report, about


def show(run: Run, report: Report, about: Mapping[str, Any], out: Console) -> None:
    """Print the tables of a finished run."""
    if report.total == 0.0:
        run.note(
            "warning: the Fisher is zero everywhere. The selected parameters may not reach the "
            "output, or --dtype may be too narrow."
        )
    print_report(out, report, about, run.job.options.top)
    out.print(f"written to {run.directory}", highlight=False, markup=False, soft_wrap=True)


def describe(run: Run, total: ff.Diagonal, source: Source, module: nn.Module) -> dict[str, Any]:
    """Return what `summary.json` says about the run besides values and times."""
    job, options = run.job, run.job.options
    return {
        "model": source.name,
        "data": LIBRARY if options.data is None else str(options.data),
        "fisher": options.fisher,
        "unit": options.unit,
        "count": total.count.item(),
        "num_samples": len(job.samples.tokens),
        "skipped_samples": job.samples.skipped,
        "truncated_samples": job.samples.truncated,
        "predictions": job.samples.predictions,
        "label_samples": options.label_samples,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "select": options.select,
        "seed": options.seed,
        "granularity": options.granularity,
        "dtype": options.dtype,
        "device": str(job.device),
        "processes": job.team.world,
        "tied_parameters": tied_names(module),
        "versions": versions(),
    }


def timing(run: Run, clock: Clock, count: float) -> dict[str, Any]:
    """Return seconds, rates and memory; batches of an interrupted process count as well."""
    batches = clock.seconds["batches"]
    samples = run.job.samples
    return {
        "seconds": clock.total + run.seconds_before,
        "seconds_by_phase": dict(clock.seconds),
        "samples_per_second": len(samples.tokens) / batches,
        "tokens_per_second": samples.predictions / batches,
        "units_per_second": count / batches,
        "peak_memory_bytes": run.peak,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def copy_whole(file: Path, target: Path) -> None:
    """Copy a file so that the target is there whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    temporary = target.with_name(f".{target.name}.writing")
    try:
        shutil.copyfile(file, temporary)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        cannot_write(target, error)


def check_csv(target: Path) -> None:
    """Refuse, before the work, a place for the table that does not exist.

    Raises:
        OutputError: It is a directory, or its directory is not there.
    """
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise OutputError(f"--output_path: expected a file in an existing directory, got {target}.")
