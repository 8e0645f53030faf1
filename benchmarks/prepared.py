"""A call that is ready to be timed, and what its makers share."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.oracle import Values
from benchmarks.workloads import Workload

T = TypeVar("T")

NOT_THERE = "no such quantity"


class NotOffered(Exception):
    """The library has no such quantity."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Prepared:
    """A call to be timed.

    Attributes:
        run: The call.
        values: Reads its result as values that can be compared.
        reset: Drops what the call left behind on the model, such as `.grad`.
    """

    run: Callable[[], Any]
    values: Callable[[Any], Values]
    reset: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Library:
    """A library to compare with.

    Attributes:
        distribution: What it is installed as.
    """

    distribution: str

    @property
    def version(self) -> str | None:
        """Its installed version."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


class OneBatch(torch.utils.data.DataLoader[Any]):
    """A loader that yields one batch as it is, without the cost of collating it anew."""

    def __init__(self, workload: Workload) -> None:
        """Take inputs and targets of a workload."""
        self._batch = [workload.batch.inputs.detach(), workload.batch.targets]
        data = torch.utils.data.TensorDataset(*self._batch)
        super().__init__(data, batch_size=workload.examples)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batch."""
        return iter([list(self._batch)])


def forget(module: torch.nn.Module, field: str) -> None:
    """Drop the gradients of a module, and what BackPACK left on its parameters."""
    module.zero_grad()
    for p in module.parameters():
        if hasattr(p, field):
            delattr(p, field)


def offered(known: Mapping[str, T], quantity: str) -> T:
    """Return what a library has for a quantity."""
    if quantity not in known:
        raise NotOffered(NOT_THERE)
    return known[quantity]


def no_mask(workload: Workload) -> None:
    """Refuse workloads of which some positions do not count."""
    if workload.batch.mask is not None:
        raise NotOffered("no mask over positions")
