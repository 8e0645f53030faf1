"""Confident logits, soft labels, labels that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from fisherfn.core import random
from fisherfn.core.errors import DataError, OptionError, ShapeError
from fisherfn.likelihoods import bernoulli

logit = st.one_of(st.floats(-30, 30), st.floats(-1e4, 1e4))


@given(logit)
def test_definitions_at_any_logit(value: float) -> None:
    z = torch.full((2, 1), value, dtype=torch.float64)
    y = torch.tensor([[0], [1]])
    likelihood = bernoulli()
    log_prob, score = likelihood.log_prob(z, y), likelihood.score(z, y)
    assert_close(log_prob, torch.cat([F.logsigmoid(-z[0]), F.logsigmoid(z[0])]))
    assert_close(log_prob.exp() @ score, torch.zeros(1).double(), rtol=0, atol=1e-15)
    # In this order neither factor cancels: sigma(z) sigma(-z).
    fisher = torch.sigmoid(z[:1]) * torch.sigmoid(-z[:1])
    assert_close(likelihood.root(z[:1], 0) ** 2, fisher, rtol=1e-11, atol=1e-300)
    assert_close(likelihood.fisher_mv(z[:1], 3 * torch.ones(1, 1)), 3 * fisher, rtol=1e-11, atol=0)


def test_score_of_a_confident_label_is_no_rounding() -> None:
    z, y = torch.tensor([[20.0, -20.0]]), torch.tensor([[1, 0]])
    want = torch.tensor([[2.0611536e-09, -2.0611536e-09]])  # 1 - sigmoid(20) is 0 in float32
    assert_close(bernoulli().score(z, y), want, rtol=1e-6, atol=0)


def test_soft_labels_have_the_gradient_of_the_cross_entropy() -> None:
    z = random.normal(random.key(0), (3, 2), torch.float64).requires_grad_()
    y = random.uniform(random.key(1), (3, 2), torch.float64)
    likelihood = bernoulli()
    likelihood.check_targets("test", z, y)
    loss = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1)
    assert_close(likelihood.log_prob(z, y), -loss)
    assert_close(likelihood.score(z, y), -torch.autograd.grad(loss.sum(), z)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_any_dtype_of_labels(dtype: torch.dtype) -> None:
    z, y = torch.zeros(1, 2), torch.tensor([[0, 1]]).to(dtype)
    bernoulli().check_targets("test", z, y)
    assert bernoulli().score(z, y).tolist() == [[-0.5, 0.5]]
    assert bernoulli().neutral(y, torch.tensor([False])).dtype == dtype


def test_frequencies_of_draws() -> None:
    z, n = torch.tensor([-3.0, 0.0, 1.5]), 20_000
    draws = bernoulli().sample(z.expand(n, 3), random.split(random.key(0), n))
    p = torch.sigmoid(z)
    assert ((draws.mean(0) - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    joint = (draws[:, 1] * draws[:, 2]).mean() - p[1] * p[2]  # entries are independent
    assert joint.abs() < 5 * (p[1] * p[2] / n) ** 0.5


def test_labels_rarer_than_float32_resolves() -> None:
    # With 24 bits u = 0 would have probability 6e-8 and be drawn: 100 times too often here.
    n = 2**21
    keys = random.key(0).expand(1, 2)
    draws = bernoulli().sample(torch.full((1, n), -21.2), keys)
    assert draws.sum() == 0  # expected 0.0013


def test_labels_out_of_range_are_named() -> None:
    z = torch.zeros(2, 2)
    bad: list[Any] = [
        (torch.tensor([[0, 1], [1, -1]]), "-1", r"\[1, 1\]"),
        (torch.tensor([[0.0, 1.5], [1, 0]]), "1.5", r"\[0, 1\]"),
        (torch.tensor([[torch.nan, 0.0], [1, 0]]), "nan", r"\[0, 0\]"),
    ]
    for y, got, place in bad:
        with pytest.raises(
            DataError,
            match=rf"test: expected labels from 0 to 1, got {got} at targets{place}\.",
        ):
            bernoulli().check_targets("test", z, y)
        assert bernoulli().poison(z, y)
        assert torch.isnan(bernoulli().log_prob(z, y)).any()
        assert torch.isnan(bernoulli().score(z, y)).sum() == 1


@pytest.mark.parametrize("event_ndim", [-1, 1.0, True, None])
def test_event_ndim_that_is_none(event_ndim: Any) -> None:
    with pytest.raises(
        OptionError, match=r"bernoulli: expected an integer >= 0, got .* at event_nd"
    ):
        bernoulli(event_ndim)


def test_outputs_without_event_axes() -> None:
    with pytest.raises(
        ShapeError,
        match=r"expected outputs \[B, \*positions, \*event\] with 1 event axes, got shape \(4,\) "
        r"at outputs\. .* likelihoods\.bernoulli\(\.\.\., event_ndim=0\)",
    ):
        bernoulli().positions_shape(torch.zeros(4))


def test_targets_that_would_broadcast() -> None:
    with pytest.raises(
        ShapeError, match=r"expected targets of shape \(4, 1\), got \(4,\) at targets"
    ):
        bernoulli().score(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"expected real targets, got torch.complex64"):
        bernoulli().score(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.complex64))
