"""Confidence intervals for the mean of a stream, over independent observations.

An observation is one update of a state, or one entry of the leading axis of a tensor. Whoever
counts tokens as independent observations where sequences are gets an interval that is too narrow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.core import random, trees
from fisherfn.core.errors import DataError, OptionError, ShapeError, at
from fisherfn.core.modes import concrete, unmixed
from fisherfn.core.options import is_count
from fisherfn.core.trees import Tree
from fisherfn.states.quantiles import normal_quantile, t_quantile
from fisherfn.states.welford import WelfordState, effective_updates, entries, stderr
from fisherfn.states.window import WindowState

METHODS = ("normal", "t", "bootstrap")
#: Entries of replicates held at once.
_ROOM = 1 << 22


class Interval(NamedTuple):
    """Lower and upper ends, trees like the entries of the mean."""

    lower: Tree
    upper: Tree


def interval(
    observations: Any,
    *,
    level: float = 0.95,
    method: str = "t",
    key: Tensor | None = None,
    replicates: int = 1000,
) -> Interval:
    """Return a confidence interval for the mean, entry by entry.

    "normal" is mean ± z·stderr, right for many observations. "t" is mean ± t·stderr with W²/Σw² − 1
    degrees of freedom, right for few Gaussian ones. "bootstrap" takes the percentiles of the mean
    of resampled observations, whatever their distribution, and needs the observations themselves.

    Args:
        observations: A state of `welford` ("normal" and "t"), a state of `window`, or a tree of
            tensors `[n, ...]` with the observations along the leading axis.
        level: Probability with which the interval covers the mean.
        method: "normal", "t" or "bootstrap".
        key: Random key, for "bootstrap".
        replicates: How many times to resample.

    Returns:
        The two ends; NaN where there are fewer than two observations.

    Raises:
        OptionError: An option does not exist, or does not go with these observations.
        ShapeError: A tensor without a leading axis, or axes of different lengths.
        DataError: Fewer than two observations, where that is known.

    Cost: "bootstrap" multiplies a matrix `[replicates, n]` with the observations; the same draws
    serve all entries.

    Reference: Efron & Tibshirani (1993), An introduction to the bootstrap, chapter 13.

    Example:
        >>> sample = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
        >>> low, high = interval({"x": sample})
        >>> low["x"], high["x"]  # 3 ± 2.7764 · 0.7071
        (tensor(1.0368, dtype=torch.float64), tensor(4.9632, dtype=torch.float64))
    """
    _check(level, method, key, replicates)
    p = 0.5 + 0.5 * level
    if isinstance(observations, WelfordState):
        if method == "bootstrap":
            raise OptionError(
                "states.interval: expected observations to resample for method='bootstrap', got a "
                "state of welford(), which has forgotten them. Keep them in states.window(n), or "
                "use method='t'."
            )
        return _symmetric(observations, p, method)
    samples, weights = _samples(observations)
    if method == "bootstrap":
        assert key is not None
        return _bootstrap(samples, weights, 1.0 - p, key, replicates)
    return _symmetric(_moments(samples, weights), p, method)


def _symmetric(state: WelfordState, p: float, method: str) -> Interval:
    """Return mean ± quantile · standard error."""
    freedom = (effective_updates(state) - 1.0).double()
    quantile = t_quantile(p, freedom) if method == "t" else normal_quantile(p)
    mean = entries(state.mean)
    reach = trees.map(
        lambda e: e * (quantile.to(e.dtype) if isinstance(quantile, Tensor) else quantile),
        stderr(state),
    )
    return Interval(trees.sub(mean, reach), trees.add(mean, reach))


def _samples(observations: Any) -> tuple[Tree, Tensor]:
    """Return observations along the leading axis, and their weights."""
    if isinstance(observations, WindowState):
        columns = [entries(entry) for entry in observations.entries]
        stacked = trees.map(lambda *xs: torch.stack(xs), *columns)
        samples, weights = stacked, observations.weights
    else:
        samples = observations
        weights = torch.ones(_length(samples), dtype=torch.float64)
    known = int((weights > 0).sum()) if concrete(weights) else 2
    if known < 2:
        raise DataError(
            f"states.interval: expected at least 2 observations, got {known}. One says nothing of "
            "its own error."
        )
    return samples, weights


def _length(samples: Tree) -> int:
    """Return the length of the leading axis that all leaves share."""
    leaves, paths = trees.leaves(samples), trees.paths(samples)
    first = None
    for leaf, path in zip(leaves, paths, strict=True):
        where = at(path)
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or not leaf.is_floating_point():
            got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            shape = f" of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else ""
            raise ShapeError(
                f"states.interval: expected tensors [n, ...] with n observations, got {got}{shape}"
                f"{where}. Pass a state of welford() or window(), or stack the observations."
            )
        if first is not None and len(leaf) != first:
            raise ShapeError(
                f"states.interval: expected {first} observations in every leaf, got {len(leaf)}"
                f"{where}. Stack the same observations."
            )
        first = len(leaf)
    if first is None:
        raise ShapeError(
            "states.interval: expected a tree with at least one tensor, got none. Pass "
            "observations."
        )
    return first


@unmixed
def _moments(samples: Tree, weights: Tensor) -> WelfordState:
    """Return the moments of stacked observations, in two passes."""
    count = weights.sum()
    share = weights / torch.where(count == 0, 1.0, count)

    def weighted(x: Tensor, w: Tensor) -> Tensor:
        return torch.tensordot(w.to(x.device, x.dtype), x, 1)

    mean = trees.map(lambda x: weighted(x, share), samples)
    m2 = trees.map(lambda x, m: weighted((x - m).square(), weights), samples, mean)
    return WelfordState(count, (weights > 0).sum(), weights.square().sum(), mean, m2)


@unmixed
def _bootstrap(samples: Tree, weights: Tensor, p: float, key: Tensor, replicates: int) -> Interval:
    """Return the percentiles of the mean of resampled observations."""
    n = len(weights)
    there = (weights > 0).sum()
    uniform = random.uniform(key.to(weights.device), (replicates, n), torch.float64)
    # those that are there come last: places of a window may be empty, or have weight 0
    order = (weights > 0).to(torch.int8).argsort(stable=True)
    index = order[n - 1 - torch.minimum((uniform * there).long(), there - 1).clamp(min=0)]
    drawn = torch.arange(n, device=weights.device) >= n - there  # n draws of n observations
    times = torch.zeros(replicates, n, dtype=torch.float64, device=weights.device)
    times = times.scatter_add(1, index, drawn.to(times.dtype).expand(replicates, n)) * weights
    times = times / times.sum(1, keepdim=True)
    ends = torch.tensor([p, 1.0 - p], dtype=torch.float64)

    def leaf(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(n, -1)
        factor = times.to(x.device, x.dtype)
        pieces = flat.split(max(1, _ROOM // replicates), dim=1)
        where = ends.to(x.device, x.dtype)
        found = torch.cat([torch.quantile(factor @ piece, where, dim=0) for piece in pieces], 1)
        low, high = found.reshape(2, *x.shape[1:]).unbind()
        return low, high

    leaves, treedef = trees.flatten(samples)
    found = [leaf(x) for x in leaves]
    lower, upper = ([pair[i] for pair in found] for i in range(2))
    return Interval(trees.unflatten(treedef, lower), trees.unflatten(treedef, upper))


def _check(level: Any, method: Any, key: Any, replicates: Any) -> None:
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise OptionError(
            f"states.interval: expected level in (0, 1), got {level!r}. Pass for instance 0.95."
        )
    if method not in METHODS:
        raise OptionError(
            f"states.interval: expected method to be one of {list(METHODS)}, got {method!r}. "
            "Use 't' unless there is a reason."
        )
    if method != "bootstrap":
        return
    if not isinstance(key, Tensor):
        raise OptionError(
            f"states.interval: expected a key for method='bootstrap', got {key!r}. "
            "Pass key=ff.random.key(0)."
        )
    if not is_count(replicates, 2):
        raise OptionError(
            f"states.interval: expected replicates to be an integer > 1, got {replicates!r}. "
            "1000 is usual."
        )
