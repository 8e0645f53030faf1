"""Squares of scores in a Kronecker basis: inputs and cotangents are rotated, then contracted.

Tensor format: as in `fisherfn.layers.kronecker`; bases are [R, n, k] with orthonormal columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisherfn.layers.form import Form
from fisherfn.layers.lookup import Lookup
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
    right = inputs.to(a.dtype)
    turned_a = _turned(a, right[:, :-1] if bias else right)
    if factor != 1:
        turned_a = turned_a * factor
    if bias:
        turned_a = turned_a + right[:, -1:]
    if parts > 1:
        g = g.unflatten(-1, (parts, -1)).movedim(-2, 3).flatten(2, 3)
    turned_g = _turned(g, outputs.to(g.dtype))
    r = g.shape[2]
    if turned_a.shape[1] not in (1, r):
        turned_a = turned_a.repeat_interleave(r // turned_a.shape[1], 1)
    turned_a = turned_a.expand(-1, r, -1, -1)
    found = Outer(turned_a, turned_g).square_sum()
    if not any(thin):
        return found
    whole_a = a * factor
    if bias:
        whole_a = torch.cat([whole_a, torch.ones_like(a[..., :1])], -1)
    return _with_rest(found, (turned_a, whole_a), (turned_g, g), thin)


def _turned(x: Tensor, basis: Tensor) -> Tensor:
    """Return the rows of [..., R, T, n] in a basis [R or 1, n, k]; one product for each group."""
    if basis.shape[0] == 1:
        return (x.reshape(-1, x.shape[-1]) @ basis[0]).reshape(*x.shape[:-1], -1)
    groups = x.dim() - 3
    rows = x.movedim(groups, 0)
    found = rows.reshape(basis.shape[0], -1, x.shape[-1]) @ basis
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
