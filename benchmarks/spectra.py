"""Traces, spectra and solves without the matrix: what they reach, and for how many products.

    python benchmarks/spectra.py                       MLP and GPT, at the start and after training
    python benchmarks/spectra.py --problem smollm2     a language model of 135 million parameters

Each number stands beside the truth where that can be had: the exact trace, the exact spectrum
through the inner products of all columns. The unit of time is one eager `loss.backward()`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import fisherfn as ff
from benchmarks.timing import interleaved, seconds
from benchmarks.workloads import Workload, build

PRODUCTS = 30
LANCZOS_PRODUCTS = 40
PARTS = ["trace", "probes", "eigenvalues", "solve"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    found: dict[str, Any] = {}
    for problem in asked.problem:
        if problem == "smollm2":
            found[problem] = language_model(asked)
            continue
        workload = build(problem, asked.device)
        found[problem] = {}
        for steps in (0, asked.training):
            train(workload, steps)
            name = f"after {steps} steps of training"
            found[problem][name] = measure(workload, asked)
            show(f"{problem}, {name}", found[problem][name])
    if asked.output is not None:
        asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def train(workload: Workload, steps: int, rate: float = 1e-3) -> None:
    """Fit the batch with Adam."""
    optimizer = torch.optim.Adam(workload.module.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        workload.loss(workload.module).backward()
        optimizer.step()


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
    traces["products of xtrace to 1%"] = quick(*given, key=key).matvecs
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


def language_model(asked: argparse.Namespace) -> dict[str, Any]:
    """Do a trace, five eigenvalues and a solve on SmolLM2-135M, 2 sequences of 128 tokens."""
    from transformers import AutoModelForCausalLM

    from fisherfn.app.packaged import packaged_model

    directory, _ = packaged_model()
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    module.config.use_cache = False
    model, params, buffers = ff.functional(module)
    key = ff.random.key(asked.seed)
    ids = ff.random.categorical(
        ff.random.split(key, 2 * 128), torch.ones(module.config.vocab_size)
    ).reshape(2, 128)
    given = (params, buffers, ff.causal_batch(ids))
    lik, device = ff.likelihoods.categorical(), torch.device(asked.device)
    found: dict[str, Any] = {"parameters": ff.tree.size(params)}

    def timed(name: str, run: Callable[[], Any], tell: Callable[[Any], dict[str, Any]]) -> Any:
        kept: list[Any] = []
        taken = seconds(lambda: kept.append(run()), device)
        gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found[name] = {**tell(kept[0]), "seconds": taken, "GiB so far": gigabytes}
        show(name, found[name], 2)
        return kept[0]

    def estimate(e: Any) -> dict[str, Any]:
        return {"value": float(e.value), "stderr": float(e.stderr)}

    if "trace" in asked.parts:
        estimator = ff.trace(model, lik, fisher="mc", num_samples=4)
        timed("trace, 4 draws of labels", lambda: estimator(*given, key=key), estimate)
    F = timed("linearised", lambda: ff.linearized(model, lik)(*given), lambda F: {})
    if "probes" in asked.parts:
        timed(
            "trace, random vectors",
            lambda: ff.linalg.hutchinson(F, params, num_matvecs=asked.steps, key=key),
            lambda e: {**estimate(e), "products": e.matvecs},
        )
    if "eigenvalues" in asked.parts:
        timed(
            "five largest eigenvalues",
            lambda: ff.linalg.lanczos(
                F,
                params,
                k=5,
                key=key,
                max_basis=9,
                max_steps=asked.steps,
                tolerance=1e-2,
                verify=0,
            ),
            lambda e: {
                "eigenvalues": e.eigenvalues.tolist(),
                "residuals": e.residuals.tolist(),
                "converged": bool(e.converged),
                "products": int(e.steps),
            },
        )
    if "solve" in asked.parts:
        b = ff.tree.random_like(key, params)
        damping = 1e-3 * float(largest_scale(F, b))
        timed(
            "solve",
            lambda: ff.linalg.cg(F, b, damping=damping, tolerance=1e-2, max_steps=asked.steps),
            lambda e: {
                "reason": e.reason,
                "steps": int(e.steps),
                "residual": float(e.residual),
                "damping": damping,
            },
        )
    return found


def largest_scale(F: Callable[[Any], Any], v: Any) -> Tensor:
    """Return ‖F v‖² / vᵀ F v, towards the largest eigenvalue: what damping is measured by."""
    product = F(v)
    return ff.tree.norm(product) ** 2 / ff.tree.dot(v, product)


def show(title: str, found: Any, indent: int = 0) -> None:
    """Print nested results."""
    print(" " * indent + title + ":")
    for name, value in found.items():
        if isinstance(value, dict):
            show(name, value, indent + 2)
        else:
            numbers = value if isinstance(value, list) else [value]
            texts = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in numbers]
            print(" " * (indent + 2) + f"{name}: {', '.join(texts)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", nargs="+", default=["mlp", "gpt"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--training", type=int, default=100, help="steps of training")
    parser.add_argument("--parts", nargs="+", default=PARTS, help="of the language model")
    parser.add_argument("--steps", type=int, default=25, help="products for the language model")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
