"""The whole Fisher information matrix [P, P]."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fisherfn.core import trees
from fisherfn.curvature.blocks import Blocks, Part
from fisherfn.curvature.common import Scalar, combine
from fisherfn.curvature.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Blocks):
    """A matrix: see `fisherfn.curvature.base` for the algebra and its conventions.

    Attributes:
        matrix: [P, P], symmetric; parameters in insertion order, each row-major.
        count: N, the units averaged over; 0-d float tensor.
        layout: Static structure of the parameters, `Layout.of(params)`.
        fisher: Which labels were used.
        unit: What is counted.

    Example:
        >>> import torch
        >>> params = {"w": torch.zeros(2)}
        >>> F = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor(8.0), Layout.of(params))
        >>> F.eigenvalues(), F.solve({"w": torch.tensor([3.0, 3.0])})
        (tensor([3., 1.]), {'w': tensor([1., 1.])})
        >>> F
        Dense(2 x 2, count=8, fisher='exact', unit='example')
    """

    matrix: Tensor
    count: Tensor
    layout: Layout
    _: KW_ONLY
    fisher: str = "exact"
    unit: str = "example"

    _averages = ("matrix",)
    _entrywise = True

    def _summary(self) -> str:
        return f"{self.layout.size} x {self.layout.size}"

    def _parts(self) -> list[Part]:
        leaves = tuple(range(len(self.layout.sizes)))
        return [Part("", self.matrix, leaves)] if leaves else []

    def _check_same(self, caller: str, other: Any) -> None:
        other.layout.check_same(caller, self.layout)

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        count = self.count if count is None else count
        matrix = combine(a, self.matrix, b, None if other is None else other.matrix)
        return replace(self, matrix=matrix, count=count)


trees.register_dataclass_node(Dense, ("matrix", "count"), ("layout", "fisher", "unit"))
