"""Traces, spectra and solves without the matrix: what they reach, and for how many products.

    python benchmarks/spectra.py                       MLP and GPT, at the start and after training
    python benchmarks/spectra.py --truth               small models, beside their dense matrices
    python benchmarks/spectra.py --peers               other libraries' eigenvalues and traces
    python benchmarks/spectra.py --problem smollm2     a language model of 135 million parameters

Each number stands beside the truth where that can be had: the exact trace, the exact spectrum
through the inner products of all columns. The unit of time is one eager `loss.backward()`.
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
from torch import Tensor

import fisherfn as ff
from benchmarks import report, spectra_language, spectra_peers, spectra_truth
from benchmarks.solves import PRECONDITIONERS
from benchmarks.spectra_language import PARTS, show
from benchmarks.timing import interleaved
from benchmarks.workloads import SMALL_PROBLEMS, Workload, build, train

PRODUCTS = 30
LANCZOS_PRODUCTS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for."""
    asked = parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    found: dict[str, Any] = {}
    for problem in asked.problem or _problems(asked):
        found[problem] = _ask(problem, asked)
    if asked.output is not None:
        content = {**report.environment(torch.device(asked.device)), "found": found}
        asked.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _problems(asked: argparse.Namespace) -> Sequence[str]:
    if asked.truth:
        return SMALL_PROBLEMS
    return spectra_peers.PROBLEMS if asked.peers else ("mlp", "gpt")


def _ask(problem: str, asked: argparse.Namespace) -> Any:
    if asked.truth:
        rows = spectra_truth.against_dense(build(problem, asked.device), asked.seed)
        print(spectra_truth.table(problem, rows), flush=True)
        return rows
    if asked.peers:
        rows = spectra_peers.beside_peers(problem, asked.device, asked.seed)
        print(spectra_truth.table(problem, rows), flush=True)
        return rows
    if problem == "smollm2":
        return spectra_language.language_model(asked)
    workload, found = build(problem, asked.device), {}
    for steps in (0, asked.training):
        train(workload, steps)
        name = f"after {steps} steps of training"
        found[name] = measure(workload, asked)
        show(f"{problem}, {name}", found[name])
    return found


def measure(workload: Workload, asked: argparse.Namespace) -> dict[str, Any]:
    """Return errors, standard errors and costs for one workload as it is now."""
    model, params, buffers = ff.functional(workload.module)
    lik, batch, key = ff.likelihoods.categorical(), workload.batch, ff.random.key(asked.seed)
    given = (params, buffers, batch)
    found: dict[str, Any] = {"loss": float(workload.loss(workload.module).detach())}
    pulls = workload.positions * (workload.classes - 1)
    if pulls <= 100:
        truth, spread = ff.trace(model, lik)(*given)
    else:
        truth, spread = ff.trace(model, lik, fisher="mc", num_samples=50)(*given, key=key)
    traces: dict[str, Any] = {"truth": float(truth), "stderr of the truth": float(spread)}
    for method in ("hutchinson", "hutchpp", "xtrace"):
        estimator = ff.trace(model, lik, method=method, num_matvecs=PRODUCTS)
        value, stderr = estimator(*given, key=key)
        traces[method] = {
            "relative stderr": float(stderr / value),
            "relative error": float((value - truth) / truth),
            "products": PRODUCTS,
        }
    quick = ff.trace(model, lik, method="xtrace", target_stderr=0.01, relative=True)
    last = quick(*given, key=key)
    reached = bool(last.stderr <= 0.01 * last.value)
    traces["products of xtrace to 1%"] = last.matvecs if reached else f"more than {last.matvecs}"
    found["trace"] = traces
    if pulls <= 100:
        found["spectrum"] = _spectrum(model, given, lik, key)
    found["gradients"] = _costs(workload, model, given, lik, key, asked.repeats, pulls)
    return found


def _spectrum(model: Any, given: Any, lik: Any, key: Tensor) -> dict[str, Any]:
    """Compare the ten largest eigenvalues with the exact ones."""
    truth = ff.gram_spectrum(model, lik, k=10)(*given).double()
    F = ff.linearized(model, lik)(*given)
    found: dict[str, Any] = {"truth": truth.tolist()}
    for products in (20, 30, LANCZOS_PRODUCTS):
        pairs = ff.linalg.lanczos(F, given[0], k=10, key=key, max_steps=products)
        errors = (pairs.eigenvalues.double() - truth).abs() / truth
        errors = errors[truth > 1e-3 * truth[0]]  # what float32 can tell from zero
        found[f"within {products} products"] = {
            "products": int(pairs.steps),
            "largest relative error": float(errors.max()),
            "largest relative residual": float((pairs.residuals / pairs.eigenvalues[0]).max()),
            "converged": bool(pairs.converged),
        }
    return found


def _costs(
    workload: Workload, model: Any, given: Any, lik: Any, key: Tensor, repeats: int, pulls: int
) -> dict[str, float]:
    """Time the exact traces in gradients."""
    runs: dict[str, Callable[[], object]] = {"gradient": workload.gradient()}
    empirical, mc = [ff.trace(model, lik, fisher=labels) for labels in ("empirical", "mc")]
    exact = ff.trace(model, lik)
    runs["exact, empirical labels"] = lambda: empirical(*given)
    runs["exact, mc labels"] = lambda: mc(*given, key=key)
    if pulls <= 100:
        runs["exact, exact labels"] = lambda: exact(*given)
    for run in runs.values():
        run()
    timings = interleaved(runs, workload.device, repeats)
    unit = timings.pop("gradient").median
    return {name: timing.median / unit for name, timing in timings.items()}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--problem", nargs="+", help="default: those of what is asked")
    made.add_argument("--truth", action="store_true", help="compare with dense matrices")
    made.add_argument("--peers", action="store_true", help="compare with other libraries")
    made.add_argument("--device", default="cpu")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--training", type=int, default=100, help="steps, for the default")
    made.add_argument("--parts", nargs="+", default=PARTS, help="of the language model")
    made.add_argument("--steps", type=int, default=25, help="products for the language model")
    made.add_argument("--solve-steps", type=int, default=60, help="products of each solve")
    made.add_argument("--damping", type=float, default=1e-2, help="share of the top eigenvalue")
    made.add_argument(
        "--preconditioners",
        nargs="+",
        choices=PRECONDITIONERS,
        default=["plain", "eigenpairs"],
        help="of the language model's solve",
    )
    made.add_argument("--output", type=Path, help="a JSON file to write")
    return made


if __name__ == "__main__":
    sys.exit(main())
