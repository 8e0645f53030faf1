"""First and second moments of the scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.curvature import GradientMoments
from fisherfn.estimators import checks
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.numerics import accumulate
from fisherfn.likelihoods import resolve


class Moments(Statistic):
    """Weighted means of scores and of their squares."""

    def __init__(self, num_samples: int) -> None:
        """Expect `num_samples` draws."""
        self.num_samples = num_samples
        self._mean: dict[int, Tensor] = {}
        self._square: dict[int, Tensor] = {}

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Add this parameter's scores and squares; scores come with `√(w/N)` once already."""
        mean = scores.scaled(root_weights).sum()
        self._mean[leaf] = accumulate(self._mean.get(leaf), mean)
        self._square[leaf] = scores.square_sum(self._square.get(leaf))

    def result(self, frame: Frame) -> GradientMoments:
        """Return the moments, averaged over draws."""
        structure, n = trees.structure(frame.params), len(frame.leaves)
        scale = 1.0 / self.num_samples
        mean = [self._mean[i] * scale for i in range(n)]
        square = [self._square[i] * scale for i in range(n)]
        return GradientMoments(
            frame.total,
            trees.unflatten(structure, mean),
            trees.unflatten(structure, square),
            fisher=frame.fisher,
            unit=frame.unit,
        )


def gradient_moments(
    model: Any,
    likelihood: Any,
    *,
    fisher: str = "empirical",
    num_samples: int = 1,
    chunk_size: int | None = None,
) -> Estimator:
    """Give mean and mean square of the examples' scores, from one backward.

    mean = (1/N) Σ_n s_n and square = (1/N) Σ_n s_n², elementwise. With observed labels the mean is
    the negative gradient of the mean loss, and `square - mean²` the variance of the per-example
    gradient.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        fisher: "empirical", or "mc" for labels drawn from the model.
        num_samples: Draws of labels for each example.
        chunk_size: Examples processed together.

    Returns:
        An estimator that gives `GradientMoments`.

    Raises:
        OptionError: an option does not exist; exact labels have mean zero by definition.

    Cost: that of `diagonal` plus the weight gradients.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> batch = ff.Batch(torch.tensor([[2.0], [2.0]]), targets=torch.tensor([1, 0]))
        >>> moments = ff.gradient_moments(model, ff.likelihoods.categorical())
        >>> found = moments({"w": torch.zeros(1, 2)}, {}, batch)
        >>> found.mean, found.square
        ({'w': tensor([[0., 0.]])}, {'w': tensor([[1., 1.]])})
    """
    labels = checks.check_options(
        "gradient_moments", model, fisher, num_samples, "example", chunk_size
    )
    if fisher not in ("empirical", "mc"):
        raise OptionError(
            f"gradient_moments: expected fisher='empirical' or 'mc', got {fisher!r}. The mean "
            "score under the model's own labels is zero; diagonal() gives the mean square."
        )
    options = {"fisher": fisher, "num_samples": num_samples, "chunk_size": chunk_size}
    lik = resolve("gradient_moments", likelihood)
    return Estimator("gradient_moments", model, lik, options, labels, lambda: Moments(num_samples))
