"""Fisher products against the matrix itself, for every kind, unit, mask, weights and model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import fisherfn as ff
import oracles
from cases.kinds import KINDS
from fisherfn import testing
from fisherfn.testing import assert_close
from fisherfn.testing.laws import counts
from fisherfn.testing.members import FISHERS, UNITS

MODELS = cases.LAYERS | cases.ATTENTION | cases.LANGUAGE
KEY = ff.random.key(3)


def linear() -> tuple[Any, Any, Any]:
    with cases.seeded(0):
        return ff.functional(torch.nn.Linear(3, 4).double())


def vector(params: Any, seed: int = 1) -> Any:
    return ff.tree.random_like(ff.random.key(seed), params)


def flat(tree: Any) -> torch.Tensor:
    return ff.tree.ravel(tree)[0]


@pytest.mark.parametrize("name", list(MODELS))
def test_product_is_the_matrix_times_the_vector_on_every_model(name: str) -> None:
    case = MODELS[name]
    s = case.setup()
    v = vector(s.params)
    for fisher in ("exact", "empirical"):
        if name in cases.LANGUAGE:  # a loop over their parameters takes long
            dense = ff.dense(s.model, s.likelihood, fisher=fisher)(*s.args).to_dense()
        else:
            dense = oracles.dense(s.problem, fisher)
        want = dense.double() @ flat(v).double()
        got = ff.fisher_vp(s.model, s.likelihood, fisher=fisher)(*s.args, v)
        size = want.norm()
        assert (flat(got).double() - want).norm() <= 100 * case.rtol * size, fisher


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", list(KINDS))
def test_product_is_that_of_dense_for_every_likelihood(name: str, fisher: str, unit: str) -> None:
    s = KINDS[name].setup()
    options: dict[str, Any] = {"fisher": fisher, "unit": unit}
    v = vector(s.params)
    want = ff.dense(s.model, s.likelihood, **options)(*s.args, key=KEY).mv(v)
    got = ff.fisher_vp(s.model, s.likelihood, **options)(*s.args, v, key=KEY)
    assert_close(got, want, rtol=1e-10)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("unit", UNITS)
@settings(max_examples=8)
@given(data=st.data())
def test_product_is_that_of_dense_on_any_problem(fisher: str, unit: str, data: Any) -> None:
    problem = data.draw(testing.problems(unit=unit))
    if not counts(problem, unit):
        return
    model, lik = problem.model, problem.likelihood
    v = vector(problem.params)
    options: dict[str, Any] = {"fisher": fisher, "unit": unit}
    want = ff.dense(model, lik, **options)(*problem.args, key=KEY).mv(v)
    params, buffers, batch = problem.args
    got = ff.fisher_vp(model, lik, **options)(params, buffers, batch, v, key=KEY)
    error = (flat(got) - flat(want)).norm()
    assert error <= 1e-10 * flat(want).norm() + 1e-13


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
def test_several_draws_are_averaged(fisher: str) -> None:
    s = KINDS["categorical_sequence"].setup()
    v = vector(s.params)
    options: dict[str, Any] = {"fisher": fisher, "num_samples": 3}
    want = ff.dense(s.model, s.likelihood, **options)(*s.args, key=KEY).mv(v)
    got = ff.fisher_vp(s.model, s.likelihood, **options)(*s.args, v, key=KEY)
    assert_close(got, want, rtol=1e-10)


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
def test_equal_keys_make_one_fixed_symmetric_linear_map(fisher: str) -> None:
    s = KINDS["categorical_sequence"].setup()
    product = ff.fisher_vp(s.model, s.likelihood, fisher=fisher)
    u, v = vector(s.params, 1), vector(s.params, 2)
    fu, fv = (product(*s.args, t, key=KEY) for t in (u, v))
    both = product(*s.args, ff.tree.axpy(2.0, u, v), key=KEY)
    assert_close(both, ff.tree.axpy(2.0, fu, fv), rtol=1e-10)
    assert_close(ff.tree.dot(u, fv), ff.tree.dot(v, fu), rtol=1e-10)
    other = product(*s.args, v, key=ff.random.key(4))
    assert not torch.allclose(flat(other), flat(fv))


@pytest.mark.parametrize("fisher", FISHERS)
def test_chunks_change_nothing(fisher: str) -> None:
    s = KINDS["categorical_sequence"].setup()
    v = vector(s.params)
    whole = ff.fisher_vp(s.model, s.likelihood, fisher=fisher)(*s.args, v, key=KEY)
    for size in (1, 2, 50):
        part = ff.fisher_vp(s.model, s.likelihood, fisher=fisher, chunk_size=size)
        assert_close(part(*s.args, v, key=KEY), whole, rtol=1e-10)


@pytest.mark.parametrize("fisher", FISHERS)
def test_batches_give_the_product_on_their_joined_data(fisher: str) -> None:
    problem = testing.Problem(
        "p", linear()[0], ff.likelihoods.categorical(),
        {"weight": cases.normal(4, 3), "bias": cases.normal(4)}, {},
        ff.Batch(
            cases.normal(5, 3),
            torch.tensor([0, 1, 2, 3, 0]),
            weights=torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64),
        ),
        (), False, "example",
    )  # fmt: skip
    v = vector(problem.params)
    product = ff.fisher_vp(problem.model, problem.likelihood, fisher=fisher)
    params, buffers, batch = problem.args
    want = product(params, buffers, batch, v, key=KEY)
    parts = [testing.take(problem, torch.arange(a, b)).batch for a, b in ((0, 2), (2, 3), (3, 5))]
    assert_close(product(params, buffers, parts, v, key=KEY), want, rtol=1e-10)
    assert_close(product(params, buffers, iter(parts), v, key=KEY), want, rtol=1e-10)
    bound = ff.linearized(problem.model, problem.likelihood, fisher=fisher)
    assert_close(bound(params, buffers, iter(parts), key=KEY)(v), want, rtol=1e-10)


def test_batches_without_ids_do_not_repeat_each_others_labels() -> None:
    model, params, buffers = linear()
    x = cases.normal(2, 3).repeat(2, 1)
    v = vector(params)
    product = ff.fisher_vp(model, ff.likelihoods.categorical(), fisher="mc")
    halves = [ff.Batch(x[:2]), ff.Batch(x[2:])]
    got = product(params, buffers, halves, v, key=KEY)
    assert_close(got, product(params, buffers, ff.Batch(x), v, key=KEY), rtol=1e-10)


@pytest.mark.parametrize("select", [r"^0\.", lambda path, t: path.startswith("0.")])
def test_selected_parameters_get_their_diagonal_block(select: Any) -> None:
    s = cases.ALL["mlp"].setup()
    names = [n for n in s.params if n.startswith("0.")]
    v = {n: t for n, t in vector(s.params).items() if n in names}
    whole = ff.tree.zeros_like(s.params) | v
    want = ff.fisher_vp(s.model, s.likelihood)(*s.args, whole)
    got = ff.fisher_vp(s.model, s.likelihood, select=select)(*s.args, v)
    assert_close(got, {n: want[n] for n in names}, rtol=1e-10)
    linear = ff.linearized(s.model, s.likelihood, select=select)(*s.args)
    assert_close(linear(v), got, rtol=1e-10)


def test_examples_that_do_not_count_may_be_anything() -> None:
    model, params, buffers = linear()
    x = cases.normal(4, 3)
    bad = x.clone()
    bad[1] = float("nan")
    mask = torch.tensor([True, False, True, True])
    v = vector(params)
    for fisher in FISHERS:
        product = ff.fisher_vp(model, ff.likelihoods.categorical(), fisher=fisher)
        targets = torch.tensor([0, 99, 2, 3])
        got, want = (
            product(params, buffers, ff.Batch(inputs, targets, mask=mask), v, key=KEY)
            for inputs in (bad, x)
        )
        assert_close(got, want, rtol=1e-12)


def test_the_names_of_the_field_are_one_function() -> None:
    assert ff.ggn_vp is ff.fisher_vp
    s = cases.ALL["mlp"].setup()
    v = vector(s.params)
    want = ff.fisher_vp(s.model, s.likelihood, fisher="empirical")(*s.args, v)
    assert_close(ff.empirical_vp(s.model, s.likelihood)(*s.args, v), want, rtol=0)


def test_vectors_of_another_dtype_are_converted_and_results_are_wide() -> None:
    model, params, buffers = linear()
    params = ff.tree.map(lambda p: p.to(torch.bfloat16), params)
    batch = ff.Batch(cases.normal(2, 3, dtype=torch.bfloat16))
    v = ff.tree.map(lambda t: torch.ones_like(t, dtype=torch.float64), params)
    got = ff.fisher_vp(model, ff.likelihoods.categorical())(params, buffers, batch, v)
    assert {t.dtype for t in got.values()} == {torch.float32}


def test_inference_mode_and_no_grad_change_nothing() -> None:
    s = cases.ALL["mlp"].setup()
    v = vector(s.params)
    product = ff.fisher_vp(s.model, s.likelihood)
    want = product(*s.args, v)
    with torch.inference_mode():
        assert_close(product(*s.args, v), want, rtol=1e-12)
    with torch.no_grad():
        assert_close(product(*s.args, v), want, rtol=1e-12)
