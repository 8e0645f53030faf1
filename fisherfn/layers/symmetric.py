"""Products of a matrix with its own transpose, whose lower triangle need not be computed.

Tensor format: rows `[n, d]`, or a stack of them `[R, n, d]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfn.core.matmul import as_columns, quick, quick_product, rounded, traced
from fisherfn.core.operations import operation
from fisherfn.layers.numerics import in_place_allowed

# Products of fewer columns are not split, and others so many times: starting one costs more than it
# saves, on a GPU more so.
_SPLIT = {"cpu": 96, "other": 256}
_DEPTH = {"cpu": 2, "other": 1}
# By the faster library, so many rows of the triangle are made at once; of few rows the copies would
# take longer.
_BAND = 256


def gram(x: Tensor) -> Tensor:
    """Return `xᵀ x` for a matrix [n, d], with not much more than half of the multiplications.

    The product is symmetric: of its four quarters one is the transpose of another, and the two on
    the diagonal are symmetric again. Split once it takes 3/4 of the multiplications, twice 5/8.

    >>> gram(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.],
            [2., 4.]])
    """
    n, d = x.shape
    if quick(x, d, n, d):
        return _of_columns(as_columns(x))
    if traced(x, d, n, d):
        return _whole_gram(x)
    if not _splits(x):
        return x.T @ x
    if in_place_allowed():
        out = x.new_empty(d, d)
        _gram_into(x, out, _DEPTH[_place(x)])
        return out
    return _gram_parts(x, _DEPTH[_place(x)])


def gram_with(x: Tensor, ones: Tensor) -> Tensor:
    """Return `yᵀ y` for y = [x, ones], a matrix [n, d] with one more column, without a graph.

    A copy of the rows, or of the product, costs as much as the split saves.

    >>> gram_with(torch.tensor([[3.0]]), torch.ones(1))
    tensor([[9., 3.],
            [3., 1.]])
    """
    n, d = x.shape
    if quick(x, d, n, d):
        columns = x.new_empty(d + 1, rounded(n))
        columns[:d, :n].copy_(x.T)
        columns[d, :n].copy_(ones)
        columns[:, n:] = 0.0
        return _of_columns(columns)
    if not _splits(x):
        return gram(torch.cat([x, ones.unsqueeze(1)], 1))
    out = x.new_empty(d + 1, d + 1)
    _gram_into(x, out[:d, :d], _DEPTH[_place(x)])
    torch.mv(x.T, ones, out=out[d, :d])
    out[:d, d].copy_(out[d, :d])
    torch.dot(ones, ones, out=out[d, d])
    return out


def _splits(x: Tensor) -> bool:
    """Return whether a product is worth splitting."""
    return x.shape[1] >= 2 * _SPLIT[_place(x)] and x.shape[0] >= 64


def _place(x: Tensor) -> str:
    return "cpu" if x.device.type == "cpu" else "other"


def _gram_into(x: Tensor, out: Tensor, depth: int) -> None:
    d = x.shape[1]
    if depth == 0 or d < 2 * _SPLIT[_place(x)]:
        torch.mm(x.T, x, out=out)
        return
    h = d // 2
    first, second = x[:, :h], x[:, h:]
    _gram_into(first, out[:h, :h], depth - 1)
    _gram_into(second, out[h:, h:], depth - 1)
    torch.mm(first.T, second, out=out[:h, h:])
    out[h:, :h].copy_(out[:h, h:].T)


def _of_columns(columns: Tensor) -> Tensor:
    """Return `y yᵀ` for [d, n] by the faster library; of wide ones the upper triangle, mirrored."""
    d, n = columns.shape
    if d < 2 * _BAND or n < 4 * _BAND:
        return quick_product(columns, columns.T)
    out = columns.new_empty(d, d)
    step = -(-d // (d // _BAND))
    for start in range(0, d, step):
        stop = min(d, start + step)
        out[start:stop, start:].copy_(quick_product(columns[start:stop], columns[start:].T))
        out[start:stop, :start].copy_(out[:start, start:stop].T)
    return out


_whole_gram = operation(
    "gram(Tensor x) -> Tensor",
    lambda x: _of_columns(as_columns(x)),
    lambda x: x.new_empty(x.shape[1], x.shape[1]),
)


def _gram_parts(x: Tensor, depth: int) -> Tensor:
    d = x.shape[1]
    if depth == 0 or d < 2 * _SPLIT[_place(x)]:
        return x.T @ x
    h = d // 2
    first, second = x[:, :h], x[:, h:]
    beside = first.T @ second
    top = torch.cat([_gram_parts(first, depth - 1), beside], 1)
    return torch.cat([top, torch.cat([beside.T, _gram_parts(second, depth - 1)], 1)], 0)


def stacked_gram(x: Tensor) -> Tensor:
    """Return `xᵀ x` for each of [R, n, d], [R, d, d]."""
    return gram(x[0]).unsqueeze(0) if x.shape[0] == 1 else x.mT @ x
