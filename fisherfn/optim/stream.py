"""Curvature as a stream: averaged over batches, and inverted every now and then.

The average is exponential and by meaning: Kronecker factors are averaged, not their products
(`ff.states.ema`). The steps at which it is updated and inverted are counted in the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import random, trees
from fisherfn.core.errors import OptionError
from fisherfn.core.modes import concrete
from fisherfn.core.trees import Tree
from fisherfn.curvature import Curvature, LowRank
from fisherfn.curvature.common import is_number
from fisherfn.optim.inverse import Inverse, invert
from fisherfn.states import ema


class CurvatureState(NamedTuple):
    """What a stream of curvature remembers."""

    average: Any  # EmaState of the estimator's results; None before the first, or if decay is 0
    inverse: Any  # Inverse, as of the last refresh; None before the first batch


@dataclass(frozen=True)
class Stream:
    """An estimator, and when its results are averaged and inverted.

    Attributes:
        caller: The public function on whose behalf errors are raised.
        estimator: Called as `(params, buffers, batch, *, key)`, gives a curvature.
        decay: Of the average; 0 keeps the latest only.
        update_every: Steps between two estimates.
        invert_every: Steps between two inversions.
        invert: Makes an `Inverse` of a curvature.
    """

    caller: str
    estimator: Any
    decay: float
    update_every: int
    invert_every: int
    invert: Callable[[Any], Inverse]

    def init(self) -> CurvatureState:
        """Return the state before the first batch."""
        return CurvatureState(None, None)

    def update(
        self,
        state: CurvatureState,
        step: Tensor,
        params: Tree,
        buffers: Tree,
        batch: Batch | None,
        key: Tensor | None,
    ) -> CurvatureState:
        """Return the state after one more step: with a new estimate or inverse, if they are due."""
        if batch is None:
            if state.inverse is None:
                raise OptionError(
                    f"{self.caller}: expected batch= at the first step, got None. Pass the batch "
                    "that the gradients are of, or a part of it: update(grads, state, params, "
                    "buffers=buffers, batch=batch). For torchopt.chain, bind(batch=batch) does so."
                )
            return state
        self._check_key(key)
        if key is not None:
            key = random.fold_in(key, step.to(key.device))
        first = state.inverse is None
        # without an average, an estimate that is not inverted would be lost
        every = self.update_every if self.decay else self.invert_every
        due = _due(step, every) if not first else True
        if due is False:
            return self._inverted(state, step)
        new = self._estimate(params, buffers, batch, key)
        if not self.decay:
            after = CurvatureState(None, self.invert(new))
        else:
            after = self._inverted(
                CurvatureState(self._averaged(state.average, new), state.inverse), step
            )
        if due is True:
            return after
        return _choose(due, after, self._inverted(state, step))

    def _estimate(self, params: Tree, buffers: Tree, batch: Batch, key: Tensor | None) -> Any:
        new = self.estimator(params, buffers, batch, key=key)
        if not isinstance(new, Curvature):
            raise OptionError(
                f"{self.caller}: expected an estimator of curvature, got one that gives "
                f"{type(new).__name__}. Use kfac, ekfac, diagonal, low_rank, dense or implicit."
            )
        return new

    def _averaged(self, average: Any, new: Curvature) -> Any:
        """Return the average with one more result in it."""
        smooth = ema(self.decay)
        state = smooth.init(new) if average is None else average
        rows = len(new.weights) if isinstance(new, LowRank) else 0
        _, state = smooth.update(new, state)
        if isinstance(new, LowRank):
            # joined rows would grow without end: the best approximation by as many as one batch has
            state = state._replace(mean=state.mean.truncate(rows))
        return state

    def _inverted(self, state: CurvatureState, step: Tensor) -> CurvatureState:
        """Return the state with a fresh inverse, if one is due."""
        if not self.decay:
            return state
        due = _due(step, self.invert_every) if state.inverse is not None else True
        if due is False:
            return state
        after = state._replace(inverse=self.invert(state.average.mean))
        return after if due is True else _choose(due, after, state)

    def _check_key(self, key: Any) -> None:
        fisher = getattr(self.estimator, "options", {}).get("fisher")
        if key is None and fisher in ("mc", "curvature_prop"):
            raise OptionError(
                f"{self.caller}: expected key= for fisher={fisher!r}, got None. Pass "
                "key=random.key(seed); the step is folded in, so one key serves all steps."
            )


def _due(step: Tensor, every: int) -> bool | Tensor:
    """Return whether a step is due; a tensor where the step has no value."""
    if every == 1:
        return True
    due = step % every == 0
    return bool(due) if concrete(step) else due


def _choose(condition: Any, a: Any, b: Any) -> Any:
    """Return one of two states of the same structure, both of which have been computed."""
    return trees.map(lambda x, y: torch.where(condition.to(x.device), x, y.to(x.dtype)), a, b)


def stream(
    caller: str,
    estimator: Any,
    decay: Any,
    update_every: Any,
    invert_every: Any,
    inverter: Callable[[Any], Inverse] | None,
) -> Stream:
    """Return a stream with its options checked.

    Raises:
        OptionError: One of them makes no sense.
    """
    if not callable(estimator) or isinstance(estimator, torch.nn.Module):
        raise OptionError(
            f"{caller}: expected an estimator of curvature, got {type(estimator).__name__}. Pass "
            "for instance kfac(model, likelihood, fisher='mc')."
        )
    if not is_number(decay) or not 0 <= decay < 1:
        raise OptionError(
            f"{caller}: expected decay in [0, 1), got {decay!r}. 0.95 averages over about 20 "
            "estimates, 0 keeps the latest."
        )
    for name, value in (("update_every", update_every), ("invert_every", invert_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(
                f"{caller}: expected {name} to be an integer of at least 1, got {value!r}. It "
                "counts steps."
            )
    if inverter is not None and not callable(inverter):
        raise OptionError(
            f"{caller}: expected invert to be a function, got {type(inverter).__name__}. Pass "
            "for instance functools.partial(optim.sharded_inverse, group=group)."
        )

    def default(matrix: Any) -> Inverse:
        return invert(matrix, reused=invert_every > 1)

    return Stream(caller, estimator, float(decay), update_every, invert_every, inverter or default)
