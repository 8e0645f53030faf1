"""Modules that run with other tensors in the places of their own."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherfn as ff
from fisherfn.core.substitution import Substitution


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Give the modules of a test their own random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Tied(nn.Module):
    """A table that is also the head, a buffer, and one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.again = self.inner[0]
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.ones(5))
        self.register_buffer("nothing", None)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(self.inner(self.table(x)))
        if self.fail:
            raise ArithmeticError("no")
        return self.head(h) + self.shift


def state(module: nn.Module) -> dict[str, Tensor]:
    """Return other values for every parameter and buffer, ties once."""
    _, params, buffers = ff.functional(module)
    torch.manual_seed(1)
    return {
        k: torch.rand_like(t) if t.is_floating_point() else t
        for k, t in {**buffers, **params}.items()
    }


def tensors(module: nn.Module) -> dict[str, Any]:
    """Return what is in every place."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def reference(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return what torch's own function gives."""
    return torch.func.functional_call(module, values, (x,))


X = torch.tensor([0, 3, 3])


def test_equals_functional_call_and_leaves_the_module_as_it_was() -> None:
    module = Tied().eval()
    values, before = state(module), tensors(module)
    call, want = Substitution(module), reference(copy.deepcopy(module), values, X)
    for _ in range(2):
        assert torch.equal(call(values, (X,), {}), want)
    assert torch.equal(call(values, (), {"x": X}), want)
    after = tensors(module)
    assert list(after) == list(before)
    assert all(after[k] is before[k] for k in before)


def test_an_error_leaves_the_module_as_it_was() -> None:
    module = Tied().eval()
    values, before = state(module), tensors(module)
    module.fail = True
    with pytest.raises(ArithmeticError, match="no"):
        Substitution(module)(values, (X,), {})
    assert all(t is before[k] for k, t in tensors(module).items())


def test_what_is_left_out_stays_the_modules_own() -> None:
    module = Tied().eval()
    values = {"inner.0.weight": torch.ones(3, 3)}
    assert torch.equal(Substitution(module)(values, (X,), {}), reference(module, values, X))


@pytest.mark.parametrize("change", ["parameter", "module", "untied", "buffer"])
def test_a_module_that_changes_is_looked_at_again(change: str) -> None:
    module = Tied().eval()
    call = Substitution(module)
    call(state(module), (X,), {})
    if change == "parameter":
        module.inner[0].weight = nn.Parameter(torch.zeros(3, 3))
    elif change == "module":
        module.inner[2] = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    elif change == "untied":
        module.head.weight = nn.Parameter(torch.zeros(5, 3))
    else:
        module.register_buffer("shift", torch.zeros(5))
    values = state(module)
    assert ("head.weight" in values) == (change == "untied")
    assert torch.equal(call(values, (X,), {}), reference(module, values, X))


def test_another_name_of_a_tie_is_understood() -> None:
    module = Tied().eval()
    values = {"head.weight": torch.ones(5, 3)}
    assert torch.equal(Substitution(module)(values, (X,), {}), reference(module, values, X))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_run_with_their_own_module(way: str) -> None:
    model, params, buffers = ff.functional(Tied().eval())
    before = model(params, buffers, X)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(params, buffers, X), before)
    assert twin.module is not model.module
    assert twin._call.module is twin.module
    own = tensors(twin.module)
    assert all(store[key] is t for store, key, t in twin._call._own)
    assert {id(t) for _, _, t in twin._call._own} == {id(t) for t in own.values()}


def test_scripted_parts_are_left_to_torch() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Linear(3, 2))
    module = nn.Sequential(scripted)
    values = {"0.weight": torch.ones(2, 3)}
    x = torch.ones(1, 3)
    assert torch.equal(Substitution(module)(values, (x,), {}), reference(module, values, x))
    assert torch.equal(module(x), scripted(x))


class Slow(nn.Module):
    """A layer that is used twice, with time for other threads in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        time.sleep(0.002)
        return self.layer(h)


def test_threads_take_turns_with_a_module() -> None:
    module = Slow().double()
    before = tensors(module)
    batch = ff.Batch(torch.rand(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    lik = ff.likelihoods.categorical()
    _, params, buffers = ff.functional(module)
    points = [ff.tree.scale(params, 1.0 + i) for i in range(4)]
    alone = ff.diagonal(ff.functional(copy.deepcopy(module))[0], lik)
    want = [alone(p, buffers, batch).values for p in points]

    def run(i: int) -> list[Any]:
        model, same, _ = ff.functional(module)  # each thread looks at the module for itself
        assert all(torch.equal(same[k], params[k]) for k in params)
        shared = ff.diagonal(model, lik)
        return [shared(points[i], buffers, batch).values for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(want, pool.map(run, range(4)), strict=True):
            assert all(torch.equal(got[k], expected[k]) for got in found for k in expected)
    assert all(t is before[k] for k, t in tensors(module).items())


def test_runs_inside_a_compiled_function() -> None:
    module = Tied().eval()
    values, call = state(module), Substitution(module)
    run = torch.compile(lambda v, x: call(v, (x,), {}), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(values, X), reference(module, values, X))
