"""Likelihoods: what turns a model's outputs into a distribution over targets."""

from __future__ import annotations

from fisherfn.likelihoods.base import Likelihood
from fisherfn.likelihoods.bernoulli import Bernoulli, bernoulli
from fisherfn.likelihoods.categorical import Categorical, categorical
from fisherfn.likelihoods.custom import Custom, custom
from fisherfn.likelihoods.gaussian import Gaussian, gaussian
from fisherfn.likelihoods.independent import Independent
from fisherfn.likelihoods.poisson import Poisson, poisson
from fisherfn.likelihoods.resolve import resolve

__all__ = [
    "Bernoulli",
    "Categorical",
    "Custom",
    "Gaussian",
    "Independent",
    "Likelihood",
    "Poisson",
    "bernoulli",
    "categorical",
    "custom",
    "gaussian",
    "poisson",
    "resolve",
]
