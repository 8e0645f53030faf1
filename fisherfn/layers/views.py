"""From a parameter to the tensor that a layer saw, and back.

A view is a chain of linear steps, each of which only moves, selects or rescales entries. Scores of
the view go back to the parameter through the adjoint of the chain; since no entry is duplicated,
squares go the same way (with the square of any factor).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Permute:
    """Axes in another order."""

    dims: tuple[int, ...]

    def adjoint(self, t: Tensor, lead: int, power: int) -> Tensor:
        """Undo the permutation behind `lead` leading axes."""
        inverse = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return t.permute(*range(lead), *(lead + d for d in inverse))


@dataclass(frozen=True)
class Reshape:
    """The same entries in another shape; `source` is the shape before."""

    source: tuple[int, ...]

    def adjoint(self, t: Tensor, lead: int, power: int) -> Tensor:
        """Return to the source shape behind `lead` leading axes."""
        return t.reshape(*t.shape[:lead], *self.source)


@dataclass(frozen=True)
class Slice:
    """Entries `start` to `stop` along `dim`, of `size`."""

    dim: int
    start: int
    stop: int
    size: int

    def adjoint(self, t: Tensor, lead: int, power: int) -> Tensor:
        """Put zeros where the slice did not look."""
        after = t.dim() - 1 - (lead + self.dim)
        return F.pad(t, [0, 0] * after + [self.start, self.size - self.stop])


@dataclass(frozen=True)
class Factor:
    """All entries times a constant."""

    value: float

    def adjoint(self, t: Tensor, lead: int, power: int) -> Tensor:
        """Multiply by the factor, or its square for squares."""
        return t * self.value**power


Step: TypeAlias = Permute | Reshape | Slice | Factor
View: TypeAlias = tuple[Step, ...]


def pull(view: View, t: Tensor, *, lead: int = 0, power: int = 1) -> Tensor:
    """Carry scores (`power=1`) or their squares (`power=2`) of a view back to the parameter.

    Args:
        view: The chain of steps, from the parameter outwards.
        t: `[*lead axes, *shape of the view]`.
        lead: Number of leading axes that the view knows nothing of.
        power: 1 for scores, 2 for squares.

    Returns:
        `[*lead axes, *shape of the parameter]`.
    """
    for step in reversed(view):
        t = step.adjoint(t, lead, power)
    return t


def with_plain_sizes(view: View) -> View:
    """Return the same chain with sizes that are plain integers, which can be compared and hashed.

    Sizes of parameters stay the same, also where the compiler makes symbols of them.
    """
    steps: list[Step] = []
    for step in view:
        if isinstance(step, Reshape):
            step = Reshape(tuple(int(n) for n in step.source))
        elif isinstance(step, Slice):
            step = Slice(step.dim, int(step.start), int(step.stop), int(step.size))
        steps.append(step)
    return tuple(steps)


def factor(view: View) -> float:
    """Return the product of the constants in a chain."""
    value = 1.0
    for step in view:
        if isinstance(step, Factor):
            value *= step.value
    return value


def disjoint(a: View, b: View) -> bool:
    """Return True if two views of one parameter surely share no entry."""
    if not a or not b:
        return False
    x, y = a[0], b[0]
    if isinstance(x, Slice) and isinstance(y, Slice) and x.dim == y.dim:
        if x.stop <= y.start or y.stop <= x.start:
            return True
        return x == y and disjoint(a[1:], b[1:])
    return x == y and disjoint(a[1:], b[1:])
