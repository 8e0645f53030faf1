"""The diagonal of the Fisher information, exact for each example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.curvature import Diagonal
from fisherfn.estimators import checks
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.numerics import accumulate
from fisherfn.likelihoods import resolve


class SquareSum(Statistic):
    """Sums of squared scores of every parameter; with several draws also their spread."""

    def __init__(self, num_samples: int) -> None:
        """Expect `num_samples` draws."""
        self.num_samples = num_samples
        self._now: dict[int, Tensor] = {}
        self._mean: dict[int, Tensor] = {}
        self._m2: dict[int, Tensor] = {}
        self._draws = 0

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Add the squares of this parameter's scores."""
        self._now[leaf] = scores.square_sum(self._now.get(leaf))

    def end_draw(self) -> None:
        """Update mean and spread over draws (Welford), one parameter at a time."""
        if self.num_samples == 1:
            return
        self._draws += 1
        n = self._draws
        for leaf in list(self._now):
            value = self._now.pop(leaf)
            mean = self._mean.get(leaf)
            if mean is None:
                self._mean[leaf], self._m2[leaf] = value, torch.zeros_like(value)
                continue
            delta = value - mean
            self._mean[leaf] = mean + delta / n
            self._m2[leaf] = accumulate(self._m2[leaf], delta * (value - self._mean[leaf]))

    def draws(self) -> tuple[dict[int, Tensor], dict[int, Tensor] | None]:
        """Return the sums, and with several draws the standard errors of their means."""
        if self.num_samples == 1:
            return self._now, None
        scale = 1.0 / (self._draws * (self._draws - 1))
        return self._mean, {i: _root(m2 * scale) for i, m2 in self._m2.items()}

    def result(self, frame: Frame) -> Diagonal:
        """Return the diagonal, with the standard error of the mean over draws."""
        structure = trees.structure(frame.params)
        values, errors = self.draws()
        order = range(len(frame.leaves))
        return Diagonal(
            trees.unflatten(structure, [values[i] for i in order]),
            frame.total,
            None if errors is None else trees.unflatten(structure, [errors[i] for i in order]),
            fisher=frame.fisher,
            unit=frame.unit,
        )


def _root(variance: Tensor) -> Tensor:
    """Return the square root, with derivative zero where draws agree."""
    spread = variance > 0
    return torch.where(spread, torch.where(spread, variance, 1.0).sqrt(), 0.0)


def diagonal(
    model: Any,
    likelihood: Any,
    *,
    fisher: str = "exact",
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
) -> Estimator:
    """Estimate the diagonal of the Fisher information, from each example's own score.

    F_ii = (1/N) Σ_n E_y[ s_ni² ], with s_n the gradient of the summed log-probability of unit n.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution, from `fisherfn.likelihoods`.
        fisher: Whose labels: "exact" (the model's, in closed form), "mc" (drawn from the model),
            "curvature_prop" (random signs, unbiased), "empirical" (the observed targets).
        num_samples: Draws of labels for each example, for "mc" and "curvature_prop". The
            expectation does not depend on it; with more than one, the result has a standard error.
        unit: What N counts: "example", a row of the batch, or "position", each of its positions.
        chunk_size: Examples processed together; None takes all that memory allows.

    Returns:
        An estimator: called with `(params, buffers, batch, *, key=None)` it gives a `Diagonal`.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: one forward and one backward for each draw, without weight gradients, and one contraction
    the size of the weight gradient. "exact" takes positions x (C - 1) pull-backs.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method,
    sections 5 and 9; Kunstner, Balles & Hennig (2019) for the empirical Fisher.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> params = {"w": torch.zeros(1, 2, dtype=torch.float64)}
        >>> batch = ff.Batch(torch.tensor([[2.0]], dtype=torch.float64))
        >>> fim = ff.diagonal(model, ff.likelihoods.categorical())
        >>> fim(params, {}, batch).values
        {'w': tensor([[1., 1.]], dtype=torch.float64)}
    """
    labels = checks.check_options("diagonal", model, fisher, num_samples, unit, chunk_size)
    options = {
        "fisher": fisher,
        "num_samples": num_samples,
        "unit": unit,
        "chunk_size": chunk_size,
    }
    lik = resolve("diagonal", likelihood)
    return Estimator("diagonal", model, lik, options, labels, lambda: SquareSum(num_samples))
