"""Solves with the Fisher information: the right-hand side, and what may precondition them.

The right-hand side is the gradient, so that the solution is a step of natural gradient. Damping is
stated as a share of the largest eigenvalue: at 1/κ of it, plain conjugate gradients need at most
about √κ log(2/ε) / 2 steps for a residual of ε, and fewer where few eigenvalues stand out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fisherfn as ff

Tree = Any
PRECONDITIONERS = ("plain", "eigenpairs", "diagonal", "K-FAC")


def gradient(model: Any, params: Any, buffers: Any, batch: ff.Batch) -> Any:
    """Return the gradient of the mean over examples of the negative log-likelihood."""
    targets = batch.targets
    if batch.mask is not None:
        targets = targets.masked_fill(~batch.mask, -100)

    def loss(params: Any) -> Tensor:
        out = model(params, buffers, batch.inputs)
        logits = out if isinstance(out, Tensor) else out.logits
        total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
        return total / len(targets)

    return torch.func.grad(loss)(params)


def by_eigenpairs(pairs: ff.linalg.Eigenpairs, damping: float) -> Callable[[Tree], Tree]:
    """Return v to (Σ θᵢ uᵢ uᵢᵀ + λI)⁻¹ v for the pairs found: largest eigenvalues are taken out.

    Reference: Frangella, Tropp & Udell (2023), Randomized Nyström preconditioning, SIAM Journal on
    Matrix Analysis and Applications 44(2), section 5, whose approximation is another one.
    """
    values = pairs.eigenvalues
    rows = {name: t.reshape(len(values), -1) for name, t in pairs.eigenvectors.items()}
    change = 1 / (values + damping) - 1 / damping

    def apply(v: Tree) -> Tree:
        along = sum(rows[name] @ t.flatten() for name, t in v.items()) * change
        found = {name: t / damping for name, t in v.items()}
        for name, t in found.items():
            t += (along @ rows[name]).reshape(t.shape)
        return found

    return apply


def first(pairs: ff.linalg.Eigenpairs, many: int) -> ff.linalg.Eigenpairs:
    """Return the first pairs in memory of their own, so that the others can go."""
    return replace(
        pairs,
        eigenvalues=pairs.eigenvalues[:many].clone(),
        eigenvectors=ff.tree.map(lambda t: t[:many].clone(), pairs.eigenvectors),
        residuals=pairs.residuals[:many].clone(),
    )


def preconditioners(
    names: Sequence[str],
    model: Any,
    likelihood: Any,
    given: tuple[Any, Any, ff.Batch],
    damping: float,
    pairs: ff.linalg.Eigenpairs,
    key: Tensor,
) -> dict[str, Callable[[Tree], Tree] | None]:
    """Return preconditioners by name; factors and diagonals are those of labels drawn once."""
    found: dict[str, Callable[[Tree], Tree] | None] = {}
    makers: Mapping[str, Any] = {"diagonal": ff.diagonal, "K-FAC": ff.kfac}
    for name in names:
        if name == "plain":
            found[name] = None
        elif name == "eigenpairs":
            found[name] = by_eigenpairs(pairs, damping)
        else:
            matrix = makers[name](model, likelihood, fisher="mc")(*given, key=key)
            found[name] = lambda v, matrix=matrix: matrix.solve(v, damping=damping)
    return found
