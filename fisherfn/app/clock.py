"""Where the time went, and how much memory it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in named phases, in the order in which they were first entered."""

    def __init__(self) -> None:
        """Begin."""
        self.seconds: dict[str, float] = {}
        self.begun = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.begun

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add time to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that the process has held at one time on this device, 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
