"""Errors that only a program meets: no memory, no disk, no file."""

from __future__ import annotations

import torch

from fisherfn.core.errors import FisherError


class OutputError(FisherError, OSError):
    """Something could not be written or read where the user said."""


class OutOfMemoryError(FisherError, MemoryError):
    """The device or the machine has too little memory for one batch."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True iff this is torch's or Python's way of saying that memory ran out.

    The allocator of the CPU has no exception class of its own: it raises a bare `RuntimeError`.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )
