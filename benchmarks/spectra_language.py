"""A language model of 135 million parameters: trace, largest eigenvalues, and damped solves."""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from typing import Any

import torch

import fisherfn as ff
from benchmarks.solves import first, gradient, preconditioners
from benchmarks.timing import seconds

KEPT = 3  # of the eigenvectors, each as large as the model, for the solve
PARTS = ["trace", "probes", "eigenvalues", "solve"]


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
    return answers(asked, model, (params, buffers, ff.causal_batch(ids)))


def answers(
    asked: argparse.Namespace, model: Any, given: tuple[Any, Any, ff.Batch]
) -> dict[str, Any]:
    """Ask a model with categorical outputs for the parts that the arguments name."""
    params, key = given[0], ff.random.key(asked.seed)
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
    if "eigenvalues" in asked.parts or "solve" in asked.parts:
        pairs = timed(
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
        pairs = first(pairs, KEPT)
        if "solve" in asked.parts:
            _solve(asked, timed, F, (model, lik, given, key), pairs)
    return found


def _solve(
    asked: argparse.Namespace, timed: Any, F: Any, problem: Any, pairs: ff.linalg.Eigenpairs
) -> None:
    """Solve for a step of natural gradient, by each preconditioner that is asked for."""
    model, lik, given, key = problem
    damping = asked.damping * float(pairs.eigenvalues[0])
    b = gradient(model, *given)
    for name in asked.preconditioners:
        made = preconditioners([name], model, lik, given, damping, pairs, key)
        timed(
            f"solve, {name}",
            lambda made=made, name=name: ff.linalg.cg(
                F,
                b,
                damping=damping,
                preconditioner=made[name],
                tolerance=1e-2,
                max_steps=asked.solve_steps,
            ),
            lambda e: {
                "reason": e.reason,
                "converged": bool(e.converged),
                "steps": int(e.steps),
                "residual": float(e.residual),
                "damping": damping,
                "damping over largest eigenvalue": asked.damping,
            },
        )


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
