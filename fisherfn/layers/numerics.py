"""Choices of arithmetic that all contractions share: accumulation type and block sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fisherfn.core.modes import transformed

# One block of per-example scores, in bytes. On a CPU a block should stay in the last-level cache;
# on a GPU, and in compiled code, it only has to bound the memory.
_CPU_BLOCK = 8 * 2**20
_LARGE_BLOCK = 256 * 2**20


def in_place_allowed() -> bool:
    """Return True where a fresh buffer may be overwritten: eager execution without a graph."""
    return not transformed() and not torch.is_grad_enabled()


def block_bytes(t: Tensor) -> int:
    """Return how many bytes of per-example scores may be formed at once on the device of `t`."""
    return _CPU_BLOCK if t.device.type == "cpu" and not transformed() else _LARGE_BLOCK


def blocks(total: int, bytes_each: int, like: Tensor) -> Iterator[tuple[int, int]]:
    """Yield ranges of `total` items such that one range needs at most a block of memory."""
    step = max(1, block_bytes(like) // max(1, bytes_each))
    for start in range(0, total, step):
        yield start, min(total, start + step)


@contextmanager
def convolution_precision(like: Tensor) -> Iterator[None]:
    """Multiply as precisely as the convolution's own gradient would be on the device of `like`.

    torch lets convolutions round float32 to TensorFloat-32 by default, but not matrix products.
    The contraction of a convolution is a matrix product; it follows the choice for convolutions.
    """
    cudnn: Any = torch.backends.cudnn  # its attributes are made at import, unseen by type checkers
    matmul = torch.backends.cuda.matmul
    ours = like.device.type == "cuda" and not transformed()
    if not ours or cudnn.conv.fp32_precision != "tf32":
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def accumulate(total: Tensor | None, term: Tensor) -> Tensor:
    """Return `total + term`, in place where nobody else can see `total`."""
    if total is None:
        return term
    return total.add_(term) if in_place_allowed() else total + term


def sum_of_squares(s: Tensor, *, own: bool = False) -> Tensor:
    """Return the sum of squares over the two leading axes; `own` tensors may be used up."""
    if not in_place_allowed():
        return (s * s).sum((0, 1))
    if s.device.type != "cpu":
        # one pass; the root has no derivative at zero, but none is asked for here
        return torch.linalg.vector_norm(s, dim=(0, 1)).square_()
    # on a CPU a norm over leading axes is not vectorised: six times slower than squares and sum
    return (s.square_() if own else s * s).sum((0, 1))
