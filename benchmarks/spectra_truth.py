"""Errors of traces, spectra, log-determinants and solves against dense matrices in float64.

The models are small enough for the Fisher information as a matrix, row by row from its definition:
an MLP, a convolutional network and a transformer. Each question is asked of the model in float32,
as one would. In float64, where what is left is the error of the method, only those without random
errors are asked, since the others would not change.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fisherfn as ff
from benchmarks.definitions import dense_fisher
from benchmarks.solves import PRECONDITIONERS, gradient, preconditioners
from benchmarks.workloads import Workload

PRODUCTS, KEYS = 30, 30
EIGENVALUES = 5
PROBES, STEPS = 5, 20
DAMPING = 1e-2  # of the largest eigenvalue
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A model in some precision, and its matrix by definition."""

    workload: Workload
    matrix: Tensor
    spectrum: Tensor
    seed: int

    @property
    def given(self) -> tuple[Any, Any, ff.Batch]:
        """Parameters, buffers and batch."""
        return *ff.functional(self.workload.module)[1:], self.workload.batch

    @property
    def model(self) -> Any:
        """The function of parameters, buffers and inputs."""
        return ff.functional(self.workload.module)[0]

    @property
    def key(self) -> Tensor:
        """The random key."""
        return ff.random.key(self.seed, device=self.workload.device)

    @property
    def tolerance(self) -> float:
        """The residual to ask for in this precision."""
        return TOLERANCES[next(self.workload.module.parameters()).dtype]

    @property
    def damping(self) -> float:
        """What is added to the diagonal."""
        return DAMPING * float(self.spectrum[0])


LIKELIHOOD = ff.likelihoods.categorical()


def against_dense(workload: Workload, seed: int = 0) -> list[Row]:
    """Return what each method gives beside the truth.

    Args:
        workload: A small one: its matrix takes 8 P² bytes.
        seed: Of random vectors.

    Returns:
        Rows of `question`, `method`, `precision`, `truth`; `error`, relative; `claim`, the relative
        standard error or residual that the method reports; `z`, error in standard errors; `keys`,
        over which the root of the mean square is taken; `products` of one run.
    """
    wide = workload.double()
    matrix = dense_fisher(wide)
    spectrum = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)
    single, double = [Question(one, matrix, spectrum, seed) for one in (workload, wide)]
    exact = [row for asked in (single, double) for row in _without_randomness(asked)]
    return [*_random_traces(single), _log_determinant(single), *exact]


def _without_randomness(asked: Question) -> list[Row]:
    exact = ff.trace(asked.model, LIKELIHOOD)(*asked.given)
    trace = _estimates("trace", "exact", [exact], float(asked.spectrum.sum()))
    pairs = _pairs(asked)
    rows = [trace, *_eigenvalues(asked, pairs), *_solves(asked, pairs)]
    precision = str(next(asked.workload.module.parameters()).dtype).removeprefix("torch.")
    return [{**row, "precision": precision} for row in rows]


def _random_traces(asked: Question) -> list[Row]:
    estimators: dict[str, Any] = {
        method: ff.trace(asked.model, LIKELIHOOD, method=method, num_matvecs=PRODUCTS)
        for method in ("hutchinson", "hutchpp", "xtrace")
    }
    drawn = ff.trace(asked.model, LIKELIHOOD, fisher="mc", num_samples=PRODUCTS)
    estimators[f"{PRODUCTS} draws of labels"] = drawn
    rows, truth = [], float(asked.spectrum.sum())
    for method, estimator in estimators.items():
        keys = ff.random.split(asked.key, KEYS).unbind(0)
        found = [estimator(*asked.given, key=key) for key in keys]
        rows.append(_estimates("trace", method, found, truth))
    return rows


def _estimates(question: str, method: str, found: list[ff.Estimate], truth: float) -> Row:
    """Summarise estimates from several keys: roots of mean squares."""
    errors = [float(e.value) - truth for e in found]
    stderrs = [float(e.stderr) for e in found]
    known = [error / stderr for error, stderr in zip(errors, stderrs, strict=True) if stderr > 0]
    return {
        "question": question,
        "method": method,
        "precision": "float32",
        "truth": truth,
        "error": _root_mean_square(errors) / abs(truth),
        "claim": _root_mean_square(stderrs) / abs(truth),
        "z": _root_mean_square(known) if known else None,
        "keys": len(found),
        "products": found[0].matvecs or None,
    }


def _root_mean_square(values: list[float]) -> float:
    return statistics.fmean(v * v for v in values) ** 0.5


def _eigenvalues(asked: Question, found: ff.linalg.Eigenpairs) -> list[Row]:
    truth = asked.spectrum[:EIGENVALUES]
    errors = (found.eigenvalues.double() - truth).abs() / truth
    return [
        {
            "question": "eigenvalue",
            "method": f"lanczos, number {i + 1}",
            "truth": float(truth[i]),
            "error": float(errors[i]),
            "claim": float(found.residuals[i]) / float(truth[0]),
            "products": int(found.steps),
        }
        for i in range(EIGENVALUES)
    ]


def _pairs(asked: Question) -> ff.linalg.Eigenpairs:
    F = ff.linearized(asked.model, LIKELIHOOD)(*asked.given)
    return ff.linalg.lanczos(
        F, asked.given[0], k=EIGENVALUES, key=asked.key, tolerance=asked.tolerance
    )


def _log_determinant(asked: Question) -> Row:
    """Ask for log det (F / λ + I): what F adds to damping alone."""
    damping = asked.damping
    truth = float((asked.spectrum / damping).log1p().sum())
    F = ff.linearized(asked.model, LIKELIHOOD)(*asked.given)
    base = len(asked.spectrum) * torch.tensor(damping, dtype=torch.float64).log()
    found = []
    for key in ff.random.split(asked.key, KEYS).unbind(0):
        total = ff.linalg.slq(
            F,
            asked.given[0],
            num_probes=PROBES,
            num_steps=STEPS,
            key=key,
            damping=damping,
            lower=0.0,
        )
        found.append(ff.Estimate(total.value.double() - base, total.stderr))
    row = _estimates("log-determinant", "slq", found, truth)
    return {**row, "products": PROBES * STEPS}


def _solves(asked: Question, pairs: ff.linalg.Eigenpairs) -> list[Row]:
    damping = asked.damping
    b = gradient(asked.model, *asked.given)
    right = ff.tree.ravel(b)[0].double()
    identity = torch.eye(len(right), dtype=torch.float64, device=right.device)
    truth = torch.linalg.solve(asked.matrix + damping * identity, right)
    F = ff.linearized(asked.model, LIKELIHOOD)(*asked.given)
    made = preconditioners(
        PRECONDITIONERS, asked.model, LIKELIHOOD, asked.given, damping, pairs, asked.key
    )
    rows = []
    for name, preconditioner in made.items():
        found = ff.linalg.cg(
            F, b, damping=damping, preconditioner=preconditioner, tolerance=asked.tolerance
        )
        x = ff.tree.ravel(found.value)[0].double()
        rows.append(
            {
                "question": "solve",
                "method": f"cg, {name}",
                "truth": float(truth.norm()),
                "error": float((x - truth).norm() / truth.norm()),
                "claim": float(found.residual),
                "products": int(found.steps),
                "reason": found.reason,
            }
        )
    return rows


def table(title: str, rows: list[Row]) -> str:
    """Return rows as text, in columns as wide as their widest cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([f"{title}:", *lines])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(_cell(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
