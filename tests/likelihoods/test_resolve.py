"""Losses are refused with the likelihood to use instead."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fisherfn.core.errors import OptionError
from fisherfn.likelihoods import (
    Categorical,
    bernoulli,
    categorical,
    custom,
    gaussian,
    poisson,
    resolve,
)

INSTEAD = [
    (nn.CrossEntropyLoss(), "CrossEntropyLoss", r"categorical\(\) on the logits \(class_axis=1"),
    (nn.CrossEntropyLoss, "CrossEntropyLoss", r"categorical\(\)"),
    (F.cross_entropy, "cross_entropy", r"categorical\(\).*Batch.ignore\(targets, -100\)"),
    (nn.NLLLoss(), "NLLLoss", r"categorical\(\).*Log-probabilities do as well"),
    (F.nll_loss, "nll_loss", r"categorical\(\)"),
    (nn.BCEWithLogitsLoss(), "BCEWithLogitsLoss", r"bernoulli\(\) on the logits"),
    (F.binary_cross_entropy_with_logits, "binary_cross_entropy_with_logits", r"bernoulli\(\)"),
    (nn.BCELoss(), "BCELoss", r"bernoulli\(\) on the logits: leave the sigmoid out"),
    (F.binary_cross_entropy, "binary_cross_entropy", r"bernoulli\(\)"),
    (
        nn.MSELoss(),
        "MSELoss",
        r"no scale, so it is no likelihood\. Use likelihoods\.gaussian\(scale",
    ),
    (F.mse_loss, "mse_loss", r"gaussian\(scale\)"),
    (functools.partial(F.mse_loss, reduction="sum"), "mse_loss", r"gaussian\(scale\)"),
    (
        nn.GaussianNLLLoss(),
        "GaussianNLLLoss",
        r"custom\(log_prob, \.\.\.\) where the model predicts",
    ),
    (F.gaussian_nll_loss, "gaussian_nll_loss", r"gaussian\(scale\)"),
    (nn.PoissonNLLLoss(), "PoissonNLLLoss", r"poisson\(\) on the logarithms"),
    (F.poisson_nll_loss, "poisson_nll_loss", r"poisson\(\)"),
    (nn.L1Loss(), "L1Loss", r"custom\(log_prob, sample, \.\.\.\) with a normalised density"),
    (F.smooth_l1_loss, "smooth_l1_loss", r"custom\("),
    (nn.HuberLoss(), "HuberLoss", r"custom\("),
    (nn.KLDivLoss(reduction="sum"), "KLDivLoss", r"custom\("),
    (nn.HingeEmbeddingLoss(), "HingeEmbeddingLoss", r"custom\(log_prob, sample, \.\.\.\) with its"),
]


@pytest.mark.parametrize(("loss", "name", "advice"), INSTEAD, ids=lambda x: str(x)[:20])
def test_losses_are_refused_with_the_likelihood_to_use(loss: Any, name: str, advice: str) -> None:
    match = rf"diagonal: expected a likelihood, got .*{name}.* at likelihood\. .*{advice}.*"
    with pytest.raises(OptionError, match=match + r"The reduction of a loss plays no part\."):
        resolve("diagonal", loss)


@pytest.mark.parametrize(
    ("got", "match"),
    [
        (
            categorical,
            r"got categorical at likelihood\. Call it: likelihoods\.categorical\(\.\.\.\)",
        ),
        (
            Categorical,
            r"got Categorical at likelihood\. Call it: likelihoods\.categorical\(\.\.\.\)",
        ),
        (
            lambda z, y: z,
            r"Wrap a log-probability as likelihoods\.custom\(log_prob, \.\.\.\), or use",
        ),
        (nn.Linear(1, 1), r"Wrap a log-probability"),
        ("categorical", r"got 'categorical' at .* one of fisherfn\.likelihoods: bernoulli, categ"),
        (None, r"got None at likelihood\. Use one of"),
        (torch.ones(2), r"Use one of fisherfn\.likelihoods"),
        ([], r"got \[\] at likelihood\. Use one of"),
    ],
    ids=lambda x: str(x)[:20],
)
@pytest.mark.moves_global_rng
def test_anything_else_is_refused(got: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        resolve("diagonal", got)


def test_likelihoods_pass() -> None:
    for likelihood in (
        bernoulli(),
        categorical(),
        gaussian(1.0),
        poisson(),
        custom(lambda z, y: z),
    ):
        assert resolve("diagonal", likelihood) is likelihood
