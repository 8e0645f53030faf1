"""The four kinds of labels, for every likelihood: what each is, and what it is on average."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fisherfn as ff
import oracles
from cases.kinds import KINDS, exact, ravel, setup, tree
from fisherfn.testing import assert_close
from oracles import Categorical

FISHERS = ("exact", "mc", "curvature_prop", "empirical")


NAMES = list(KINDS)


# ---- the oracle itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["categorical", "categorical_sequence", "categorical_warm"])
def test_oracle_drops_the_cross_terms_of_joint_labels_rightly(name: str) -> None:
    problem = setup(name).problem
    assert_close(oracles.dense(problem), oracles.joint_dense(problem))


# ---- exact and empirical -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_exact_is_the_expectation_over_every_label(name: str) -> None:
    s = setup(name)
    got = ff.dense(s.model, s.likelihood, fisher="exact")(*s.args)
    assert_close(got.to_dense(), exact(name))
    assert (got.fisher, got.unit, got.count.item()) == ("exact", "example", s.problem.size)


@pytest.mark.parametrize("name", NAMES)
def test_exact_is_the_default(name: str) -> None:
    s = setup(name)
    got = ff.diagonal(s.model, s.likelihood)(*s.args)
    assert got.fisher == "exact"
    assert_close(got.values, tree(name, exact(name).diagonal()))


@pytest.mark.parametrize("unit", ["example", "position"])
@pytest.mark.parametrize("name", NAMES)
def test_empirical_is_the_second_moment_of_observed_scores(name: str, unit: str) -> None:
    s = setup(name)
    got = ff.dense(s.model, s.likelihood, fisher="empirical", unit=unit)(*s.args)
    assert_close(got.to_dense(), oracles.dense(s.problem, "empirical", unit))
    assert got.unit == unit


@pytest.mark.parametrize("name", NAMES)
def test_one_column_at_all_positions_at_once_would_be_wrong(name: str) -> None:
    """Guards the guard: with positions that see each other the wrong trace is another number."""
    s = setup(name)
    positions = s.problem.positions()
    if "sequence" not in name or not positions:
        return
    outputs = torch.cat([s.problem.outputs(n) for n in range(s.problem.size)])
    root = s.likelihood.root(outputs.detach(), 0)
    together, apart = 0.0, 0.0
    for n in range(s.problem.size):
        both = oracles.gradient((outputs[n] * root[n]).sum(), s.problem.params)
        together += both.square().sum().item()
        for t in range(positions[0]):
            one = oracles.gradient((outputs[n, t] * root[n, t]).sum(), s.problem.params)
            apart += one.square().sum().item()
    assert abs(together - apart) > 0.05 * apart


# ---- the same matrix in every shape --------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "position"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(
    "name", ["categorical_sequence", "gaussian_scale_each", "poisson_sequence"]
)
def test_diagonal_is_the_diagonal_of_dense_and_of_its_blocks(
    name: str, fisher: str, unit: str
) -> None:
    s = setup(name)
    key = ff.random.key(7) if fisher in ("mc", "curvature_prop") else None
    options: dict[str, Any] = {"fisher": fisher, "unit": unit}
    diagonal = ff.diagonal(s.model, s.likelihood, **options)(*s.args, key=key)
    dense = ff.dense(s.model, s.likelihood, **options)(*s.args, key=key)
    blocks = ff.block_diagonal(s.model, s.likelihood, **options)(*s.args, key=key)
    matrix = dense.to_dense()
    assert_close(ravel(diagonal.values), matrix.diagonal(), what="diagonal of dense")
    separate = torch.block_diag(*oracles.blocks(matrix, s.problem.params).values())
    assert_close(blocks.to_dense(), separate, what="blocks of dense")
    assert_close(matrix, matrix.mT, what="symmetry")
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10 * matrix.diagonal().max()
    for result in (diagonal, dense, blocks):
        assert_close(result.trace(), matrix.trace(), what="trace")
        assert_close(result.diagonal(), diagonal.values, what="diagonal")


@pytest.mark.parametrize("name", ["categorical_sequence", "gaussian"])
def test_diagonal_is_the_mean_of_squared_scores(name: str) -> None:
    s = setup(name)
    scores = ff.per_sample_gradients(s.model, s.likelihood)(*s.args)
    diagonal = ff.diagonal(s.model, s.likelihood, fisher="empirical")(*s.args)
    assert_close(diagonal.values, {k: v.square().mean(0) for k, v in scores.items()})
    norms = ff.score_norms(s.model, s.likelihood)(*s.args)
    assert_close(norms.mean(), diagonal.trace())
    gram = ff.score_gram(s.model, s.likelihood)(*s.args)
    assert_close(gram.diagonal(), norms)
    flat = torch.cat([v.flatten(1) for v in scores.values()], dim=1)
    assert_close(gram, flat @ flat.mT)
    # Square of the mean instead of mean of squares: the commonest mistake of all.
    wrong = torch.stack([v.mean(0).square().sum() for v in scores.values()]).sum()
    assert (wrong - diagonal.trace()).abs() > 0.1 * diagonal.trace()


@pytest.mark.parametrize("name", ["categorical_sequence", "bernoulli"])
def test_moments_are_mean_and_mean_square_of_the_scores(name: str) -> None:
    s = setup(name)
    weights = torch.tensor([2.0, 0.5, 1.0, 0.0][: s.problem.size], dtype=torch.float64)
    batch = ff.Batch(s.batch.inputs, targets=s.batch.targets, weights=weights)
    problem = oracles.Problem(
        s.problem.forward,
        s.problem.params,
        s.problem.inputs,
        s.problem.family,
        s.problem.targets,
        None,
        weights,
    )
    count, mean, square = oracles.moments(problem)
    got = ff.gradient_moments(s.model, s.likelihood)(s.params, s.buffers, batch)
    assert got.count.item() == count
    assert_close(got.mean, tree(name, mean))
    assert_close(got.square, tree(name, square))


# ---- causal shift --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["categorical_sequence", "categorical_warm"])
def test_expected_score_is_zero_at_each_position(name: str) -> None:
    """Labels are scored by the distribution that they are drawn from, at their own position."""
    s = setup(name)
    size, length = s.problem.size, s.problem.positions()[0]
    estimator = ff.per_sample_gradients(s.model, s.likelihood)
    outputs = s.model(s.params, s.buffers, s.batch.inputs)
    family = s.problem.family
    assert isinstance(family, Categorical)
    probabilities = family.log_probs(outputs).exp()
    for t in range(length):
        mask = (torch.arange(length) == t).expand(size, -1)
        total = {k: torch.zeros(size, *p.shape, dtype=p.dtype) for k, p in s.params.items()}
        largest = 0.0
        for label in range(outputs.shape[-1]):
            targets = torch.full((size, length), label)
            batch = ff.Batch(s.batch.inputs, targets=targets, mask=mask)
            for k, score in estimator(s.params, s.buffers, batch).items():
                weight = probabilities[:, t, label].reshape(-1, *[1] * (score.ndim - 1))
                total[k] += weight * score
                largest = max(largest, score.abs().max().item())
        assert largest > 1e-3
        assert max(value.abs().max().item() for value in total.values()) < 1e-12 * max(largest, 1.0)


# ---- reductions and temperatures -----------------------------------------------------------------


def test_temperature_scales_drawing_and_scoring_alike() -> None:
    """Logits divided by 2 are the model of temperature 2."""
    warm = setup("categorical_warm")

    def halved(params: object, buffers: object, inputs: object) -> Tensor:
        return warm.model(params, buffers, inputs) / 2.0

    key = ff.random.key(5)
    for fisher, unit in itertools.product(("exact", "mc"), ("example", "position")):
        given = {} if fisher == "exact" else {"key": key}
        one = ff.diagonal(warm.model, warm.likelihood, fisher=fisher, unit=unit)
        two = ff.diagonal(halved, ff.likelihoods.categorical(), fisher=fisher, unit=unit)
        assert_close(one(*warm.args, **given).values, two(*warm.args, **given).values)


def test_gaussian_scale_is_a_standard_deviation() -> None:
    s = setup("gaussian")
    narrow = ff.diagonal(s.model, ff.likelihoods.gaussian(0.1))(*s.args)
    wide = ff.diagonal(s.model, ff.likelihoods.gaussian(1.0))(*s.args)
    assert_close(narrow.trace(), 100.0 * wide.trace())


def test_saturated_logits_stay_finite() -> None:
    """One minus a cumulative sum of probabilities would be NaN here."""

    def model(params: dict[str, Tensor], buffers: object, inputs: Tensor) -> Tensor:
        return inputs @ params["w"]

    params = {"w": torch.eye(4, dtype=torch.float64) * 80.0}
    inputs = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0], [1.0, 1, 0, 0]], dtype=torch.float64)
    batch = ff.Batch(inputs, targets=torch.tensor([0, 1, 2]))
    for fisher in FISHERS:
        key = ff.random.key(0) if fisher in ("mc", "curvature_prop") else None
        got = ff.diagonal(model, ff.likelihoods.categorical(), fisher=fisher)(
            params, {}, batch, key=key
        )
        assert got.values["w"].isfinite().all()
    exactly = ff.diagonal(model, ff.likelihoods.categorical())(params, {}, batch)
    p = torch.softmax(inputs @ params["w"], -1)
    assert_close(exactly.values["w"], inputs.square().T @ (p * (1 - p)) / 3, rtol=1e-6)
