"""What an estimator does with scores: one small accumulator a quantity.

A statistic receives the scores of one parameter after the other, for a block of columns and a chunk
of examples at a time, and never keeps more than its result needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisherfn.capture.plan import Plan
from fisherfn.core.modes import Unmixed
from fisherfn.estimators.observe import Observed
from fisherfn.layers.leaf import LeafScores


@dataclass(frozen=True)
class Frame:
    """The trees that results are shaped like, and what was counted."""

    params: Any
    leaves: list[Tensor]
    total: Tensor
    fisher: str
    unit: str
    batch: int


class Statistic(ABC, Unmixed):
    """Accumulates one quantity over columns, draws and chunks of examples, without autocast.

    Attributes:
        normalised: Whether the scores should come multiplied by `√(w/N)`.
        needs_scores: Whether scores are looked at, or only outputs.
        needs_rows: Whether whole rows of scores are formed, so that memory grows with P.
    """

    _unmixed = ("end_pull", "end_chunk", "end_draw", "result")
    normalised = True
    needs_scores = True
    needs_rows = False

    def begin(self, params: Any) -> None:
        """Learn what the parameters look like."""
        return

    def expect(self, batch: int) -> None:
        """Learn how many examples will come, masked ones included."""
        return

    def plan(self, plan: Plan) -> None:
        """Learn where the parameters are used."""
        return

    def sources(self, marks: Sequence[Any]) -> None:
        """Learn, for each tap of the plan, a mark of its input in a chunk: equal for one tensor."""
        return

    def observe(self, observed: Observed) -> None:
        """Look at the outputs of a chunk, before any pull-back."""
        return

    @abstractmethod
    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Receive the scores of a parameter; `root_weights` is `√(w/N)`, `[B]` or `[K, B]`."""

    def multiplications(self, leaf: int, scores: LeafScores) -> int:
        """Return the multiplications that `take` needs, for explanations."""
        return scores.multiplications()

    def end_pull(self) -> None:
        """All parameters have been taken for this block of columns."""
        return

    def end_chunk(self) -> None:
        """All columns of one draw have been taken for this chunk of examples."""
        return

    def end_draw(self) -> None:
        """All chunks have been taken for this draw of labels."""
        return

    @abstractmethod
    def result(self, frame: Frame) -> Any:
        """Return the finished quantity."""
