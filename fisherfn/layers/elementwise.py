"""Scale and shift by a parameter that broadcasts: `x * p`, `x + p`, and `p.expand(...)`.

Tensor format: the cotangent is `[K, B, M, *rest]`. The parameter is aligned with the output from
the right; where it has size 1 and the output has more, its score is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.core.dtypes import wide
from fisherfn.layers.direct import Direct
from fisherfn.layers.form import Form
from fisherfn.layers.registry import Call, Match, Role, register_rule
from fisherfn.layers.views import Factor, View


@dataclass(frozen=True)
class Alignment:
    """A parameter's shape, padded on the left to the number of axes of the output."""

    shape: tuple[int, ...]
    padded: tuple[int, ...]

    @staticmethod
    def of(parameter: Tensor, rank: int) -> Alignment:
        """Align a parameter with an output of `rank` axes."""
        shape = tuple(parameter.shape)
        return Alignment(shape, (1,) * (rank - len(shape)) + shape)

    def accepts(self, axis: int, rank: int) -> bool:
        """Return True if the parameter is the same for all examples."""
        return rank == len(self.padded) and self.padded[axis] == 1

    def reduce(self, d: Tensor, axis: int) -> Direct:
        """Sum `[K, B, M, *rest]` to the parameter's shape."""
        sizes = self.padded[:axis] + self.padded[axis + 1 :]
        axes = [2] + [3 + i for i, n in enumerate(sizes) if n == 1]
        axes = [i for i in axes if d.shape[i] != 1]  # a sum over nothing is a copy
        d = d.sum(axes) if axes else d
        return Direct(d.reshape(*d.shape[:2], *self.shape))


@dataclass(frozen=True)
class ShiftBuilder:
    """The cotangent itself, summed to the parameter's shape."""

    alignment: Alignment
    factor: float = 1.0

    def accepts(self, axis: int, rank: int) -> bool:
        """Return True if the parameter is the same for all examples."""
        return self.alignment.accepts(axis, rank)

    def __call__(self, kept: Sequence[Tensor], g: Tensor, axis: int) -> tuple[Form, View]:
        """Return the direct form."""
        view: View = (Factor(self.factor),) if self.factor != 1 else ()
        return self.alignment.reduce(wide(g), axis), view


@dataclass(frozen=True)
class ScaleBuilder:
    """The cotangent times the other factor, summed to the parameter's shape."""

    alignment: Alignment

    def accepts(self, axis: int, rank: int) -> bool:
        """Return True if the parameter is the same for all examples."""
        return self.alignment.accepts(axis, rank)

    def __call__(self, kept: Sequence[Tensor], g: Tensor, axis: int) -> tuple[Form, View]:
        """Return the direct form."""
        return self.alignment.reduce(wide(g) * wide(kept[0]), axis), ()


def shift_role(call: Call, argument: str, factor: float = 1.0) -> Role:
    """Return the role of a parameter that is added to the output."""
    aligned = Alignment.of(call.tracked[argument], len(call.output_shape))
    return Role(argument, ShiftBuilder(aligned, factor))


def match_scale(call: Call) -> Match | None:
    """`input * other`."""
    if len(call.tracked) != 1:
        return None
    (side,) = call.tracked
    other = "other" if side == "input" else "input"
    aligned = Alignment.of(call.tracked[side], len(call.output_shape))
    return Match((other,), (Role(side, ScaleBuilder(aligned)),))


def match_shift(call: Call) -> Match | None:
    """`input + alpha * other`."""
    if len(call.tracked) != 1:
        return None
    (side,) = call.tracked
    factor = 1.0 if side == "input" else float(call["alpha"])
    return Match((), (shift_role(call, side, factor),))


def match_difference(call: Call) -> Match | None:
    """`input - alpha * other`."""
    if len(call.tracked) != 1:
        return None
    (side,) = call.tracked
    factor = 1.0 if side == "input" else -float(call["alpha"])
    return Match((), (shift_role(call, side, factor),))


def match_reversed_difference(call: Call) -> Match | None:
    """`other - input`."""
    if len(call.tracked) != 1:
        return None
    (side,) = call.tracked
    return Match((), (shift_role(call, side, -1.0 if side == "input" else 1.0),))


def match_expand(call: Call) -> Match | None:
    """`input.expand(...)`: the same parameter for every example, such as a class token."""
    return Match((), (shift_role(call, "input"),)) if "input" in call.tracked else None


_BOTH = ("input", "other")
_ALPHA = {"alpha": 1}
register_rule(
    [torch.mul, torch.Tensor.mul, torch.multiply, torch.Tensor.multiply],
    _BOTH,
    match_scale,
    name="scale",
)
register_rule([torch.add, torch.Tensor.add], _BOTH, match_shift, name="shift", defaults=_ALPHA)
register_rule([torch.sub, torch.Tensor.sub], _BOTH, match_difference, name="shift", defaults=_ALPHA)
register_rule([torch.Tensor.__rsub__], _BOTH, match_reversed_difference, name="shift")
register_rule(
    [torch.Tensor.expand, torch.Tensor.expand_as, torch.broadcast_to, torch.Tensor.broadcast_to],
    ("input",),
    match_expand,
    name="expand",
)
