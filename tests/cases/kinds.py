"""Every likelihood on outputs of every shape, small enough to average over many draws."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import oracles
from cases.base import Built, Case, Net, Setup, normal, table
from oracles import Bernoulli, Categorical, Gaussian, Poisson


def _flat(width: int) -> Built:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, width))
    return Built(net.double(), normal(4, 3, seed=1))


def _sequence(width: int) -> Built:
    """Positions that see each other, so that their scores are not orthogonal."""
    net = Net(
        lambda m, x: m.head(torch.tanh(m.a(x.cumsum(1)))),
        a=nn.Linear(3, 3),
        head=nn.Linear(3, width),
    )
    return Built(net.double(), normal(3, 3, 3, seed=2))


def _class_second() -> Built:
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 3, 1))
    return Built(net.double(), normal(3, 2, 4, seed=3))


def _scalar() -> Built:
    net = Net(lambda m, x: m.a(x).squeeze(-1), a=nn.Linear(3, 1))
    return Built(net.double(), normal(3, 2, 3, seed=4))


KINDS = table(
    Case("categorical", lambda: _flat(3), Categorical()),
    Case("categorical_two_classes", lambda: _flat(2), Categorical()),
    Case("categorical_sequence", lambda: _sequence(3), Categorical()),
    Case("categorical_warm", lambda: _sequence(3), Categorical(temperature=2.0)),
    Case("categorical_cold", lambda: _flat(3), Categorical(temperature=0.5)),
    Case("categorical_class_second", _class_second, Categorical(class_axis=1)),
    Case("bernoulli", lambda: _flat(3), Bernoulli()),
    Case("bernoulli_sequence", lambda: _sequence(2), Bernoulli()),
    Case("bernoulli_scalar", _scalar, Bernoulli(event_ndim=0)),
    Case("gaussian", lambda: _flat(3), Gaussian(0.5)),
    Case("gaussian_sequence", lambda: _sequence(2), Gaussian(2.0)),
    Case("gaussian_scale_each", lambda: _flat(3), Gaussian((0.5, 1.0, 3.0))),
    Case("gaussian_two_axes", lambda: _sequence(2), Gaussian(1.5, event_ndim=2)),
    Case("gaussian_scalar", _scalar, Gaussian(0.5, event_ndim=0)),
    Case("poisson", lambda: _flat(3), Poisson()),
    Case("poisson_sequence", lambda: _sequence(2), Poisson()),
)


@functools.cache
def setup(name: str) -> Setup:
    """Return the case of this name, built once."""
    return KINDS[name].setup()


@functools.cache
def exact(name: str) -> Tensor:
    """Return the Fisher information matrix of a case, from its definition."""
    return oracles.dense(setup(name).problem)


def tree(name: str, vector: Tensor) -> dict[str, Tensor]:
    """Return a vector as a tree like the parameters of a case."""
    return oracles.unravel(vector, setup(name).problem.params)


def ravel(values: dict[str, Tensor]) -> Tensor:
    """Return a tree as a vector."""
    return torch.cat([value.reshape(-1) for value in values.values()])
