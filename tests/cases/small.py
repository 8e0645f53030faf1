"""One small problem with positions, and what every estimator is asked to say about bad ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

import fisherfn as ff
from cases.base import normal, tokens
from fisherfn import testing

B, T, C = 3, 2, 3
MEMBERS = [m for m in testing.ESTIMATORS.values() if m.unit == "example"]
#: Estimators that look at the targets.
OBSERVING = [
    m
    for m in MEMBERS
    if "empirical" in m.name
    or m.result in ("rows", "pairs")
    or m.name in ("gradient_moments", "statistics")
]


def problem() -> testing.Problem:
    """Return a perceptron on positions with targets."""
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).double()
    with torch.no_grad():
        for number, param in enumerate(module.parameters()):
            param.copy_(normal(*param.shape, seed=number))
    model, params, buffers = ff.functional(module)
    batch = ff.Batch(normal(B, T, 4), targets=tokens(B, T, high=C))
    return testing.Problem(
        "mlp", model, ff.likelihoods.categorical(), params, buffers, batch, (T,), True
    )


def changed(**fields: Any) -> testing.Problem:
    """Return the problem with other fields of its batch."""
    base = problem()
    return dataclasses.replace(base, batch=dataclasses.replace(base.batch, **fields))


def diagonal(p: testing.Problem, fisher: str = "empirical", **options: Any) -> Any:
    """Return the diagonal of a problem."""
    return ff.diagonal(p.model, p.likelihood, fisher=fisher, **options)(*p.args)
