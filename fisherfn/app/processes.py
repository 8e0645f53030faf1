"""One run by several processes, as `torchrun` starts them.

    torchrun --nproc-per-node 2 -m fisherfn fim --model ...

Each process takes every R-th batch, the sums are added at the end, and the first process writes and
prints. Labels are drawn from the place of a sample in the data, so the numbers are those of one
process, to rounding. Each process keeps a checkpoint of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import fisherfn as ff


@dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def own(self, batches: int) -> range:
        """Return the numbers of this process's batches."""
        return range(self.rank, batches, self.world)

    def directory(self, output: Path) -> Path:
        """Return where this process keeps its checkpoint."""
        if self.is_first:
            return output
        own = output / f"process-{self.rank}"
        own.mkdir(parents=True, exist_ok=True)
        return own

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def together(self, result: Any) -> Any:
        """Return the result on the data of all processes; None stands for no data."""
        return result if self.world == 1 else ff.distributed.all_reduce(result)

    def quiet(self, console: Console) -> Console:
        """Return the console to print to: none but the first process does."""
        return console if self.is_first else Console(file=StringIO())


@contextmanager
def processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the other processes of this run, if `torchrun` has started any.

    Args:
        device: The option `--device`.

    Yields:
        Which process this is, and the device that it should use.

    Raises:
        OptionError: There are fewer GPUs than processes, or one GPU is named for all of them.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Processes(), device
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda:"):
        raise ff.OptionError(
            f"--device: expected cuda or cpu for {world} processes, got {device}. Each takes the "
            "GPU of its own number."
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ff.OptionError(
                f"--device: expected a GPU for each process of this machine, got "
                f"{torch.cuda.device_count()} for process {local}. Start fewer, or take cpu."
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world)
    try:
        yield Processes(rank, world), device
    finally:
        dist.destroy_process_group()
