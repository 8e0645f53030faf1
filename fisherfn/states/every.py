"""Two streams of different price: one every n-th step, the other between.

The usual case is a Fisher from labels drawn from the model every hundred steps and the empirical
one, which is there anyway, on all other steps. They estimate different matrices, so they are kept
in two states and never mixed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.core.merging import empty_like, merge
from fisherfn.core.modes import concrete
from fisherfn.core.options import is_count
from fisherfn.states import transform
from fisherfn.states.transform import Transform, Weight


class EveryPair(NamedTuple):
    """One thing for the n-th steps and one for those between: readings, or examples of members."""

    every: Any
    otherwise: Any


class EveryState(NamedTuple):
    """Two states and the step that chooses between them."""

    step: Tensor  # shape=(), dtype=int64: updates so far
    period: Tensor  # shape=(), dtype=int64: n
    every: Any  # state of the transform for steps 0, n, 2n, ...
    otherwise: Any  # state of the other one, or None

    def __fisher_merge__(self, other: EveryState) -> EveryState:
        if concrete(self.period, other.period) and not torch.equal(self.period, other.period):
            raise OptionError(
                f"merge: expected two states of the same period, got {self.period.item()} and "
                f"{other.period.item()}. Make both with the same states.every(n, ...)."
            )
        return EveryState(
            torch.maximum(self.step, other.step),
            self.period,
            merge(self.every, other.every),
            merge(self.otherwise, other.otherwise),
        )

    def __fisher_empty__(self) -> EveryState:
        empty = torch.zeros_like(self.step)
        return EveryState(empty, self.period, empty_like(self.every), empty_like(self.otherwise))


def every(n: int, a: Transform, otherwise: Transform | None = None) -> Transform:
    """Fold every n-th member into one state, and the others into another.

    Which member is due, `ff.states.due(state)` says beforehand, so that only that one has to be
    computed; `ff.states.accumulate` does so by itself when it is given a pair of estimators.

    Args:
        n: The period; step 0 is the first that is due.
        a: What steps 0, n, 2n, ... go into.
        otherwise: What the other steps go into; None forgets them.

    Returns:
        A `Transform`. `init` takes one example for both, or an `EveryPair` of them where they
        differ in kind; the reading is an `EveryPair`, or the reading of `a` where `otherwise` is
        None. Under `torch.compile` and `torch.vmap`, where the step has no value, both updates are
        computed and one is taken, so there both have to be of one kind.

    Raises:
        OptionError: `n` is no positive integer, or the others are no transforms.

    Example:
        >>> from fisherfn.states.ema import ema
        >>> lever = every(2, ema(0.5), otherwise=ema(0.5))
        >>> state = lever.init(torch.zeros(()))
        >>> for x in (1.0, 10.0, 1.0, 10.0):
        ...     reading, state = lever.update(torch.tensor(x), state)
        >>> reading
        EveryPair(every=tensor(1.), otherwise=tensor(10.))
    """
    _check(n, a, otherwise)

    def init(like: Any) -> EveryState:
        pair = like if isinstance(like, EveryPair) else EveryPair(like, like)
        first = a.init(pair.every)
        at = transform.place([first])
        return EveryState(
            torch.zeros((), dtype=torch.int64, device=at),
            torch.full((), n, dtype=torch.int64, device=at),
            first,
            None if otherwise is None else otherwise.init(pair.otherwise),
        )

    def update(new: Any, state: EveryState, weight: Weight = None) -> tuple[Any, EveryState]:
        is_due, step = due(state), state.step + 1
        if concrete(state.period) and int(state.period) != n:
            raise OptionError(
                f"every.update: expected a state of the period {n}, got one of "
                f"{int(state.period)}. Go on with the same states.every(n, ...)."
            )
        one, two = state.every, state.otherwise
        if not concrete(is_due):
            one = _choose(is_due, a.update(new, one, weight)[1], one)
            if otherwise is not None:
                two = _choose(is_due, two, otherwise.update(new, two, weight)[1])
        elif bool(is_due):
            one = a.update(new, one, weight)[1]
        elif otherwise is not None:
            two = otherwise.update(new, two, weight)[1]
        after = EveryState(step, state.period, one, two)
        return read(after), after

    def read(state: EveryState) -> Any:
        if otherwise is None:
            return a.read(state.every)
        return EveryPair(a.read(state.every), otherwise.read(state.otherwise))

    return Transform(init, update, read)


def due(state: EveryState) -> Tensor:
    """Return whether the next member goes to the first of the two transforms.

    Args:
        state: A state of `every`.

    Returns:
        0-d bool tensor.

    Raises:
        OptionError: Not a state of `every`.
    """
    if not isinstance(state, EveryState):
        raise OptionError(
            f"states.due: expected a state of every(), got {type(state).__name__}. "
            "Pass the second value that update returned."
        )
    return state.step % state.period == 0


def _choose(condition: Tensor, a: Any, b: Any) -> Any:
    """Return one of two states of the same structure."""
    return trees.map(lambda x, y: torch.where(condition, x, y), a, b)


def _check(n: Any, a: Any, otherwise: Any) -> None:
    if not is_count(n):
        raise OptionError(
            f"states.every: expected n to be a positive integer, got {n!r}. 1 makes every step due."
        )
    for name, given in (("a", a), ("otherwise", otherwise)):
        if not isinstance(given, Transform) and not (name == "otherwise" and given is None):
            raise OptionError(
                f"states.every: expected {name} to be a transform, got {type(given).__name__}. "
                "Pass for instance states.ema(0.99)."
            )
