"""Each rank's share of the data, and results that are cut into rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.distributed.wire import Wire, check_group
from fisherfn.states.accumulate import rows_of


def local_batches(batches: Iterable[Batch], *, group: Any = None) -> Iterator[Batch]:
    """Give the batches of this rank: every R-th of R ranks, with the ids of a single process.

    Every rank goes through the same iterable and lets go of what belongs to others, so the data
    has to be cheap to name and expensive to use, as it is here.

    Args:
        batches: The batches of all ranks, in the same order everywhere.
        group: Process group; None is the default group.

    Yields:
        Batches with ids: their own, or the running numbers over the batches of all ranks.

    Raises:
        UnsupportedError: There is no process group.
    """
    check_group("distributed.local_batches")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    seen = 0
    for number, batch in enumerate(batches):
        rows, device = rows_of(batch)
        if number % world == rank:
            if batch.ids is None:
                ids = torch.arange(rows, device=device) + seen
                batch = dataclasses.replace(batch, ids=ids)
            yield batch
        seen += rows


def unshard(obj: Any, *, group: Any = None) -> Any:
    """Return the whole of a result or state that `all_reduce(..., sharded=True)` has cut.

    Args:
        obj: This rank's rows.
        group: Process group; None is the default group.

    Returns:
        The whole, on every rank: a tree of the same structure.

    Raises:
        UnsupportedError: There is no process group.
    """
    wire = Wire("distributed.unshard", group)
    scalars = _scalars(obj)

    def whole(x: Tensor) -> Tensor:
        if id(x) in scalars or x.ndim == 0:
            return x
        shapes = wire.objects(tuple(x.shape))
        return torch.cat([part for part in wire.every(x, shapes) if part is not None])

    return trees.map(whole, obj)


def _scalars(obj: Any) -> set[int]:
    """Return the tensors of a state that are weights and clocks, which are never cut."""
    found: set[int] = set()
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        for name in ("weight", "weights", "updates"):
            if isinstance(getattr(obj, name, None), Tensor):
                found.add(id(getattr(obj, name)))
    parts = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, list | tuple) else ()
    for part in parts:
        found |= _scalars(part)
    return found
