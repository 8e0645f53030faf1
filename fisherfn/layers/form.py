"""What a layer's score is made of, whatever the layer: the interface of the three forms.

Shapes: B examples; K columns, the cotangents that were pulled back together (labels, columns of a
square root); a form stands for scores `[K, B, *shape]` of one use of one parameter, without forming
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from fisherfn.layers.memo import Memo


class Form(ABC):
    """Per-example scores of one parameter (or one view of it), kept in factored form."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter (or view) that the scores belong to."""

    @property
    def columns(self) -> int:
        """K, the number of cotangents."""
        return self.sample().shape[0]

    @property
    def batch(self) -> int:
        """B, the number of examples."""
        return self.sample().shape[1]

    @abstractmethod
    def scores(self) -> Tensor:
        """Return the scores `[K, B, *shape]`."""

    @abstractmethod
    def square_sum(self, total: Tensor | None = None) -> Tensor:
        """Return `total` plus the sum over columns and examples of squared scores, `[*shape]`."""

    @abstractmethod
    def sum(self) -> Tensor:
        """Return the sum over columns and examples of the scores, `[*shape]`."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Return the squared norms of the scores, `[K, B]`."""

    @abstractmethod
    def gram(self) -> Tensor:
        """Return inner products of all pairs of examples, summed over columns, `[B, B]`."""

    @abstractmethod
    def scaled(self, weight: Tensor) -> Form:
        """Return the form of the scores times `weight`, `[B]`."""

    def remembering(self, memo: Memo) -> Form:
        """Return the same form, which may keep in `memo` what depends on the inputs alone."""
        return self

    @abstractmethod
    def part(self, start: int, stop: int) -> Form:
        """Return the form of the examples `start` to `stop`."""

    @abstractmethod
    def joined(self, other: Form) -> Form | None:
        """Return the form of the sum of both scores, or None if it has no such form."""

    @abstractmethod
    def followed_by(self, others: Sequence[Form]) -> Form:
        """Return the form of these examples and those of other forms of the same kind."""

    @abstractmethod
    def multiplications(self) -> int:
        """Return the multiplications that `square_sum` needs."""

    @abstractmethod
    def sample(self) -> Tensor:
        """Return what the scores are made of, `[K, B, ...]`; it tells device and type too."""

    @property
    def score_bytes(self) -> int:
        """Bytes of the score of one example, all columns."""
        size = self.columns * self.sample().element_size()
        for n in self.shape:
            size *= n
        return size
