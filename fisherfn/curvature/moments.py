"""First and second moments of the scores, elementwise."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.trees import Tree
from fisherfn.curvature.base import Result
from fisherfn.curvature.common import Scalar, check_number, combine, scalar_like
from fisherfn.curvature.diagonal import check_tensors

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class GradientMoments(Result):
    """Mean and mean square of the scores of N units; it merges, but is no matrix.

    Attributes:
        count: N, 0-d float tensor.
        mean: Tree like the parameters, (1/N) Σ s_n.
        square: Tree like the parameters, (1/N) Σ s_n², the diagonal of the Fisher information.
        fisher: Which labels were used.
        unit: What is counted.

    Example:
        >>> mean, square = {"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}
        >>> GradientMoments(torch.tensor(8.0), mean, square).variance()
        {'w': tensor([4.])}
    """

    count: Tensor
    mean: Tree
    square: Tree
    _: KW_ONLY
    fisher: str = "empirical"
    unit: str = "example"

    _averages = ("mean", "square")
    _entrywise = True

    def _summary(self) -> str:
        leaves = trees.leaves(self.mean)
        return f"{len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'}"

    def _check(self, caller: str) -> None:
        self._check_count(caller)
        check_tensors(caller, "mean", self.mean)
        check_tensors(caller, "square", self.square)
        trees.check_like(caller, "square", self.square, self.mean, like_name="mean")

    def _check_same(self, caller: str, other: Any) -> None:
        trees.check_like(caller, "the second mean", other.mean, self.mean, like_name="the first")

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        count = self.count if count is None else count
        if other is None:
            mean, square = [
                trees.map(lambda x: combine(a, x), tree) for tree in (self.mean, self.square)
            ]
        else:
            mean, square = [
                trees.map(lambda x, y: combine(a, x, b, y), ours, theirs)
                for ours, theirs in ((self.mean, other.mean), (self.square, other.square))
            ]
        return replace(self, mean=mean, square=square, count=count)

    def variance(self, *, correction: float = 0.0) -> Tree:
        """Return the variance of the scores over units, elementwise.

        Args:
            correction: The c of Σ (s_n − mean)² / (N − c): 0 for the mean square deviation of these
                N units, 1 for an unbiased estimate for the population they are drawn from.

        Returns:
            Tree like the parameters, float32 or wider, not negative; NaN where N ≤ c. It is the
            difference of two moments, so it is only as exact as eps times the mean square.
        """
        self._check("GradientMoments.variance")
        count = wide(self.count)
        rest = count - check_number("GradientMoments.variance", "correction", correction)
        factor = torch.where(rest > 0, count / rest, torch.full_like(count, torch.nan))

        def leaf(mean: Tensor, square: Tensor) -> Tensor:
            spread = (wide(square) - wide(mean).square()).clamp_min(0.0)
            return spread * scalar_like(factor, spread)

        return trees.map(leaf, self.mean, self.square)


trees.register_dataclass_node(GradientMoments, ("count", "mean", "square"), ("fisher", "unit"))
