"""What a finished run prints: layers, components, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fisherfn.app.aggregate import Share, fraction
from fisherfn.app.report import Report

BAR = 24


def print_report(console: Console, report: Report, run: Mapping[str, Any], top: int) -> None:
    """Print the tables of a run.

    Args:
        console: Where.
        report: The values.
        run: What else is known, under the keys of `summary.json`.
        top: Rows of each table; 0 leaves out layers and components.
    """
    console.print(_headline(report, run), highlight=False, soft_wrap=True)
    if top:
        console.print(_shares("Layers", report.layers, report.total, top))
        console.print(_shares("Components", report.components, report.total, top))
    console.print(_times(run))


def _headline(report: Report, run: Mapping[str, Any]) -> str:
    select = f", parameters matching {run['select']}" if run["select"] else ""
    return (
        f"[bold]{run['model']}[/bold]: {run['fisher']} Fisher diagonal per {run['unit']}, "
        f"{run['num_samples']} samples, {run['predictions']} predicted tokens, N = "
        f"{run['count']:g}{select}\ntrace {report.total:.6g} nats²/parameter² over "
        f"{sum(s.parameters for s in report.tensors):,} parameters in {len(report.tensors)} tensors"
    )


def _shares(title: str, shares: Sequence[Share], total: float, top: int) -> Table:
    more = f", {top} of {len(shares)}" if len(shares) > top else ""
    table = Table(title=f"{title} by share of the trace{more}", title_justify="left")
    table.add_column(title.removesuffix("s").lower(), no_wrap=True)
    table.add_column("share", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("sum", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("parameters", justify="right")
    largest = fraction(shares[0].fisher_sum, total) if shares else 0.0
    for share in shares[:top]:
        part = fraction(share.fisher_sum, total)
        table.add_row(
            share.name,
            f"{part:.2%}",
            "█" * round(BAR * fraction(part, largest)),
            f"{share.fisher_sum:.4g}",
            f"{share.fisher_mean:.3e}",
            f"{share.parameters:,}",
        )
    return table


def _times(run: Mapping[str, Any]) -> Table:
    table = Table(title="Where the time went", title_justify="left")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for name, seconds in run["seconds_by_phase"].items():
        table.add_row(name, f"{seconds:.1f}")
    table.add_section()
    table.add_row("total", f"{run['seconds']:.1f}")
    table.caption = (
        f"{run['samples_per_second']:.2f} samples/s, {run['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {run['peak_memory_bytes'] / 2**30:.2f} GiB on {run['device']}"
    )
    table.caption_justify = "left"
    return table
