"""What a finished run prints: layers, components, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fisherfn.app.aggregate import Share, fraction
from fisherfn.app.report import Report

BAR = 8


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
    console.print(_rates(run), highlight=False, soft_wrap=True)


def _headline(report: Report, run: Mapping[str, Any]) -> str:
    select = f", parameters matching {run['select']}" if run["select"] else ""
    return (
        f"[bold]{run['model']}[/bold]: {run['fisher']} Fisher diagonal per {run['unit']}\n"
        f"{run['num_samples']} samples, {run['predictions']} predicted tokens, N = "
        f"{run['count']:g}{select}\ntrace {report.total:.6g} nats²/parameter² over "
        f"{sum(s.parameters for s in report.tensors):,} parameters in {len(report.tensors)} tensors"
    )


def _shares(title: str, shares: Sequence[Share], total: float, top: int) -> Table:
    more = f", {top} of {len(shares)}" if len(shares) > top else ""
    table = _table(f"{title} by share of the trace{more}")
    table.add_column(title.removesuffix("s").lower(), overflow="fold")
    for name in ("share", "", "sum", "mean", "parameters"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    largest = fraction(shares[0].fisher_sum, total) if shares else 0.0
    for share in shares[:top]:
        part = fraction(share.fisher_sum, total)
        table.add_row(
            share.name,
            f"{part:.2%}",
            "█" * round(BAR * fraction(part, largest)),
            f"{share.fisher_sum:.2e}",
            f"{share.fisher_mean:.2e}",
            f"{share.parameters:,}",
        )
    return table


def _table(title: str) -> Table:
    """Return an empty table, tight enough for long names in 80 columns."""
    return Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )


def _times(run: Mapping[str, Any]) -> Table:
    table = _table("Where the time went")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for name, seconds in run["seconds_by_phase"].items():
        table.add_row(name, f"{seconds:.1f}")
    table.add_row("total", f"{run['seconds']:.1f}")
    return table


def _rates(run: Mapping[str, Any]) -> str:
    return (
        f"{run['samples_per_second']:.2f} samples/s, {run['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {run['peak_memory_bytes'] / 2**30:.2f} GiB on {run['device']}"
    )
