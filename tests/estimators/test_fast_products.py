"""The rules once more where every product of matrices goes to the faster library."""

from __future__ import annotations

import functools

import pytest
import torch
from kfac.layers import CASES
from kfac.test_factors import REDUCED, check

import cases
import fisherfn as ff
import oracles
from fisherfn.testing import assert_close

Products = list[tuple[int, ...]]


@functools.cache
def rows(name: str, fisher: str) -> oracles.Rows:
    return oracles.rows(cases.ALL[name].setup().problem, fisher)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", cases.ALL)
def test_diagonal(name: str, fisher: str, fast_products: Products) -> None:
    s, found = cases.ALL[name].setup(), rows(name, fisher)
    want = (found.weights.unsqueeze(1) * found.scores.square()).sum(0) / found.count
    got = ff.diagonal(s.model, s.likelihood, fisher=fisher)(*s.args)
    assert_close(got.values, oracles.unravel(want, s.problem.params), cases.ALL[name].rtol)


@pytest.mark.parametrize("name", cases.ALL)
def test_inner_products(name: str, fast_products: Products) -> None:
    s, scores = cases.ALL[name].setup(), rows(name, "empirical").scores
    gram = ff.score_gram(s.model, s.likelihood)(*s.args)
    assert_close(gram, scores @ scores.T, cases.ALL[name].rtol)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "linear_3d", "encoder_layer"])
def test_it_is_used(name: str, fast_products: Products) -> None:
    s = cases.ALL[name].setup()
    ff.diagonal(s.model, s.likelihood, fisher="empirical")(*s.args)
    assert fast_products


@pytest.mark.parametrize("name", CASES)
def test_factors(name: str, fast_products: Products) -> None:
    case = CASES[name]()
    F = ff.kfac(case.model, case.likelihood, fisher="empirical")(*case.args)
    check(case, F, "expand", fisher="empirical")


@pytest.mark.parametrize("name", REDUCED)
def test_reduced_factors(name: str, fast_products: Products) -> None:
    case = CASES[name]()
    F = ff.kfac(case.model, case.likelihood, fisher="empirical", approx="reduce")(*case.args)
    check(case, F, "reduce", fisher="empirical")


@pytest.mark.parametrize("name", ["linear_positions", "conv2d_positions", "conv2d_groups"])
def test_results(name: str, fast_products: Products) -> None:
    case = CASES[name]()
    v = ff.tree.random_like(ff.random.key(1), case.args[0])
    for F in (
        ff.kfac(case.model, case.likelihood)(*case.args),
        ff.ekfac(case.model, case.likelihood)(*case.args),
    ):
        fast_products.clear()
        matrix, flat = F.to_dense(), ff.tree.ravel(v)[0]
        assert_close(ff.tree.ravel(F.mv(v))[0], matrix @ flat)
        damped = matrix + 0.1 * torch.eye(len(flat), dtype=matrix.dtype)
        assert_close(ff.tree.ravel(F.solve(v, damping=0.1))[0], torch.linalg.solve(damped, flat))
        assert fast_products


@pytest.mark.parametrize("matrix", ["fisher", "hessian"])
@pytest.mark.parametrize("name", ["mlp", "linear_3d", "encoder_layer", "conv2d"])
def test_recorded_products(name: str, matrix: str, fast_products: Products) -> None:
    s = cases.ALL[name].setup()
    params, buffers, batch = s.args
    v = ff.tree.random_like(ff.random.key(1), params)
    linear = ff.linearized(s.model, s.likelihood, matrix=matrix)(params, buffers, batch)
    single = ff.hvp if matrix == "hessian" else ff.fisher_vp
    assert_close(linear(v), single(s.model, s.likelihood)(params, buffers, batch, v))
