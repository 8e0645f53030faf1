"""Functions of torch whose derivatives do not compose: results are still batched and derived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import cases
import fisherfn as ff
import oracles
from cases import Net, normal
from fisherfn.layers import composing

B = 2  # as many examples, columns and stacked models: axes that are confused have equal sizes


def between(act: nn.Module | None, forward: Callable[[Any, Tensor], Tensor]) -> Any:
    parts: dict[str, nn.Module] = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)}
    return Net(forward, **parts, **({} if act is None else {"act": act})).double()


def channels(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.a(x).reshape(-1, 2, 2).transpose(1, 2))
    return m.b(h.reshape(-1, 4))


def distances(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).reshape(-1, 2, 2)
    return m.b(torch.cdist(h, 0.5 * h.flip(1) + 0.2).reshape(-1, 4))


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


MODELS: dict[str, Callable[[], Any]] = {
    "prelu": lambda: between(nn.PReLU(), lambda m, x: m.b(m.act(m.a(x)))),
    "prelu_channels": lambda: between(nn.PReLU(2), channels),
    "prelu_of_others": lambda: between(
        None, lambda m, x: m.b(torch.prelu(m.a(x), m.a.bias.sigmoid()[:1] - 1.0))
    ),
    "hardsigmoid": lambda: between(nn.Hardsigmoid(), lambda m, x: m.b(m.act(m.a(x)))),
    "weight_norm": lambda: between(normed(), lambda m, x: m.b(torch.tanh(m.act(m.a(x))))),
    "cdist": lambda: between(None, distances),
}
NORMS: dict[str, Callable[[], Any]] = {
    "layer_norm": lambda: between(nn.LayerNorm(4), lambda m, x: m.b(torch.tanh(m.act(m.a(x))))),
    "instance_norm": lambda: between(nn.InstanceNorm1d(2, affine=True), channels),
}
ESTIMATORS: dict[str, Callable[..., Any]] = {
    "scores": lambda model, lik: ff.per_sample_gradients(model, lik),
    "exact": lambda model, lik: ff.diagonal(model, lik),
    "chunks": lambda model, lik: ff.diagonal(model, lik, chunk_size=1),
    "low_rank": lambda model, lik: ff.low_rank(model, lik, fisher="empirical"),
}


def setup(name: str, estimator: str) -> tuple[Callable[[Any], Tensor], dict[str, Tensor]]:
    """Return a result as one vector, a function of the parameters, and the parameters."""
    with cases.seeded(0):
        module = (MODELS | NORMS)[name]()
        for p in module.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    model, params, buffers = ff.functional(module)
    batch = ff.Batch(normal(B, 4), targets=torch.tensor([2, 0]))
    estimate = ESTIMATORS[estimator](model, ff.likelihoods.categorical())

    def result(p: Any) -> Tensor:
        found = ff.tree.leaves(estimate(p, buffers, batch))
        return torch.cat([t.reshape(-1).double() for t in found])

    return result, params


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", MODELS)
def test_stacked_models(name: str, estimator: str) -> None:
    result, params = setup(name, estimator)
    stacked = {k: torch.stack([p, 1.1 * p]) for k, p in params.items()}
    found = torch.vmap(result)(stacked)
    # torch's own derivative of hardsigmoid is 1/6 in float32
    rtol = 2e-7 if name == "hardsigmoid" else 1e-9
    for i in range(B):
        want = result({k: p[i] for k, p in stacked.items()})
        assert_close(found[i], want, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_of_results(name: str, estimator: str) -> None:
    result, params = setup(name, estimator)
    pick = normal(result(params).numel(), seed=1)
    found = torch.func.grad(lambda p: result(p) @ pick)(params)
    point = torch.cat([p.reshape(-1) for p in params.values()])
    for seed in range(3):
        direction = normal(point.numel(), seed=seed)
        want = oracles.central_difference(
            lambda v: result(oracles.unravel(v, params)) @ pick, point, direction
        )
        got = torch.cat([g.reshape(-1) for g in found.values()]) @ direction
        assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*MODELS, *NORMS])
def test_second_derivatives_of_results(name: str) -> None:
    result, params = setup(name, "exact")
    pick = normal(result(params).numel(), seed=1)
    gradient = torch.func.grad(lambda p: result(p) @ pick)
    point = torch.cat([p.reshape(-1) for p in params.values()])
    direction = normal(point.numel(), seed=2)

    def along(p: Any) -> Tensor:
        return torch.cat([g.reshape(-1) for g in gradient(p).values()])

    want = oracles.central_difference(
        lambda v: along(oracles.unravel(v, params)), point, direction, step=1e-4
    )
    got = torch.func.grad(lambda p: along(p) @ direction)(params)
    assert_close(torch.cat([g.reshape(-1) for g in got.values()]), want, rtol=1e-5, atol=1e-7)


CALLS: dict[str, tuple[Any, Any, tuple[Tensor, ...], dict[str, Any]]] = {
    "prelu": (torch.prelu, composing.plain_prelu, (normal(2, 3, 4), normal(3, seed=1)), {}),
    "prelu_one": (torch.prelu, composing.plain_prelu, (normal(4), normal(1, seed=1)), {}),
    "prelu_scalar": (torch.prelu, composing.plain_prelu, (normal(2, 4), normal(seed=1)), {}),
    "hardsigmoid": (F.hardsigmoid, composing.plain_hardsigmoid, (4.0 * normal(40),), {}),
}
CALLS |= {
    f"cdist_{p:g}": (
        torch.cdist,
        composing.plain_cdist,
        (normal(2, 3, 4), normal(2, 5, 4, seed=1)),
        {"p": p},
    )
    for p in (0.5, 1.0, 2.0, 3.0, float("inf"))
}
CALLS |= {
    f"weight_norm_{dim}": (
        torch._weight_norm,
        composing.plain_weight_norm,
        (normal(3, 4), normal(*shape, seed=1)),
        {"dim": dim},
    )
    for dim, shape in ((0, (3, 1)), (1, (1, 4)))
}


@pytest.mark.parametrize("call", CALLS)
def test_plain_formulas_have_the_values_and_derivatives_of_torch(call: str) -> None:
    function, plain, args, options = CALLS[call]
    found, pull = torch.func.vjp(lambda *a: plain(*a, **options), *args)[:2]
    want, reference = torch.func.vjp(lambda *a: function(*a, **options), *args)[:2]
    assert_close(found, want)
    assert_close(pull(torch.cos(want)), reference(torch.cos(want)))


def test_equal_rows_have_distance_zero_and_no_derivative() -> None:
    x = normal(1, 2, 3)
    found, pull = torch.func.vjp(lambda x: composing.plain_cdist(x, x.detach()), x)[:2]
    assert torch.equal(found.diagonal(dim1=1, dim2=2), torch.zeros(1, 2, dtype=x.dtype))
    (only,) = pull(torch.eye(2, dtype=x.dtype)[None])
    assert torch.equal(only, torch.zeros_like(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid_in_place_stays_itself(inplace: bool) -> None:
    chosen = composing.composable(F.hardsigmoid, (normal(2),), {"inplace": inplace})
    assert chosen is (F.hardsigmoid if inplace else composing.plain_hardsigmoid)
    assert composing.composable(F.hardsigmoid, (normal(2), inplace), {}) is chosen
