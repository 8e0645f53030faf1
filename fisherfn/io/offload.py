"""Keeping results and states in CPU memory, in as few bytes as is wanted.

Entries are stored in float32, bfloat16 or scaled float16. Fisher information is small: entries of
1e-10 are usual, and float16 ends at 6e-8, so plain float16 would store zeros. It is therefore
multiplied by a power of two for each tensor, which is exact and takes its largest entry to between
2¹⁴ and 2¹⁵; what is more than about 2³⁹ times smaller than that is flushed to zero, and counted.
bfloat16 has the range of float32 and 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, UnsupportedError, at
from fisherfn.core.modes import concrete, is_dtensor
from fisherfn.io.files import device_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False, repr=False)
class Offloaded:
    """Something in CPU memory; `fetch` brings it back. Counts and clocks are as they were.

    Attributes:
        value: The same structure, with entries in the narrow dtype on the CPU.
        exponents: int64 [L], the power of two by which each leaf was multiplied.
        dtypes: The dtype that each leaf had.
        flushed: Fraction of the entries other than zero that became zero; 0-d float64.
        error: ‖stored − original‖ / ‖original‖ over all entries; 0-d float64.
        event: What says that the copy from a GPU has ended, or None.

    Example:
        >>> kept = offload({"w": torch.tensor([1.0, 1e-12])}, "float16")
        >>> kept
        Offloaded(1 leaf, 4 bytes, flushed 0.5, error 1e-12)
        >>> fetch(kept)
        {'w': tensor([1., 0.])}
    """

    value: Any
    exponents: Tensor
    dtypes: tuple[torch.dtype, ...]
    flushed: Tensor
    error: Tensor
    event: Any = None

    def __repr__(self) -> str:
        n = len(self.dtypes)
        self.wait()
        return (
            f"Offloaded({n} {'leaf' if n == 1 else 'leaves'}, {self.bytes} bytes, "
            f"flushed {self.flushed.item():.2g}, error {self.error.item():.2g})"
        )

    @property
    def bytes(self) -> int:
        """Bytes of all leaves."""
        return sum(x.numel() * x.element_size() for x in trees.leaves(self.value))

    def wait(self) -> None:
        """Wait until a copy from a GPU has ended; before that the values are not there yet."""
        if self.event is not None:
            self.event.synchronize()

    def settled(self) -> Offloaded:
        """Wait, and return the same without the event, so that it can be saved."""
        self.wait()
        return replace(self, event=None)


def offload(obj: Any, dtype: str | torch.dtype = "float32") -> Offloaded:
    """Copy a result, a state or a tree of tensors to CPU memory.

    From a GPU the copy is asynchronous, into pinned memory: the GPU rounds and sends while the
    program goes on, and `fetch`, `repr` and `wait` wait for it.

    Args:
        obj: Any tree of tensors. Floating-point tensors with an axis are entries; counts, weights,
            clocks and integers are kept as they are.
        dtype: "float32", "bfloat16" or "float16" (scaled by a power of two a tensor). A tensor that
            is narrower already stays.

    Returns:
        An `Offloaded`, which reports the fraction that was flushed to zero and the relative error;
        float32 results in "float32" lose nothing.

    Raises:
        OptionError: No such dtype.
        UnsupportedError: Inside a transformation, tensors without memory, a DTensor, or something
            that is no tensor.

    Cost: three passes over the entries where they are, and their bytes over the bus.
    """
    narrow = _dtype(dtype)
    leaves, treedef = trees.flatten(obj)
    _check_leaves(leaves, trees.paths(obj))
    if not concrete(*leaves):
        raise UnsupportedError(
            "io.offload: expected tensors with values, got some inside a transformation or without "
            "memory. Offload outside of torch.compile and torch.func."
        )
    kept: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    for x in leaves:
        stored, exponent, counted = _narrowed(x.detach(), narrow)
        parts.append((exponent, *counted))
        kept.append(_to_cpu(stored))
    exponents, lost, there, wrong, square = (
        torch.stack([p[i].cpu() if len(_devices(leaves)) > 1 else p[i] for p in parts])
        if parts
        else torch.zeros(0, dtype=torch.float64)
        for i in range(5)
    )
    flushed = lost.sum() / there.sum().clamp(min=1)
    size = square.sum()
    error = (wrong.sum() / torch.where(size == 0, 1.0, size)).sqrt()
    report = [_to_cpu(x) for x in (exponents.to(torch.int64), flushed, error)]
    return Offloaded(
        trees.unflatten(treedef, kept),
        report[0],
        tuple(x.dtype for x in leaves),
        report[1],
        report[2],
        _event(leaves),
    )


def fetch(kept: Offloaded, *, device: torch.device | str = "cpu") -> Any:
    """Bring back what `offload` has stored.

    Args:
        kept: What `offload` returned.
        device: Where the tensors go.

    Returns:
        The object, of the same structure and dtypes; entries as exact as `kept.error` says.

    Raises:
        OptionError: Not an `Offloaded`, or there is no such device.
    """
    if not isinstance(kept, Offloaded):
        raise OptionError(
            f"io.fetch: expected what io.offload returned, got {type(kept).__name__}. Files are "
            "read with io.load."
        )
    place = device_of("fetch", device)
    kept.wait()
    leaves, treedef = trees.flatten(kept.value)
    found = []
    for x, exponent, dtype in zip(leaves, kept.exponents.tolist(), kept.dtypes, strict=True):
        x = x.to(place, non_blocking=True).to(dtype)
        if exponent:
            x = x * _power(torch.tensor(-exponent), dtype).to(x.device)
        found.append(x.clone() if any(x is y for y in leaves) else x)
    return trees.unflatten(treedef, found)


def _check_leaves(leaves: list[Any], paths: list[str]) -> None:
    for x, path in zip(leaves, paths, strict=True):
        if not isinstance(x, Tensor):
            raise UnsupportedError(
                f"io.offload: expected a result, a state or a tree of tensors, got "
                f"{type(x).__name__}{at(path)}. Leave it out."
            )
        if is_dtensor(x):
            raise UnsupportedError(
                f"io.offload: expected tensors of this process, got a DTensor{at(path)}. Offload "
                "each rank's part, .to_local()."
            )


def _narrowed(x: Tensor, narrow: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a leaf as it is stored, its exponent, and what was lost.

    The last are the numbers of entries flushed and not zero, and the squared norms of error and
    value.
    """
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    none = torch.zeros((), dtype=torch.int64, device=x.device)
    if not x.is_floating_point() or not x.ndim:
        return x, none.double(), [zero] * 4
    if torch.finfo(x.dtype).bits <= torch.finfo(narrow).bits:
        return x, none.double(), [zero, *_sizes(x)[:1], zero, *_sizes(x)[1:]]
    exponent = none
    scaled = x
    if narrow == torch.float16 and x.numel():
        # an infinite entry is stored as such and has no say in the scale of the others
        largest = torch.where(x.isfinite(), x.abs(), 0.0).amax()
        exponent = 15 - torch.frexp(largest).exponent.to(torch.int64)
        limit = 126 if x.dtype == torch.float32 else 1022
        exponent = torch.where(largest > 0, exponent.clamp(-limit, limit), 0)
        scaled = x * _power(exponent, x.dtype)
    stored = scaled.to(narrow)
    back = stored.to(x.dtype)
    lost = ((back == 0) & (x != 0)).sum(dtype=torch.float64)
    wrong = (scaled - back).to(x.dtype)
    # in units of the scaled tensor a square cannot underflow; undone exactly below
    factor = _power(-exponent, torch.float64) if exponent is not none else zero + 1.0
    size = torch.linalg.vector_norm(scaled, dtype=torch.float64) * factor
    error = torch.linalg.vector_norm(wrong, dtype=torch.float64) * factor
    there = (x != 0).sum(dtype=torch.float64)
    return stored, exponent.double(), [lost, there, error.square(), size.square()]


def _sizes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of entries other than zero, and the squared norm."""
    there = (x != 0).sum(dtype=torch.float64)
    return there, torch.linalg.vector_norm(x, dtype=torch.float64).square()


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2 to an integer power, to the bit.

    >>> _power(torch.tensor(-3), torch.float32)
    tensor(0.1250)
    """
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int64) + 127) << 23).to(torch.int32).view(torch.float32)


def _to_cpu(x: Tensor) -> Tensor:
    """Return a copy on the CPU; from a GPU into pinned memory, without waiting."""
    if x.device.type != "cuda":
        return x.to("cpu", copy=True).contiguous()
    room = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return room.copy_(x, non_blocking=True)


def _event(leaves: list[Tensor]) -> Any:
    """Return what marks the end of the copies so far on the GPUs of these tensors."""
    devices = [d for d in _devices(leaves) if d.type == "cuda"]
    if not devices:
        return None
    for device in devices[:-1]:
        torch.cuda.synchronize(device)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(devices[-1]))
    return event


def _devices(leaves: list[Tensor]) -> list[torch.device]:
    return list(dict.fromkeys(x.device for x in leaves))


def _dtype(dtype: Any) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise OptionError(
            f"io.offload: expected dtype to be one of {list(DTYPES)}, got {dtype!r}. float32 loses "
            "nothing."
        )
    return found
