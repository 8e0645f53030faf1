"""Folding an estimator over batches: the result on all the data, one batch in memory at a time.

Every result here is an average over N units, so the fold is `merge`, the average weighted by each
batch's own N. It equals the result on the concatenated batches to rounding, for every kind of
labels: random ones are drawn from (key, id of the example), and each example keeps its id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import merging, trees
from fisherfn.core.errors import DataError, OptionError, UnsupportedError

Report: TypeAlias = Callable[[int, "int | None"], Any]


class AccumulateState(NamedTuple):
    """All that a fold remembers; a pytree of tensors, to be saved with `ff.io.save`."""

    result: Any  # what the estimator returns, on all batches so far
    batches: Tensor  # shape=(), dtype=int64
    examples: Tensor  # shape=(), dtype=int64: rows seen, masked ones included

    def __fisher_merge__(self, other: AccumulateState) -> AccumulateState:
        return AccumulateState(
            merging.merge(self.result, other.result),
            self.batches + other.batches,
            self.examples + other.examples,
        )

    def __fisher_empty__(self) -> AccumulateState:
        return AccumulateState(
            merging.empty_like(self.result),
            torch.zeros_like(self.batches),
            torch.zeros_like(self.examples),
        )


def accumulate(
    estimator: Callable[..., Any],
    params: Any,
    buffers: Any,
    batches: Iterable[Batch],
    *,
    state: AccumulateState | None = None,
    key: Tensor | None = None,
    progress: bool | Report = False,
    on_update: Callable[[AccumulateState], Any] | None = None,
) -> tuple[Any, AccumulateState]:
    """Return the result of an estimator on the joined data of many batches.

    A batch without `ids` gets the running numbers of its examples, so that two batches never repeat
    each other's random labels. Interrupt it at will: `on_update` has seen every finished batch, and
    going on from a state gives what one uninterrupted run gives, to the last bit.

    Args:
        estimator: Anything callable as `(params, buffers, batch, *, key)` whose results can be
            merged, such as `ff.diagonal(...)` or its compiled form; or a dict, tuple or NamedTuple
            of such results.
        params: As for the estimator.
        buffers: As for the estimator.
        batches: Any iterable of `ff.Batch`, generators included. Each is used once and let go.
        state: Where to go on, from an earlier call; `batches` then are those that it has not seen.
        key: As for the estimator; the same key serves every batch.
        progress: True shows a bar with the time left; a function is called with the number of
            batches done, earlier calls included, and their total (None if unknown).
        on_update: Called with the state after each batch, for instance to save it.

    Returns:
        The result, and the state from which to go on.

    Raises:
        DataError: There is no batch, or something else than a batch.
        OptionError: An argument of the wrong type.
        UnsupportedError: The results cannot be merged, or the bar is asked for without `rich`.

    Example:
        >>> from fisherfn.curvature import Diagonal
        >>> def squares(params, buffers, batch, *, key=None):  # the model x·w of unit variance
        ...     n = torch.tensor(float(len(batch.inputs)))
        ...     return Diagonal({"w": batch.inputs.square().mean(0)}, n)
        >>> data = [Batch(torch.ones(3, 2)), Batch(3 * torch.ones(1, 2))]
        >>> result, state = accumulate(squares, {"w": torch.zeros(2)}, {}, data)
        >>> result.values, state.batches, state.examples
        ({'w': tensor([3., 3.])}, tensor(2), tensor(4))
    """
    _check_arguments(estimator, batches, state, progress, on_update)
    done = 0 if state is None else int(state.batches)
    total = done + len(batches) if isinstance(batches, Sized) else None
    with _reporting(progress) as report:
        for batch in batches:
            if not isinstance(batch, Batch):
                raise DataError(
                    f"accumulate: expected batches of type ff.Batch, got {type(batch).__name__} as "
                    f"number {done}. Wrap it: ff.Batch(inputs, targets)."
                )
            state = _step(estimator, params, buffers, batch, state, key)
            done += 1
            report(done, total)
            if on_update is not None:
                on_update(state)
    if state is None:
        raise DataError(
            "accumulate: expected at least one batch, got none. A generator is empty when it has "
            "been used before; build it anew."
        )
    return state.result, state


def _step(
    estimator: Callable[..., Any],
    params: Any,
    buffers: Any,
    batch: Batch,
    state: AccumulateState | None,
    key: Tensor | None,
) -> AccumulateState:
    """Return the state after one more batch."""
    rows, device = _rows(batch)
    seen = torch.zeros((), dtype=torch.int64) if state is None else state.examples
    if batch.ids is None:
        ids = torch.arange(rows, device=device) + seen.to(device)
        batch = dataclasses.replace(batch, ids=ids)
    result = estimator(params, buffers, batch, key=key)
    if state is None:
        merging.check_mergeable("accumulate", result)
        return AccumulateState(result, torch.ones((), dtype=torch.int64), seen + rows)
    return AccumulateState(
        merging.merge(state.result, result), state.batches + 1, state.examples + rows
    )


def _rows(batch: Batch) -> tuple[int, torch.device]:
    """Return the number of examples of a batch, and where they are."""
    for leaf in trees.leaves(batch.inputs):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0], leaf.device
    raise DataError(
        "accumulate: expected inputs with the examples as leading axis, got no tensor that has an "
        "axis. Put a tensor [B, ...] into ff.Batch."
    )


def _check_arguments(
    estimator: Any, batches: Any, state: Any, progress: Any, on_update: Any
) -> None:
    """Check the types of arguments that would otherwise fail late or in silence."""
    if not callable(estimator):
        raise OptionError(
            f"accumulate: expected an estimator, got {type(estimator).__name__}. "
            "Pass for instance ff.diagonal(model, likelihood)."
        )
    if not isinstance(batches, Iterable):
        raise DataError(
            f"accumulate: expected an iterable of batches, got {type(batches).__name__}. "
            "Put a single batch into a list."
        )
    if state is not None and not isinstance(state, AccumulateState):
        raise OptionError(
            f"accumulate: expected state from an earlier call, got {type(state).__name__}. "
            "Pass the second value that accumulate returned, not the first."
        )
    if not isinstance(progress, bool) and not callable(progress):
        raise OptionError(
            f"accumulate: expected progress to be True, False or a function, got {progress!r}. "
            "A function is called with the batches done and their total."
        )
    if on_update is not None and not callable(on_update):
        raise OptionError(
            f"accumulate: expected on_update to be a function, got {on_update!r}. "
            "It is called with the state after each batch."
        )


@contextlib.contextmanager
def _reporting(progress: bool | Report) -> Iterator[Report]:
    """Give the function to call after each batch; a bar is taken down whatever happens."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    with _random_state_kept():
        bar = _bar()
        task = bar.add_task("batches", total=None)
        bar.start()

    def show(done: int, total: int | None) -> None:
        with _random_state_kept():
            bar.update(task, completed=done, total=total, refresh=True)

    try:
        yield show
    finally:
        with _random_state_kept():
            bar.stop()


def _bar() -> Any:
    """Return a progress bar of rich, on the error stream."""
    try:
        from rich import console
        from rich import progress as bars
    except ImportError as error:
        raise UnsupportedError(
            "accumulate: expected the package rich for progress=True, got none. Install it with "
            'pip install "fisherfn[app]", or pass a function.'
        ) from error
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    # No thread that redraws by itself: rich draws from the global random state (see below).
    return bars.Progress(*columns, console=console.Console(stderr=True), auto_refresh=False)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put the global random state of Python back, from which rich draws; it must not move."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)
