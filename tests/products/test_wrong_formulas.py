"""Formulas that have passed for these quantities elsewhere, on fixtures that tell them apart.

Each fixture first shows that the wrong formula is wrong there, so that the test could fail.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linalg.operators import rotated
from torch import Tensor

import cases
import fisherfn as ff
import oracles
from fisherfn.testing import assert_close

KEY = ff.random.key(3)


@pytest.fixture
def s() -> cases.Setup:
    return cases.ALL["mlp"].setup()


def vector(s: cases.Setup) -> Any:
    return ff.tree.random_like(ff.random.key(1), s.params)


def mean_score(s: cases.Setup) -> Tensor:
    return oracles.scores(s.problem).mean(0)


@pytest.mark.parametrize("product", [ff.ggn_vp, ff.fisher_vp, ff.empirical_vp])
def test_no_product_is_that_of_the_outer_product_of_the_mean_gradient(
    s: cases.Setup, product: Any
) -> None:
    v, mean = vector(s), mean_score(s)
    wrong = mean * (mean @ ff.tree.ravel(v)[0])
    got = ff.tree.ravel(product(s.model, s.likelihood)(*s.args, v))[0]
    across = got - mean * (mean @ got) / (mean @ mean)
    assert across.norm() > 0.1 * got.norm()
    assert (got - wrong).norm() > 0.1 * got.norm()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_spectrum_has_the_rank_of_the_scores_and_no_eigenvalue_twice(
    s: cases.Setup, fisher: str
) -> None:
    # of the rank-one matrix, a Lanczos without orthogonalisation returned 0.438 four times
    truth = ff.dense(s.model, s.likelihood, fisher=fisher)(*s.args).eigenvalues()[:4]
    assert (truth[1:] < 0.95 * truth[:-1]).all()  # four of them, well apart
    assert truth[1] > 0.01 * truth[0]
    F = ff.linearized(s.model, s.likelihood, fisher=fisher)(*s.args)
    got = ff.linalg.lanczos(F, s.params, k=4, key=KEY, tolerance=1e-9)
    assert_close(got.eigenvalues, truth, rtol=1e-8)


def test_product_with_the_rank_one_matrix_itself_has_one_eigenvalue(s: cases.Setup) -> None:
    mean, restore = mean_score(s), ff.tree.ravel(s.params)[1]

    def mv(v: Any) -> Any:
        return restore(mean * (mean @ ff.tree.ravel(v)[0]))

    got = ff.linalg.lanczos(mv, s.params, k=4, key=KEY)
    assert_close(got.eigenvalues[0], mean @ mean, rtol=1e-10)
    assert (got.eigenvalues[1:].abs() < 1e-12 * got.eigenvalues[0]).all()


def test_gauss_newton_product_is_not_zero(s: cases.Setup) -> None:
    # a detached output in the last step gave zeros of the right shapes
    v = vector(s)
    outputs = lambda p: s.model(p, s.buffers, s.batch.inputs)  # noqa: E731
    jacobian = torch.cat(
        [j.flatten(2) for j in torch.func.jacrev(outputs)(s.params).values()], dim=2
    )
    total = torch.zeros_like(ff.tree.ravel(v)[0])
    for z, J in zip(outputs(s.params), jacobian, strict=True):
        p = z.softmax(-1)
        total = total + J.T @ ((p.diag() - torch.outer(p, p)) @ (J @ ff.tree.ravel(v)[0]))
    want = total / len(jacobian)
    assert want.norm() > 0.01
    single = ff.ggn_vp(s.model, s.likelihood)(*s.args, v)
    linearised = ff.linearized(s.model, s.likelihood)(*s.args)(v)
    for got in (single, linearised):
        assert_close(ff.tree.ravel(got)[0], want, rtol=1e-9)


def test_documented_traces_agree_and_are_no_norms_of_a_mean_gradient(s: cases.Setup) -> None:
    # one was ‖ḡ‖², the other N²‖ḡ‖², whatever num_samples: 256 times the first for 16 examples
    scores = oracles.scores(s.problem)
    mean, size = mean_score(s).square().sum(), len(scores)
    truths = {
        "empirical": scores.square().sum() / size,
        "exact": ff.dense(s.model, s.likelihood)(*s.args).trace(),
    }
    for make, fisher in (
        (ff.empirical_fisher_trace, "empirical"),
        (ff.generalized_fisher_trace, "exact"),
    ):
        got = make(s.model, s.likelihood, num_samples=400)(*s.args, key=KEY)
        assert (got.value - truths[fisher]).abs() < 5 * got.stderr
        for wrong in (mean, size**2 * mean):
            assert (got.value - wrong).abs() > 5 * got.stderr
        exact = ff.trace(s.model, s.likelihood, fisher=fisher)(*s.args)
        assert_close(exact.value, truths[fisher], rtol=1e-9)


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_sparse_probes_of_a_hessian_are_rescaled(density: float) -> None:
    # unscaled, a tenth of the entries gave 7.68 for 75
    w = {"w": torch.arange(1.0, 6.0, dtype=torch.float64)}
    model = lambda params, buffers, x: x * params["w"]  # noqa: E731
    batch = ff.Batch(torch.ones(1, 5).double(), torch.zeros(1, 5).double())
    lik = ff.likelihoods.gaussian((1 / 15) ** 0.5)  # H = 15 I
    H = ff.linearized(model, lik, matrix="hessian")(w, {}, batch)
    got = ff.linalg.hutchinson(H, w, num_matvecs=800, key=KEY, density=density)
    assert (got.value - 75.0).abs() <= 5 * got.stderr + 1e-9
    assert got.stderr < 10.0
    assert got.value > 40.0


@pytest.mark.parametrize("step", [1e-6, None])
def test_finite_differences_in_float32(s: cases.Setup, step: float | None) -> None:
    # one-sided with this absolute step in float32 the error was 359 %
    v = vector(s)
    want = ff.tree.ravel(ff.hvp(s.model, s.likelihood)(*s.args, v))[0]
    params = {name: p.float() for name, p in s.params.items()}
    batch = ff.Batch(s.batch.inputs.float(), s.batch.targets)
    got = ff.finite_difference_vp(s.model, s.likelihood, step=step)(params, s.buffers, batch, v)
    error = (ff.tree.ravel(got)[0].double() - want).norm() / want.norm()
    assert (error > 0.02) if step else (error < 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_steps", [20, 40, 100])
@pytest.mark.parametrize(
    "spectrum",
    [[5.0] + [0.0] * 199, [10.0, 9.0] + [1.0] * 198, [10.0] + [0.01] * 199],
    ids=["rank one", "two above a cluster", "one above a cluster"],
)
def test_long_iterations_return_no_eigenvalue_twice(
    spectrum: list[float], max_steps: int, dtype: torch.dtype
) -> None:
    # windows of a few vectors, or one pass over all, gave (10, 9.8, 9, 5.3) and (10, 10, 10, 10)
    known = rotated(spectrum, dtype=dtype)
    got = ff.linalg.lanczos(
        known.mv, known.like, k=5, key=KEY, max_steps=max_steps, verify=max_steps
    )
    want = torch.tensor(spectrum[:5], dtype=torch.float64)
    atol = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * spectrum[0]
    torch.testing.assert_close(got.eigenvalues.double(), want, rtol=0, atol=atol)
