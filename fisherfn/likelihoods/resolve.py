"""From what a caller hands over as likelihood to a `Likelihood`, or to an error that says which."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.nn.modules import loss as losses

from fisherfn.core.errors import OptionError
from fisherfn.likelihoods.base import Likelihood
from fisherfn.likelihoods.bernoulli import bernoulli
from fisherfn.likelihoods.categorical import categorical
from fisherfn.likelihoods.custom import custom
from fisherfn.likelihoods.gaussian import gaussian
from fisherfn.likelihoods.poisson import poisson

_FACTORIES = (bernoulli, categorical, custom, gaussian, poisson)

_CATEGORICAL = (
    "Use likelihoods.categorical() on the logits (class_axis=1 where the classes come second). "
    "What it ignores becomes a mask, Batch.ignore(targets, -100); class weights become weights."
)
_GAUSSIAN = (
    "A squared error has no scale, so it is no likelihood. Use likelihoods.gaussian(scale), scale "
    "being the standard deviation of the noise."
)
_PREDICTED = (
    "Use likelihoods.gaussian(scale) where the scale is known, and "
    "likelihoods.custom(log_prob, ...) where the model predicts it."
)
_ROBUST = (
    "Use likelihoods.custom(log_prob, sample, ...) with a normalised density, such as that of the "
    "Laplace distribution."
)
_OTHER = "Use likelihoods.custom(log_prob, sample, ...) with its normalised log-probability."

# (module class, function, what to use instead). A subclass comes before its base.
_LOSSES: tuple[tuple[type[nn.Module], Any, str], ...] = (
    (nn.CrossEntropyLoss, F.cross_entropy, _CATEGORICAL),
    (
        nn.NLLLoss,
        F.nll_loss,
        _CATEGORICAL + " Log-probabilities do as well as logits: softmax undoes their logarithm.",
    ),
    (
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        "Use likelihoods.bernoulli() on the logits.",
    ),
    (
        nn.BCELoss,
        F.binary_cross_entropy,
        "Use likelihoods.bernoulli() on the logits: leave the sigmoid out of the model.",
    ),
    (nn.MSELoss, F.mse_loss, _GAUSSIAN),
    (nn.GaussianNLLLoss, F.gaussian_nll_loss, _PREDICTED),
    (
        nn.PoissonNLLLoss,
        F.poisson_nll_loss,
        "Use likelihoods.poisson() on the logarithms of the rates.",
    ),
    (nn.L1Loss, F.l1_loss, _ROBUST),
    (nn.SmoothL1Loss, F.smooth_l1_loss, _ROBUST),
    (nn.HuberLoss, F.huber_loss, _ROBUST),
    (nn.KLDivLoss, F.kl_div, _OTHER),
    (losses._Loss, None, _OTHER),  # every other loss module of torch
)


def resolve(caller: str, likelihood: Any) -> Likelihood:
    """Return the likelihood, or say which one to use instead.

    Args:
        caller: The public function that was handed it, for the message.
        likelihood: What was handed over.

    Returns:
        The same object, if it is a likelihood.

    Raises:
        OptionError: Anything else. Losses of torch are recognised, also through `partial`.

    Example:
        >>> resolve("diagonal", bernoulli()).name
        'bernoulli'
        >>> resolve("diagonal", nn.BCEWithLogitsLoss())
        Traceback (most recent call last):
        fisherfn.core.errors.OptionError: diagonal: expected a likelihood, got BCEWithLogits...
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    got = getattr(likelihood, "__name__", None) or repr(likelihood)
    raise OptionError(
        f"{caller}: expected a likelihood, got {got} at likelihood. {_advice(likelihood)}"
    )


def _advice(got: Any) -> str:
    if isinstance(got, functools.partial):
        return _advice(got.func)
    if got in _FACTORIES or (inspect.isclass(got) and issubclass(got, Likelihood)):
        return f"Call it: likelihoods.{got.__name__.lower()}(...)."
    for module, function, advice in _LOSSES:
        is_module = issubclass(got, module) if inspect.isclass(got) else isinstance(got, module)
        if is_module or (function is not None and got is function):
            return f"{advice} The reduction of a loss plays no part."
    names = ", ".join(factory.__name__ for factory in _FACTORIES)
    if callable(got):
        return (
            f"Wrap a log-probability as likelihoods.custom(log_prob, ...), or use one of {names}."
        )
    return f"Use one of fisherfn.likelihoods: {names}."
