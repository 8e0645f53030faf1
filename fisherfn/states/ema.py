"""Exponential moving average.

With weights w_i (1 unless given) and decay β, the average after t updates is

    m_t = Σ_i β^{t−i} w_i x_i / Σ_i β^{t−i} w_i,

that is the zero-initialised average Σ (1−β) β^{t−i} w_i x_i divided by its bias. It is kept in its
debiased form, m_t = m_{t−1} + (w_t/W_t)(x_t − m_{t−1}) with W_t = β W_{t−1} + w_t: the same number,
but exact where it has to be. The first reading is x_1 and a constant stays itself, to the last bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError
from fisherfn.core.modes import concrete
from fisherfn.states import transform
from fisherfn.states.transform import Transform, Weight


class EmaState(NamedTuple):
    """What an average remembers. L is the number of cells (leaves, or whole results)."""

    mean: Any  # tree like the members, float32 or wider: the debiased average
    weight: Tensor  # shape=(L,), dtype=float64: W, discounted weight seen by each cell
    updates: Tensor  # shape=(L,), dtype=int64: clock of each cell

    def __fisher_merge__(self, other: EmaState) -> EmaState:
        """Join two shards of one stream: their k-th last updates are of the same age."""
        cells, treedef = transform.flatten("merge", self.mean)
        theirs = transform.align("merge", self.mean, other.mean, absent=False)
        weight = self.weight + other.weight
        share = (other.weight / torch.where(weight == 0, 1.0, weight)).unbind()
        joined = [transform.toward(a, b, s) for a, b, s in zip(cells, theirs, share, strict=True)]
        return EmaState(
            treedef.unflatten(joined), weight, torch.maximum(self.updates, other.updates)
        )

    def __fisher_empty__(self) -> EmaState:
        mean, zero = transform.nothing(self.mean), torch.zeros_like
        return EmaState(mean, zero(self.weight), zero(self.updates))


def ema(decay: float, *, dtype: torch.dtype | None = None) -> Transform:
    """Average a stream with exponentially decaying weights, free of bias from the first update on.

    Every cell (a leaf, or a result such as `Diagonal`) has its own clock: one that is absent from
    an update, as a None or a missing entry, neither ages nor counts, so its average is that of the
    updates it took part in. A result keeps its meaning: factors are averaged rather than their
    products, standard errors are those of an average of independent estimates, and `count` is the
    number of units whose plain average would be as precise.

    Args:
        decay: β, in [0, 1). About 1/(1−β) updates are remembered.
        dtype: In which to keep the average; default: that of the members, float32 or wider.

    Returns:
        A `Transform`. Its reading is the average, a tree like the members; NaN in cells that have
        never been there. `weight=` counts an update several times; give the number of units to
        make the average independent of how they were batched.

    Raises:
        OptionError: `decay` is not in [0, 1), or `dtype` is no floating-point dtype.

    Cost: one pass over the members: reads two trees, writes one. Memory: one tree.

    Reference: Kingma & Ba (2015), Adam, section 3, for the bias.

    Example:
        >>> average = ema(0.9)
        >>> state = average.init({"w": torch.zeros(2)})
        >>> reading, state = average.update({"w": torch.tensor([1.0, 2.0])}, state)
        >>> reading
        {'w': tensor([1., 2.])}
        >>> reading, state = average.update({"w": torch.tensor([2.9, 2.0])}, state)
        >>> reading  # (0.9 · 1 + 2.9) / 1.9
        {'w': tensor([2., 2.])}
    """
    _check_decay(decay)
    transform.check_dtype("states.ema", dtype)

    def init(like: Any) -> EmaState:
        cells, _ = transform.flatten("ema.init", like)
        at = transform.place(cells)
        return EmaState(
            transform.empty(like, dtype),
            torch.zeros(len(cells), dtype=working_dtype(at), device=at),
            torch.zeros(len(cells), dtype=torch.int64, device=at),
        )

    def update(new: Any, state: EmaState, weight: Weight = None) -> tuple[Any, EmaState]:
        transform.check_state("ema.update", state, EmaState)
        cells, treedef = transform.flatten("ema.update", state.mean)
        news = transform.align("ema.update", state.mean, new, absent=True)
        w = transform.check_weight("ema.update", weight, 1.0, state.weight)
        here = [cell is not None for cell in news]
        if all(here):
            total, updates = decay * state.weight + w, state.updates + 1
        else:
            seen = torch.tensor(here, device=state.weight.device)
            total = torch.where(seen, decay * state.weight + w, state.weight)
            updates = state.updates + seen
        shares = (w / torch.where(total == 0, 1.0, total)).unbind()
        means = [
            cell if x is None else transform.toward(cell, transform.cast(x, dtype), share)
            for cell, x, share in zip(cells, news, shares, strict=True)
        ]
        after = EmaState(treedef.unflatten(means), total, updates)
        # only a weight may be 0
        certain = weight is None or (concrete(total) and bool((total > 0).all()))
        if all(here) and certain:
            return after.mean, after
        never = (total == 0).unbind()
        known = [
            transform.unknown_where(nothing, mean)
            for mean, nothing in zip(means, never, strict=True)
        ]
        return treedef.unflatten(known), after

    def read(state: EmaState) -> Any:
        transform.check_state("ema.read", state, EmaState)
        cells, treedef = transform.flatten("ema.read", state.mean)
        never = (state.weight == 0).unbind()
        known = [transform.unknown_where(n, cell) for n, cell in zip(never, cells, strict=True)]
        return treedef.unflatten(known)

    return Transform(init, update, read)


def _check_decay(decay: Any) -> None:
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise OptionError(
            f"states.ema: expected decay in [0, 1), got {decay!r}. 0.99 remembers about 100 "
            "updates; for the plain mean use states.welford()."
        )
