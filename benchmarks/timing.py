"""Fair timing on a machine that is never quite quiet: everything interleaved, medians reported."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

MIN_SAMPLE_SECONDS = 0.02  # shorter calls are repeated within a sample


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    minimum: float
    lower_quartile: float
    upper_quartile: float
    samples: int
    calls_per_sample: int

    def as_dict(self) -> dict[str, float | int]:
        """Return the fields."""
        return asdict(self)


def seconds(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds that one call takes, averaged over `calls` of them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, Timing]:
    """Time all runs round by round, so that a slow moment of the machine hits all of them.

    Args:
        runs: What to call, by name; each has been called before, so that caches are warm.
        device: Where they work.
        repeats: Rounds; within each, the order moves on by one.

    Returns:
        The timing of each run.
    """
    calls = {name: _calls_per_sample(run, device) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    with _no_collection():
        for r in range(repeats):
            start = r % len(names)
            for name in names[start:] + names[:start]:
                samples[name].append(seconds(runs[name], device, calls[name]))
            gc.collect()
    return {name: _summary(samples[name], calls[name]) for name in names}


def _calls_per_sample(run: Callable[[], object], device: torch.device) -> int:
    once = seconds(run, device)
    return max(1, round(MIN_SAMPLE_SECONDS / once))


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _summary(samples: list[float], calls: int) -> Timing:
    quarters = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return Timing(quarters[1], min(samples), quarters[0], quarters[2], len(samples), calls)
