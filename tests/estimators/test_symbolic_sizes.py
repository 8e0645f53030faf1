"""Models of other sizes in one compiled function: the compiler makes symbols of their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import fisherfn as ff
from fisherfn.testing import assert_close

LIK = ff.likelihoods.categorical()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Let nothing that was compiled before be reused."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(params: dict[str, Tensor], buffers: object, x: Tensor) -> Tensor:
    """Convolve, multiply by a transposed view, multiply again."""
    h = torch.relu(torch.nn.functional.conv2d(x, params["conv"])).mean((2, 3))
    return (torch.tanh(h @ params["hidden"].T) @ params["out"]) + params["bias"]


def problem(
    channels: int, width: int, classes: int, size: int
) -> tuple[dict[str, Tensor], ff.Batch]:
    """Return parameters and a batch of these sizes."""
    source = torch.Generator().manual_seed(channels)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    params = {
        "conv": draw(channels, 2, 3, 3),
        "hidden": draw(width, channels),
        "out": draw(width, classes),
        "bias": draw(classes),
    }
    return params, ff.Batch(draw(size, 2, 6, 6), torch.zeros(size, dtype=torch.int64))


ESTIMATORS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "diagonal": lambda params: ff.diagonal(model, LIK, fisher="empirical"),
    "grouped": lambda params: ff.grouped(model, LIK, ff.groups.infer(params), fisher="empirical"),
    "kfac": lambda params: ff.kfac(model, LIK, fisher="empirical"),
    "gradient_moments": lambda params: ff.gradient_moments(model, LIK, fisher="empirical"),
}


@pytest.mark.parametrize("eager_first", [False, True])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_sizes_may_become_symbols(name: str, eager_first: bool) -> None:
    for sizes in ((4, 5, 3, 3), (6, 7, 4, 5), (7, 9, 5, 6)):
        params, batch = problem(*sizes)
        estimator = ESTIMATORS[name](params)
        if eager_first:
            estimator(params, {}, batch)
        compiled = torch.compile(estimator, fullgraph=True, backend="aot_eager", dynamic=None)
        got = compiled(params, {}, batch)
        assert_close(got, estimator(params, {}, batch), 1e-10)


def matrices(params: dict[str, Tensor], buffers: object, x: Tensor) -> Tensor:
    """Multiply twice."""
    return torch.tanh(x @ params["conv"].T) @ params["out"].T


def windows(params: dict[str, Tensor], buffers: object, x: Tensor) -> Tensor:
    """Convolve, and multiply."""
    h = torch.relu(torch.nn.functional.conv2d(x, params["conv"], padding=1)).mean((2, 3))
    return h @ params["out"].T


@pytest.mark.parametrize("eager_first", [False, True])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_all_sizes_of_a_parameter_may_become_symbols(name: str, eager_first: bool) -> None:
    """As where a parameter of one model has other dimensions than that of the model before."""
    vectors = {"conv": (5, 4), "out": (3, 5)}, (6, 4)
    images = {"conv": (5, 2, 3, 3), "out": (3, 5)}, (6, 2, 4, 4)
    for model, (shapes, shape) in ((matrices, vectors), (windows, images)):
        source = torch.Generator().manual_seed(0)
        params = {k: torch.randn(n, generator=source).double() for k, n in shapes.items()}
        inputs = torch.randn(shape, generator=source).double()
        batch = ff.Batch(inputs, torch.zeros(6, dtype=torch.int64))
        options: dict[str, Any] = {"fisher": "empirical"}
        if name == "grouped":
            options["groups"] = ff.groups.infer(params)
        estimator = getattr(ff, name)(model, LIK, **options)
        if eager_first:
            estimator(params, {}, batch)
        compiled = torch.compile(estimator, fullgraph=True, backend="aot_eager")
        got = compiled(params, {}, batch)
        assert_close(got, estimator(params, {}, batch), 1e-10)
