"""`y = x Wᵀ + b`, and products with a matrix on either side.

Tensor format: `x` is `[B, M, *positions, I]`, the cotangent `[K, B, M, *positions, O]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core.dtypes import wide
from fisherfn.layers.attention import packed_linear
from fisherfn.layers.elementwise import shift_role
from fisherfn.layers.form import Form
from fisherfn.layers.outer import Outer
from fisherfn.layers.registry import Call, Match, Role, register_rule
from fisherfn.layers.views import Permute, Reshape, View


@dataclass(frozen=True)
class MatrixBuilder:
    """Outer products of input rows and cotangent rows.

    `transposed`: the argument is `[I, O]`, as in `x @ W`. `left`: the matrix stands on the left,
    `W @ x`, and vectors are columns. `parts`: the outputs are so many blocks with a meaning of
    their own.
    """

    transposed: bool
    left: bool = False
    parts: int = 1

    def accepts(self, axis: int, rank: int) -> bool:
        """Any axis but those that the matrix acts on."""
        return axis < rank - (2 if self.left else 1)

    def __call__(self, kept: Sequence[Tensor], g: Tensor, axis: int) -> tuple[Form, View]:
        """Return the outer form `[1, O, I]`."""
        a = kept[0]
        if self.left:
            a, g = a.transpose(-1, -2), g.transpose(-1, -2)
        a = wide(a.reshape(a.shape[0], 1, -1, a.shape[-1]))
        if a.shape[0] != g.shape[1]:
            a = a.expand(g.shape[1], -1, -1, -1)
        rows = wide(g.reshape(*g.shape[:2], 1, -1, g.shape[-1]))
        o, i = rows.shape[-1], a.shape[-1]
        view: View = (Permute((1, 0)), Reshape((o, i))) if self.transposed else (Reshape((o, i)),)
        return Outer(a, rows), view


def match_linear(call: Call) -> Match | None:
    """`linear(input, weight, bias)`."""
    if "input" in call.tracked:
        return None
    roles = []
    if "weight" in call.tracked:
        roles.append(Role("weight", MatrixBuilder(transposed=False)))
    if "bias" in call.tracked:
        roles.append(shift_role(call, "bias"))
    return Match(("input",) if "weight" in call.tracked else (), tuple(roles))


def match_packed(call: Call) -> Match | None:
    """Queries, keys and values as one `linear(input, weight, bias)`."""
    found = match_linear(call)
    if found is None or "weight" not in call.tracked:
        return found
    role = Role("weight", MatrixBuilder(transposed=False, parts=3))
    return replace(found, roles=(role, *found.roles[1:]))


def match_product(call: Call) -> Match | None:
    """`input @ other`, with a matrix parameter on either side."""
    if len(call.tracked) != 1:
        return None
    (side,) = call.tracked
    if call.tracked[side].dim() != 2:
        return None
    if side == "other":
        if call["input"].dim() < 2:
            return None
        return Match(("input",), (Role("other", MatrixBuilder(transposed=True)),))
    if call["other"].dim() < 2:
        return None
    return Match(("other",), (Role("input", MatrixBuilder(transposed=False, left=True)),))


def match_addmm(call: Call) -> Match | None:
    """`addmm(bias, mat1, mat2)`, as `Conv1D` of GPT-2 writes a linear layer."""
    if "mat1" in call.tracked or call["beta"] != 1 or call["alpha"] != 1:
        return None
    roles = []
    if "mat2" in call.tracked:
        roles.append(Role("mat2", MatrixBuilder(transposed=True)))
    if "input" in call.tracked:
        roles.append(shift_role(call, "input"))
    return Match(("mat1",) if "mat2" in call.tracked else (), tuple(roles))


register_rule([F.linear], ("input", "weight", "bias"), match_linear, name="linear")
register_rule([packed_linear], ("input", "weight", "bias"), match_packed, name="linear")
register_rule(
    [torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm],
    ("input", "other"),
    match_product,
    name="matmul",
)
register_rule(
    [torch.addmm, torch.Tensor.addmm],
    ("input", "mat1", "mat2"),
    match_addmm,
    name="addmm",
    defaults={"beta": 1, "alpha": 1},
)
