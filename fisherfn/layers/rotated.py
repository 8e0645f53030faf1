"""Squares of scores in a Kronecker basis: inputs and cotangents are rotated, then contracted.

Where an example has more positions than a score has rows, as in the first layers of a convolutional
network, the score is contracted first and rotated itself.

Tensor format: as in `fisherfn.layers.kronecker`; bases are [R, n, k] with orthonormal columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisherfn.core.matmul import row_product, stacked_product
from fisherfn.layers.form import Form
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.numerics import accumulate, blocks, sum_of_squares
from fisherfn.layers.outer import Outer


def rotated_squares(
    form: Form,
    outputs: Tensor,
    inputs: Tensor | None,
    *,
    thin: tuple[bool, bool],
    bias: bool,
    factor: float = 1.0,
    parts: int = 1,
) -> Tensor:
    """Return the sum of squares of the scores in a Kronecker basis.

    Args:
        form: An `Outer` or `Lookup`.
        outputs: Basis [R, O, k_O], R as after the cut into `parts`.
        inputs: Basis [R or 1, I, k_I], with a row for the ones of a bias; None for a table.
        thin: Whether the basis of the outputs, and that of the inputs, spans only a part: then the
            mean over the rest follows in one more row or column.
        bias: Whether the inputs have a column of ones.
        factor: What the inputs, but not the ones, are multiplied by.
        parts: Into how many blocks the outputs of each group are cut.

    Returns:
        `[R, k_O, k_I]`, one more where thin.
    """
    if isinstance(form, Lookup):
        turned = replace(form, g=form.g @ outputs[0].to(form.g.dtype))
        found = turned.square_sum().T.unsqueeze(0)
        if not thin[0]:
            return found
        width = max(1, outputs.shape[1] - outputs.shape[2])
        beside = form.square_sum().sum(1) - found.sum((0, 1))
        return torch.cat([found, (beside / width).clamp_min(0.0).expand(1, 1, -1)], 1)
    assert isinstance(form, Outer)
    assert inputs is not None
    a, g = form.a, form.g
    if a.shape[1] > 1 and a.stride(1) == 0:
        a = a[:, :1]
    right, left = inputs.to(a.dtype), outputs.to(g.dtype)
    if parts > 1:
        g = g.unflatten(-1, (parts, -1)).movedim(-2, 3).flatten(2, 3)
    if not any(thin) and len(g) * g.shape[-1] < g.shape[-2]:
        return _of_turned_scores(a, g, left, right, bias=bias, factor=factor)
    turned_a = _turned(a, right[:, :-1] if bias else right)
    if factor != 1:
        turned_a = turned_a * factor
    if bias:
        turned_a = turned_a + right[:, -1:]
    turned_g = _turned(g, left)
    turned_a = _repeated(turned_a, g.shape[2])
    found = Outer(turned_a, turned_g).square_sum()
    if not any(thin):
        return found
    whole_a = a * factor
    if bias:
        whole_a = torch.cat([whole_a, torch.ones_like(a[..., :1])], -1)
    return _with_rest(found, (turned_a, whole_a), (turned_g, g), thin)


def _of_turned_scores(
    a: Tensor, g: Tensor, left: Tensor, right: Tensor, *, bias: bool, factor: float
) -> Tensor:
    """Return what `rotated_squares` does, from scores that are formed before they are rotated."""
    late = a.shape[-1] < a.shape[-2]  # the cotangents, too, have more positions than a score rows
    outer = Outer(_repeated(a, g.shape[2]), g if late else _turned(g, left))
    total = None
    for start, stop in blocks(outer.batch, 2 * outer.score_bytes, a):
        part = outer.part(start, stop)
        s = part.scores()
        if factor != 1:
            s = s * factor
        if bias:
            s = torch.cat([s, part.g.sum(-2).unsqueeze(-1)], -1)
        s = _turned(s, right)
        total = accumulate(total, sum_of_squares(left.mT @ s if late else s, own=True))
    assert total is not None
    return total


def _repeated(a: Tensor, groups: int) -> Tensor:
    """Return inputs [B, R or 1, T, I] once for each of so many groups of outputs."""
    if a.shape[1] not in (1, groups):
        return a.repeat_interleave(groups // a.shape[1], 1)
    return a.expand(-1, groups, -1, -1)


def _turned(x: Tensor, basis: Tensor) -> Tensor:
    """Return the rows of [..., R, T, n] in a basis [R or 1, n, k]; one product for each group."""
    if basis.shape[0] == 1:
        return row_product(x.reshape(-1, x.shape[-1]), basis[0]).reshape(*x.shape[:-1], -1)
    groups = x.dim() - 3
    rows = x.movedim(groups, 0)
    found = stacked_product(rows.reshape(basis.shape[0], -1, x.shape[-1]), basis)
    return found.reshape(*rows.shape[:-1], -1).movedim(0, groups)


def _with_rest(
    found: Tensor, a: tuple[Tensor, Tensor], g: tuple[Tensor, Tensor], thin: tuple[bool, bool]
) -> Tensor:
    """Append the mean squares beside thin bases; `a` and `g` are pairs: in the basis, and whole."""
    o = max(1, g[1].shape[-1] - g[0].shape[-1])
    i = max(1, a[1].shape[-1] - a[0].shape[-1])
    # the difference of two sums is known to rounding errors of the first
    eps = 4.0 * max(g[1].shape[-1], a[1].shape[-1]) * torch.finfo(found.dtype).eps

    def mean(every: Tensor, inside: Tensor, many: int) -> Tensor:
        rest = every - inside
        return torch.where(rest > eps * every, rest / many, torch.zeros_like(rest))

    if thin[0]:
        # Σ_o (Σ_t g_to a_tj)² = a_jᵀ (g gᵀ) a_j
        gg = (g[1] @ g[1].mT).sum(0)
        every = ((gg @ a[0]) * a[0]).sum((0, 2))
        found = torch.cat([found, mean(every, found.sum(-2), o).unsqueeze(-2)], -2)
    if thin[1]:
        aa = a[1] @ a[1].mT
        every = ((aa @ g[0]) * g[0]).sum((0, 1, 3))
        if thin[0]:
            gg = (g[1] @ g[1].mT).sum(0)
            beside = mean((gg * aa).sum((0, 2, 3)), every.sum(-1), o)
            every = torch.cat([every, beside.unsqueeze(-1)], -1)
        found = torch.cat([found, mean(every, found.sum(-1), i).unsqueeze(-1)], -1)
    return found
