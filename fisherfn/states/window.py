"""The last members of a stream, as they were.

The members themselves are kept, oldest first, and the reading is their weighted mean: nothing is
subtracted, so nothing is left of a member that has gone. A state shares its members with the state
before it; an update copies nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError
from fisherfn.core.options import is_count
from fisherfn.states import transform
from fisherfn.states.transform import Transform, Weight


class WindowState(NamedTuple):
    """The last S members; places that are not filled yet have weight 0 and come first."""

    entries: tuple[Any, ...]  # S trees like the members, oldest first
    weights: Tensor  # shape=(S,), dtype=float64
    updates: Tensor  # shape=(), dtype=int64: members seen, those that have gone included

    def __fisher_merge__(self, other: WindowState) -> WindowState:
        """Join two shards of one stream: their k-th last members are of the same time."""
        if len(self.entries) != len(other.entries):
            raise OptionError(
                f"merge: expected windows of one size, got {len(self.entries)} and "
                f"{len(other.entries)}. Make both with the same states.window(size)."
            )
        total = self.weights + other.weights
        shares = (other.weights / torch.where(total == 0, 1.0, total)).unbind()
        joined: list[Any] = []
        for a, b, share in zip(self.entries, other.entries, shares, strict=True):
            cells, treedef = transform.flatten("merge", a)
            theirs = transform.align("merge", a, b, absent=False)
            found = [transform.toward(x, y, share) for x, y in zip(cells, theirs, strict=True)]
            joined.append(treedef.unflatten(found))
        return WindowState(tuple(joined), total, torch.maximum(self.updates, other.updates))

    def __fisher_empty__(self) -> WindowState:
        zeros = trees.map(torch.zeros_like, self)
        return zeros._replace(entries=transform.nothing(self.entries))


def window(size: int, *, dtype: torch.dtype | None = None) -> Transform:
    """Average the last `size` members of a stream, and keep them.

    `ff.states.interval(state, method="bootstrap", key=key)` resamples what is kept.

    Args:
        size: How many members to keep, at least 1.
        dtype: In which to keep them; default: their own, float32 or wider.

    Returns:
        A `Transform`. Its reading is the weighted mean of the members that are kept, a tree like
        them; every member has weight 1 unless given.

    Raises:
        OptionError: `size` is no positive integer, or `dtype` is no floating-point dtype.

    Cost: a reading passes over all that is kept. Memory: `size` trees.

    Example:
        >>> recent = window(2)
        >>> state = recent.init({"w": torch.zeros(1)})
        >>> for x in (1.0, 2.0, 6.0):
        ...     reading, state = recent.update({"w": torch.tensor([x])}, state)
        >>> reading
        {'w': tensor([4.])}
    """
    if not is_count(size):
        raise OptionError(
            f"states.window: expected size to be a positive integer, got {size!r}. "
            "It is the number of updates to remember."
        )
    transform.check_dtype("states.window", dtype)

    def init(like: Any) -> WindowState:
        cells, _ = transform.flatten("window.init", like)
        at = transform.place(cells)
        nothing = transform.empty(like, dtype)
        return WindowState(
            (nothing,) * size,
            torch.zeros(size, dtype=working_dtype(at), device=at),
            torch.zeros((), dtype=torch.int64, device=at),
        )

    def update(new: Any, state: WindowState, weight: Weight = None) -> tuple[Any, WindowState]:
        transform.check_state("window.update", state, WindowState)
        if len(state.entries) != size:
            raise OptionError(
                f"window.update: expected a state of {size} members, got one of "
                f"{len(state.entries)}. Go on with the same states.window(size)."
            )
        cells, treedef = transform.flatten("window.update", state.entries[-1])
        news = transform.align("window.update", state.entries[-1], new, absent=False)
        w = transform.check_weight("window.update", weight, 1.0, state.weights)
        # through the fold's own arithmetic, so that a member has the dtypes and checks of the state
        one = torch.ones_like(state.weights[0])
        kept = [
            transform.toward(cell, transform.cast(x, dtype), one)
            for cell, x in zip(cells, news, strict=True)
        ]
        after = WindowState(
            (*state.entries[1:], treedef.unflatten(kept)),
            torch.cat([state.weights[1:], (w * one).reshape(1)]),
            state.updates + 1,
        )
        return read(after), after

    def read(state: WindowState) -> Any:
        transform.check_state("window.read", state, WindowState)
        total = torch.zeros_like(state.weights[0])
        first = transform.nothing(state.entries[0])
        cells, treedef = transform.flatten("window.read", first)
        for entry, w in zip(state.entries, state.weights.unbind(), strict=True):
            total = total + w
            share = w / torch.where(total == 0, 1.0, total)
            found, _ = transform.flatten("window.read", entry)
            cells = [transform.toward(a, b, share) for a, b in zip(cells, found, strict=True)]
        return treedef.unflatten([transform.unknown_where(total == 0, cell) for cell in cells])

    return Transform(init, update, read)
