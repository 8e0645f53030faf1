"""Random labels and signs: right on average, with honest errors, tied to ids and keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fisherfn as ff
import oracles
from cases.kinds import KINDS, exact, ravel, setup
from fisherfn.testing import assert_close

NAMES = list(KINDS)


# ---- expectations --------------------------------------------------------------------------------


def sample(run: Callable[[Tensor], Tensor], draws: int, seed: int) -> Tensor:
    return torch.stack([run(key) for key in ff.random.split(ff.random.key(seed), draws)])


def assert_unbiased(draws: Tensor, truth: Tensor, precision: float) -> None:
    """|mean - truth| < 5 standard errors computed from the draws, which have to be small."""
    mean = draws.mean(0)
    error = draws.std(0) / draws.shape[0] ** 0.5
    excess = (mean - truth).abs() - 5.0 * error
    assert excess.max() < 1e-12, (
        f"off by {((mean - truth).abs() / error).max():.1f} standard errors"
    )
    total = draws.flatten(1).sum(1)
    assert total.std() / draws.shape[0] ** 0.5 < precision * truth.sum(), "too few draws to tell"


UNBIASED = [
    name
    for name in NAMES
    if name not in ("categorical_two_classes", "gaussian_two_axes", "categorical_cold")
]


@pytest.mark.parametrize(
    ("fisher", "num_samples", "draws"),
    [
        ("mc", 1, 150),
        ("mc", 5, 40),
        ("curvature_prop", 1, 150),
        ("curvature_prop", 5, 40),
    ],
)
@pytest.mark.parametrize("name", UNBIASED)
def test_random_labels_average_to_exact(
    name: str, fisher: str, num_samples: int, draws: int
) -> None:
    s = setup(name)
    estimator = ff.diagonal(s.model, s.likelihood, fisher=fisher, num_samples=num_samples)
    found = sample(lambda k: ravel(estimator(*s.args, key=k).values), draws, seed=11)
    assert_unbiased(found, exact(name).diagonal(), precision=0.12)


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
def test_random_labels_average_to_exact_off_the_diagonal(fisher: str) -> None:
    s = setup("categorical_sequence")
    estimator = ff.dense(s.model, s.likelihood, fisher=fisher)
    found = sample(lambda k: estimator(*s.args, key=k).to_dense(), 400, seed=12)
    mean, error = found.mean(0), found.std(0) / 400**0.5
    assert ((mean - exact("categorical_sequence")).abs() < 5.0 * error + 1e-12).all()


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
@pytest.mark.parametrize("unit", ["example", "position"])
def test_random_labels_average_to_exact_under_mask_and_weights(fisher: str, unit: str) -> None:
    s = setup("categorical_sequence")
    mask = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    if unit == "position":
        weights = weights.unsqueeze(1) * torch.tensor([1.0, 3.0, 0.25], dtype=torch.float64)
    batch = ff.Batch(s.batch.inputs, mask=mask, weights=weights)
    problem = oracles.Problem(
        s.problem.forward, s.problem.params, s.problem.inputs, s.problem.family, None, mask, weights
    )
    truth = oracles.diagonal(problem, unit=unit)
    exactly = ff.diagonal(s.model, s.likelihood, unit=unit)(s.params, s.buffers, batch)
    assert_close(ravel(exactly.values), truth)
    estimator = ff.diagonal(s.model, s.likelihood, fisher=fisher, unit=unit)
    found = sample(
        lambda k: ravel(estimator(s.params, s.buffers, batch, key=k).values), 300, seed=13
    )
    assert_unbiased(found, truth, precision=0.08)


def test_standard_error_is_that_of_the_mean_over_samples() -> None:
    """Reported standard errors match the spread over keys, and shrink as they should."""
    s = setup("categorical_sequence")
    for num_samples in (4, 16):
        estimator = ff.diagonal(s.model, s.likelihood, fisher="mc", num_samples=num_samples)
        results = [estimator(*s.args, key=k) for k in ff.random.split(ff.random.key(2), 120)]
        spread = torch.stack([ravel(r.values) for r in results]).var(0)
        claimed = torch.stack([ravel(r.stderr).square() for r in results]).mean(0)
        error = torch.stack([ravel(r.stderr).square() for r in results]).std(0) / 120**0.5
        # the variance of a sample variance over 120 keys is about 2/120 of its square, and more
        slack = 5.0 * (error + spread * (6.0 / 120) ** 0.5)
        assert ((spread - claimed).abs() < slack + 1e-14).all()
        assert (claimed.sum() / spread.sum() - 1.0).abs() < 0.25


def test_one_sample_has_no_standard_error() -> None:
    s = setup("categorical")
    got = ff.diagonal(s.model, s.likelihood, fisher="mc")(*s.args, key=ff.random.key(0))
    assert got.stderr is None


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
def test_more_samples_are_the_mean_of_their_own(fisher: str) -> None:
    """One draw of many samples has the spread of a mean, not of a sum or of a single one."""
    s = setup("gaussian")
    single = ff.diagonal(s.model, s.likelihood, fisher=fisher, num_samples=1)
    many = ff.diagonal(s.model, s.likelihood, fisher=fisher, num_samples=8)
    one = sample(lambda k: single(*s.args, key=k).trace(), 200, seed=3)
    eight = sample(lambda k: many(*s.args, key=k).trace(), 200, seed=4)
    ratio = one.var() / eight.var()
    assert 8 / 1.8 < ratio < 8 * 1.8


def test_keys_are_used() -> None:
    s = setup("categorical_sequence")
    for fisher in ("mc", "curvature_prop"):
        estimator = ff.diagonal(s.model, s.likelihood, fisher=fisher)
        first, again, other = (
            estimator(*s.args, key=ff.random.key(seed)).trace() for seed in (1, 1, 2)
        )
        assert first == again
        assert first != other


def test_labels_follow_ids_not_rows() -> None:
    """Two equal examples draw the same label under one id and their own under two."""
    s = setup("categorical")
    inputs = s.batch.inputs[:1].expand(40, -1)
    estimator = ff.diagonal(s.model, s.likelihood, fisher="mc")

    def trace(ids: Tensor | None, key: Tensor) -> Tensor:
        return estimator(s.params, s.buffers, ff.Batch(inputs, ids=ids), key=key).trace()

    alone = [
        estimator(s.params, s.buffers, ff.Batch(inputs[:1], ids=torch.tensor([9])), key=key).trace()
        for key in ff.random.split(ff.random.key(1), 5)
    ]
    same = [trace(torch.full((40,), 9), key) for key in ff.random.split(ff.random.key(1), 5)]
    assert_close(torch.stack(same), torch.stack(alone))
    own = trace(None, ff.random.key(1))
    assert all((own - value).abs() > 1e-6 for value in alone)


def test_custom_likelihood_equals_the_closed_form() -> None:
    """A likelihood given by its log-probability and sampler alone."""
    s = setup("gaussian")
    outputs = s.model(s.params, s.buffers, s.batch.inputs)

    def log_prob(outputs: Tensor, targets: Tensor) -> Tensor:
        return -0.5 * ((targets - outputs) / 0.5).square().sum(-1)

    def draw(outputs: Tensor, keys: Tensor) -> Tensor:
        noise = torch.vmap(lambda k: ff.random.normal(k, (3,), dtype=torch.float64))(keys)
        return outputs + 0.5 * noise

    custom = ff.likelihoods.custom(log_prob, sample=draw)
    assert outputs.shape[-1] == 3
    got = ff.diagonal(s.model, custom, fisher="empirical")(*s.args)
    assert_close(ravel(got.values), oracles.diagonal(s.problem, "empirical"))
    estimator = ff.diagonal(s.model, custom, fisher="mc")
    found = sample(lambda k: ravel(estimator(*s.args, key=k).values), 200, seed=21)
    assert_unbiased(found, exact("gaussian").diagonal(), precision=0.08)
