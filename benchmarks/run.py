"""Measure every quantity against an ordinary gradient of the same batch.

    python benchmarks/run.py                                      CPU problems, all quantities
    python benchmarks/run.py --problem mlp --quantity diagonal/mc --compile
    python benchmarks/run.py --device cuda --peers --memory       GPU problems, with other libraries

Each value is first checked against a loop oracle in float64. Then gradient, quantities and peers
are timed round by round in this process. The unit of every number is one eager `loss.backward()`.
Results are written to benchmarks/results as JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import memory, report
from benchmarks.checks import Checks
from benchmarks.peers import PEERS, NotOffered
from benchmarks.quantities import GRADIENT, QUANTITIES, Case, prepare
from benchmarks.report import Row
from benchmarks.timing import interleaved, seconds
from benchmarks.workloads import BUILDERS, CPU_PROBLEMS, GPU_PROBLEMS, Workload, build

MEMORY_TIMEOUT = 900.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return 1 if a value of the library is wrong."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(asked.device)
    problems = asked.problem or (GPU_PROBLEMS if device.type == "cuda" else CPU_PROBLEMS)
    wrong = 0
    for problem in problems:
        workload = build(problem, asked.device, asked.seed)
        rows = measure(workload, asked)
        print(report.table(problem, workload.sizes, device, rows), flush=True)
        print(f"written: {report.write(asked.output, problem, workload.sizes, device, rows)}\n")
        wrong += sum(row.source == "fisherfn" and row.agrees is False for row in rows)
        wrong += sum(row.source == "fisherfn" and row.status == "failed" for row in rows)
    return int(wrong > 0)


def measure(workload: Workload, asked: argparse.Namespace) -> list[Row]:
    """Check, time and weigh every case of a workload."""
    checks = Checks(workload)
    found: dict[Case, Row] = {}
    runs: dict[Case, Callable[[], Any]] = {}
    for case in cases(asked):
        print(f"{workload.name}: checking {case}", file=sys.stderr, flush=True)
        row = found[case] = Row(case.quantity, case.source, case.compiled)
        try:
            runs[case] = _check_and_warm_up(workload, case, row, checks)
        except NotOffered as error:
            row.status, row.message = "not offered", str(error)
        except Exception as error:
            row.status, row.message = "failed", f"{type(error).__name__}: {error}".split("\n")[0]
    named = {str(case): run for case, run in runs.items()}
    print(f"{workload.name}: timing {len(named)} cases", file=sys.stderr, flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the library were seen in its check
        timings = interleaved(named, workload.device, asked.repeats)
    for case in runs:
        found[case].timing = timings[str(case)]
        found[case].gradients = timings[str(case)].median / timings[str(GRADIENT)].median
    if asked.memory:
        _weigh(workload, {case: found[case] for case in runs})
    return list(found.values())


def cases(asked: argparse.Namespace) -> list[Case]:
    """List what to measure, the eager gradient first."""
    compiled = [False, True] if asked.compile else [False]
    listed = [Case("gradient", "gradient", c) for c in compiled]
    for quantity in asked.quantity or QUANTITIES:
        listed += [Case("fisherfn", quantity, c) for c in compiled]
        if asked.peers:
            listed += [Case(peer, quantity) for peer in PEERS]
    return listed


def _check_and_warm_up(
    workload: Workload, case: Case, row: Row, checks: Checks
) -> Callable[[], Any]:
    if case.source == "gradient":
        prepared = prepare(workload, case)
        row.first_call = seconds(prepared.run, workload.device)
        return prepared.run
    reason = QUANTITIES[case.quantity].reason_to_skip(workload)
    if reason:
        raise NotOffered(reason)
    if case.source in PEERS and PEERS[case.source].version is None:
        raise NotOffered(f"{PEERS[case.source].distribution} is not installed")
    with warnings.catch_warnings():
        if case.source != "fisherfn":
            warnings.simplefilter("ignore")
        prepared = prepare(workload, case)
        start = time.perf_counter()
        result = prepared.run()
        row.first_call = time.perf_counter() - start
        checks.check(case, prepared, result, row)
        del result
        prepared.run()
    return prepared.run


def _weigh(workload: Workload, rows: dict[Case, Row]) -> None:
    threads = torch.get_num_threads()
    device = str(workload.device)
    for case, row in rows.items():
        try:
            row.memory = memory.in_subprocess(workload.name, case, device, threads, MEMORY_TIMEOUT)
        except Exception as error:
            row.message = f"memory: {error}"
    unit = rows[GRADIENT].memory
    for row in rows.values():
        if unit and row.memory is not None:
            row.memory_gradients = row.memory / unit


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--problem", nargs="+", choices=list(BUILDERS), help="default: those of the device")
    add("--quantity", nargs="+", choices=list(QUANTITIES), help="default: all")
    add("--device", default="cpu", help="cpu or cuda")
    add("--compile", action="store_true", help="measure under torch.compile(fullgraph=True) too")
    add("--peers", action="store_true", help="measure other libraries too")
    add("--memory", action="store_true", help="measure peak memory, each case in its own process")
    add(
        "--repeats", type=int, default=15, help="rounds of timing; published numbers take 9 or more"
    )
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add("--seed", type=int, default=0, help="of weights and data")
    add(
        "--output",
        type=Path,
        default=report.ROOT / "benchmarks" / "results",
        help="folder of the results",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
