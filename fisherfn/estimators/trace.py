"""The trace of the Fisher information: squared norms of scores, or random quadratic forms.

tr F = (1/N) Σ_n E_y ‖s_n‖²: the squared norms of the scores of single examples. The squared norm of
a mean gradient is something else (at most as much, and zero where a model has converged).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core.dtypes import wide
from fisherfn.core.errors import OptionError
from fisherfn.core.options import check_count
from fisherfn.estimators import checks
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.observe import Observed
from fisherfn.estimators.probed import ProbedTrace
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.numerics import accumulate, blocks
from fisherfn.layers.outer import Outer
from fisherfn.likelihoods import resolve
from fisherfn.linalg.hutchinson import summary
from fisherfn.linalg.results import Estimate
from fisherfn.linalg.space import check_key


class NormSum(Statistic):
    """Sums of squared norms of the scores, for each draw of labels."""

    def __init__(self) -> None:
        """Start empty."""
        self._now: Tensor | None = None
        self._draws: list[Tensor] = []

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Add the squared norms of this parameter's scores."""
        self._now = accumulate(self._now, wide(scores.norms()).sum())

    def end_draw(self) -> None:
        """Begin with the next draw."""
        assert self._now is not None
        self._draws.append(self._now)
        self._now = None

    def result(self, frame: Frame) -> Estimate:
        """Return the mean over draws, with its standard error."""
        draws = torch.stack(self._draws)
        value, stderr = summary(draws)
        if frame.fisher in ("exact", "empirical"):  # one draw, and nothing random
            return Estimate(
                value,
                torch.zeros_like(value),
                frame.total,
                fisher=frame.fisher,
                unit=frame.unit,
            )
        return Estimate(
            value, stderr, frame.total, fisher=frame.fisher, unit=frame.unit, draws=draws
        )


class Projections(Statistic):
    """Σ_n (s_nᵀ v)² for several random vectors v, which exist one leaf at a time."""

    def __init__(self, caller: str, num_samples: int) -> None:
        """Expect `num_samples` random vectors."""
        self.caller, self.num_samples = caller, num_samples
        self._key: Tensor | None = None
        self._inner: Tensor | None = None
        self._total: Tensor | None = None

    def observe(self, observed: Observed) -> None:
        """Learn the key of the random vectors."""
        check_key(self.caller, observed.key)
        self._key = observed.key

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Add this parameter's share of the inner products."""
        assert self._key is not None
        like = wide(scores.uses[0][0].sample())
        bytes_each = like.element_size() * math.prod(scores.shape)
        found = []
        for start, stop in blocks(self.num_samples, bytes_each, like):
            numbers = torch.arange(start, stop, device=self._key.device)
            keys = random.fold_in(random.fold_in(self._key, numbers), leaf).to(like.device)
            found.append(project(scores, random.rademacher(keys, scores.shape, like.dtype)))
        self._inner = accumulate(self._inner, torch.cat(found, dim=-1))

    def end_pull(self) -> None:
        """Square the inner products of whole scores."""
        assert self._inner is not None
        self._total = accumulate(self._total, (self._inner * self._inner).sum((0, 1)))
        self._inner = None

    def result(self, frame: Frame) -> Estimate:
        """Return the mean over random vectors, with its standard error."""
        assert self._total is not None
        value, stderr = summary(self._total)
        return Estimate(
            value, stderr, frame.total, fisher=frame.fisher, unit=frame.unit, draws=self._total
        )


def project(scores: LeafScores, vectors: Tensor) -> Tensor:
    """Return the inner products of scores with vectors `[m, *shape]`, as `[K, B, m]`."""
    if len(scores.uses) == 1:
        form, view = scores.uses[0]
        if isinstance(form, Outer) and not view:
            return _project_outer(form, vectors.reshape(-1, *form.shape))
    flat = vectors.flatten(1)
    found = []
    like = scores.uses[0][0].sample()
    for start, stop in blocks(scores.batch, scores.score_bytes, like):
        found.append(wide(scores.part(start, stop).scores()).flatten(2) @ flat.T)
    return torch.cat(found, dim=1)


def _project_outer(form: Outer, vectors: Tensor) -> Tensor:
    """Return gᵀ V a, summed over positions: one forward of the layer for each vector."""
    a, g = wide(form.a), wide(form.g)
    found = [((a @ v.transpose(-1, -2)) * g).sum((-1, -2, -3)) for v in vectors.unbind(0)]
    return torch.stack(found, dim=-1)


def trace(
    model: Any,
    likelihood: Any,
    *,
    fisher: str = "exact",
    method: str = "exact",
    num_matvecs: int | None = None,
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
    probes: str | None = None,
    target_stderr: float | None = None,
    relative: bool = False,
) -> Estimator | ProbedTrace:
    """Estimate the trace of the Fisher information.

    tr F = (1/N) Σ_n E_y ‖s_n‖². Method "exact" adds up the squared norms of single scores, which
    the capture gives for about one gradient; the others take products of F with random vectors.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution, from `fisherfn.likelihoods`.
        fisher: Whose labels: "exact", "mc", "curvature_prop" or "empirical".
        method: "exact", "hutchinson", "hutchpp" or "xtrace"; see `ff.linalg`.
        num_matvecs: Products, at most, for the random methods; 30 by default.
        num_samples: Draws of labels for each example, for "mc" and "curvature_prop".
        unit: What N counts: "example" or "position".
        chunk_size: Examples processed together.
        probes: Random vectors of the random methods; each has its own default.
        target_stderr: Stop as soon as the standard error is at most this.
        relative: Whether that is a share of the value.

    Returns:
        An estimator: called with `(params, buffers, batch, *, key=None)` it gives an `Estimate`. By
        method "exact", its standard error is that of the mean over draws of labels: 0 for "exact"
        and "empirical", infinite for one draw. By the random methods, which always need a key, it
        is that of the trace of the matrix of the labels drawn.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: by method "exact" one forward and one backward for each draw, without weight gradients;
    for exact labels positions x (C - 1) pull-backs. Otherwise two gradients, and about one for each
    product.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method, section
    5; Epperly, Tropp & Webber (2024) for XTrace, whose product count it takes from `num_matvecs`.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> params = {"w": torch.zeros(1, 2)}
        >>> batch = ff.Batch(torch.tensor([[2.0]]))
        >>> ff.trace(model, ff.likelihoods.categorical())(params, {}, batch).value
        tensor(2.)
    """
    labels = checks.check_options("trace", model, fisher, num_samples, unit, chunk_size)
    lik = resolve("trace", likelihood)
    options = {
        "fisher": fisher,
        "method": method,
        "num_matvecs": num_matvecs,
        "num_samples": num_samples,
        "unit": unit,
        "chunk_size": chunk_size,
        "probes": probes,
        "target_stderr": target_stderr,
        "relative": relative,
    }
    if method == "exact":
        given = {"num_matvecs": num_matvecs, "probes": probes, "target_stderr": target_stderr}
        wrong = [name for name, value in given.items() if value is not None]
        if wrong:
            raise OptionError(
                f"trace: expected no {wrong[0]}= for method='exact', got {given[wrong[0]]!r}. No "
                "products are taken there; use method='xtrace'."
            )
        return Estimator("trace", model, lik, options, labels, NormSum)
    return ProbedTrace("trace", model, lik, options)


def empirical_fisher_trace(
    model: Any,
    likelihood: Any,
    *,
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
) -> Estimator:
    """Estimate the trace of the empirical Fisher information by Hutchinson's method.

    With random signs v, tr F = E[vᵀ F v] and vᵀ F v = (1/N) Σ_n (s_nᵀ v)²: Jacobian-vector products
    of the log-probabilities of single examples, read off their scores. `trace` with
    `fisher="empirical"` has no noise and costs less; this function is for comparison.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        num_samples: Random vectors; the variance falls like 1/num_samples.
        unit: What N counts: "example" or "position".
        chunk_size: Examples processed together.

    Returns:
        An estimator: called with `(params, buffers, batch, *, key)` it gives an `Estimate`, which
        is differentiable. The standard error is infinite for one vector.

    Raises:
        OptionError: an option makes no sense, such as `num_samples=0`, or there is no key.

    Cost: one forward, one backward, and one forward of each layer for each random vector.

    Reference: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model, lik = lambda params, buffers, x: x @ params["w"], ff.likelihoods.categorical()
        >>> batch = ff.Batch(torch.tensor([[2.0]]), targets=torch.tensor([1]))
        >>> estimator = ff.empirical_fisher_trace(model, lik, num_samples=1000)
        >>> found = estimator({"w": torch.zeros(1, 2)}, {}, batch, key=ff.random.key(0))
        >>> bool((found.value - 2.0).abs() < 5 * found.stderr)
        True
    """
    name = "empirical_fisher_trace"
    labels = checks.check_options(name, model, "empirical", 1, unit, chunk_size)
    check_count(name, "num_samples", num_samples, 1, "It is the number of random vectors.")
    options = {"num_samples": num_samples, "unit": unit, "chunk_size": chunk_size}
    lik = resolve(name, likelihood)
    return Estimator(name, model, lik, options, labels, lambda: Projections(name, num_samples))


def generalized_fisher_trace(
    model: Any,
    likelihood: Any,
    *,
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
) -> Estimator:
    """Estimate the trace of the Fisher information, labels from the model, by Hutchinson's method.

    With J_n the Jacobian of the outputs for example n and B_n Bₙᵀ their Fisher information,
    tr F = (1/N) Σ_n tr(Bₙᵀ J_n J_nᵀ B_n) = (1/N) Σ_n E_v ‖J_nᵀ B_n v‖² for random signs v: sums of
    squared gradients, whose expectation is over the labels of the model and not those observed.
    Random vectors of this space are independent from example to example, so the estimate has less
    variance than one from as many vectors of parameter space.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        num_samples: Random vectors; the variance falls like 1/num_samples.
        unit: What N counts: "example" or "position".
        chunk_size: Examples processed together.

    Returns:
        An estimator: called with `(params, buffers, batch, *, key)` it gives an `Estimate`, which
        is differentiable. The standard error is infinite for one vector.

    Raises:
        OptionError: an option makes no sense, such as `num_samples=0`, or there is no key.

    Cost: one forward, and for each random vector one backward without weight gradients.

    Reference: Hutchinson (1990); Martens, Sutskever & Swersky (2012), Estimating the Hessian by
    back-propagating curvature, ICML, section 4.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model, lik = lambda params, buffers, x: x @ params["w"], ff.likelihoods.categorical()
        >>> estimator = ff.generalized_fisher_trace(model, lik, num_samples=3)
        >>> batch = ff.Batch(torch.tensor([[2.0]]))
        >>> estimator({"w": torch.zeros(1, 2)}, {}, batch, key=ff.random.key(0)).value
        tensor(2.)
    """
    name = "generalized_fisher_trace"
    labels = checks.check_options(name, model, "curvature_prop", num_samples, unit, chunk_size)
    options = {"num_samples": num_samples, "unit": unit, "chunk_size": chunk_size}
    return Estimator(name, model, resolve(name, likelihood), options, labels, NormSum)
