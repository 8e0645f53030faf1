"""States under torch.compile, torch.vmap and torch.func.grad, together with an estimator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from states.streams import STREAMS
from states.test_ema import close, folded
from torch import Tensor

import fisherfn as ff
from fisherfn.core import trees
from fisherfn.states import Transform, ema, every, interval, welford, window

TRANSFORMS = {
    "ema": ema(0.9),
    "welford": welford(),
    "window": window(3),
    "every": every(2, ema(0.5), otherwise=welford()),
}


def network() -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
        ).double()
    return ff.functional(net)


def batch(seed: int, n: int = 6) -> ff.Batch:
    x = ff.random.normal(ff.random.key(seed), (n, 4), torch.float64)
    return ff.Batch(x, targets=torch.arange(n) % 3)


PAIRS = [
    ("ema", "diagonal"),
    ("welford", "statistics"),
    *[
        pytest.param(name, estimate, marks=pytest.mark.slow)
        for name in TRANSFORMS
        for estimate in ("diagonal", "block_diagonal", "statistics")
        if (name, estimate) not in (("ema", "diagonal"), ("welford", "statistics"))
    ],
]


@pytest.mark.parametrize(("name", "estimate"), PAIRS)
def test_estimator_and_update_compile_into_one_step(name: str, estimate: str) -> None:
    transform = TRANSFORMS[name]
    model, params, buffers = network()
    lik = ff.likelihoods.categorical()
    fim: Any = {
        "diagonal": lambda: ff.diagonal(model, lik, fisher="mc"),
        "block_diagonal": lambda: ff.block_diagonal(model, lik, fisher="empirical"),
        "statistics": lambda: ff.statistics(d=ff.diagonal(model, lik, fisher="mc"), gradient=True),
    }[estimate]()

    def step(params: Any, batch: ff.Batch, key: Tensor, state: Any) -> Any:
        return transform.update(fim(params, buffers, batch, key=key), state)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    like = fim(params, buffers, batch(0), key=ff.random.key(0))
    eager = fast = transform.init(like)
    for i in range(3):
        key = ff.random.key(i)
        want, eager = step(params, batch(i), key, eager)
        got, fast = compiled(params, batch(i), key, fast)
        unknown = name == "every"  # what is not due yet is unknown in both
        close(got, want, 1e-10, equal_nan=unknown)
        close(fast, eager, 1e-10)


@pytest.mark.parametrize("stream", ["tree", "diagonal_stderr", "moments"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_vmap_over_streams_is_a_loop(transform: Transform, stream: str) -> None:
    make = STREAMS[stream]
    members = [[make(i) for i in range(start, start + 4)] for start in (0, 7, 14)]
    want = [folded(transform, each) for each in members]
    columns = [
        trees.map(lambda *xs: torch.stack(xs), *[each[t] for each in members]) for t in range(4)
    ]
    got = torch.vmap(lambda *xs: folded(transform, list(xs)))(*columns)
    for i, one in enumerate(want):
        close(trees.map(lambda x, i=i: x[i], got), one)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_readings_are_differentiable(transform: Transform) -> None:
    def f(x: Tensor) -> Tensor:
        reading, _ = folded(transform, [x, 2 * x, x.square()])
        return sum(t.sum() for t in trees.leaves(reading))  # type: ignore[return-value]

    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found, eps = torch.func.grad(f)(x), 1e-6
    for i in range(2):
        step = torch.zeros_like(x)
        step[i] = eps
        slope = (f(x + step) - f(x - step)) / (2 * eps)
        torch.testing.assert_close(found[i], slope, rtol=1e-6, atol=1e-8)


def test_intervals_under_vmap() -> None:
    x = ff.random.normal(ff.random.key(0), (8, 5), torch.float64)
    state = folded(welford(), list(x))[1]
    want = interval(state)
    got = torch.vmap(lambda column: interval(folded(welford(), list(column))[1]), in_dims=1)(x)
    close(got, want)


def test_merge_compiles() -> None:
    _, a = folded(welford(), [STREAMS["diagonal"](i) for i in range(3)])
    _, b = folded(welford(), [STREAMS["diagonal"](i) for i in range(3, 5)])
    torch._dynamo.reset()
    close(torch.compile(ff.merge, fullgraph=True, backend="aot_eager")(a, b), ff.merge(a, b))
