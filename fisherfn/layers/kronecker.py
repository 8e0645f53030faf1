"""Second moments of a layer's inputs and of its cotangents, the factors of Kronecker blocks.

Tensor format: an outer form has inputs `a` [B, R, T, I] and cotangents `g` [K, B, R, T, O]; the
moments are `Σ w a aᵀ` [R, I, I] and `Σ g gᵀ` [R, O, O] over all rows ("expand"), or over examples
of the mean of a and of the sum of g over the T rows ("reduce"). Cotangents carry their weight
already. Inputs that are shared by all groups have R = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfn.layers.convolution import Unfolded
from fisherfn.layers.form import Form
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.numerics import accumulate, in_place_allowed, wide
from fisherfn.layers.outer import Outer

# Products of fewer columns are not split: starting one costs more than it saves.
_SPLIT = 192
_DEPTH = 2


def gram(x: Tensor) -> Tensor:
    """Return `xᵀ x` for a matrix [n, d], with not much more than half of the multiplications.

    The product is symmetric: of its four quarters one is the transpose of another, and the two on
    the diagonal are symmetric again. Split twice, it takes 5/8 of the multiplications.

    >>> gram(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.],
            [2., 4.]])
    """
    d = x.shape[1]
    if not _splits(x):
        return x.T @ x
    if in_place_allowed():
        out = x.new_empty(d, d)
        _gram_into(x, out, _DEPTH)
        return out
    return _gram_parts(x, _DEPTH)


def _splits(x: Tensor) -> bool:
    """Return whether a product is worth splitting."""
    return x.shape[1] >= 2 * _SPLIT and x.shape[0] >= 64


def _gram_into(x: Tensor, out: Tensor, depth: int) -> None:
    d = x.shape[1]
    if depth == 0 or d < 2 * _SPLIT:
        torch.mm(x.T, x, out=out)
        return
    h = d // 2
    first, second = x[:, :h], x[:, h:]
    _gram_into(first, out[:h, :h], depth - 1)
    _gram_into(second, out[h:, h:], depth - 1)
    torch.mm(first.T, second, out=out[:h, h:])
    out[h:, :h].copy_(out[:h, h:].T)


def _gram_parts(x: Tensor, depth: int) -> Tensor:
    d = x.shape[1]
    if depth == 0 or d < 2 * _SPLIT:
        return x.T @ x
    h = d // 2
    first, second = x[:, :h], x[:, h:]
    beside = first.T @ second
    top = torch.cat([_gram_parts(first, depth - 1), beside], 1)
    return torch.cat([top, torch.cat([beside.T, _gram_parts(second, depth - 1)], 1)], 0)


def _stacked_gram(x: Tensor) -> Tensor:
    """Return `xᵀ x` for each of [R, n, d], [R, d, d]."""
    return gram(x[0]).unsqueeze(0) if x.shape[0] == 1 else x.mT @ x


@dataclass(frozen=True)
class Weights:
    """How often each row of a layer's input counts.

    Attributes:
        each: Weight of each position of the outputs, 0 where there is none, [B, P]; None: all 1.
        exists: 1 where there is a position, 0 elsewhere, [B, P].
    """

    each: Tensor | None = None
    exists: Tensor | None = None

    def examples(self) -> Tensor | None:
        """Return the weight of each example, [B]."""
        if self.each is None or self.exists is None:
            return None
        many = self.exists.sum(-1)
        return self.each.sum(-1) / torch.where(many > 0, many, torch.ones_like(many))

    def rows(self, t: int) -> Tensor | None:
        """Return the weight of each of T rows of an example, [B, T]."""
        if self.each is None:
            return None
        if t == self.each.shape[1]:
            return self.each
        found = self.examples()
        assert found is not None
        return found.unsqueeze(-1).expand(-1, t)

    def shares(self, t: int) -> Tensor | None:
        """Return what each of T rows contributes to the mean of an example, [B, T]."""
        if self.exists is None or t != self.exists.shape[1]:
            return None
        many = self.exists.sum(-1, keepdim=True)
        return self.exists / torch.where(many > 0, many, torch.ones_like(many))


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of a layer's input.

    Attributes:
        square: `Σ w a aᵀ`, [R, I, I], where a bias adds an input of one; counts [1, I] for a
            table; if so kept, rows √w a [R, n, I].
        rows: `Σ w`, 0-d.
    """

    square: Tensor
    rows: Tensor


def input_moments(
    form: Form, weights: Weights, *, reduce: bool, bias: bool, keep_rows: bool = False
) -> Moments:
    """Return the second moments of the inputs of a form.

    Args:
        form: An `Outer`, `Unfolded` or `Lookup`.
        weights: How often rows count.
        reduce: Average the rows of an example first. The rows of a table never are.
        bias: Add an input of one.
        keep_rows: Return the rows in place of their product.

    Returns:
        The sums; what is averaged over is `rows`.
    """
    if isinstance(form, Lookup):
        return _counts(form, weights)
    if isinstance(form, Unfolded):
        square, rows = None, None
        for part, (start, stop) in form.inputs():
            some = _part(weights, start, stop)
            found = _of_rows(*_rows(part, some, reduce), bias, keep_rows)
            square = _joined(square, found.square, keep_rows)
            rows = found.rows if rows is None else rows + found.rows
        assert square is not None
        assert rows is not None
        return Moments(square, rows)
    assert isinstance(form, Outer)
    return _of_rows(*_rows(form.a, weights, reduce), bias, keep_rows)


def _joined(total: Tensor | None, term: Tensor, keep_rows: bool) -> Tensor:
    if total is None or not keep_rows:
        return accumulate(total, term)
    return torch.cat([total, term], -2)


def _part(weights: Weights, start: int, stop: int) -> Weights:
    if weights.each is None or weights.exists is None:
        return weights
    return Weights(weights.each[start:stop], weights.exists[start:stop])


def _rows(a: Tensor, weights: Weights, reduce: bool) -> tuple[Tensor, Tensor | None]:
    """Return the rows [R, n, I] of `a`, [B, R, T, I], and their weights [n]."""
    t = a.shape[2]
    # inputs that were expanded over groups are one
    if a.shape[1] > 1 and a.stride(1) == 0:
        a = a[:, :1]
    if not reduce or t == 1:
        w = weights.rows(t)
        rows = a.transpose(0, 1).reshape(a.shape[1], -1, a.shape[-1])
        return rows, None if w is None else w.reshape(-1)
    shares = weights.shares(t)
    if shares is None:
        mean = a.mean(2)
    else:
        mean = (shares.to(a.dtype)[:, None, None] @ a).squeeze(2)
    return mean.transpose(0, 1), weights.examples()


def _of_rows(rows: Tensor, w: Tensor | None, bias: bool, keep_rows: bool) -> Moments:
    if w is None:
        many = torch.full((), float(rows.shape[1]), dtype=_count_dtype(rows), device=rows.device)
        root = None
    else:
        w = w.to(rows.dtype)
        root, many = w.sqrt()[:, None], w.sum(dtype=_count_dtype(w))
        # where, not a product alone: what has no weight may have no finite value
        zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
        rows = torch.where(w[:, None] > 0, rows, zero) * root
    if keep_rows:
        return Moments(_with_one(rows, root) if bias else rows, many)
    if not bias:
        return Moments(_stacked_gram(rows), many)
    if rows.shape[0] > 1 or not in_place_allowed() or not _splits(rows[0]):
        return Moments(_stacked_gram(_with_one(rows, root)), many)
    # the ones last, into one buffer: a copy of the rows, or of the product, costs as much
    n = rows.shape[2]
    out = rows.new_empty(n + 1, n + 1)
    _gram_into(rows[0], out[:n, :n], _DEPTH)
    torch.mv(rows[0].T, _ones(rows[0], root), out=out[n, :n])
    out[:n, n].copy_(out[n, :n])
    out[n, n].copy_(many)
    return Moments(out.unsqueeze(0), many)


def _ones(rows: Tensor, root: Tensor | None) -> Tensor:
    return rows.new_ones(rows.shape[0]) if root is None else root[:, 0]


def _with_one(rows: Tensor, root: Tensor | None) -> Tensor:
    one = torch.ones_like(rows[..., :1]) if root is None else root.expand(rows.shape[0], -1, -1)
    return torch.cat([rows, one], -1)


def _count_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of numbers of rows: float32 cannot count beyond 2²⁴."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _counts(form: Lookup, weights: Weights) -> Moments:
    """Return how often each row of a table was read, [1, rows]; padding is never read."""
    b, t = form.index.shape
    w = weights.rows(t)
    if w is None:
        w = torch.ones(b, t, dtype=form.g.dtype, device=form.g.device)
    w = w.to(form.g.dtype)
    if form.padding is not None:
        w = torch.where(form.index == form.padding, torch.zeros_like(w), w)
    counts = w.new_zeros(form.rows).index_add(0, form.index.reshape(-1), w.reshape(-1))
    return Moments(counts.unsqueeze(0), w.sum(dtype=_count_dtype(w)))


def output_moments(form: Form, *, reduce: bool, parts: int = 1, keep_rows: bool = False) -> Tensor:
    """Return the second moments `Σ g gᵀ` of the cotangents of a form, [R, O, O].

    Args:
        form: An `Outer`, `Unfolded` or `Lookup`.
        reduce: Sum the rows of an example first. Those of a table never are.
        parts: Cut the outputs of each group into so many blocks that do not interact.
        keep_rows: Return the rows [R, n, O] in place of their product.

    Returns:
        `[R * parts, O / parts, O / parts]`, or rows.
    """
    if isinstance(form, Lookup):
        rows = form.g.reshape(1, -1, form.g.shape[-1])
        return rows if keep_rows else _stacked_gram(rows)
    if isinstance(form, Unfolded):
        total = None
        for g in form.cotangents():
            total = _joined(total, _of_cotangents(g, reduce, parts, keep_rows), keep_rows)
        assert total is not None
        return total
    assert isinstance(form, Outer)
    return _of_cotangents(form.g, reduce, parts, keep_rows)


def _of_cotangents(g: Tensor, reduce: bool, parts: int, keep_rows: bool) -> Tensor:
    g = wide(g)
    if reduce and g.shape[3] > 1:
        g = g.sum(3, keepdim=True)
    rows = g.permute(2, 0, 1, 3, 4).reshape(g.shape[2], -1, g.shape[-1])
    if parts > 1:
        r, n, o = rows.shape
        rows = rows.reshape(r, n, parts, o // parts).transpose(1, 2).reshape(r * parts, n, -1)
    return rows if keep_rows else _stacked_gram(rows)


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
