"""Is the mean over draws of labels right? Traces show whether it has the right scale."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks import kronecker_blocks, kronecker_checks
from benchmarks.agreement_cases import Case
from benchmarks.kronecker_peers import Options
from benchmarks.prepared import Prepared
from benchmarks.workloads import Workload

REPEATS = 300
MAX_Z = 5.0


def ratio(
    case: Case, prepare: Callable[[Workload, str, Options], Prepared], structure: str
) -> tuple[float, float]:
    """Return the mean trace over many calls in units of the expected one, and its standard error.

    Args:
        case: The problem; `options.draws` says how many labels each call draws for an example.
        prepare: A library.
        structure: "kfac" or "ekfac".
    """
    known = kronecker_blocks.layers(case.workload, "exact").values()
    if structure == "kfac":
        wanted = sum(float(layer.kfac().trace()) for layer in known)
    else:
        wanted = sum(float(layer.diagonal().sum()) for layer in known)
    prepared = prepare(case.workload, f"{structure}/mc", case.options)
    got = [
        sum(kronecker_checks.traces(prepared.values(prepared.run())).values())
        for _ in range(REPEATS)
    ]
    spread = statistics.stdev(got) / REPEATS**0.5
    return statistics.mean(got) / wanted, spread / wanted


def verdict(found: float, spread: float) -> tuple[str, str]:
    """Return what a ratio means: "right" or "off", and in words."""
    if abs(found - 1.0) < MAX_Z * spread:
        return "right", f"right (mean trace ×{found:.3f} ± {spread:.3f})"
    return "off", f"off by ×{found:.3f} ± {spread:.3f}"
