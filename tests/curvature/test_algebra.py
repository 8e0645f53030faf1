"""Every question, to every representation, against the dense matrix in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisherfn.core import random, trees

DAMPING = st.sampled_from([0.0, 1e-3, 0.7, 5])
POWERS = st.sampled_from([-3, -2, -1.5, -1, -0.5, -0.25, 0, 0.0, 0.5, 1, 1.7, 2, 3, 6, -5])


def close(got: Tensor, want: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


def matrix_power(matrix: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**p) @ vectors.T


@given(data=st.data())
def test_to_dense_is_the_matrix_in_insertion_order(cases: Any, data: st.DataObject) -> None:
    case = data.draw(cases)
    if case.kind in ("low_rank", "ekfac", "pooled"):  # kinds that do not keep these entries
        close(case.F.to_dense(), case.matrix, 1e-12)
    else:
        assert torch.equal(case.F.to_dense(), case.matrix)


@given(data=st.data(), seed=st.integers(0, 99))
def test_products(cases: Any, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases)
    v = case.draw(seed)
    x = case.vector(v)
    close(case.vector(case.F.mv(v)), case.matrix @ x)
    close(case.F.quadratic(v), x @ case.matrix @ x)
    assert trees.structure(case.F.mv(v)) == trees.structure(case.params)


@given(data=st.data(), seed=st.integers(0, 99), damping=DAMPING)
def test_solve(cases: Any, data: st.DataObject, seed: int, damping: float) -> None:
    case = data.draw(cases)
    v = case.draw(seed)
    want = torch.linalg.solve(damped(case.matrix, damping), case.vector(v))
    close(case.vector(case.F.solve(v, damping=damping)), want)
    close(case.vector(case.F.solve(v, damping=torch.tensor(damping, dtype=torch.float64))), want)


@given(data=st.data(), p=POWERS, damping=DAMPING)
def test_power(cases: Any, data: st.DataObject, p: float, damping: float) -> None:
    case = data.draw(cases)
    v = case.draw(1)
    want = matrix_power(damped(case.matrix, damping), p) @ case.vector(v)
    scale = want.norm().clamp_min(1.0)
    close(case.vector(case.F.pow(v, p, damping=damping)) / scale, want / scale)


@given(data=st.data(), damping=DAMPING)
def test_numbers(cases: Any, data: st.DataObject, damping: float) -> None:
    case = data.draw(cases)
    close(case.F.trace(), case.matrix.trace())
    close(case.F.frobenius(), case.matrix.square().sum().sqrt())
    close(case.vector(case.F.diagonal()), case.matrix.diagonal())
    close(case.F.logdet(damping=damping), torch.logdet(damped(case.matrix, damping)))
    got = case.F.eigenvalues()
    close(got, torch.linalg.eigvalsh(case.matrix).flip(0))
    assert bool((got.diff() <= 0).all())


@given(data=st.data(), seed=st.integers(0, 99), damping=DAMPING)
def test_sample_whitens_the_draws_of_its_key(
    cases: Any, data: st.DataObject, seed: int, damping: float
) -> None:
    # x = A z with A A^T = (F + λI)^-1 exactly if x^T (F + λI) x = z^T z for every z.
    case = data.draw(cases)
    key = random.key(seed)
    x = case.vector(case.F.sample(key, damping=damping))
    z = case.vector(trees.random_like(key, case.params))
    close(x @ damped(case.matrix, damping) @ x, z @ z)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_samples_have_the_inverse_as_covariance(case: Any, damping: float) -> None:
    keys = random.split(random.key(7), 4000)
    draws = torch.vmap(lambda key: case.F.sample(key, damping=damping))(keys)
    x = torch.cat([leaf.flatten(1) for leaf in draws.values()], 1)
    products = x[:, :, None] * x[:, None, :]
    want = torch.linalg.inv(damped(case.matrix, damping))
    stderr = products.std(0) / len(keys) ** 0.5
    assert bool(((products.mean(0) - want).abs() < 5 * stderr).all())
    assert bool((x.mean(0).abs() < 5 * x.std(0) / len(keys) ** 0.5).all())


def test_two_representations_of_one_matrix_draw_the_same_sample(make: Any, layers: Any) -> None:
    diagonal = make("diagonal", layers).F
    dense = make("dense", layers).F
    dense = type(dense)(diagonal.to_dense(), diagonal.count, dense.layout)
    key = random.key(5)
    for a, b in zip(diagonal.sample(key).values(), dense.sample(key).values(), strict=True):
        close(a, b)


@given(data=st.data(), c=st.sampled_from([0, 2, -1.5, np.float64(0.3), np.float32(2.0)]))
def test_scaling(cases: Any, data: st.DataObject, c: float) -> None:
    case = data.draw(cases)
    for scaled in (
        c * case.F,
        case.F * c,
        torch.tensor(float(c)) * case.F,
        case.F * torch.tensor(c),
    ):
        close(scaled.to_dense(), float(c) * case.matrix, 1e-7)
        assert type(scaled) is type(case.F)
        assert torch.equal(scaled.count, case.F.count)


@given(data=st.data())
def test_sum_is_the_sum_of_the_matrices(cases: Any, data: st.DataObject, make: Any) -> None:
    case = data.draw(cases)
    if case.kind in ("kfac", "ekfac"):  # their sums are of their kind in special cases alone
        return
    other = make(case.kind, case.params, seed=4321, rank=50)
    close((case.F + other.F).to_dense(), case.matrix + other.matrix)
    assert (case.F + other.F).count == 80


@given(data=st.data())
def test_vectors_are_matched_by_key(cases: Any, data: st.DataObject) -> None:
    case = data.draw(cases)
    if not isinstance(case.params, dict):
        return
    v = case.draw(2)
    turned = dict(reversed(v.items()))
    for a, b in zip(trees.leaves(case.F.mv(v)), trees.leaves(case.F.mv(turned)), strict=True):
        assert torch.equal(a, b)
    assert list(case.F.solve(turned)) == list(case.params)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "given_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_results_are_float32_or_wider_and_solve_keeps_the_dtype(
    case: Any, stored: torch.dtype, given_dtype: torch.dtype
) -> None:
    F = trees.map(lambda x: x if x.ndim == 0 else x.to(stored), case.F)
    v = case.draw(1, given_dtype)
    wide = torch.promote_types(stored, torch.float32)
    both = torch.promote_types(wide, given_dtype)
    for tree in (F.mv(v), F.pow(v, 0.5, damping=0.1), F.pow(v, 2), F.pow(v, 0)):
        assert {x.dtype for x in trees.leaves(tree)} == {both}
    assert {x.dtype for x in F.solve(v, damping=0.1).values()} == {given_dtype}
    for tree in (F.diagonal(), F.sample(random.key(0), damping=0.1)):
        assert {x.dtype for x in trees.leaves(tree)} == {wide}
    numbers = [F.trace(), F.frobenius(), F.logdet(damping=0.1), F.eigenvalues(), F.to_dense()]
    assert {x.dtype for x in numbers} == {wide}
    assert F.quadratic(v).dtype == both
    assert (2 * F).to_dense().dtype == (F + F).to_dense().dtype == wide


def test_solve_returns_each_leaf_in_its_own_dtype(case: Any) -> None:
    v = case.draw(1)
    v["0.bias"] = v["0.bias"].bfloat16()
    dtypes = {name: x.dtype for name, x in case.F.solve(v).items()}
    assert dtypes["0.bias"] == torch.bfloat16
    assert dtypes["0.weight"] == torch.float64


def test_float32_agrees_with_float64(case: Any) -> None:
    F = trees.map(lambda x: x.float(), case.F)
    v = case.draw(1)
    close(case.vector(F.solve(v, damping=0.1)), case.vector(case.F.solve(v, damping=0.1)), 1e-4)
    close(F.logdet(), case.F.logdet(), 1e-4)


def test_norm_of_tiny_entries_does_not_vanish(case: Any) -> None:
    # Typical entries are far below 1e-20, whose squares are zero in float32.
    tiny = trees.map(lambda x: x.float(), 1e-30 * case.F)
    close(tiny.frobenius() * 1e30, case.F.frobenius(), 1e-5)


def test_damping_is_not_lost_beside_large_entries_of_float32(make: Any, layers: Any) -> None:
    # In float32, 1e4 + 1e-5 is 1e4: the solution would not depend on the damping at all.
    dense = make("dense", layers).F
    ones = torch.ones(8, 8)
    F = type(dense)(1e4 * ones, dense.count, dense.layout)
    v = {name: torch.full_like(x, 1.0, dtype=torch.float32) for name, x in layers.items()}
    v["0.bias"] = torch.tensor([2.0, 0.0])  # sums to the same: a part outside the range of ones
    got = F.solve(v, damping=1e-5)
    x = torch.cat([leaf.reshape(-1) for leaf in v.values()]).double()
    want = torch.linalg.solve(damped(1e4 * ones.double(), 1e-5), x)
    error = torch.cat([leaf.reshape(-1) for leaf in got.values()]) - want
    assert error.norm() < 1e-6 * want.norm()


def test_inputs_are_left_alone(case: Any) -> None:
    v, key = case.draw(1), random.key(1)
    before = [x.clone() for x in [*trees.leaves(case.F), *v.values(), key]]
    F = case.F
    _ = F.mv(v), F.solve(v, damping=0.1), F.pow(v, -0.5), F.pow(v, 2), F.quadratic(v), F.trace()
    _ = F.frobenius(), F.logdet(), F.diagonal(), F.eigenvalues(), F.sample(key), F.to_dense()
    _ = 2 * F, F + F
    after = [*trees.leaves(case.F), *v.values(), key]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_parameters_at_all(make: Any) -> None:
    for kind in ("diagonal", "dense", "leaves"):
        F = make(kind, {}).F
        assert F.mv({}) == F.solve({}) == F.diagonal() == F.sample(random.key(0)) == {}
        assert F.trace() == F.frobenius() == F.logdet() == F.quadratic({}) == 0
        assert F.eigenvalues().shape == (0,)
        assert F.to_dense().shape == (0, 0)
