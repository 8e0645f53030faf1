"""Folding an estimator over batches: the result on all the data, one batch in memory at a time.

Every result here is an average over N units, so the fold is `merge`, the average weighted by each
batch's own N. It equals the result on the concatenated batches to rounding, for every kind of
labels: random ones are drawn from (key, id of the example), and each example keeps its id. With a
transform (`ema`, `welford`, `window`, `every`) its state is folded instead.

**Do not clip gradients.** A batch with NaN is no reason to clip or normalise gradients first. The
Fisher information is the mean square of the scores; a clipped score is the derivative of no
log-probability, and clipping shrinks just those examples that contribute most, by an amount that
depends on the batch. What a non-finite batch says is that the model's outputs or weights overflow
there. Look at it (`on_nonfinite="raise"` names the batch and the leaf), compute in a wider dtype,
or leave it out and have it counted (`on_nonfinite="skip"`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import merging, trees
from fisherfn.core.errors import DataError, OptionError
from fisherfn.core.modes import concrete
from fisherfn.states import transform as kinds
from fisherfn.states.every import EveryPair, EveryState, due
from fisherfn.states.finite import first_bad_leaf
from fisherfn.states.options import STATES, Options, kind_of, options_of, refuse_target
from fisherfn.states.progress import Report, reporting
from fisherfn.states.transform import Transform
from fisherfn.states.welford import WelfordState, entries, stderr

_LOG = logging.getLogger(__name__)

#: Updates before a standard error is trusted to stop a fold: one of 7 degrees of freedom is itself
#: known to about a quarter.
_LEAST_UPDATES = 8


class AccumulateState(NamedTuple):
    """All that a fold remembers; a pytree of tensors, to be saved with `ff.io.save`."""

    result: Any  # what the estimator returns, on all batches so far; with a transform, its state
    batches: Tensor  # shape=(), dtype=int64: batches seen, skipped ones included
    examples: Tensor  # shape=(), dtype=int64: rows seen, masked and skipped ones included
    skipped: Tensor = torch.zeros((), dtype=torch.int64)  # shape=(), batches that were not finite
    units: Tensor = torch.zeros((), dtype=torch.float64)  # shape=(), N of the batches not skipped

    def __fisher_merge__(self, other: AccumulateState) -> AccumulateState:
        a, b = self.result, other.result
        return AccumulateState(
            merging.merge(a, b) if a is not None and b is not None else (b if a is None else a),
            self.batches + other.batches,
            self.examples + other.examples,
            self.skipped + other.skipped,
            self.units + other.units,
        )

    def __fisher_empty__(self) -> AccumulateState:
        zeros = [torch.zeros_like(x) for x in self[1:]]
        return AccumulateState(merging.empty_like(self.result), *zeros)


def accumulate(
    estimator: Any,
    params: Any,
    buffers: Any,
    batches: Iterable[Batch],
    *,
    transform: Transform | None = None,
    state: AccumulateState | Transform | None = None,
    key: Tensor | None = None,
    progress: bool | Report = False,
    on_update: Callable[[AccumulateState], Any] | None = None,
    max_units: float | None = None,
    target_stderr: float | None = None,
    on_nonfinite: str | None = "raise",
) -> tuple[Any, AccumulateState]:
    """Return the result of an estimator on the joined data of many batches.

    A batch without `ids` gets the running numbers of its examples, so that two batches never repeat
    each other's random labels. One that is empty or masked throughout adds nothing. Interrupt it at
    will: `on_update` has seen every finished batch, and going on from a state gives what one
    uninterrupted run gives, to the last bit.

    Args:
        estimator: Anything callable as `(params, buffers, batch, *, key)` whose results can be
            merged, such as `ff.diagonal(...)` or its compiled form; or a dict, tuple or NamedTuple
            of such results. With a transform `every`, a pair of estimators: the one for the steps
            that are due, and the one for those between.
        params: As for the estimator.
        buffers: As for the estimator.
        batches: Any iterable of `ff.Batch`, generators included. Each is used once and let go.
        transform: What to fold with, such as `welford()`; None takes the plain result on all data.
        state: Where to go on, from an earlier call with the same transform; `batches` then are
            those that it has not seen. A transform is taken as `transform`.
        key: As for the estimator; the same key serves every batch.
        progress: True shows a bar with the time left; a function is called with the number of
            batches done, earlier calls included, and their total (None if unknown).
        on_update: Called with the state after each batch, for instance to save it.
        max_units: Stop after the batch with which N, the units of all batches, reaches this.
        target_stderr: Stop as soon as ‖standard errors‖ / ‖mean‖, over all entries, is at most
            this, from the 8th batch on. The error is that between batches; it needs `welford()`,
            which is the default transform then.
        on_nonfinite: On a batch whose result has NaN or infinity: "raise", or "skip" it and count
            it in the state; None does not look. The module says why clipping is no remedy.

    Returns:
        The result (with a transform its reading), and the state from which to go on.

    Raises:
        DataError: There is no batch, or something else than a batch, or a result is not finite.
        OptionError: An argument of the wrong type, or a state of another transform.
        UnsupportedError: The results cannot be merged, or the bar is asked for without `rich`.

    Cost: that of the estimator, and one pass over its result to look for what is not finite.

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
    if isinstance(state, Transform):
        transform, state = state if transform is None else transform, None
    options = options_of(
        estimator, batches, transform, progress, on_update, max_units, target_stderr, on_nonfinite
    )
    _check_state(state, options)
    fold = _Fold(options, params, buffers, key, state)
    length = _length(batches)
    total = None if length is None else fold.done + length
    stream = iter(batches)
    with reporting(progress) as report:
        while not fold.is_finished():
            batch = next(stream, None)
            if batch is None:
                break
            fold.step(batch)
            assert fold.state is not None
            report(fold.done, total)
            if on_update is not None:
                on_update(fold.state)
    return fold.finish()


class _Fold:
    """A fold on its way."""

    def __init__(
        self,
        options: Options,
        params: Any,
        buffers: Any,
        key: Tensor | None,
        state: AccumulateState | None,
    ) -> None:
        self.options, self.params, self.buffers, self.key = options, params, buffers, key
        self.state = state
        self.done = 0 if state is None else int(state.batches)

    def is_finished(self) -> bool:
        """Return whether enough units were seen, or the result is good enough."""
        options, state = self.options, self.state
        if state is None or state.result is None:
            return False
        if options.max_units is not None and float(state.units) >= options.max_units:
            return True
        if options.target_stderr is None:
            return False
        moments = state.result
        if not isinstance(moments, WelfordState):
            refuse_target()
        if int(moments.updates) < _LEAST_UPDATES:
            return False
        error, mean = trees.norm(stderr(moments)), trees.norm(entries(moments.mean))
        return bool(error <= options.target_stderr * mean)

    def step(self, batch: Any) -> None:
        """Fold one more batch."""
        if not isinstance(batch, Batch):
            raise DataError(
                f"accumulate: expected batches of type ff.Batch, got {type(batch).__name__} as "
                f"number {self.done}. Wrap it: ff.Batch(inputs, targets)."
            )
        rows, device = rows_of(batch)
        before = self.state or AccumulateState(None, *[torch.zeros((), dtype=torch.int64)] * 2)
        if batch.ids is None:
            ids = torch.arange(rows, device=device) + before.examples.to(device)
            batch = dataclasses.replace(batch, ids=ids)
        counted = before._replace(batches=before.batches + 1, examples=before.examples + rows)
        if rows == 0 or _counts_nothing(batch):
            self.done, self.state = self.done + 1, counted
            return
        result = self._estimate(batch, before.result)
        self.done += 1
        bad = None if self.options.on_nonfinite is None else first_bad_leaf(result)
        if bad is not None:
            self._complain(bad, batch)
            self.state = counted._replace(skipped=before.skipped + 1)
            return
        units = _units(result, rows)
        units = before.units.to(units.device) + units
        joined = self._joined(before.result, result, batch)
        self.state = counted._replace(result=joined, units=units)

    def finish(self) -> tuple[Any, AccumulateState]:
        """Return the result and the state."""
        if self.state is None:
            raise DataError(
                "accumulate: expected at least one batch, got none. A generator is empty when it "
                "has been used before; build it anew."
            )
        if self.state.result is None:
            raise DataError(
                f"accumulate: expected at least one batch with a finite result, got {self.done}: "
                f"{int(self.state.skipped)} were all skipped as not finite, and in the others "
                "everything is masked or has weight 0. See what on_nonfinite='raise' says."
            )
        transform = self.options.transform
        if transform is None:
            return self.state.result, self.state
        return transform.read(self.state.result), self.state

    def _estimate(self, batch: Batch, state: Any) -> Any:
        """Return the estimator's result on a batch; of a pair, that of the one that is due."""
        estimator = self.options.estimator
        if isinstance(estimator, tuple):
            first = state is None or bool(due(state))
            estimator = estimator[0] if first else estimator[1]
        return estimator(self.params, self.buffers, batch, key=self.key)

    def _joined(self, before: Any, result: Any, batch: Batch) -> Any:
        """Return what is remembered after one more result."""
        transform, estimator = self.options.transform, self.options.estimator
        if transform is None:
            if before is None:
                merging.check_mergeable("accumulate", result)
                return result
            return merging.merge(before, result)
        if before is None:
            like = result
            if isinstance(estimator, tuple):  # the other one, once, for what its results look like
                other = estimator[1](self.params, self.buffers, batch, key=self.key)
                like = EveryPair(result, other)
            before = transform.init(like)
            if isinstance(estimator, tuple) and not isinstance(before, EveryState):
                raise OptionError(
                    "accumulate: expected one estimator, got a pair. A pair goes with "
                    "transform=states.every(n, a, otherwise=b)."
                )
        return transform.update(result, before)[1]

    def _complain(self, bad: str, batch: Batch) -> None:
        """Raise for a batch that is not finite, or log that it is skipped."""
        assert batch.ids is not None
        ids = batch.ids.tolist()
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        what = f"got {bad} in batch number {self.done - 1} (ids {shown})"
        if self.options.on_nonfinite == "skip":
            _LOG.warning("accumulate: skipped a batch that is not finite: %s", what)
            return
        raise DataError(
            f"accumulate: expected finite results, {what}. The outputs or weights of the model "
            "overflow there: use a wider dtype, repair the data, or leave such batches out with "
            "on_nonfinite='skip'; clipping gradients would only hide it."
        )


def _length(batches: Iterable[Batch]) -> int | None:
    """Return the number of batches, if it is known."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):  # a DataLoader of an iterable data set
        return None


def _units(result: Any, rows: int) -> Tensor:
    """Return N of a result; the rows of the batch where it does not say."""
    counts = [getattr(cell, "count", None) for cell in kinds.flatten("accumulate", result)[0]]
    known = [n for n in counts if isinstance(n, Tensor)]
    return (known[0] if known else torch.tensor(rows)).detach().double()


def rows_of(batch: Batch) -> tuple[int, torch.device]:
    """Return the number of examples of a batch, and where they are."""
    for leaf in trees.leaves(batch.inputs):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0], leaf.device
    raise DataError(
        "accumulate: expected inputs with the examples as leading axis, got no tensor that has an "
        "axis. Put a tensor [B, ...] into ff.Batch."
    )


def _counts_nothing(batch: Batch) -> bool:
    """Return whether everything in a batch is masked or has weight 0, so that it adds nothing."""
    counted = [x != 0 for x in (batch.mask, batch.weights) if isinstance(x, Tensor) and x.numel()]
    if not counted or not concrete(*counted):
        return False
    if not all([bool(x.any()) for x in counted]):
        return True
    if len(counted) == 1 or counted[0].ndim < counted[1].ndim:
        return False
    mask, weights = counted
    weights = weights.reshape(*weights.shape, *[1] * (mask.ndim - weights.ndim))
    try:
        return not bool((mask & weights).any())
    except RuntimeError:  # shapes that do not fit; the estimator says so
        return False


def _check_state(state: Any, options: Options) -> None:
    """Check that a state to go on with is one of this transform."""
    if state is None:
        return
    if not isinstance(state, AccumulateState):
        raise OptionError(
            f"accumulate: expected state from an earlier call, got {type(state).__name__}. "
            "Pass the second value that accumulate returned, not the first."
        )
    if state.result is None:
        return
    made = None
    if options.transform is not None:
        made = kind_of(options.transform)
        if made is None:
            return  # its own update will know
    found = type(state.result) if type(state.result) in STATES else None
    if made is not found and (made is None or made in STATES or found is not None):
        ours, theirs = (kind.__name__ if kind else "a plain result" for kind in (found, made))
        raise OptionError(
            f"accumulate: expected a state folded with the same transform, got one with {ours} for "
            f"{theirs}. Pass the transform= of the earlier call."
        )
