"""Mean and spread of a stream, in one pass.

West's update for members x_i of weight w_i, with W the sum of the weights:

    δ = x − mean,   mean += (w/W) δ,   m2 += w (1 − w/W) δ²

so that m2 = Σ w_i (x_i − mean)², without the cancellation of Σ w x² − (Σ w x)²/W. Two states merge
exactly (Chan, Golub & LeVeque).

An **update** is one independent observation, however many units its weight says that it stands
for: the spread is that between updates. Dividing a spread between batches by the number of tokens
in them is a familiar error, by the square root of the tokens in a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError
from fisherfn.core.modes import concrete
from fisherfn.core.trees import Tree
from fisherfn.states import transform
from fisherfn.states.blockwise import grow
from fisherfn.states.transform import Transform, Weight


class WelfordState(NamedTuple):
    """Weighted moments of a stream; `variance`, `stderr` and `interval` read them."""

    # W = Σ w, for results the number of units; shape=(), dtype=float64
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    updates: Tensor  # shape=(), dtype=int64: independent observations
    weight_sq: Tensor  # shape=(), dtype=float64: Σ w²
    mean: Any  # tree like the members, float32 or wider
    m2: Any  # tree of tensors, Σ w (x − mean)²; like the entries of `mean`

    def __fisher_merge__(self, other: WelfordState) -> WelfordState:
        cells, treedef = transform.flatten("merge", self.mean)
        theirs = transform.align("merge", self.mean, other.mean, absent=False)
        count = self.count + other.count
        share = other.count / torch.where(count == 0, 1.0, count)
        between = self.count * share  # W_a W_b / W

        def spread(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return a + b + between.to(a.dtype) * (y.to(a.dtype) - x.to(a.dtype)).square()

        m2 = trees.map(spread, self.m2, other.m2, entries(self.mean), entries(other.mean))
        mean = [transform.toward(a, b, share) for a, b in zip(cells, theirs, strict=True)]
        return WelfordState(
            count,
            self.updates + other.updates,
            self.weight_sq + other.weight_sq,
            treedef.unflatten(mean),
            m2,
        )

    def __fisher_empty__(self) -> WelfordState:
        zeros = trees.map(torch.zeros_like, self)
        return zeros._replace(mean=transform.nothing(self.mean))


def entries(tree: Any) -> Tree:
    """Return a tree with every result replaced by the tensors whose entries are averages."""
    cells, treedef = transform.flatten("states", tree)
    return treedef.unflatten([transform.tensors(cell) for cell in cells])


def welford(*, dtype: torch.dtype | None = None) -> Transform:
    """Keep the weighted mean of a stream and the spread of its members, in one pass.

    Args:
        dtype: In which to keep mean and spread; default: that of the members, float32 or wider.
            float64 is worth its memory for long streams with little spread.

    Returns:
        A `Transform`. Its reading is the mean, a tree like the members; `variance`, `stderr` and
        `interval` read the rest of the state. Without `weight=` a result counts with its N, and
        several results with the N of the first; a tree of tensors counts once. A weight of 0
        changes nothing but the number of updates.

    Raises:
        OptionError: `dtype` is no floating-point dtype.

    Cost: reads three trees, writes two. Memory: two trees.

    Reference: West (1979), Updating mean and variance estimates, Communications of the ACM 22(9);
    Chan, Golub & LeVeque (1983), Algorithms for computing the sample variance, for the merge.

    Example:
        >>> moments = welford()
        >>> state = moments.init({"w": torch.zeros(1)})
        >>> for x in (1.0, 2.0, 6.0):
        ...     reading, state = moments.update({"w": torch.tensor([x])}, state)
        >>> reading, state.m2, state.count
        ({'w': tensor([3.])}, {'w': tensor([14.])}, tensor(3., dtype=torch.float64))
    """
    transform.check_dtype("states.welford", dtype)

    def init(like: Any) -> WelfordState:
        cells, _ = transform.flatten("welford.init", like)
        at = transform.place(cells)
        zero = torch.zeros((), dtype=working_dtype(at), device=at)
        mean = transform.empty(like, dtype)
        steps = torch.zeros((), dtype=torch.int64, device=at)
        m2 = trees.map(torch.zeros_like, entries(mean))
        return WelfordState(zero, steps, torch.zeros_like(zero), mean, m2)

    def update(new: Any, state: WelfordState, weight: Weight = None) -> tuple[Any, WelfordState]:
        caller = "welford.update"
        transform.check_state(caller, state, WelfordState)
        cells, treedef = transform.flatten(caller, state.mean)
        news = transform.align(caller, state.mean, new, absent=False)
        counts = [getattr(cell, "count", None) for cell in news]
        default = next((n for n in counts if isinstance(n, Tensor)), 1.0)
        w = transform.check_weight(caller, weight, default, state.count)
        count = state.count + w
        share = w / torch.where(count == 0, 1.0, count)
        spread = w * (1.0 - share)
        means, spreads = [], []
        cut = treedef.flatten_up_to(state.m2)
        for cell, x, m2 in zip(cells, news, cut, strict=True):
            x = transform.cast(x, dtype)
            old, got = transform.tensors(cell), transform.tensors(x)
            means.append(transform.toward(cell, x, share))
            spreads.append(trees.map(lambda m, a, b: grow(m, a, b, spread), m2, old, got))
        mean = treedef.unflatten(means)
        after = WelfordState(
            count,
            state.updates + 1,
            state.weight_sq + w * w,
            mean,
            treedef.unflatten(spreads),
        )
        # only a weight may be 0
        certain = weight is None or (concrete(count) and bool(count > 0))
        return mean if certain else read(after), after

    def read(state: WelfordState) -> Any:
        transform.check_state("welford.read", state, WelfordState)
        cells, treedef = transform.flatten("welford.read", state.mean)
        nothing = state.count == 0
        return treedef.unflatten([transform.unknown_where(nothing, cell) for cell in cells])

    return Transform(init, update, read)


def variance(state: WelfordState) -> Tree:
    """Return the unbiased variance between updates, m2 / (W − Σw²/W).

    Weights are reliabilities: Var(x_i) is taken to be the same for all updates. With equal weights
    it is the familiar Σ (x − mean)² / (n − 1), whatever the weight.

    Args:
        state: A state of `welford`.

    Returns:
        Tree of tensors like the entries of the mean; NaN after fewer than two updates.

    Raises:
        OptionError: Not a state of `welford`.

    Example:
        >>> moments = welford()
        >>> state = moments.init(torch.zeros(()))
        >>> for x in (1.0, 2.0, 6.0):
        ...     _, state = moments.update(torch.tensor(x), state, weight=5.0)
        >>> variance(state), stderr(state)
        (tensor(7.), tensor(1.5275))
    """
    _check_state("variance", state)
    rest = state.count - state.weight_sq / torch.where(state.count == 0, 1.0, state.count)
    factor = torch.where(_several(state) & (rest > 0), 1.0 / rest, torch.nan)
    return trees.map(lambda m2: m2 * factor.to(m2.dtype), state.m2)


def stderr(state: WelfordState) -> Tree:
    """Return the standard error of the weighted mean, √(variance · Σw²/W²).

    Args:
        state: A state of `welford`.

    Returns:
        Tree of tensors like the entries of the mean; NaN after fewer than two updates.

    Raises:
        OptionError: Not a state of `welford`.
    """
    _check_state("stderr", state)
    scale = state.weight_sq / torch.where(state.count == 0, 1.0, state.count).square()
    return trees.map(lambda v: (v * scale.to(v.dtype)).sqrt(), variance(state))


def effective_updates(state: WelfordState) -> Tensor:
    """Return Kish's effective number of updates, W²/Σw²: n for equal weights, less for others.

    Args:
        state: A state of `welford`.

    Returns:
        0-d tensor, float64; 0 before the first update.
    """
    square = state.weight_sq
    return state.count.square() / torch.where(square == 0, 1.0, square)


def _several(state: WelfordState) -> Tensor:
    # W² > Σw² up to rounding says that at least two updates had a weight
    return effective_updates(state) > 1.0 + 1e-9


def _check_state(caller: str, state: Any) -> None:
    if not isinstance(state, WelfordState):
        raise OptionError(
            f"states.{caller}: expected a state of welford(), got {type(state).__name__}. "
            "Pass the second value that update returned."
        )
