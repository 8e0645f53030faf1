"""Conjugate gradients: solutions where there are any, reasons where there are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linalg.operators import SIZE, Known, flat, operator, orthogonal, rotated, tree
from torch import Tensor

import fisherfn as ff

DAMPING = 0.1


def vector(seed: int = 0, count: int | None = None) -> Tensor:
    shape = (SIZE,) if count is None else (count, SIZE)
    return ff.random.normal(ff.random.key(seed), shape, torch.float64)


@pytest.fixture
def known() -> Known:
    return rotated([10.0 * 0.8**i for i in range(SIZE)])


def inverse(known: Known, damping: float = DAMPING) -> Tensor:
    return torch.linalg.inv(known.matrix + damping * torch.eye(SIZE, dtype=torch.float64))


@pytest.mark.parametrize(
    "damping", [DAMPING, torch.tensor(DAMPING, dtype=torch.float64)], ids=["float", "tensor"]
)
def test_solution_is_the_dense_one(known: Known, damping: Any) -> None:
    b = vector()
    got = ff.linalg.cg(known.mv, tree(b), damping=damping, tolerance=1e-12)
    torch.testing.assert_close(flat(got.value), inverse(known) @ b, rtol=1e-8, atol=1e-9)
    assert (bool(got.converged), got.reason) == (True, "converged")
    rest = b - known.matrix @ flat(got.value) - DAMPING * flat(got.value)
    torch.testing.assert_close(got.residual, rest.norm() / b.norm(), rtol=1e-2, atol=1e-15)
    # steps, one product to see whether it is true, one for the residual
    assert int(got.steps) <= len(known.calls) <= int(got.steps) + 2


def test_distinct_eigenvalues_are_steps() -> None:
    known = rotated([3.0] * 10 + [2.0] * 20 + [1.0] * 10)
    got = ff.linalg.cg(known.mv, tree(vector()), tolerance=1e-10)
    assert got.converged
    assert int(got.steps) == 3


def test_residuals_may_rise_before_they_fall() -> None:
    noise = orthogonal(SIZE) * torch.logspace(0, 2.5, SIZE, dtype=torch.float64)
    known = operator(noise @ noise.T)
    got = ff.linalg.cg(known.mv, tree(vector()), tolerance=1e-8)
    assert got.converged, got.reason


@pytest.mark.parametrize("chunk_size", [1, 2, 7])
def test_several_right_hand_sides(known: Known, chunk_size: int) -> None:
    b = vector(1, 3)
    b[1] = 0.0
    got = ff.linalg.cg(
        known.mv, tree(b), damping=DAMPING, tolerance=1e-10, stacked=True, chunk_size=chunk_size
    )
    want = b @ inverse(known)
    torch.testing.assert_close(flat(got.value, 1), want, rtol=1e-7, atol=1e-8)
    assert got.converged.tolist() == [True, True, True]
    assert got.reason == ("converged", "zero right-hand side", "converged")
    alone = ff.linalg.cg(known.mv, tree(b[2]), damping=DAMPING, tolerance=1e-10)
    assert abs(int(got.steps[2]) - int(alone.steps)) <= 1
    assert int(got.steps[1]) == 0


def test_preconditioner_saves_steps(known: Known) -> None:
    b, matrix = tree(vector()), inverse(known, 0.2)
    plain = ff.linalg.cg(known.mv, b, damping=DAMPING, tolerance=1e-9)
    got = ff.linalg.cg(
        known.mv,
        b,
        damping=DAMPING,
        tolerance=1e-9,
        preconditioner=lambda v: tree(matrix @ flat(v)),
    )
    assert got.converged
    assert int(got.steps) < int(plain.steps) / 2
    torch.testing.assert_close(flat(got.value), flat(plain.value), rtol=1e-6, atol=1e-7)


def test_first_guess(known: Known) -> None:
    b = vector()
    x = inverse(known) @ b
    got = ff.linalg.cg(known.mv, tree(b), damping=DAMPING, x0=tree(x))
    assert (int(got.steps), bool(got.converged)) == (0, True)
    near = ff.linalg.cg(known.mv, tree(b), damping=DAMPING, x0=tree(x + 0.1), tolerance=1e-10)
    torch.testing.assert_close(flat(near.value), x, rtol=1e-7, atol=1e-8)


def test_zero_has_the_solution_zero(known: Known) -> None:
    got = ff.linalg.cg(known.mv, known.like)
    assert not flat(got.value).any()
    assert bool(got.converged)
    assert float(got.residual) == 0.0
    assert got.reason == "zero right-hand side"


def skew(size: int) -> Tensor:
    noise = vector(3, SIZE)[:size, :size]
    return noise - noise.T


IDENTITY = torch.eye(SIZE, dtype=torch.float64)
FAILURES = {
    "indefinite": (torch.diag(torch.linspace(-1.0, 1.0, SIZE).double()), "not positive definite"),
    "negative": (-IDENTITY, "not positive definite"),
    "zero": (0.0 * IDENTITY, "not positive definite"),
    "singular": (torch.diag((torch.arange(SIZE) > 9).double()), "not positive definite"),
    "slightly unsymmetric": (IDENTITY * torch.arange(1, SIZE + 1) + skew(SIZE), "not symmetric"),
    "rotation": (skew(SIZE), "not positive definite"),
    "nan": (float("nan") * IDENTITY, "not finite"),
    "infinite": (float("inf") * IDENTITY, "not finite"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_values_with_a_reason(name: str) -> None:
    matrix, reason = FAILURES[name]
    known = operator(matrix)
    got = ff.linalg.cg(known.mv, tree(vector()))
    assert not got.converged
    assert reason in got.reason


def test_stagnation_is_a_value() -> None:
    known = rotated([10.0**-i for i in range(8)] + [1.0] * (SIZE - 8), dtype=torch.float32)
    b = tree(vector().float())
    got = ff.linalg.cg(known.mv, b, tolerance=1e-14)
    assert not got.converged
    assert got.reason == "the residual no longer falls"
    assert int(got.steps) < 400


def test_too_few_steps(known: Known) -> None:
    got = ff.linalg.cg(known.mv, tree(vector()), damping=DAMPING, max_steps=3, tolerance=1e-10)
    assert (bool(got.converged), got.reason, int(got.steps)) == (False, "reached max_steps", 3)
    assert 0 < float(got.residual) < 10


def test_preconditioner_has_to_be_positive(known: Known) -> None:
    got = ff.linalg.cg(known.mv, tree(vector()), preconditioner=lambda v: ff.tree.scale(v, -1.0))
    assert not got.converged
    assert got.reason == "the preconditioner is not positive definite"


def test_right_hand_side_that_is_not_finite(known: Known) -> None:
    b = vector()
    b[3] = math.nan
    got = ff.linalg.cg(known.mv, tree(b))
    assert not got.converged
    assert got.reason == "not finite"
    assert flat(got.value).isnan().all()


def test_dtypes_of_the_right_hand_side() -> None:
    b = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2)}
    got = ff.linalg.cg(lambda v: ff.tree.scale(v, 2.0), b)
    assert (got.value["a"].dtype, got.value["b"].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(got.value["b"], torch.full((2,), 0.5))


def test_as_a_method_of_the_dense_representation() -> None:
    """A preconditioner from the representations: `lambda v: F.solve(v, damping=d)`."""
    with torch.random.fork_rng(devices=[]):
        module = torch.nn.Linear(3, 2).double()
    model, params, buffers = ff.functional(module)
    lik, x = ff.likelihoods.categorical(), vector(5)[:30].reshape(10, 3)
    F = ff.dense(model, lik)(params, buffers, ff.Batch(x))
    D = ff.diagonal(model, lik)(params, buffers, ff.Batch(x))
    b = ff.tree.random_like(ff.random.key(0), params)
    got = ff.linalg.cg(
        F.mv,
        b,
        damping=DAMPING,
        tolerance=1e-11,
        preconditioner=lambda v: D.solve(v, damping=DAMPING),
    )
    assert got.converged
    want = F.solve(b, damping=DAMPING)
    for name, leaf in want.items():
        torch.testing.assert_close(got.value[name], leaf, rtol=1e-8, atol=1e-9)
