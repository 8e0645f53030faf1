"""Steps in compiled code that need the loss, its model, or a basis that was just found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fisherfn as ff
from fisherfn import optim
from fisherfn.core import random, trees

LIK = ff.likelihoods.categorical()


def network() -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    return ff.functional(module.double())


def data(seed: int) -> ff.Batch:
    x = random.normal(random.key(seed), (8, 4), torch.float64)
    return ff.Batch(x, torch.arange(8) % 3)


def gradient(model: Any, params: Any, buffers: Any, batch: ff.Batch) -> Any:
    def loss(p: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(p, buffers, batch.inputs), batch.targets)

    return torch.func.grad(loss)(params)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adapted_damping": (ff.diagonal, {"damping": optim.levenberg_marquardt(0.5, every=1)}),
    "exact_momentum": (ff.diagonal, {"learning_rate": None, "momentum": "exact", "damping": 0.1}),
    "ekfac": (lambda *a: ff.ekfac(*a, widest=3), {"damping": 0.1, "decay": 0.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_compiles(name: str) -> None:
    model, params, buffers = network()
    make, options = CASES[name]
    opt = optim.natural_gradient(make(model, LIK), **options)

    def step(grads: Any, state: Any, params: Any, batch: ff.Batch) -> Any:
        return opt.update(grads, state, params, buffers=buffers, batch=batch, refresh=True)

    batch = data(0)
    _, state = step(gradient(model, params, buffers, batch), opt.init(params), params, batch)
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in (1, 2):
        batch = data(number)
        grads = gradient(model, params, buffers, batch)
        got, (want, state) = fast(grads, state, params, batch), step(grads, state, params, batch)
        for a, b in zip(trees.leaves(got), trees.leaves((want, state)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_a_copy_makes_the_same_steps(name: str) -> None:
    model, params, buffers = network()
    make, options = CASES[name]
    opt, batch = optim.natural_gradient(make(model, LIK), **options), data(0)
    grads = gradient(model, params, buffers, batch)
    want, got = [
        o.update(grads, o.init(params), params, buffers=buffers, batch=batch)[0]
        for o in (opt, copy.deepcopy(opt))
    ]
    for a, b in zip(trees.leaves(got), trees.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_matrix_free_steps_need_values() -> None:
    model, params, buffers = network()
    opt, batch = optim.natural_gradient(ff.implicit(model, LIK), decay=0.0), data(0)

    def step(grads: Any) -> Any:
        return opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)[0]

    with pytest.raises(ff.UnsupportedError, match="expected values for implicit, got none"):
        torch.vmap(step)(trees.map(lambda p: p[None], params))
