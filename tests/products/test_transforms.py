"""Products under `torch.compile`, `torch.vmap` and `torch.func.grad`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cases
import fisherfn as ff
from cases import Net, normal
from fisherfn.testing import assert_close

# torch's own compiler still imports parts of TorchScript
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
KEY = ff.random.key(3)
LIK = ff.likelihoods.categorical()
PRODUCTS = {
    "exact": lambda model: ff.fisher_vp(model, LIK),
    "mc": lambda model: ff.fisher_vp(model, LIK, fisher="mc"),
    "curvature_prop": lambda model: ff.fisher_vp(model, LIK, fisher="curvature_prop"),
    "empirical": lambda model: ff.empirical_vp(model, LIK, unit="position"),
    "hessian": lambda model: ff.hvp(model, LIK),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.norm(m.embed(x))
    q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in m.qkv(h).chunk(3, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(h + mixed.transpose(1, 2).flatten(2).tanh(), m.embed.weight)


@pytest.fixture(scope="module")
def problem() -> tuple[Any, Any, Any, ff.Batch]:
    """A causal layer of attention after a layer norm, with a tied head."""
    with cases.seeded(0):
        net = Net(attention, embed=nn.Embedding(5, 4), norm=nn.LayerNorm(4), qkv=nn.Linear(4, 12))
    model, params, buffers = ff.functional(net.double().eval())
    ids = cases.tokens(2, 3, high=5)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    weights = torch.tensor([[1.0, 2.0, 1.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
    del weights
    return model, params, buffers, ff.Batch(ids, ids.roll(-1, 1), mask=mask)


def vector(params: Any, seed: int = 1) -> Any:
    return ff.tree.random_like(ff.random.key(seed), params)


def stack(params: Any, count: int = 3) -> Any:
    return ff.tree.random_like(ff.random.split(ff.random.key(1), count), params)


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_compiled_is_eager(name: str, problem: Any) -> None:
    model, params, buffers, batch = problem
    product = PRODUCTS[name](model)
    v = vector(params)
    want = product(params, buffers, batch, v, key=KEY)
    fast = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert_close(fast(params, buffers, batch, v, key=KEY), want, rtol=1e-9)


def test_compiled_over_batches_linearised_and_in_blocks(problem: Any) -> None:
    model, params, buffers, batch = problem
    bind, vectors = ff.linearized(model, LIK), stack(params)
    ids, targets, mask = batch.inputs, batch.targets, batch.mask
    parts = [ff.Batch(ids[i : i + 1], targets[i : i + 1], mask=mask[i : i + 1]) for i in range(2)]

    def several(params: Any, vectors: Any) -> Any:
        bound = bind(params, buffers, parts)
        return bound({k: t[0] for k, t in vectors.items()}), bound.block(vectors)

    want = several(params, vectors)
    fast = torch.compile(several, fullgraph=True, backend="aot_eager")
    assert_close(fast(params, vectors), want, rtol=1e-9)


@pytest.mark.slow
def test_compiled_by_inductor(problem: Any) -> None:
    model, params, buffers, batch = problem
    product, v = ff.fisher_vp(model, LIK), vector(params)
    want = product(params, buffers, batch, v)
    assert_close(torch.compile(product, fullgraph=True)(params, buffers, batch, v), want, 1e-8)


def test_bad_targets_poison_compiled_products(problem: Any) -> None:
    model, params, buffers, batch = problem
    bad = ff.Batch(batch.inputs, batch.targets + 100, mask=batch.mask)
    for make in (PRODUCTS["empirical"], PRODUCTS["hessian"]):
        fast = torch.compile(make(model), fullgraph=True, backend="aot_eager")
        found = fast(params, buffers, bad, vector(params))
        assert [k for k, t in found.items() if not t.isnan().any()] == []


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_vmap_over_tangents_and_over_parameters_is_a_loop(name: str, problem: Any) -> None:
    model, params, buffers, batch = problem
    product, vectors = PRODUCTS[name](model), stack(params)
    rows = [
        product(params, buffers, batch, {k: t[i] for k, t in vectors.items()}, key=KEY)
        for i in range(3)
    ]
    want = {k: torch.stack([r[k] for r in rows]) for k in params}
    got = torch.vmap(lambda v: product(params, buffers, batch, v, key=KEY))(vectors)
    assert_close(got, want, rtol=1e-8)
    moved = {k: p + 0.1 * vectors[k] for k, p in params.items()}
    got = torch.vmap(lambda p: product(p, buffers, batch, vector(params), key=KEY))(moved)
    rows = [
        product({k: p[i] for k, p in moved.items()}, buffers, batch, vector(params), key=KEY)
        for i in range(3)
    ]
    assert_close(got, {k: torch.stack([r[k] for r in rows]) for k in params}, rtol=1e-8)


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_derivative_of_a_quadratic_form_is_its_finite_difference(name: str, problem: Any) -> None:
    """Fused layer norm gave a third derivative with the mean held fixed, and another number."""
    model, params, buffers, batch = problem
    product, v, d = PRODUCTS[name](model), vector(params), vector(params, 7)

    def form(p: Any) -> torch.Tensor:
        return ff.tree.dot(v, product(p, buffers, batch, v, key=KEY))

    slope = torch.func.grad(form)(params)
    h = 1e-4
    ends = [form(ff.tree.axpy(x * h, d, params)) for x in (1, -1, 2, -2)]
    want = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)
    assert_close(ff.tree.dot(slope, d), want, rtol=1e-6)
    live = {k: p.clone().requires_grad_() for k, p in params.items()}
    by_autograd = torch.autograd.grad(form(live), list(live.values()))
    assert_close(dict(zip(live, by_autograd, strict=True)), slope, rtol=1e-9)


def test_derivative_by_the_vector_is_the_product_itself(problem: Any) -> None:
    model, params, buffers, batch = problem
    product, v = ff.fisher_vp(model, LIK), vector(params)
    half = torch.func.grad(lambda t: ff.tree.dot(t, product(params, buffers, batch, t)) / 2)(v)
    assert_close(half, product(params, buffers, batch, v), rtol=1e-9)


def test_derivative_through_instance_norm() -> None:
    with cases.seeded(0):
        net = Net(
            lambda m, x: m.head(m.norm(m.conv(x)).flatten(1)),
            conv=nn.Conv1d(2, 3, 2), norm=nn.InstanceNorm1d(3, affine=True), head=nn.Linear(12, 3),
        ).double()  # fmt: skip
    model, params, buffers = ff.functional(net.eval())
    batch, v, d = ff.Batch(normal(2, 2, 5)), vector(params), vector(params, 7)
    product = ff.fisher_vp(model, LIK)

    def form(p: Any) -> torch.Tensor:
        return ff.tree.dot(v, product(p, buffers, batch, v))

    h = 1e-5
    want = (form(ff.tree.axpy(h, d, params)) - form(ff.tree.axpy(-h, d, params))) / (2 * h)
    assert_close(ff.tree.dot(torch.func.grad(form)(params), d), want, rtol=1e-6)


def test_several_products_with_the_hessian_inside_of_a_derivative() -> None:
    """What the first product counts does not belong to its own derivative."""
    s = cases.ALL["mlp"].setup()
    params, buffers, batch = s.args
    key = ff.random.key(0)
    estimate = ff.hessian_trace(s.model, s.likelihood, num_matvecs=3)

    def trace(params: Any) -> Any:
        return estimate(params, buffers, batch, key=key).value

    d = ff.tree.random_like(ff.random.key(1), params)
    slope = ff.tree.dot(torch.func.grad(trace)(params), d)
    step = 1e-5
    ahead, behind = (trace(ff.tree.axpy(c, d, params)) for c in (step, -step))
    assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6)
    stacked = ff.tree.map(lambda p: torch.stack([p, 1.5 * p]), params)
    found = torch.vmap(trace)(stacked)
    assert_close(found, torch.stack([trace(params), trace(ff.tree.scale(params, 1.5))]))
