"""A table of likelihoods with their naive definitions, run through one contract.

The definitions are those of `torch.distributions`, one position a row: log-probabilities of rows
`[M, E]`, scores by autograd, expectations as sums over every label (or a quadrature).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributions as D

from fisherfn import likelihoods
from fisherfn.core import random
from fisherfn.likelihoods import Likelihood


@dataclass(frozen=True)
class Case:
    """A likelihood, outputs and targets for it, and the same thing one position at a time."""

    name: str
    likelihood: Likelihood
    outputs: Tensor
    targets: Tensor
    row_log_prob: Callable[[Tensor, Tensor], Tensor]
    """Rows `[M, E]` and targets `[M]` or `[M, E]` to `[M]`."""
    support: Callable[[Tensor], tuple[Tensor, Tensor]]
    """One row `[E]` to targets `[M, ...]` and probabilities `[M]` that give exact expectations."""
    class_axis: int = -1

    def rows(self, x: Tensor) -> Tensor:
        """Anything like the outputs as `[number of positions, E]`."""
        positions = math.prod(self.likelihood.positions_shape(self.outputs))
        return x.movedim(self.class_axis, -1).reshape(positions, -1)

    def like_outputs(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return rows.reshape(self.outputs.movedim(self.class_axis, -1).shape).movedim(
            -1, self.class_axis
        )

    def row_targets(self, targets: Tensor) -> Tensor:
        """Targets as `row_log_prob` wants them."""
        rows = self.rows(self.outputs).shape[0]
        labels = isinstance(self.likelihood, likelihoods.Categorical | likelihoods.Custom)
        return targets.reshape(rows) if labels else targets.reshape(rows, -1)

    def naive_scores(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Scores `[M, E]` by autograd."""
        rows = rows.detach().requires_grad_()
        return torch.autograd.grad(self.row_log_prob(rows, targets).sum(), rows)[0]

    def naive_moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[N, E]` and second moment `[N, E, E]` of the score at each position."""
        means, seconds = [], []
        for row in self.rows(self.outputs):
            targets, weights = self.support(row)
            scores = self.naive_scores(row.expand(len(targets), -1), targets)
            means.append(weights @ scores)
            seconds.append(torch.einsum("m,mi,mj->ij", weights, scores, scores))
        return torch.stack(means), torch.stack(seconds)


def _normal(seed: int, *shape: int) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def _classes(seed: int, classes: int, *shape: int) -> Tensor:
    return (random.uniform(random.key(seed), shape) * classes).long()


def _categorical(name: str, outputs: Tensor, temperature: float = 1.0, axis: int = -1) -> Case:
    def log_prob(rows: Tensor, targets: Tensor) -> Tensor:
        return D.Categorical(logits=rows / temperature).log_prob(targets)

    def support(row: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(len(row)), torch.softmax(row / temperature, -1)

    shape = outputs.movedim(axis, -1).shape
    targets = _classes(7, shape[-1], *shape[:-1])
    likelihood = likelihoods.categorical(temperature, axis)
    return Case(name, likelihood, outputs, targets, log_prob, support, axis)


def _bernoulli(name: str, outputs: Tensor, event_ndim: int = 1) -> Case:
    def log_prob(rows: Tensor, targets: Tensor) -> Tensor:
        return D.Bernoulli(logits=rows).log_prob(targets.to(rows.dtype)).sum(-1)

    def support(row: Tensor) -> tuple[Tensor, Tensor]:
        targets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(row)))).to(row.dtype)
        p = torch.sigmoid(row)
        return targets, (targets * p + (1 - targets) * (1 - p)).prod(-1)

    targets = _classes(8, 2, *outputs.shape)
    return Case(name, likelihoods.bernoulli(event_ndim), outputs, targets, log_prob, support)


def _gaussian(name: str, outputs: Tensor, scale: float | Tensor, event_ndim: int = 1) -> Case:
    event = outputs.shape[outputs.ndim - event_ndim :]
    flat = torch.as_tensor(scale, dtype=outputs.dtype).expand(event).reshape(-1)

    def log_prob(rows: Tensor, targets: Tensor) -> Tensor:
        return D.Normal(rows, flat.to(rows.dtype)).log_prob(targets).sum(-1)

    def support(row: Tensor) -> tuple[Tensor, Tensor]:
        # Gauss-Hermite with three nodes is exact for the square of a linear score.
        points = itertools.product((-(3**0.5), 0.0, 3**0.5), repeat=len(row))
        nodes = torch.tensor(list(points), dtype=torch.float64)
        weights = torch.where(nodes == 0, 4.0, 1.0).double().prod(-1) / 6 ** len(row)
        return row + flat * nodes, weights

    targets = outputs + _normal(9, *outputs.shape)
    return Case(name, likelihoods.gaussian(scale, event_ndim), outputs, targets, log_prob, support)


def _poisson(name: str, outputs: Tensor, event_ndim: int = 1) -> Case:
    def log_prob(rows: Tensor, targets: Tensor) -> Tensor:
        return D.Poisson(rows.exp()).log_prob(targets).sum(-1)

    def support(row: Tensor) -> tuple[Tensor, Tensor]:
        grids = torch.meshgrid(*[torch.arange(60.0).double()] * len(row), indexing="ij")
        targets = torch.stack([grid.reshape(-1) for grid in grids], -1)
        return targets, log_prob(row.expand(len(targets), -1), targets).exp()

    targets = _classes(8, 4, *outputs.shape).double()
    return Case(name, likelihoods.poisson(event_ndim), outputs, targets, log_prob, support)


def _custom() -> Case:
    """A categorical of the user's own making, with another square root (C columns)."""

    def log_prob(z: Tensor, y: Tensor) -> Tensor:
        return torch.log_softmax(z, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    def sample(z: Tensor, keys: Tensor) -> Tensor:
        return random.categorical(keys, logits=z)

    def root(z: Tensor, index: Tensor) -> Tensor:
        p = torch.softmax(z, -1)
        at = torch.arange(z.shape[-1]) == index
        scale = torch.where(at, p, 0.0).sum(-1, keepdim=True).sqrt()
        return scale * (at.to(z.dtype) - p)

    case = _categorical("custom", _normal(13, 2, 3, 4))
    made = likelihoods.custom(
        log_prob, sample, root=root, columns=lambda z: z.shape[-1], position_ndim=1
    )
    return Case(case.name, made, case.outputs, case.targets, case.row_log_prob, case.support)


CASES = [
    _categorical("categorical", _normal(1, 6, 4)),
    _categorical("categorical-positions", 2 * _normal(2, 2, 3, 5)),
    _categorical("categorical-two-position-axes", _normal(2, 2, 2, 2, 3)),
    _categorical("categorical-axis-1", _normal(3, 2, 5, 3, 2), axis=1),
    _categorical("categorical-hot", _normal(4, 2, 3, 4), temperature=2.5),
    _categorical("categorical-cold-axis-1", 0.4 * _normal(5, 2, 3, 4), temperature=0.5, axis=1),
    _categorical("categorical-two-level", 3 * _normal(6, 2, 2, 200)),
    _bernoulli("bernoulli", _normal(7, 3, 3)),
    _bernoulli("bernoulli-positions", 3 * _normal(8, 2, 2, 3)),
    _bernoulli("bernoulli-scalar", _normal(9, 4), event_ndim=0),
    _bernoulli("bernoulli-matrix", _normal(10, 2, 2, 2), event_ndim=2),
    _gaussian("gaussian", _normal(11, 3, 2), 0.7),
    _gaussian("gaussian-scales", _normal(12, 2, 2, 3), torch.tensor([0.1, 1.0, 30.0])),
    _gaussian("gaussian-scalar", _normal(13, 4), torch.tensor(2.0), event_ndim=0),
    _gaussian(
        "gaussian-matrix", _normal(14, 2, 2, 3), torch.tensor([[0.5], [3.0]]).double(), event_ndim=2
    ),
    _poisson("poisson", _normal(15, 3, 2)),
    _poisson("poisson-positions", 0.5 * _normal(16, 2, 3, 1)),
    _poisson("poisson-scalar", _normal(17, 4), event_ndim=0),
    _custom(),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Each likelihood of the table in turn."""
    return request.param


@pytest.fixture
def keys() -> Callable[[Any], Tensor]:
    """One key an example, as the estimators make them."""

    def make(outputs: Tensor, seed: int = 0) -> Tensor:
        return random.fold_in(random.key(seed), torch.arange(outputs.shape[0]))

    return make


@pytest.fixture
def compiled() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.compile` without graph breaks, traced through autograd; needs no C++ compiler."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    return make
