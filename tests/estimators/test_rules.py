"""Every layer rule and the general path against loops over single examples."""

from __future__ import annotations

import functools

import pytest
import torch

import cases
import fisherfn as ff
import oracles
from fisherfn.testing import assert_close

NAMES = list(cases.ALL)


@functools.cache
def setup(name: str) -> cases.Setup:
    return cases.ALL[name].setup()


@functools.cache
def rows(name: str, fisher: str) -> oracles.Rows:
    return oracles.rows(setup(name).problem, fisher)


def tree(name: str, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    return oracles.unravel(vector, setup(name).problem.params)


def rtol(name: str) -> float:
    return cases.ALL[name].rtol


@pytest.mark.parametrize("name", NAMES)
def test_scores(name: str) -> None:
    s = setup(name)
    got = ff.per_sample_gradients(s.model, s.likelihood)(*s.args)
    assert_close(got, tree(name, rows(name, "empirical").scores), rtol(name))


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_inner_products(name: str) -> None:
    s = setup(name)
    scores = rows(name, "empirical").scores
    norms = ff.score_norms(s.model, s.likelihood)(*s.args)
    gram = ff.score_gram(s.model, s.likelihood)(*s.args)
    assert_close(norms, scores.square().sum(1), rtol(name), "norms")
    assert_close(gram, scores @ scores.T, rtol(name), "gram")


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_diagonal(name: str, fisher: str) -> None:
    s = setup(name)
    found = rows(name, fisher)
    want = (found.weights.unsqueeze(1) * found.scores.square()).sum(0) / found.count
    got = ff.diagonal(s.model, s.likelihood, fisher=fisher)(*s.args)
    assert_close(got.values, tree(name, want), rtol(name))
    assert got.count.item() == found.count


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_matrix_and_blocks(name: str, fisher: str) -> None:
    s = setup(name)
    found = rows(name, fisher)
    want = (found.weights.unsqueeze(1) * found.scores).T @ found.scores / found.count
    dense = ff.dense(s.model, s.likelihood, fisher=fisher)(*s.args)
    assert_close(dense.to_dense(), want, rtol(name), "dense")
    blocks = ff.block_diagonal(s.model, s.likelihood, fisher=fisher)(*s.args)
    separate = torch.block_diag(*oracles.blocks(want, s.problem.params).values())
    assert_close(blocks.to_dense(), separate, rtol(name), "blocks")


@pytest.mark.parametrize("name", NAMES)
def test_moments(name: str) -> None:
    s = setup(name)
    scores = rows(name, "empirical").scores
    got = ff.gradient_moments(s.model, s.likelihood)(*s.args)
    assert_close(got.mean, tree(name, scores.mean(0)), rtol(name), "mean")
    assert_close(got.square, tree(name, scores.square().mean(0)), rtol(name), "square")
    assert got.count.item() == len(scores)


@pytest.mark.parametrize("name", NAMES)
def test_route(name: str) -> None:
    """The cases that are there for a rule are not answered by the general path."""
    s = setup(name)
    expected = cases.ALL[name].general
    report = ff.explain(ff.diagonal(s.model, s.likelihood, fisher="empirical"))(*s.args)
    assert [row.path for row in report.rows] == list(s.params)
    if expected is not None:
        assert set(report.general) == set(expected), str(report)
