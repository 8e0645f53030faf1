"""The Hessian side: products, diagonal, trace, finite differences, Jacobians, layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import fisherfn as ff
import oracles
from cases import normal
from fisherfn.testing import assert_close

MODELS = cases.ALL | cases.LANGUAGE
NAMES = [
    "mlp", "conv2d", "layer_norm", "group_norm", "instance_norm1d", "embedding_repeated_tokens",
    "tied_embedding_and_head", "encoder_layer_padding", "mha_both_masks", "lstm", "gru",
    "weight_norm", "custom_function", "gpt2", "llama", "bert_masked",
]  # fmt: skip


def vector(params: Any, seed: int = 1) -> Any:
    return ff.tree.random_like(ff.random.key(seed), params)


def loss(s: Any, leaves: list[Tensor]) -> Tensor:
    """The mean negative log-likelihood, by the oracle's loop over examples."""
    weights, mask = s.problem.unit_weights("example"), s.problem.full_mask()
    terms = [weights[n] * s.problem.observed(n)[mask[n]].sum() for n in range(s.problem.size)]
    return -torch.stack(terms).sum() / weights.sum()


def slope(s: Any, v: Any) -> Tensor:
    """H v by a difference of gradients of fourth order, at moved parameters."""
    leaves, parts = list(s.problem.params.values()), [v[name] for name in s.problem.params]
    start = [p.detach().clone() for p in leaves]

    def gradient(distance: Tensor) -> Tensor:
        with torch.no_grad():
            for p, x, t in zip(leaves, start, parts, strict=True):
                p.copy_(x + distance * t)
        return oracles.gradient(loss(s, leaves), s.problem.params)

    point = torch.zeros((), dtype=torch.float64)
    found = oracles.central_difference(gradient, point, torch.ones_like(point), step=1e-4)
    gradient(point)
    return found


def hessian(s: Any) -> Tensor:
    """The Hessian, a column at a time."""
    vector, unravel = ff.tree.ravel(s.params)
    columns = [slope(s, unravel(row)) for row in torch.eye(len(vector), dtype=torch.float64)]
    return torch.stack(columns)


def test_product_of_a_fitted_classifier_keeps_its_digits_in_float32() -> None:
    """Where the loss is 1e-8, 1 - p is a few roundings of 1."""

    def model(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ params["first"]) @ params["second"]

    lik, y, one = ff.likelihoods.categorical(), torch.arange(12) % 3, torch.eye(3)
    x = one[y] + 0.1 * normal(12, 3, dtype=torch.float32)
    w = {"first": 2.0 * one + 0.1 * normal(3, 3, seed=1), "second": 24.0 * one + normal(3, 3)}
    w = {name: t.float() for name, t in w.items()}
    v, wide = vector(w), {name: t.double() for name, t in w.items()}
    want = ff.hvp(model, lik)(wide, {}, ff.Batch(x.double(), y), ff.tree.map(Tensor.double, v))
    assert lik.log_prob(model(wide, {}, x.double()), y).mean() > -1e-6
    batch = ff.Batch(x, y)
    linearized = ff.linearized(model, lik, matrix="hessian")(w, {}, batch)
    for got in (ff.hvp(model, lik)(w, {}, batch, v), linearized(v)):
        error = ff.tree.norm(ff.tree.sub(ff.tree.map(Tensor.double, got), want))
        assert error < 2e-5 * ff.tree.norm(want)


@pytest.mark.parametrize("name", NAMES)
def test_product_is_that_of_the_hessian(name: str) -> None:
    s = MODELS[name].setup()
    v = vector(s.params)
    want = slope(s, v)
    got = ff.tree.ravel(ff.hvp(s.model, s.likelihood)(*s.args, v))[0]
    assert (got - want).norm() <= 1e-6 * want.norm()
    part = ff.hvp(s.model, s.likelihood, chunk_size=2)(*s.args, v)
    assert_close(ff.tree.ravel(part)[0], got, rtol=1e-7)


def test_hessian_of_every_likelihood() -> None:
    from cases.kinds import KINDS

    for name, case in KINDS.items():
        s = case.setup()
        v = vector(s.params)
        want = slope(s, v)
        got = ff.tree.ravel(ff.hvp(s.model, s.likelihood)(*s.args, v))[0]
        assert (got - want).norm() <= 1e-6 * want.norm() + 1e-9, name


def test_of_a_linear_model_hessian_and_fisher_are_one() -> None:
    s = cases.ALL["linear_alone"].setup()
    v = vector(s.params)
    want = ff.fisher_vp(s.model, s.likelihood)(*s.args, v)
    assert_close(ff.hvp(s.model, s.likelihood)(*s.args, v), want, rtol=1e-9)


def test_diagonal_and_trace_are_those_of_the_matrix() -> None:
    s = cases.ALL["mlp"].setup()
    matrix = hessian(s)
    got = ff.hessian_diagonal(s.model, s.likelihood)(*s.args)
    assert_close(ff.tree.ravel(got)[0], matrix.diagonal(), rtol=1e-6)
    exact = ff.hessian_trace(s.model, s.likelihood, method="exact")(*s.args)
    assert_close(exact.value, matrix.trace(), rtol=1e-6)
    assert exact.stderr == 0
    for method in ("hutchinson", "hutchpp", "xtrace"):
        trace = ff.hessian_trace(s.model, s.likelihood, method=method, num_matvecs=24)
        value, stderr = trace(*s.args, key=ff.random.key(0))
        assert abs(value - matrix.trace()) < 5 * stderr
    picked = ff.hessian_diagonal(s.model, s.likelihood, select="bias")(*s.args)
    for name, found in picked.items():
        assert_close(found, got[name], rtol=1e-8)
    assert set(picked) == {n for n in s.params if "bias" in n}


def test_trace_that_is_the_sum_of_the_diagonal_takes_sparse_directions_into_account() -> None:
    """Unscaled sparse probes gave a tenth of the trace, 7.68 for 75."""
    w = {"w": torch.arange(1.0, 6.0, dtype=torch.float64)}
    model = lambda params, buffers, x: x * params["w"]  # noqa: E731
    batch = ff.Batch(torch.ones(1, 5, dtype=torch.float64), torch.zeros(1, 5).double())
    lik = ff.likelihoods.gaussian((1 / 15) ** 0.5)  # H = 15 I
    found = ff.hessian_trace(model, lik, num_matvecs=4)(w, {}, batch, key=ff.random.key(0))
    assert_close(found.value, torch.tensor(75.0).double(), rtol=1e-9)


def test_finite_differences_are_central_and_scaled() -> None:
    s = cases.ALL["mlp"].setup()
    v = vector(s.params)
    want = ff.hvp(s.model, s.likelihood)(*s.args, v)
    for scale in (1e-6, 1.0, 1e6):
        moved = ff.tree.scale(v, scale)
        got = ff.finite_difference_vp(s.model, s.likelihood)(*s.args, moved)
        assert_close(ff.tree.scale(got, 1 / scale), want, rtol=1e-5)
    single = {k: p.float() for k, p in s.params.items()}
    batch = ff.Batch(s.batch.inputs.float(), s.batch.targets)
    got = ff.finite_difference_vp(s.model, s.likelihood)(single, s.buffers, batch, v)
    error = (ff.tree.ravel(got)[0].double() - ff.tree.ravel(want)[0]).norm()
    # one-sided, with an absolute step of 1e-6 in float32, the error was 359 %
    assert error < 1e-2 * ff.tree.norm(want)
    by_hand = ff.finite_difference_vp(s.model, s.likelihood, step=1e-4)(*s.args, v)
    assert_close(by_hand, want, rtol=1e-5)
    zero = ff.finite_difference_vp(s.model, s.likelihood)(*s.args, ff.tree.zeros_like(v))
    assert all(not t.any() for t in zero.values())


def test_finite_differences_over_batches() -> None:
    s = cases.ALL["mlp"].setup()
    v = vector(s.params)
    product = ff.finite_difference_vp(s.model, s.likelihood)
    x, y = s.batch.inputs, s.batch.targets
    halves = [ff.Batch(x[:1], y[:1]), ff.Batch(x[1:], y[1:])]
    want = product(s.params, s.buffers, ff.Batch(x, y), v)
    assert_close(product(s.params, s.buffers, halves, v), want, rtol=1e-5)


# ---- Jacobians -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv2d", "lstm", "layer_norm"])
def test_jacobian_products(name: str) -> None:
    s = cases.ALL[name].setup()
    want = torch.func.jacrev(lambda p: s.model(p, s.buffers, s.batch.inputs))(s.params)
    got = ff.output_jacobian(s.model)(s.params, s.buffers, s.batch.inputs)
    assert_close(got, want, rtol=1e-8)
    v = vector(s.params)
    pushed = ff.output_jvp(s.model)(s.params, s.buffers, s.batch.inputs, v)
    parts = [(j.flatten(-v[k].dim()) @ v[k].reshape(-1)) for k, j in want.items()]
    assert_close(pushed, torch.stack(parts).sum(0), rtol=1e-8)
    c = normal(*pushed.shape, seed=5)
    pulled = ff.output_vjp(s.model)(s.params, s.buffers, s.batch.inputs, c)
    for k, j in want.items():
        flat = j.reshape(c.numel(), -1)
        assert_close(pulled[k].reshape(-1), c.reshape(-1) @ flat, rtol=1e-8)


def test_jacobian_products_compose() -> None:
    s = cases.ALL["mlp"].setup()
    jacobian = ff.output_jacobian(s.model, select="bias")
    stacked = ff.tree.map(lambda t: torch.stack([t, 2 * t]), s.params)
    got = torch.vmap(lambda p: jacobian(p, s.buffers, s.batch.inputs))(stacked)
    want = jacobian(s.params, s.buffers, s.batch.inputs)
    assert_close(ff.tree.map(lambda t: t[0], got), want, rtol=1e-10)


# ---- layers --------------------------------------------------------------------------------------


def test_statistics_of_layers() -> None:
    values = {"0.weight": torch.tensor([[1.0, 3.0]]), "0.bias": torch.tensor([5.0])}
    values["1.weight"] = torch.tensor([-2.0])
    found = ff.layer_statistics(values)
    assert list(found) == ["0", "1"]
    first = found["0"]
    assert (first.size, float(first.sum), float(first.mean)) == (3, 9.0, 3.0)
    assert (float(first.min), float(first.max)) == (1.0, 5.0)
    assert_close(first.std, torch.tensor(8.0 / 3.0).sqrt())
    assert ff.by_layer(values)["1"].tolist() == [-2.0]
