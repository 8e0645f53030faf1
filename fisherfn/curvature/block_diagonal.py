"""The diagonal blocks of the Fisher information: one for each leaf, or for a group of leaves."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, TreeMismatchError
from fisherfn.curvature.blocks import Blocks, Part
from fisherfn.curvature.common import Scalar, combine
from fisherfn.curvature.layout import Group, Layout

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(Blocks):
    """Block-diagonal: see `fisherfn.curvature.base` for the algebra and its conventions.

    Attributes:
        blocks: A matrix [n, n] for each group, under its name; the leaves of the group one after
            the other, each row-major.
        count: N, the units averaged over; 0-d float tensor.
        layout: Static structure of the parameters, `Layout.of(params)`.
        groups: Static pairs (name, paths of the leaves that the block covers), together each leaf
            once: `leaf_groups(layout)`, `layer_groups(layout)`, or any other partition.
        fisher: Which labels were used.
        unit: What is counted.

    Example:
        >>> import torch
        >>> from fisherfn.curvature.layout import leaf_groups
        >>> layout = Layout.of({"w": torch.zeros(2), "b": torch.zeros(1)})
        >>> blocks = {"w": torch.tensor([[2.0, 1.0], [1.0, 2.0]]), "b": torch.tensor([[5.0]])}
        >>> F = BlockDiagonal(blocks, torch.tensor(8.0), layout, leaf_groups(layout))
        >>> F.eigenvalues(), F.diagonal()
        (tensor([5., 3., 1.]), {'w': tensor([2., 2.]), 'b': tensor([5.])})
        >>> F
        BlockDiagonal(2 blocks, 3 x 3, count=8, fisher='exact', unit='example')
    """

    blocks: dict[str, Tensor]
    count: Tensor
    layout: Layout
    groups: tuple[Group, ...]
    _: KW_ONLY
    fisher: str = "exact"
    unit: str = "example"

    _averages = ("blocks",)
    _entrywise = True

    def _summary(self) -> str:
        many = "block" if len(self.groups) == 1 else "blocks"
        return f"{len(self.groups)} {many}, {self.layout.size} x {self.layout.size}"

    def _parts(self) -> list[Part]:
        position = {path: i for i, path in enumerate(self.layout.paths)}
        return [
            Part(name, self.blocks[name], tuple([position[path] for path in paths]))
            for name, paths in self.groups
        ]

    def _check(self, caller: str) -> None:
        names = [name for name, _ in self.groups]
        if len(set(names)) != len(names) or set(self.blocks) != set(names):
            raise TreeMismatchError(
                f"{caller}: expected one block for each of the groups {names}, got "
                f"{list(self.blocks)}. Name the blocks like the groups."
            )
        covered = [path for _, paths in self.groups for path in paths]
        if sorted(covered) != sorted(self.layout.paths) or not all(p for _, p in self.groups):
            raise OptionError(
                f"{caller}: expected groups that cover each leaf of the parameters once, got "
                f"{self.groups} for {list(self.layout.paths)}. Use leaf_groups or layer_groups."
            )
        super()._check(caller)

    def _check_same(self, caller: str, other: Any) -> None:
        other.layout.check_same(caller, self.layout)
        if dict(self.groups) != dict(other.groups):
            raise TreeMismatchError(
                f"{caller}: expected two results with the same groups, got {self.groups} and "
                f"{other.groups}. Compute both with the same options."
            )

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        count = self.count if count is None else count
        blocks = {
            name: combine(a, matrix, b, None if other is None else other.blocks[name])
            for name, matrix in self.blocks.items()
        }
        return replace(self, blocks=blocks, count=count)


trees.register_dataclass_node(
    BlockDiagonal, ("blocks", "count"), ("layout", "groups", "fisher", "unit")
)
