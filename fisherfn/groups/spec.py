"""Which scalars of one parameter belong to one group, as static data.

A spec is made of plain Python values, so that it can be compared, hashed, compiled and written to a
file. Base groups are cut first:

    layout "runs"      `run` consecutive entries along `axis`, whatever the other indices; the last
                       run may be shorter
    layout "blocks"    output channels of a transposed convolution in `blocks` independent blocks:
                       base group (block of axis 0) * shape[axis] + (index along axis)
    layout "elements"  every scalar for itself, row-major
    layout "whole"     the whole tensor

and `order[base group]` is then the number of the group; without it, base groups are groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherfn.core.errors import OptionError, ShapeError
from fisherfn.core.options import is_count

KINDS = ("channel", "head", "row", "bucket", "element", "tensor", "label")
LAYOUTS = ("runs", "blocks", "elements", "whole")
REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class GroupSpec:
    """The groups of one parameter.

    Attributes:
        kind: What a group is: "channel", "head", "row", "bucket", "element", "tensor" or "label".
        shape: Shape of the parameter.
        axis: The axis along which the groups lie; None where they do not lie along one.
        num_groups: Number of groups.
        layout: How base groups are cut: "runs", "blocks", "elements" or "whole".
        run: Consecutive entries along `axis` in one base group, for "runs".
        blocks: Independent blocks along axis 0, for "blocks".
        order: Group of each base group, or None for its own number.
        parts: Names and numbers of groups of what is stored fused: `(("q", 8), ("k", 2), ...)`.
        names: Names of the groups, for labels.
        reduction: How `reduce` joins the scalars of a group: "sum" or "mean".
        into: Name of the pool that the groups are added to; None for a vector of the parameter's
            own, under its path.
        source: How the spec was found, for people; not compared.

    Example:
        >>> GroupSpec("head", (6, 4), 0, 3, run=2).sizes
        (8, 8, 8)
    """

    kind: str
    shape: tuple[int, ...]
    axis: int | None
    num_groups: int
    layout: str = "runs"
    run: int = 1
    blocks: int = 1
    order: tuple[int, ...] | None = None
    parts: tuple[tuple[str, int], ...] = ()
    names: tuple[str, ...] = ()
    reduction: str = "sum"
    into: str | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("layout", self.layout, LAYOUTS),
            ("reduction", self.reduction, REDUCTIONS),
        ):
            if value not in known:
                raise OptionError(
                    f"GroupSpec: expected {name} to be one of {list(known)}, got {value!r}. Use "
                    "groups.channels, heads, rows, elements or whole to make specs."
                )
        along = self.layout in ("runs", "blocks")
        if along != (self.axis is not None) or (
            self.axis is not None and not 0 <= self.axis < len(self.shape)
        ):
            raise ShapeError(
                f"GroupSpec: expected an axis of the shape {self.shape} for layout "
                f"{self.layout!r}, got {self.axis}. Only 'runs' and 'blocks' lie along an axis, "
                "counted from 0."
            )
        if self.layout == "blocks" and (self.axis != 1 or self.shape[0] % max(1, self.blocks)):
            raise ShapeError(
                f"GroupSpec: expected blocks along axis 0 of the shape {self.shape} and axis=1, "
                f"got blocks={self.blocks}, axis={self.axis}. Give the groups= of the convolution."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.run < 1 or self.blocks < 1 or self.num_groups < 0:
            raise OptionError(
                f"GroupSpec: expected positive numbers, got run={self.run}, blocks={self.blocks}, "
                f"num_groups={self.num_groups}. A run has at least one entry."
            )
        base = self.base_groups
        if self.order is None and base != self.num_groups:
            raise ShapeError(
                f"GroupSpec: expected num_groups={base} for the shape {self.shape} with layout "
                f"{self.layout!r} and run={self.run}, got {self.num_groups}. Pass order= to join "
                "them."
            )
        if self.order is not None and (
            len(self.order) != base or not all([0 <= g < self.num_groups for g in self.order])
        ):
            raise ShapeError(
                f"GroupSpec: expected order= to give each of {base} base groups a group below "
                f"{self.num_groups}, got {len(self.order)} numbers up to "
                f"{max(self.order, default=0)}. Count the runs along the axis."
            )
        if self.parts and sum([n for _, n in self.parts]) != self.num_groups:
            raise ShapeError(
                f"GroupSpec: expected parts with {self.num_groups} groups in all, got "
                f"{self.parts}. Name each group once."
            )
        if self.names and len(self.names) != self.num_groups:
            raise ShapeError(
                f"GroupSpec: expected {self.num_groups} names, got {len(self.names)}. Name each "
                "group once."
            )

    def __hash__(self) -> int:
        """Hash what tells most specs apart; an order may be as long as the parameter."""
        return hash((self.kind, self.shape, self.axis, self.num_groups, self.run, self.into))

    @property
    def base_groups(self) -> int:
        """Number of base groups, before `order`."""
        if self.layout == "whole":
            return 1
        if self.layout == "elements" or self.axis is None:
            return prod(self.shape)
        if self.layout == "blocks":
            return self.blocks * self.shape[self.axis]
        return -(-self.shape[self.axis] // self.run)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of scalars in each group."""
        return tuple(self.counts("cpu").tolist())

    def counts(self, device: torch.device | str) -> Tensor:
        """Return the number of scalars in each group, int64 `[num_groups]`."""
        base, n = self.base_groups, prod(self.shape)
        if self.layout == "runs" and base:
            assert self.axis is not None
            each = prod(self.shape[: self.axis]) * prod(self.shape[self.axis + 1 :])
            last = self.shape[self.axis] - (base - 1) * self.run
            counts = torch.full((base,), self.run * each, dtype=torch.int64, device=device)
            if last != self.run:
                counts = torch.cat([counts[:-1], counts.new_full((1,), last * each)])
        else:
            counts = torch.full((base,), n // base if base else 0, dtype=torch.int64, device=device)
        return self._regroup(counts)

    def fold(self, t: Tensor) -> Tensor:
        """Return the sum over each group of a tensor of the parameter's shape, `[num_groups]`."""
        if self.layout == "whole":
            found = t.sum().reshape(1)
        elif self.layout == "elements" or self.axis is None:
            found = t.reshape(-1)
        elif self.layout == "blocks":
            split = t.reshape(self.blocks, self.shape[0] // self.blocks, self.shape[1], -1)
            found = split.sum((1, 3)).reshape(-1)
        else:
            others = [d for d in range(len(self.shape)) if d != self.axis]
            found = sum_runs(t.sum(others) if others else t, self.run)
        return self._regroup(found)

    def spread(self, values: Tensor) -> Tensor:
        """Return the group's value at each scalar; broadcasts to the parameter's shape."""
        if self.order is not None:
            index = torch.tensor(self.order, dtype=torch.int64, device=values.device)
            values = values.index_select(0, index)
        if self.layout == "elements" or self.axis is None:
            return values.reshape([1] * len(self.shape) if self.layout == "whole" else self.shape)
        rest = len(self.shape) - 2
        if self.layout == "blocks":
            table = values.reshape(self.blocks, 1, self.shape[1])
            table = table.expand(-1, self.shape[0] // self.blocks, -1)
            return table.reshape(self.shape[0], self.shape[1], *[1] * rest)
        if self.run > 1:
            values = values.unsqueeze(1).expand(-1, self.run).reshape(-1)
        shape = [1] * len(self.shape)
        shape[self.axis] = self.shape[self.axis]
        return values[: self.shape[self.axis]].reshape(shape)

    def index(self) -> np.ndarray[Any, Any]:
        """Return the group of each scalar, int64; broadcasts to the parameter's shape."""
        if self.layout == "elements" or self.axis is None:
            whole = self.layout == "whole"
            index = np.arange(self.base_groups).reshape(
                [1] * len(self.shape) if whole else self.shape
            )
        elif self.layout == "blocks":
            block = np.arange(self.shape[0]) // (self.shape[0] // self.blocks)
            index = block[:, None] * self.shape[1] + np.arange(self.shape[1])
            index = index.reshape(*self.shape[:2], *[1] * (len(self.shape) - 2))
        else:
            shape = [1] * len(self.shape)
            shape[self.axis] = self.shape[self.axis]
            index = (np.arange(self.shape[self.axis]) // self.run).reshape(shape)
        return index if self.order is None else np.asarray(self.order, dtype=np.int64)[index]

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Return the values of what is stored fused by name, such as "q", "k" and "v".

        Args:
            values: `[num_groups]`.

        Returns:
            Vectors by name, in the order of `parts`.

        Raises:
            OptionError: Nothing is fused here.
        """
        if not self.parts:
            raise OptionError(
                f"GroupSpec.split: expected a spec with parts, got {self.kind} groups of one "
                "projection. Use the vector as it is."
            )
        pieces = values.split([n for _, n in self.parts])
        return {name: piece for (name, _), piece in zip(self.parts, pieces, strict=True)}

    def renamed(self, **changes: Any) -> GroupSpec:
        """Return a copy with other fields."""
        return replace(self, **changes)

    def _regroup(self, base: Tensor) -> Tensor:
        if self.order is None:
            return base
        index = torch.tensor(self.order, dtype=torch.int64, device=base.device)
        return base.new_zeros(self.num_groups).index_add(0, index, base)


def sum_runs(values: Tensor, run: int) -> Tensor:
    """Return the sums of `run` consecutive entries of a vector; the last run may be shorter.

    >>> sum_runs(torch.arange(5), 2)
    tensor([1, 5, 4])
    """
    if run == 1:
        return values
    missing = -len(values) % run
    if missing:
        values = torch.cat([values, values.new_zeros(missing)])
    return values.reshape(-1, run).sum(1)


def channels(shape: Sequence[int], *, axis: int = 0, blocks: int = 1) -> GroupSpec:
    """Return the spec of one group for each channel along an axis.

    Args:
        shape: Shape of the parameter.
        axis: 0 for linear layers and convolutions, `[out, in, ...]`; 1 for `Conv1D` and transposed
            convolutions, `[in, out, ...]`.
        blocks: The `groups=` of a transposed convolution, whose output channels are
            `blocks * shape[1]`.

    Returns:
        A spec with one group an output channel.

    Raises:
        ShapeError: There is no such axis, or the blocks do not divide axis 0.

    Example:
        >>> channels((8, 4, 3, 3)).num_groups, channels((4, 8), axis=1).num_groups
        (8, 8)
    """
    size = _axis("channels", shape, axis)
    if blocks > 1:
        return GroupSpec("channel", tuple(shape), axis, blocks * size, "blocks", blocks=blocks)
    return GroupSpec("channel", tuple(shape), axis, size)


def rows(shape: Sequence[int], *, axis: int = 0, bucket: int = 1) -> GroupSpec:
    """Return the spec of one group for each row of a table, or for `bucket` consecutive rows.

    Args:
        shape: Shape of the parameter.
        axis: The axis of the rows.
        bucket: Rows in one group; the last bucket may have fewer.

    Returns:
        A spec of kind "row", or "bucket".

    Raises:
        OptionError: `bucket` is no positive integer.
        ShapeError: There is no such axis.

    Example:
        >>> rows((10, 3), bucket=4).sizes
        (12, 12, 6)
    """
    size = _axis("rows", shape, axis)
    check_bucket("rows", bucket)
    kind = "row" if bucket == 1 else "bucket"
    return GroupSpec(kind, tuple(shape), axis, -(-size // bucket), run=bucket)


def check_bucket(caller: str, bucket: Any) -> None:
    """Raise unless `bucket` is a positive integer.

    Raises:
        OptionError: It is not.
    """
    if not is_count(bucket):
        raise OptionError(
            f"groups.{caller}: expected bucket to be an integer of at least 1, got {bucket!r}. It "
            "is the number of rows in one group."
        )


def elements(shape: Sequence[int]) -> GroupSpec:
    """Return the spec in which every scalar is its own group.

    >>> elements((2, 3)).num_groups
    6
    """
    return GroupSpec("element", tuple(shape), None, prod(shape), "elements")


def whole(shape: Sequence[int]) -> GroupSpec:
    """Return the spec in which the whole tensor is one group.

    >>> whole((2, 3)).sizes
    (6,)
    """
    return GroupSpec("tensor", tuple(shape), None, 1, "whole")


def _axis(caller: str, shape: Sequence[int], axis: int) -> int:
    if not (is_count(axis, 0) and axis < len(shape)):
        raise ShapeError(
            f"groups.{caller}: expected an axis of the shape {tuple(shape)}, got {axis!r}. Axes "
            "are counted from 0."
        )
    return shape[axis]
