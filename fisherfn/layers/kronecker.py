"""Second moments of a layer's inputs and of its cotangents, the factors of Kronecker blocks.

Tensor format: an outer form has inputs `a` [B, R, T, I] and cotangents `g` [K, B, R, T, O]; the
moments are `Σ w a aᵀ` [R, I, I] and `Σ g gᵀ` [R, O, O] over all rows ("expand"), or over examples
of the mean of a and of the sum of g over the T rows ("reduce"). Cotangents carry their weight
already. Inputs that are shared by all groups have R = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.core.dtypes import wide, working_dtype
from fisherfn.core.modes import transformed
from fisherfn.layers import shifts
from fisherfn.layers.convolution import Unfolded
from fisherfn.layers.form import Form
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.numerics import accumulate, blocks, convolution_precision, in_place_allowed
from fisherfn.layers.outer import Outer
from fisherfn.layers.symmetric import gram_with, stacked_gram


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
        with convolution_precision(form.g):
            return _of_patches(form, weights, reduce, bias, keep_rows)
    assert isinstance(form, Outer)
    return _of_rows(*_rows(form.a, weights, reduce), bias, keep_rows)


def _of_patches(
    form: Unfolded, weights: Weights, reduce: bool, bias: bool, keep_rows: bool
) -> Moments:
    places = form.g.shape[4:]
    if not (reduce or keep_rows or form.transposed) and shifts.applies(form.geometry, places):
        t = math.prod(places) * form.x.shape[1]
        if weights.each is None or weights.each.shape[1] != t:
            return _of_shifts(form, weights, bias)
    square, rows = None, None
    for part, (start, stop) in form.inputs():
        some = _part(weights, start, stop)
        found = _of_rows(*_rows(part, some, reduce), bias, keep_rows)
        square = _joined(square, found.square, keep_rows)
        rows = found.rows if rows is None else rows + found.rows
    assert square is not None
    assert rows is not None
    return Moments(square, rows)


def _number(many: int, like: Tensor) -> Tensor:
    return torch.full((), float(many), dtype=working_dtype(like), device=like.device)


def _of_shifts(form: Unfolded, weights: Weights, bias: bool) -> Moments:
    """Return the moments of patches from products of rows of the image."""
    places, geometry = form.g.shape[4:], form.geometry
    b, m = form.x.shape[:2]
    total = rows = mean = None
    each = form.x.numel() // max(1, b) * math.prod(geometry.kernel[1:]) * form.x.element_size()
    w = weights.examples()
    for start, stop in blocks(b, each, form.x):
        x = form.x[start:stop].reshape(-1, *form.x.shape[2:])
        image = shifts.image_rows(geometry, x, places)
        many = (stop - start) * m * math.prod(places)
        count = _number(many, x)
        root = None
        if w is not None:
            own = w[start:stop].to(x.dtype)
            count = own.sum(dtype=working_dtype(x)) * (m * math.prod(places))
            root = own.sqrt().repeat_interleave(m * math.prod(places[1:])).unsqueeze(-1)
            zero = torch.zeros((), dtype=x.dtype, device=x.device)
            image = torch.where(root > 0, image, zero) * root
        found = shifts.patch_gram(geometry, image, places[0], stacked_gram)
        total = accumulate(total, found)
        rows = count if rows is None else rows + count
        if bias:
            image = image if root is None else image * root
            term = shifts.patch_sum(geometry, image, places[0])
            mean = term if mean is None else mean + term
    assert total is not None
    assert rows is not None
    if mean is not None:
        column = mean.unsqueeze(-1)
        corner = rows.to(total.dtype).expand(total.shape[0], 1, 1)
        total = torch.cat([torch.cat([total, column], -1), torch.cat([column.mT, corner], -1)], -2)
    return Moments(total, rows)


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
        return _flat(a.transpose(0, 1), 2), None if w is None else w.reshape(-1)
    shares = weights.shares(t)
    if shares is None:
        mean = a.mean(2)
    else:
        mean = (shares.to(a.dtype)[:, None, None] @ a).squeeze(2)
    return mean.transpose(0, 1), weights.examples()


def _flat(x: Tensor, axes: int) -> Tensor:
    """Return `[R, *axes, d]` as `[R, n, d]`, copied as it is stored: by rows or by columns."""
    if transformed() or x.stride(-1) == 1 or x.stride(-2) != 1:
        return x.flatten(1, axes)
    return x.movedim(-1, 1).flatten(2).mT


def _of_rows(rows: Tensor, w: Tensor | None, bias: bool, keep_rows: bool) -> Moments:
    if w is None:
        many = _number(rows.shape[1], rows)
        root = None
    else:
        w = w.to(rows.dtype)
        root, many = w.sqrt()[:, None], w.sum(dtype=working_dtype(w))
        # where, not a product alone: what has no weight may have no finite value
        zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
        rows = torch.where(w[:, None] > 0, rows, zero) * root
    if keep_rows:
        return Moments(_with_one(rows, root) if bias else rows, many)
    if not bias:
        return Moments(stacked_gram(rows), many)
    if rows.shape[0] > 1 or not in_place_allowed():
        return Moments(stacked_gram(_with_one(rows, root)), many)
    ones = rows.new_ones(rows.shape[1]) if root is None else root[:, 0]
    return Moments(gram_with(rows[0], ones).unsqueeze(0), many)


def _with_one(rows: Tensor, root: Tensor | None) -> Tensor:
    one = torch.ones_like(rows[..., :1]) if root is None else root.expand(rows.shape[0], -1, -1)
    return torch.cat([rows, one], -1)


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
    return Moments(counts.unsqueeze(0), w.sum(dtype=working_dtype(w)))


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
        return rows if keep_rows else stacked_gram(rows)
    if isinstance(form, Unfolded):
        total = None
        with convolution_precision(form.g):
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
    rows = _flat(g.permute(2, 0, 1, 3, 4), 3)
    if parts > 1:
        r, n, o = rows.shape
        rows = rows.reshape(r, n, parts, o // parts).transpose(1, 2).reshape(r * parts, n, -1)
    return rows if keep_rows else stacked_gram(rows)
