"""Sums over ranks, and what they cost to send.

A tensor goes over the wire as it is, as the upper triangle of a symmetric matrix (exact), or
rounded to a narrow dtype. Rounded tensors are gathered and added here in float32 or wider, so the
only error is that of one rounding on each rank, and its norm is known.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfn.core.errors import OptionError, UnsupportedError


class Wire:
    """The ranks of a group, and a count of what was sent."""

    def __init__(
        self, caller: str, group: Any, triangular: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Connect to a group, and choose how tensors are sent."""
        check_group(caller)
        if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
            raise OptionError(
                f"{caller}: expected dtype to be None, torch.bfloat16, torch.float16 or "
                f"torch.float32, got {dtype!r}. None sends tensors as they are."
            )
        self.group, self.triangular, self.dtype = group, triangular, dtype
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        nccl = "nccl" in str(dist.get_backend(group))
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        self.sent = self.full = 0
        self.lost = 0.0  # squared norm of this rank's rounding errors
        self.norm = 0.0  # squared norm of what came of it

    def objects(self, mine: Any) -> list[Any]:
        """Return a small object of every rank, in the order of the ranks."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def scalar(self, x: Tensor) -> Tensor:
        """Return the sum of counts and weights over ranks, never rounded."""
        return self._plain(x)

    def sum(self, x: Tensor, symmetric: bool = False) -> Tensor:
        """Return the sum of a tensor over ranks."""
        self.full += x.numel() * x.element_size()
        total = self._unpacked(self._sum(self._packed(x, symmetric)), x, symmetric)
        self._remember(total)
        return total

    def shard(self, x: Tensor) -> Tensor:
        """Return this rank's rows of the sum over ranks; the whole of a 0-d tensor."""
        if x.ndim == 0:
            return self.sum(x)
        size = x.numel() * x.element_size()
        self.full, self.sent = self.full + size, self.sent + size
        mine = x[:0]
        for rank, rows in enumerate(cut(x, self.world)):
            part = self._there(rows).clone()
            if part.numel():
                dist.reduce(part, dist.get_global_rank(self._group(), rank), group=self.group)
            if rank == self.rank:
                mine = part.to(x.device)
        return mine

    def _group(self) -> Any:
        return self.group if self.group is not None else dist.group.WORLD

    def every(self, x: Tensor, shapes: list[tuple[int, ...] | None]) -> list[Tensor | None]:
        """Return a tensor of every rank, of these shapes; None where a rank has none."""
        sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
        self.full += x.numel() * x.element_size()
        narrow = self._narrow(x.reshape(-1))
        self.sent += narrow.numel() * narrow.element_size()
        room = self._there(narrow.new_zeros(max(sizes)))
        room[: narrow.numel()] = narrow.to(room.device)
        found = [torch.empty_like(room) for _ in shapes]
        if room.numel():
            dist.all_gather(found, room, group=self.group)
        for part in found:
            self._remember(part)
        return [
            None if shape is None else part[:size].to(x.device, x.dtype).reshape(shape)
            for part, size, shape in zip(found, sizes, shapes, strict=True)
        ]

    def error(self) -> float:
        """Return a bound of the error of all entries together, relative to their norm."""
        lost = self._plain(torch.tensor(math.sqrt(self.lost), dtype=torch.float64)).item()
        return lost / math.sqrt(self.norm) if lost else 0.0

    def _sum(self, x: Tensor) -> Tensor:
        narrow = self._narrow(x)
        self.sent += narrow.numel() * narrow.element_size()
        if narrow.dtype == x.dtype:
            return self._plain(x)
        mine = self._there(narrow)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine, group=self.group)
        total = torch.zeros_like(x)
        for part in found:
            total += part.to(x.device, x.dtype)
        return total

    def _narrow(self, x: Tensor) -> Tensor:
        """Return a tensor as it is sent; remember what is lost."""
        if self.dtype is None or not x.is_floating_point():
            return x
        if torch.finfo(self.dtype).bits >= torch.finfo(x.dtype).bits:
            return x
        narrow = x.to(self.dtype)
        self.lost += float((x - narrow.to(x.dtype)).double().square().sum())
        return narrow

    def _remember(self, x: Tensor) -> None:
        if self.dtype is not None and x.is_floating_point():
            self.norm += float(x.double().square().sum())

    def _packed(self, x: Tensor, symmetric: bool) -> Tensor:
        if not (symmetric and self.triangular):
            return x
        i, j = _triangle(x)
        return x[..., i, j]

    def _unpacked(self, packed: Tensor, like: Tensor, symmetric: bool) -> Tensor:
        if not (symmetric and self.triangular):
            return packed
        i, j = _triangle(like)
        whole = torch.empty_like(like)
        whole[..., i, j] = packed
        whole[..., j, i] = packed
        return whole

    def _plain(self, x: Tensor) -> Tensor:
        total = self._there(x).clone()
        if total.numel():
            dist.all_reduce(total, group=self.group)
        return total.to(x.device)

    def _there(self, x: Tensor) -> Tensor:
        """Return a contiguous tensor where this backend wants it."""
        return x.detach().to(self.device or torch.device("cpu")).contiguous()


def cut(x: Tensor, world: int) -> list[Tensor]:
    """Return the rows of each rank, as `torch.chunk` and `Shard(0)` of a DTensor cut them.

    >>> [len(part) for part in cut(torch.zeros(5, 2), 4)]
    [2, 2, 1, 0]
    """
    parts = list(x.chunk(world, dim=0)) if len(x) else []
    return parts + [x[:0]] * (world - len(parts))


def check_group(caller: str) -> None:
    """Check that there are processes to talk to.

    Raises:
        UnsupportedError: No process group has been initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise UnsupportedError(
            f"{caller}: expected an initialised process group, got none. Start the processes with "
            "torchrun and call torch.distributed.init_process_group() first."
        )


def _triangle(x: Tensor) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(x.shape[-2], x.shape[-1], device=x.device)
    return i, j
