"""`ff.low_rank` and `LowRank` with fewer rows than parameters, against the dense matrix.

As a member of the tables it goes through the laws of estimators and of representations as well;
there its rows are mostly as many as the parameters, and the matrix [P, P] is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cases
import fisherfn as ff
import fisherfn.estimators.low_rank as module
import oracles
from cases.kinds import KINDS
from fisherfn.core import random, trees
from fisherfn.core.errors import (
    OptionError,
)
from fisherfn.curvature import LowRank
from fisherfn.testing import assert_close

N = torch.tensor(5.0, dtype=torch.float64)
SHAPES = {"0.weight": (3, 4), "0.bias": (3,), "1.scale": (), "1.weight": (2, 3)}
PARAMS = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
POWERS = st.sampled_from([-5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.7, 3, 6])


def thin(seed: int, rows: int = 5, dtype: torch.dtype = torch.float64, **options: Any) -> LowRank:
    """Random rows, one of them zero as that of a masked example is."""
    like = trees.map(lambda x: x.to(dtype).expand(rows, *x.shape), PARAMS)
    drawn = trees.random_like(random.key(seed), like)
    kept = torch.arange(rows) != 1
    tree = trees.map(lambda x: x * kept.reshape(-1, *[1] * (x.ndim - 1)), drawn)
    weights = random.uniform(random.key(seed + 1), (rows,), dtype) + 0.1
    return LowRank(tree, weights, N, **options)


def difference(seed: int) -> LowRank:
    """A matrix with eigenvalues of both signs."""
    return thin(seed) + (-0.5) * thin(seed + 100, rows=3)


def matrix(F: LowRank) -> Tensor:
    """The definition, as a loop over rows."""
    found = torch.zeros(22, 22, dtype=torch.float64)
    for r, w in enumerate(F.weights.double()):
        row = torch.cat([leaf[r].reshape(-1) for leaf in F.rows.values()]).double()
        found += w * torch.outer(row, row)
    return found


def flat(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)]).double()


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Any:
    return trees.random_like(random.key(seed), trees.map(lambda x: x.to(dtype), PARAMS))


def close(got: Tensor, want: Tensor, tol: float = 1e-10) -> None:
    scale = want.abs().max().clamp_min(1.0)
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=tol, atol=tol)


def damped(m: Tensor, damping: float) -> Tensor:
    return m + damping * torch.eye(len(m), dtype=torch.float64)


# ---- the estimator -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(KINDS))
def test_exact_is_the_expectation_over_every_label(name: str) -> None:
    s = KINDS[name].setup()
    got = ff.low_rank(s.model, s.likelihood)(*s.args)
    assert_close(got.to_dense(), oracles.dense(s.problem))
    assert (got.fisher, got.unit, got.count.item()) == ("exact", "example", s.problem.size)


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
def test_draws_are_averaged_and_are_those_of_dense(fisher: str) -> None:
    s = KINDS["categorical_sequence"].setup()
    options: Any = {"fisher": fisher, "num_samples": 3}
    key = random.key(4)
    got = ff.low_rank(s.model, s.likelihood, **options)(*s.args, key=key)
    want = ff.dense(s.model, s.likelihood, **options)(*s.args, key=key)
    assert len(got.weights) == 3 * s.problem.size
    assert_close(got.to_dense(), want.to_dense())


def test_gram_is_that_of_the_scores() -> None:
    s = KINDS["categorical"].setup()
    got = ff.low_rank(s.model, s.likelihood, fisher="empirical")(*s.args)
    want = ff.score_gram(s.model, s.likelihood)(*s.args) / s.problem.size
    assert_close(got.gram(), want)
    close(got.eigenvalues()[: len(want)], torch.linalg.eigvalsh(want).flip(0))


def test_rank_keeps_the_best_approximation() -> None:
    s = KINDS["categorical"].setup()
    whole = ff.dense(s.model, s.likelihood)(*s.args).to_dense()
    got = ff.low_rank(s.model, s.likelihood, rank=2)(*s.args)
    values, vectors = torch.linalg.eigh(whole)
    best = vectors[:, -2:] @ values[-2:].diag() @ vectors[:, -2:].T
    assert len(got.weights) == 2
    close(got.to_dense(), best)
    many = ff.low_rank(s.model, s.likelihood, rank=10_000)(*s.args)
    close(many.to_dense(), whole)


def test_rows_beyond_the_budget_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s = KINDS["categorical"].setup()
    monkeypatch.setattr(module, "MATRIX_BUDGET", 1024)
    fim = ff.low_rank(s.model, s.likelihood)
    message = (
        r"low_rank: expected rows of at most .* GiB, got \d+ rows of .*, or kfac\(\), diagonal"
    )
    with pytest.raises(OptionError, match=message):
        fim(*s.args)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"], ids=str)
def test_bad_rank_is_refused(rank: Any) -> None:
    s = KINDS["categorical"].setup()
    with pytest.raises(OptionError, match=r"low_rank: expected rank= to be None or an integer"):
        ff.low_rank(s.model, s.likelihood, rank=rank)
    with pytest.raises(OptionError, match=r"LowRank\.truncate: expected rank to be an integer"):
        thin(0).truncate(rank)


# ---- the algebra ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [thin, difference])
def test_answers_without_a_factorisation(make: Any) -> None:
    F, v = make(3), draw(1)
    m, x = matrix(F), flat(v)
    close(F.to_dense(), m)
    close(flat(F.mv(v)), m @ x)
    close(F.quadratic(v), x @ m @ x)
    close(F.trace(), m.trace())
    close(F.frobenius(), m.norm())
    close(flat(F.diagonal()), m.diagonal())
    close(F.eigenvalues(), torch.linalg.eigvalsh(m).flip(0))
    assert list(F.mv(dict(reversed(v.items())))) == list(PARAMS)


@settings(max_examples=30)
@given(seed=st.integers(0, 99), damping=st.sampled_from([0.3, 3, 20]), p=POWERS)
def test_answers_with_one(seed: int, damping: float, p: float) -> None:
    F, v, key = thin(seed), draw(seed), random.key(seed)
    m, x, z = damped(matrix(F), damping), flat(v), flat(trees.random_like(key, PARAMS))
    values, vectors = torch.linalg.eigh(m)
    close(flat(F.solve(v, damping=damping)), torch.linalg.solve(m, x), 1e-9)
    close(F.logdet(damping=torch.tensor(damping)), torch.logdet(m), 1e-6)
    close(F.logdet(damping=damping), torch.logdet(m))
    close(flat(F.pow(v, p, damping=damping)), vectors @ (values**p * (vectors.T @ x)), 1e-9)
    drawn = flat(F.sample(key, damping=damping))
    close(drawn @ m @ drawn, z @ z, 1e-8)


@settings(max_examples=15)
@given(seed=st.integers(0, 99), p=POWERS)
def test_answers_of_a_difference(seed: int, p: float) -> None:
    F, v, key = difference(seed), draw(seed), random.key(seed)
    lowest = float(torch.linalg.eigvalsh(matrix(F))[0])
    assert lowest < -0.1
    damping = 0.5 - lowest
    m, x, z = damped(matrix(F), damping), flat(v), flat(trees.random_like(key, PARAMS))
    values, vectors = torch.linalg.eigh(m)
    close(flat(F.solve(v, damping=damping)), torch.linalg.solve(m, x))
    close(F.logdet(damping=damping), torch.logdet(m))
    close(flat(F.pow(v, p, damping=damping)), vectors @ (values**p * (vectors.T @ x)))
    drawn = flat(F.sample(key, damping=damping))
    close(drawn @ m @ drawn, z @ z)
    close(F.truncate(2).to_dense(), _best(matrix(F), 2))


def _best(m: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    order = values.abs().argsort(descending=True)[:rank]
    return vectors[:, order] @ values[order].diag() @ vectors[:, order].T


@pytest.mark.parametrize("p", [0, 0.5, 2, 1.5])
def test_powers_that_need_no_inverse_need_no_damping(p: float) -> None:
    F, v = thin(1), draw(2)
    values, vectors = torch.linalg.eigh(matrix(F))
    want = vectors @ (values.clamp_min(0) ** p * (vectors.T @ flat(v)))
    if p == 0.5:  # roots of eigenvalues that are rounding errors
        close(flat(F.pow(v, p)), want, 1e-6)
    else:
        close(flat(F.pow(v, p)), want)


def test_truncation_is_ordered_and_keeps_what_it_can() -> None:
    F = thin(5)
    assert F.truncate(5) is F
    close(F.truncate(4).to_dense(), matrix(F))  # one row is zero
    close(F.truncate(2).to_dense(), _best(matrix(F), 2))
    rows = torch.cat([x.reshape(3, -1) for x in F.truncate(3).rows.values()], 1)
    close(rows @ rows.T, torch.linalg.eigvalsh(matrix(F)).flip(0)[:3].diag())


def test_samples_have_the_inverse_as_covariance() -> None:
    F, keys = thin(3), random.split(random.key(7), 3000)
    x = torch.vmap(lambda key: flat(F.sample(key, damping=0.5)))(keys)
    products = x[:, :, None] * x[:, None, :]
    stderr = products.std(0) / len(keys) ** 0.5
    want = torch.linalg.inv(damped(matrix(F), 0.5))
    assert bool(((products.mean(0) - want).abs() < 5 * stderr).all())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given_dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes(stored: torch.dtype, given_dtype: torch.dtype) -> None:
    F, v = trees.map(lambda x: x.to(stored), thin(2)), draw(1, given_dtype)
    wide = torch.promote_types(stored, torch.float32)
    both = torch.promote_types(wide, given_dtype)
    for tree in (F.mv(v), F.pow(v, 0.5, damping=0.1), F.pow(v, 2), F.pow(v, 0)):
        assert {x.dtype for x in trees.leaves(tree)} == {both}
    assert {x.dtype for x in F.solve(v, damping=0.1).values()} == {given_dtype}
    for tree in (F.diagonal(), F.sample(random.key(0), damping=0.1)):
        assert {x.dtype for x in trees.leaves(tree)} == {wide}
    numbers = [F.trace(), F.frobenius(), F.logdet(damping=0.1), F.eigenvalues(), F.to_dense()]
    assert {x.dtype for x in numbers} == {wide}


def test_a_small_damping_is_not_lost_beside_float32_rows() -> None:
    F = thin(1, dtype=torch.float32)
    F = LowRank(trees.scale(F.rows, 100.0), F.weights, F.count)
    m, v = damped(matrix(F), 1e-5), draw(3, torch.float32)
    want = torch.linalg.solve(m, flat(v))
    assert (flat(F.solve(v, damping=1e-5)) - want).norm() < 1e-4 * want.norm()


def test_rows_in_blocks_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    F, v = thin(2, dtype=torch.float32), draw(0)
    want = F.solve(v, damping=0.1), F.logdet(damping=0.1)
    monkeypatch.setattr("fisherfn.curvature.gram._BLOCK", 15)  # three columns at a time
    close(flat(F.solve(v, damping=0.1)), flat(want[0]), 1e-12)
    close(F.logdet(damping=0.1), want[1].double(), 1e-6)


# ---- joining -------------------------------------------------------------------------------------


def test_sums_and_merges_are_those_of_the_matrices() -> None:
    a, b = thin(1), thin(2, rows=3)
    b = LowRank(b.rows, b.weights, torch.tensor(15.0))
    close((a + b).to_dense(), matrix(a) + matrix(b))
    close((2 * a + (-3) * b).to_dense(), 2 * matrix(a) - 3 * matrix(b))
    close((torch.tensor(2.0) * a).to_dense(), 2 * matrix(a))
    both = ff.merge(a, b)
    close(both.to_dense(), 0.25 * matrix(a) + 0.75 * matrix(b))
    assert (both.count, both.signed) == (20, False)
    empty = ff.empty_like(a)
    assert (empty.count, len(empty.weights)) == (0, 0)
    assert torch.equal(ff.merge(empty, a).to_dense(), a.to_dense())
    close(flat(empty.solve(draw(1), damping=2.0)), flat(draw(1)) / 2)


def test_files_bring_back_the_same(tmp_path: Path) -> None:
    F = difference(0)
    ff.io.save(tmp_path / "rows.safetensors", F)
    again = ff.io.load(tmp_path / "rows.safetensors")
    assert (again.signed, again.fisher) == (True, "exact")
    assert torch.equal(again.to_dense(), F.to_dense())


# ---- transformations -----------------------------------------------------------------------------


def everything(F: Any, v: Any, damping: Any) -> dict[str, Any]:
    return {
        "mv": F.mv(v),
        "solve": F.solve(v, damping=damping),
        "root": F.pow(v, -0.5, damping=damping),
        "square": F.pow(v, 2, damping=damping),
        "logdet": F.logdet(damping=damping),
        "frobenius": F.frobenius(),
        "eigenvalues": F.eigenvalues(),
        "sample": F.sample(random.key(3), damping=damping),
        "merged": ff.merge(F, F).truncate(3).to_dense(),
    }


def same(a: Any, b: Any, tol: float = 1e-9) -> None:
    assert trees.structure(a) == trees.structure(b)
    for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def _distinct(F: LowRank) -> LowRank:
    """Without the row of zeros, and regular in the space of the rows."""
    return LowRank(trees.map(lambda x: x[2:], F.rows), F.weights[2:], F.count)


@pytest.mark.slow
@pytest.mark.parametrize("make", [thin, difference])
def test_compiled_is_eager(make: Any) -> None:
    F, v = make(3), draw(1)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    damping = torch.tensor(40.0, dtype=torch.float64)
    same(compiled(F, v, damping), everything(F, v, damping))
    torch._dynamo.reset()


def test_vmap_is_a_loop() -> None:
    members = [thin(seed) for seed in (3, 4)]
    many, v = trees.map(lambda *xs: torch.stack(xs), *members), draw(1)
    damping = torch.tensor(0.3, dtype=torch.float64)
    found = torch.vmap(lambda F: everything(F, v, damping))(many)
    for i, F in enumerate(members):
        same(trees.map(lambda x, i=i: x[i], found), everything(F, v, damping))
    assert "5 rows, 22 entries, count=<(2,)>" in repr(many)


@pytest.mark.parametrize("name", ["solve", "root", "logdet", "frobenius", "eigenvalues", "sample"])
def test_derivatives_are_finite_differences(name: str) -> None:
    F, v = _distinct(thin(2)), draw(1)
    damping = torch.tensor(0.3, dtype=torch.float64)
    direction = trees.map(lambda x: torch.zeros_like(x) if x.ndim == 0 else x.cos(), F)

    def f(F: Any) -> Tensor:
        return flat(everything(F, v, damping)[name]).cos().sum()

    step = 1e-6
    want = (f(trees.axpy(step, direction, F)) - f(trees.axpy(-step, direction, F))) / (2 * step)
    got = trees.dot(torch.func.grad(f)(F), direction)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_derivative_by_a_weight_of_zero_is_finite() -> None:
    F = _distinct(thin(2))
    F = LowRank(F.rows, torch.cat([F.weights[:-1], torch.zeros(1)]), F.count)
    slope = torch.func.grad(lambda F: trees.norm(F.solve(draw(1), damping=0.3)))(F)
    assert all(bool(x.isfinite().all()) for x in trees.leaves(slope))


def test_it_shares_a_pass_with_other_estimators() -> None:
    s = KINDS["categorical_sequence"].setup()
    both = ff.statistics(
        rows=ff.low_rank(s.model, s.likelihood, fisher="mc", num_samples=2),
        diag=ff.diagonal(s.model, s.likelihood, fisher="mc", num_samples=2),
    )
    found = both(*s.args, key=random.key(1))
    assert_close(found["rows"].diagonal(), found["diag"].values)


def test_the_estimator_compiles() -> None:
    s: cases.Setup = KINDS["categorical"].setup()
    fim = ff.low_rank(s.model, s.likelihood, fisher="empirical", rank=2)
    fast = torch.compile(fim, fullgraph=True, backend="aot_eager")
    assert_close(fast(*s.args), fim(*s.args))
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [5, 40])
def test_relative_damping_is_in_units_of_the_mean_eigenvalue(rows: int) -> None:
    F, v = thin(3, rows), trees.random_like(random.key(5), PARAMS)
    mean, key = float(matrix(F).diagonal().mean()), random.key(7)
    for answer in (
        lambda **options: F.solve(v, **options),
        lambda **options: F.pow(v, -0.5, **options),
        lambda **options: F.pow(v, 2, **options),
        lambda **options: F.logdet(**options),
        lambda **options: F.sample(key, **options),
    ):
        assert_close(answer(damping=0.1, relative=True), answer(damping=0.1 * mean))
    with pytest.raises(OptionError, match="expected damping >= 0"):
        F.solve(v, damping=-0.1, relative=True)
