"""The Fisher information as a sum of outer products, one for each example and column of labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.core.options import check_count
from fisherfn.curvature import LowRank
from fisherfn.estimators import checks
from fisherfn.estimators.dense import MATRIX_BUDGET
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.observe import Labels, Observed, columns_needed
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.leaf import LeafScores
from fisherfn.likelihoods import resolve


class ScoreRows(Statistic):
    """The scores as rows, already multiplied by `√(w/N)`."""

    needs_rows = True

    def __init__(self, labels: Labels, rank: int | None) -> None:
        """Keep all rows, or combine them to the best `rank` at the end."""
        self.labels, self.rank = labels, rank
        self._rows: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self._batch = 0

    def begin(self, params: Any) -> None:
        """Learn how large a row is."""
        leaves = trees.leaves(params)
        self._bytes = sum(t.numel() * max(4, t.element_size()) for t in leaves)

    def expect(self, batch: int) -> None:
        """Learn how many examples there are."""
        self._batch = batch

    def observe(self, observed: Observed) -> None:
        """Refuse what no machine should be asked for, before it is computed."""
        columns = columns_needed(self.labels, observed.likelihood, observed.outputs)
        rows = self._batch * columns * self.labels.num_samples
        if rows * self._bytes > MATRIX_BUDGET:
            raise OptionError(
                f"low_rank: expected rows of at most {MATRIX_BUDGET / 2**30:.0f} GiB, got {rows} "
                f"rows of {self._bytes / 2**20:.3g} MiB, {rows * self._bytes / 2**30:.3g} GiB. Use "
                "fisher='mc' or 'curvature_prop', which have one row for each example and draw, "
                "fewer examples, or kfac(), diagonal() or implicit()."
            )

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Keep this parameter's part of the rows."""
        self._rows.setdefault(leaf, []).append(scores.scores().flatten(0, 1))

    def result(self, frame: Frame) -> LowRank:
        """Return the curvature."""
        found = []
        for i in range(len(frame.leaves)):
            parts = self._rows.pop(i)
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        weights = found[0].new_full((len(found[0]),), 1.0 / self.labels.num_samples)
        rows = trees.unflatten(trees.structure(frame.params), found)
        whole = LowRank(rows, weights, frame.total, fisher=frame.fisher, unit=frame.unit)
        return whole if self.rank is None else whole.truncate(self.rank)


def low_rank(
    model: Any,
    likelihood: Any,
    *,
    fisher: str = "exact",
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
    rank: int | None = None,
) -> Estimator:
    """Give the whole Fisher information as a sum of outer products of scores, F = Sᵀ S.

    The rows of S [R, P] are the scores of each example, times √(w/N), for each column of labels:
    R = B for "empirical", "mc" and "curvature_prop" (times `num_samples`), B·T·(C - 1) for "exact".
    Exact like `dense`, and the better choice while R is less than P: solving takes R²P.

    See `diagonal` for the other options and the definition.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        fisher: Whose labels.
        num_samples: Draws of labels for each example.
        unit: What N counts.
        chunk_size: Examples processed together.
        rank: Keep only so many rows, those of the best approximation of F on this batch
            (`LowRank.truncate`). The result is then no longer F itself, and merging it with others
            gives the average of approximations.

    Returns:
        An estimator that gives a `LowRank`.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: R·P memory; one forward, and a backward for each column. With `rank`, R²P multiplications
    more.

    Reference: Jacot, Gabriel & Hongler (2018) for S Sᵀ, the neural tangent kernel; Ren & Goldfarb
    (2019), Efficient subsampled Gauss-Newton and natural gradient methods, for Woodbury's formula.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> batch = ff.Batch(torch.tensor([[2.0]]))
        >>> fim = ff.low_rank(model, ff.likelihoods.categorical())
        >>> fim({"w": torch.zeros(1, 2)}, {}, batch).to_dense()
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    labels = checks.check_options("low_rank", model, fisher, num_samples, unit, chunk_size)
    advice = "It is the number of rows to keep; None keeps all, which is exact."
    check_count("low_rank", "rank", rank, 1, advice, optional=True)
    options = {
        "fisher": fisher,
        "num_samples": num_samples,
        "unit": unit,
        "chunk_size": chunk_size,
        "rank": rank,
    }
    lik = resolve("low_rank", likelihood)
    return Estimator("low_rank", model, lik, options, labels, lambda: ScoreRows(labels, rank))
