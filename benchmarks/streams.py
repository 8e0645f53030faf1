"""What it costs to remember: folding beside estimating, Welford beside its memory traffic.

    python benchmarks/streams.py                     MLP and GPT on a CPU
    python benchmarks/streams.py --device cuda --compile

Of a fold, its time over that of the estimator on the same batch (goals: 2 % for groups, 5 % for the
moving average of a diagonal). Of Welford's update of a diagonal of so many entries, its time over
that of reading three tensors and writing two (goal: 1.5). Of offloading, bytes, flushed fraction
and error. Before anything is timed, the mean of ten updates is compared with two passes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fisherfn as ff
from benchmarks import report
from benchmarks.quantities import groups
from benchmarks.timing import interleaved
from benchmarks.workloads import build

TRANSFORMS = {"ema": ff.states.ema(0.99), "welford": ff.states.welford()}
GOALS = {("grouped", "ema"): 0.02, ("diagonal", "ema"): 0.05}
TRAFFIC_GOAL = 1.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write what the arguments ask for; return 1 if a value is wrong."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    check(device)
    found: dict[str, Any] = {"environment": report.environment(device), "folds": [], "traffic": []}
    for problem in asked.problem:
        for row in folds(problem, asked):
            found["folds"].append(row)
            print("{problem:6} {quantity:9} {state:8} {ratio:8.2%} of the estimator".format(**row))
    for entries in asked.entries:
        row = traffic(entries, device, asked)
        found["traffic"].append(row)
        print(f"welford of {entries:.1e} entries: {row['ratio']:.2f} x its memory traffic")
    found["offload"] = offloads(asked.entries[-1], device)
    for row in found["offload"]:
        shown = "offload {dtype:9} {bytes:12d} bytes, flushed {flushed:.1e}, error {error:.1e}"
        print(shown.format(**row))
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"streams-{device.type}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"written: {path}")
    return 0


def check(device: torch.device) -> None:
    """Compare ten updates with two passes, in float64."""
    x = ff.random.normal(ff.random.key(0, device=device), (10, 1000), torch.float64)
    state = ff.states.welford().init(x[0])
    for row in x:
        _, state = ff.states.welford().update(row, state)
    torch.testing.assert_close(state.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ff.states.variance(state), x.var(0), rtol=1e-12, atol=1e-12)


def folds(problem: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Time an estimator and the update with its result, round by round."""
    workload = build(problem, asked.device, 0)
    model, params, buffers = ff.functional(workload.module)
    lik = ff.likelihoods.categorical()
    key = ff.random.key(0, device=workload.device)
    estimators: dict[str, Any] = {
        "diagonal": ff.diagonal(model, lik, fisher="mc"),
        "grouped": ff.grouped(model, lik, groups(workload.module), fisher="mc"),
    }
    rows = []
    for quantity, estimator in estimators.items():
        fim = torch.compile(estimator, fullgraph=True) if asked.compile else estimator
        result = fim(params, buffers, workload.batch, key=key)
        runs: dict[str, Callable[[], object]] = {
            "estimator": lambda fim=fim: fim(params, buffers, workload.batch, key=key)
        }
        for name, transform in TRANSFORMS.items():
            update: Any = transform.update
            if asked.compile:
                update = torch.compile(update, fullgraph=True)
            state = update(result, transform.init(result))[1]
            runs[name] = lambda update=update, state=state, result=result: update(result, state)
            runs[name]()
        timings = interleaved(runs, workload.device, asked.repeats)
        whole = timings["estimator"].median
        rows += [
            {
                "problem": problem,
                "quantity": quantity,
                "state": name,
                "compiled": asked.compile,
                "ratio": timings[name].median / whole,
                "goal": GOALS.get((quantity, name)),
                "seconds": timings[name].as_dict(),
                "estimator": timings["estimator"].as_dict(),
            }
            for name in TRANSFORMS
        ]
    return rows


def traffic(entries: int, device: torch.device, asked: argparse.Namespace) -> dict[str, Any]:
    """Time Welford's update of a diagonal against copies that move as many bytes."""
    x = ff.random.uniform(ff.random.key(0, device=device), (entries,))
    F = ff.Diagonal({"w": x}, torch.tensor(8.0, dtype=torch.float64, device=device))
    welford = ff.states.welford()
    update: Any = torch.compile(welford.update, fullgraph=True) if asked.compile else welford.update
    state = update(F, welford.init(F))[1]

    def copies() -> object:
        # three reads and two writes: a copy is one of each, a sum one read
        return state.mean.values["w"].clone(), state.m2["w"].clone(), x.sum()

    runs: dict[str, Callable[[], object]] = {"welford": lambda: update(F, state), "copies": copies}
    for run in runs.values():
        run()
    timings = interleaved(runs, device, asked.repeats)
    return {
        "entries": entries,
        "compiled": asked.compile,
        "ratio": timings["welford"].median / timings["copies"].median,
        "goal": TRAFFIC_GOAL,
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
    }


def offloads(entries: int, device: torch.device) -> list[dict[str, Any]]:
    """Offload entries that span the magnitudes of a language model's Fisher diagonal."""
    key = ff.random.key(0, device=device)
    # log-normal around 1e-9, over some twelve orders of magnitude
    x = 1e-9 * torch.exp(3.0 * ff.random.normal(key, (entries,), torch.float32))
    rows = []
    for dtype in ("float32", "bfloat16", "float16"):
        kept = ff.io.offload({"w": x}, dtype).settled()
        rows.append(
            {
                "dtype": dtype,
                "bytes": kept.bytes,
                "flushed": kept.flushed.item(),
                "error": kept.error.item(),
                "plain_float16_flushed": (x.half() == 0).double().mean().item(),
            }
        )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", nargs="*", default=["mlp", "gpt"])
    parser.add_argument("--entries", nargs="*", type=int, default=[1_000_000, 30_000_000])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the results",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
