"""Which parameters of a model have a Kronecker block, as the plan of its sites tells.

A weight has one if the places where it is used see parts of it that share no entry: then the rows
that each part sees are those of one layer. A weight that is used twice, tied or reused, has a score
that is the sum over its uses, whose second moment is no Kronecker product (nor is the sum of two);
it keeps its exact diagonal. A bias joins the block of the weight that it is used with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisherfn.capture.plan import Plan, Tap, Use
from fisherfn.curvature.kronecker import Step
from fisherfn.layers.convolution import ConvolutionBuilder
from fisherfn.layers.elementwise import ShiftBuilder
from fisherfn.layers.embedding import EmbeddingBuilder
from fisherfn.layers.linear import MatrixBuilder
from fisherfn.layers.views import Factor, Permute, Reshape, Slice, View, disjoint


@dataclass(frozen=True)
class Bias:
    """What is added to the output of a weight.

    Attributes:
        leaf: Which parameter.
        view: The part of it.
        number: Which of several uses it is; None if it is the only one.
    """

    leaf: int
    view: View
    number: int | None


@dataclass(frozen=True)
class Role:
    """One use of a weight: a block to be.

    Attributes:
        view: The part of the leaf that is used.
        number: Which of several uses it is; None if it is the only one.
        bias: What is added to the output, or None.
        parts: Blocks of outputs that do not interact: queries, keys and values.
        tap: Which call of the plan it is.
        reading: How the rows of the input come from it; equal for layers of one kind.
    """

    view: View
    number: int | None
    bias: Bias | None
    parts: int
    tap: int
    reading: tuple[Any, ...]


def named(path: str, use: Role | Bias) -> str:
    """Return the name of the block of a use of a parameter."""
    return path if use.number is None else f"{path}[{use.number}]"


@dataclass(frozen=True)
class Roles:
    """What each leaf is: a weight with blocks, the bias of one, or neither."""

    weights: dict[int, tuple[Role, ...]]
    biases: frozenset[int]

    @staticmethod
    def of(plan: Plan, leaves: Sequence[Tensor]) -> Roles:
        """Learn the roles of all leaves."""
        uses: dict[int, list[tuple[int, Use]]] = {}
        for index, tap in enumerate(plan.taps):
            for use in tap.uses:
                uses.setdefault(use.leaf, []).append((index, use))
        weights = {
            leaf: places
            for leaf, places in uses.items()
            if leaves[leaf].numel() and _is_weight(leaves[leaf], [use for _, use in places])
        }
        partners: dict[tuple[int, int], Bias] = {}
        biases = set()
        for leaf, places in uses.items():
            found = _partners(plan, weights, leaves, leaf, places)
            if found:
                biases.add(leaf)
                many = len(found) > 1
                for number, (partner, view) in enumerate(found.items()):
                    partners[partner] = Bias(leaf, view, number if many else None)
        roles = {}
        for leaf, places in weights.items():
            many = len(places) > 1
            roles[leaf] = tuple(
                Role(
                    use.view,
                    number if many else None,
                    partners.get((leaf, index)),
                    getattr(use.builder, "parts", 1),
                    index,
                    _reading(plan.taps[index], use),
                )
                for number, (index, use) in enumerate(places)
            )
        return Roles(roles, frozenset(biases))

    def members(self, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return leaf and number of every block of a weight, by name."""
        return {
            named(paths[leaf], role): (leaf, role.number or 0)
            for leaf, roles in self.weights.items()
            for role in roles
        }

    def role(self, leaf: int, view: View) -> Role:
        """Return the role of a use that sees a leaf through a view, which a builder may extend."""
        for role in self.weights[leaf]:
            if view[: len(role.view)] == role.view:
                return role
        raise AssertionError("every use was planned")


def _reading(tap: Tap, use: Use) -> tuple[Any, ...]:
    """Return the kind of a layer, then all that decides how it reads a given input."""
    builder, axes = use.builder, (tap.kept_axes, tap.axis, tap.rank)
    if isinstance(builder, MatrixBuilder):
        return ("matrix", builder.left, *axes)
    if isinstance(builder, ConvolutionBuilder):
        kind = "transposed convolution" if builder.transposed else "convolution"
        return (kind, builder.geometry, *axes)
    return ("table", *axes)


def _is_weight(leaf: Tensor, uses: Sequence[Use]) -> bool:
    builders = (MatrixBuilder, ConvolutionBuilder, EmbeddingBuilder)
    if not all(isinstance(use.builder, builders) for use in uses):
        return False
    return _covered(leaf, [use.view for use in uses])


def _covered(leaf: Tensor, views: Sequence[View]) -> bool:
    """Return whether some views of a leaf show each entry once."""
    if not all(disjoint(views[i], views[j]) for i in range(len(views)) for j in range(i)):
        return False
    return sum(_entries(view, leaf) for view in views) == leaf.numel()


def _partners(
    plan: Plan,
    weights: dict[int, list[tuple[int, Use]]],
    leaves: Sequence[Tensor],
    leaf: int,
    places: Sequence[tuple[int, Use]],
) -> dict[tuple[int, int], View] | None:
    """Return the weights, and the taps, that a leaf is the bias of, or None if it is not one."""
    found = {}
    for index, use in places:
        if not isinstance(use.builder, ShiftBuilder) or use.builder.factor != 1:
            return None
        if any(isinstance(step, Factor) for step in use.view):
            return None
        others = [u for u in plan.taps[index].uses if u.leaf != leaf]
        if len(others) != 1 or others[0].leaf not in weights:
            return None
        outputs = _outputs(others[0], leaves[others[0].leaf])
        shape = _shape(use.view, leaves[leaf].shape)
        if outputs is None or shape is None or math.prod(shape) != outputs:
            return None
        found[others[0].leaf, index] = use.view
    return found if _covered(leaves[leaf], [use.view for _, use in places]) else None


def _outputs(use: Use, leaf: Tensor) -> int | None:
    """Return the number of outputs of a weight that may have a bias, or None."""
    if isinstance(use.builder, ConvolutionBuilder) and not use.builder.transposed:
        return use.builder.shape[0]
    shape = _shape(use.view, leaf.shape)
    if shape is not None and isinstance(use.builder, MatrixBuilder) and not use.builder.left:
        return shape[1 if use.builder.transposed else 0]
    return None


def _entries(view: View, leaf: Tensor) -> int:
    """Return how many entries of a leaf a view shows."""
    many = leaf.numel()
    for step in view:
        if isinstance(step, Slice):
            many = many // step.size * (step.stop - step.start)
    return many


def _shape(view: View, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of a view, or None: a view knows shapes before its reshapes, not after."""
    found = tuple(shape)
    for step in view:
        if isinstance(step, Reshape):
            return None
        if isinstance(step, Slice):
            found = (*found[: step.dim], step.stop - step.start, *found[step.dim + 1 :])
        elif isinstance(step, Permute):
            found = tuple(found[d] for d in step.dims)
    return found


def steps_of(view: View, shape: Sequence[int]) -> tuple[Step, ...]:
    """Return a view as plain steps that end in some shape; constant factors are left out.

    >>> steps_of((Permute((1, 0)), Reshape((2, 3))), (1, 2, 3))
    (('permute', (1, 0)), ('reshape', (2, 3), (1, 2, 3)))
    """
    found: list[Step] = []
    now = tuple(shape)
    for step in reversed(view):
        if isinstance(step, Reshape):
            if step.source != now:
                found.append(("reshape", tuple(step.source), now))
            now = tuple(step.source)
        elif isinstance(step, Permute):
            found.append(("permute", tuple(step.dims)))
            before = sorted(zip(step.dims, now, strict=True))
            now = tuple(size for _, size in before)
        elif isinstance(step, Slice):
            found.append(("slice", step.dim, step.start, step.stop, step.size))
            now = (*now[: step.dim], step.size, *now[step.dim + 1 :])
    return tuple(reversed(found))
