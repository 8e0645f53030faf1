"""Per-example scores: gradients of each example's own log-probability, their norms and products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.estimators import checks
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.numerics import accumulate
from fisherfn.likelihoods import resolve


class Scores(Statistic):
    """The scores themselves."""

    normalised = False

    def __init__(self) -> None:
        """Start empty."""
        self._chunks: dict[int, list[Tensor]] = {}

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Keep this chunk's scores of a parameter."""
        self._chunks.setdefault(leaf, []).append(scores.scores()[0])

    def result(self, frame: Frame) -> Any:
        """Return a tree like the parameters, each leaf `[B, *shape]`."""
        found = []
        for i in range(len(frame.leaves)):
            chunks = self._chunks.pop(i)
            found.append(chunks[0] if len(chunks) == 1 else torch.cat(chunks))
        return trees.unflatten(trees.structure(frame.params), found)


class Norms(Statistic):
    """Squared norms of the scores over all parameters."""

    normalised = False

    def __init__(self) -> None:
        """Start empty."""
        self._now: Tensor | None = None
        self._chunks: list[Tensor] = []

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Add this parameter's squared norms."""
        self._now = accumulate(self._now, scores.norms()[0])

    def end_chunk(self) -> None:
        """Begin with the next examples."""
        assert self._now is not None
        self._chunks.append(self._now)
        self._now = None

    def result(self, frame: Frame) -> Tensor:
        """Return `[B]`."""
        return torch.cat(self._chunks)


class Gram(Statistic):
    """Inner products of the scores of all pairs of examples."""

    normalised = False

    def __init__(self) -> None:
        """Start empty."""
        self._chunks: dict[int, list[LeafScores]] = {}

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Keep this chunk's scores in factored form."""
        self._chunks.setdefault(leaf, []).append(scores)

    def result(self, frame: Frame) -> Tensor:
        """Return `[B, B]`."""
        total = None
        for i in range(len(frame.leaves)):
            total = accumulate(total, LeafScores.stacked(self._chunks.pop(i)).gram())
        assert total is not None
        return total


def per_sample_gradients(
    model: Any, likelihood: Any, *, chunk_size: int | None = None
) -> Estimator:
    """Give the score of every example: the gradient of its summed log-probability.

    s_n = +∇_θ Σ_t log p(y_nt | x_n, θ), for the observed targets; unweighted, and zero where
    masked.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        chunk_size: Examples processed together.

    Returns:
        An estimator that gives a tree like the parameters, each leaf `[B, *shape]`.

    Raises:
        OptionError: an option makes no sense.

    Cost: one forward, one backward, and the memory of the result, B times the parameters.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> batch = ff.Batch(torch.tensor([[2.0]]), targets=torch.tensor([1]))
        >>> gradients = ff.per_sample_gradients(model, ff.likelihoods.categorical())
        >>> gradients({"w": torch.zeros(1, 2)}, {}, batch)
        {'w': tensor([[[-1.,  1.]]])}
    """
    return _of_scores("per_sample_gradients", model, likelihood, chunk_size, Scores)


def score_norms(model: Any, likelihood: Any, *, chunk_size: int | None = None) -> Estimator:
    """Give the squared norm of every example's score, without forming the scores.

    The norm runs over all parameters.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        chunk_size: Examples processed together.

    Returns:
        An estimator that gives `[B]`, in nats² / parameter².

    Raises:
        OptionError: an option makes no sense.

    Cost: one forward and one backward; for layers with T positions the cheaper of `T²(I+O)` and
    `T·I·O` multiplications an example.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> batch = ff.Batch(torch.tensor([[2.0]]), targets=torch.tensor([1]))
        >>> ff.score_norms(model, ff.likelihoods.categorical())({"w": torch.zeros(1, 2)}, {}, batch)
        tensor([2.])
    """
    return _of_scores("score_norms", model, likelihood, chunk_size, Norms)


def score_gram(model: Any, likelihood: Any, *, chunk_size: int | None = None) -> Estimator:
    """Give the inner products of all pairs of scores, without forming the scores.

    The Gram matrix `S Sᵀ` of the scores; divided by B it has the non-zero eigenvalues of the
    empirical Fisher information.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        chunk_size: Examples whose forward and backward run together; inputs and cotangents of all
            layers are kept for all examples.

    Returns:
        An estimator that gives `[B, B]`, symmetric.

    Raises:
        OptionError: an option makes no sense.

    Cost: one forward, one backward, and for each layer the cheaper of products of positions and
    products of scores, formed for a few rows of the weight at a time.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> batch = ff.Batch(torch.tensor([[2.0], [1.0]]), targets=torch.tensor([1, 0]))
        >>> ff.score_gram(model, ff.likelihoods.categorical())({"w": torch.zeros(1, 2)}, {}, batch)
        tensor([[ 2.0000, -1.0000],
                [-1.0000,  0.5000]])
    """
    return _of_scores("score_gram", model, likelihood, chunk_size, Gram)


def _of_scores(
    name: str, model: Any, likelihood: Any, chunk_size: int | None, make: type[Statistic]
) -> Estimator:
    labels = checks.check_options(name, model, "empirical", 1, "example", chunk_size)
    lik = resolve(name, likelihood)
    return Estimator(name, model, lik, {"chunk_size": chunk_size}, labels, make)
