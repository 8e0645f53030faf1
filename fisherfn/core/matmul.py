"""The product of two matrices, by the fastest of the libraries that torch carries.

On a CPU torch multiplies float32 matrices by MKL, which leaves the AVX-512 units of processors that
are not Intel's idle; oneDNN, which torch has for convolutions, uses them: 430 in place of 210
GFLOP/s on two cores of an AMD EPYC of 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fisherfn.core.modes import in_functorch, transformed
from fisherfn.core.operations import operation

# Products of fewer multiplications, or with fewer rows or columns, cost more to start than they
# take.
_MULTIPLICATIONS = 2**21
_NARROW = 16
_DTYPES = (torch.float32,)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` for matrices [m, k] and [k, n]; there must be no autocast.

    >>> product(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.],
            [3.]])
    """
    (m, k), n = left.shape, right.shape[1]
    if quick(left, m, k, n) and quick(right, m, k, n):
        return quick_product(left, right)
    if traced(left, m, k, n) and traced(right, m, k, n):
        return _product(left, right)
    return left @ right


def stacked_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` for stacks of matrices, [..., m, k] and [..., k, n].

    >>> stacked_product(torch.ones(1, 2, 3), torch.ones(1, 3, 1)).shape
    torch.Size([1, 2, 1])
    """
    many, lead = left.shape[:-2], right.shape[:-2]
    if many.numel() == lead.numel() == 1:
        found = product(left.reshape(left.shape[-2:]), right.reshape(right.shape[-2:]))
        return found.reshape(*(many if len(many) >= len(lead) else lead), *found.shape)
    (m, k), n = left.shape[-2:], right.shape[-1]
    if many == lead and left.dim() == 3 and quick(left, m, k, n) and quick(right, m, k, n):
        return torch.stack([quick_product(x, y) for x, y in zip(left, right, strict=True)])
    return left @ right


def row_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` for rows of data [m, k], however many, and a matrix [k, n].

    >>> row_product(torch.ones(2, 3), torch.ones(3, 1)).shape
    torch.Size([2, 1])
    """
    (m, k), n = left.shape, right.shape[1]
    if quick(left, m, k, n) and quick(right, m, k, n):
        return quick_product(padded(left, 0), right)[:m]
    return product(left, right)


def summed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `leftᵀ @ right` for rows of data, however many, [R, n, m] and [R, n, k].

    >>> summed_product(torch.ones(1, 3, 2), torch.ones(1, 3, 1)).shape
    torch.Size([1, 2, 1])
    """
    (_, n, m), k = left.shape, right.shape[2]
    if not (quick(left, m, n, k) and quick(right, m, n, k)):
        return stacked_product(left.mT, right)
    if m > k:  # the narrower ones are copied
        return summed_product(right, left).mT.contiguous()
    columns = as_columns(left)
    rows = right if columns.shape[2] == n else padded(right, 1)
    return torch.stack([quick_product(x, y) for x, y in zip(columns, rows, strict=True)])


def as_columns(x: Tensor) -> Tensor:
    """Return the transpose of rows [..., n, m] in memory, with zeros up to a `rounded` n.

    What is stored by columns is returned as it is.
    """
    n = x.shape[-2]
    length = rounded(n)
    if length == n or x.mT.is_contiguous():
        return x.mT.contiguous()
    found = x.new_empty((*x.shape[:-2], x.shape[-1], length))
    found[..., :n].copy_(x.mT)
    found[..., n:] = 0.0
    return found


def padded(x: Tensor, axis: int) -> Tensor:
    """Return a tensor with zeros along an axis up to a `rounded` size."""
    missing = rounded(x.shape[axis]) - x.shape[axis]
    return F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, missing]) if missing else x


def rounded(n: int) -> int:
    """Return the next larger of the sizes that data is brought to, an eighth larger at most.

    oneDNN keeps a program for each combination of sizes: half a megabyte, made in 0.3 ms. Sequences
    of every length would fill its memory with them.

    >>> [rounded(n) for n in (7, 64, 100, 1000)]
    [8, 64, 104, 1024]
    """
    step = max(8, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


def quick(t: Tensor, m: int, k: int, n: int) -> bool:
    """Return whether oneDNN may and should multiply matrices of these sizes, one like `t`, now."""
    plain = type(t) in (Tensor, torch.nn.Parameter) and not transformed()
    return plain and _pays(t, m, k, n)


def traced(t: Tensor, m: int, k: int, n: int) -> bool:
    """Return whether compiled code should do so.

    Only estimators, which run while the graph is made, can ask, and only for sizes that are known.
    """
    if torch.compiler.is_dynamo_compiling() or not transformed() or in_functorch():
        return False
    known = type(m) is int and type(k) is int and type(n) is int
    return known and _pays(t, m, k, n)


def _pays(t: Tensor, m: int, k: int, n: int) -> bool:
    return (
        t.dtype in _DTYPES
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and m * k * n >= _MULTIPLICATIONS
        and min(m, k, n) >= _NARROW
        and dense_product() is not None
        and torch.backends.mkldnn.enabled
        and not (t.requires_grad and torch.is_grad_enabled())
        and not t._is_zerotensor()
        and forward_ad._current_level < 0
    )


def quick_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` by oneDNN, where `quick` or `traced` says yes for both.

    One of them is copied if `left` is stored by columns and `right` by rows.
    """
    multiply = dense_product()
    if multiply is None:  # code that was compiled on another processor
        return left @ right
    if not by_rows(left) and by_rows(right) and left.shape[0] > right.shape[1]:
        return multiply(right.T.contiguous(), dense(left)).T.contiguous()
    return multiply(left if by_rows(left) else left.contiguous(), dense(right.T))


def by_rows(x: Tensor) -> bool:
    """Return whether the rows of a matrix, or of a stack of them, are contiguous."""
    return x.stride(-1) == 1


def dense(x: Tensor) -> Tensor:
    """Return matrices without gaps between their rows, or between their columns."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


@functools.cache
def dense_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return oneDNN's product `x wᵀ` of matrices; None where it is missing or no faster.

    Rows of `x` must be contiguous, and `w` or its transpose without gaps: with others it takes a
    thousand times as long.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if packet is None:
        return None
    linear = packet.default
    return lambda x, w: linear(x, w, None, "none", [], "")


_product = operation(
    "product(Tensor left, Tensor right) -> Tensor",
    quick_product,
    lambda left, right: left.new_empty(left.shape[0], right.shape[1]),
)
