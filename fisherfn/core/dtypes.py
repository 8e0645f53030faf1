"""Which dtype sums and factorisations are done in, said once for all floors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WIDE = (torch.float32, torch.float64)


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 or wider: squares of half-precision numbers need the range.

    >>> wide(torch.ones(2, dtype=torch.bfloat16)).dtype, wide(torch.ones(2).double()).dtype
    (torch.float32, torch.float64)
    """
    return x if x.dtype in _WIDE else x.to(torch.promote_types(x.dtype, torch.float32))


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the common dtype of tensors, float32 or wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def working_dtype(at: Tensor | torch.device) -> torch.dtype:
    """Return the dtype for counts, delicate sums and factorisations: float64 where there is one.

    In float32 no count goes beyond 2²⁴, and many eigenvalues drown in rounding.

    >>> working_dtype(torch.ones(2))
    torch.float64
    """
    device = at.device if isinstance(at, Tensor) else at
    return torch.float32 if device.type == "mps" else torch.float64
