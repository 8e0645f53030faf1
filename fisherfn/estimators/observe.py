"""What counts of a batch, and the cotangents that stand for its labels.

Normalisation happens here and nowhere else: the cotangent of a unit of weight w is multiplied by
`√(w/N)`, so that the squares of the scores that come back already add up to the Fisher information.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import random, trees
from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError
from fisherfn.core.modes import concrete, transformed
from fisherfn.likelihoods.base import Likelihood, position_keys

#: In place of a kind of labels: nothing is pulled back, only the inputs of layers are looked at.
FORWARD_ONLY = "forward_only"
#: How many pull-backs an exact Fisher may need before it is refused.
EXACT_BUDGET = 16_384


@dataclass(frozen=True)
class Labels:
    """Whose labels are scored: the kind of Fisher, the number of draws, the unit."""

    fisher: str
    num_samples: int
    unit: str


@dataclass(frozen=True)
class Counted:
    """What counts of a batch, on the positions of its outputs.

    Attributes:
        mask: bool `[B, *positions]`.
        weights: Weight of each unit, 0 where masked: `[B]`, or `[B, *positions]` by position.
        total: N, the sum of the weights; 0-d, float64: float32 cannot count beyond 2²⁴.
        masked: Whether a mask was given at all.
    """

    mask: Tensor
    weights: Tensor
    total: Tensor
    masked: bool

    @staticmethod
    def of(
        mask: Tensor | None,
        weights: Tensor | None,
        positions: tuple[int, ...],
        unit: str,
        like: Tensor,
    ) -> Counted:
        """Count the units of a batch whose `log_prob` has the shape `positions`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        masked = mask is not None
        if mask is None and weights is None:
            places = positions[:1] if unit == "example" else positions
            kept = concrete(like) and not torch.is_inference_mode_enabled()
            return (_everything if kept else _all)(positions, places, dtype, like.device)
        if mask is None:
            mask = torch.ones(positions, dtype=torch.bool, device=like.device)
        else:
            mask = mask.expand(positions)
        if unit == "example":
            counts = mask.reshape(positions[0], -1).any(-1)
        else:
            counts = mask
        each = torch.ones((), dtype=dtype, device=like.device) if weights is None else weights
        each = _trailing(each.to(dtype), counts.dim()) if weights is not None else each
        # where, not a product: the weight of what is masked may be anything
        each = torch.where(counts, each, torch.zeros((), dtype=dtype, device=like.device))
        return Counted(mask, each, each.sum(dtype=working_dtype(each)), masked)

    def part(self, start: int, stop: int) -> Counted:
        """Return what counts of the examples `start` to `stop`, with the same total."""
        if (start, stop) == (0, self.mask.shape[0]):
            return self
        return Counted(self.mask[start:stop], self.weights[start:stop], self.total, self.masked)

    @cached_property
    def root_weights(self) -> Tensor:
        """`√(w/N)` of each unit; 0 where nothing counts."""
        total = self.total
        if not concrete(self.weights, total):
            # bad weights, or nothing to count, must not look like a result
            fine = (self.weights >= 0).all() & (total > 0)
            total = torch.where(fine, total, float("nan"))
        # in the dtype of the total, which may be beyond the range of that of the weights
        return (self.weights.to(total.dtype) / total).sqrt().to(self.weights.dtype)


def _all(
    positions: tuple[int, ...], places: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Counted:
    """Count every unit once; the units are laid out as `places`."""
    mask = torch.ones(positions, dtype=torch.bool, device=device)
    each = torch.ones(places, dtype=dtype, device=device)
    total = torch.full((), each.numel(), dtype=working_dtype(each), device=device)
    return Counted(mask, each, total, False)


@lru_cache(maxsize=16)
def _everything(
    positions: tuple[int, ...], places: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Counted:
    """Count every unit once; remembered, and so not given away."""
    # at each step of a stream it is the same, and making it takes as long as a small layer
    found = _all(positions, places, dtype, device)
    _ = found.root_weights  # computed here, so that no later mode is remembered with it
    return found


def _trailing(t: Tensor, rank: int) -> Tensor:
    """Append axes of size 1 up to `rank`."""
    return t.reshape(*t.shape, *[1] * (rank - t.dim()))


def _cleared(t: Tensor, dead: Tensor) -> Tensor:
    """Write zeros where `dead`, which broadcasts along trailing axes, is true; return `t`."""
    rank = dead.dim()
    while rank and dead.shape[rank - 1] == 1:
        rank -= 1
    if t.device.type != "cpu" or not t.is_contiguous() or t.shape[:rank] != dead.shape[:rank]:
        return t.masked_fill_(dead, 0.0)
    # few rows of many entries: on a CPU they are found first, elsewhere that would have to wait
    t.view(dead.numel(), -1).index_fill_(0, dead.reshape(-1).nonzero().flatten(), 0.0)
    return t


def broadcast(factor: Tensor, outputs: Any, likelihood: Likelihood, lead: int = 0) -> Any:
    """Give a tensor over positions, `[*lead, *P]`, the event axes of the outputs, with size 1."""
    axes = likelihood.event_axes

    def one(out: Tensor) -> Tensor:
        if axes is None:
            return _trailing(factor, out.dim() + lead)
        events = {a % out.dim() for a in axes}
        shape = list(factor.shape[:lead])
        rest = iter(factor.shape[lead:])
        shape += [1 if i in events else next(rest) for i in range(out.dim())]
        return factor.reshape(shape)

    return trees.map(one, outputs)


def columns_needed(labels: Labels, likelihood: Likelihood, outputs: Any) -> int:
    """Return how many pull-backs one draw of these labels takes."""
    places = 1
    for n in likelihood.positions_shape(outputs)[1:]:
        places *= n
    if labels.fisher == "exact":
        return places * likelihood.columns(outputs)
    if labels.fisher == "empirical" and labels.unit == "position":
        return places
    return 1


def check_budget(caller: str, labels: Labels, columns: int) -> None:
    """Refuse an exact Fisher that nobody would wait for."""
    if labels.fisher == "exact" and columns > EXACT_BUDGET:
        raise OptionError(
            f"{caller}: expected an exact Fisher of at most {EXACT_BUDGET} pull-backs, got "
            f"{columns} (positions times C - 1). Use fisher='mc' or fisher='curvature_prop', which "
            "are unbiased and need one, or fisher='empirical'."
        )


@dataclass(frozen=True)
class Observed:
    """A chunk of a batch with the model's outputs on it."""

    likelihood: Likelihood
    outputs: Any
    targets: Any
    ids: Tensor
    key: Tensor | None
    counted: Counted
    poison: Tensor | None = None
    #: What the batch says of positions, [B, *positions], and of weights, for these examples.
    positions: Tensor | None = None
    given: Tensor | None = None

    def cotangents(
        self, labels: Labels, sample: int, *, normalised: bool, step: int
    ) -> Iterator[Any]:
        """Yield blocks of at most `step` cotangents `[K, *outputs]` for one draw of labels."""
        if labels.fisher == "exact":
            yield from self._roots(self.factor(normalised), step)
            return
        if labels.fisher == "empirical":
            targets = self.likelihood.neutral(self.targets, self.mask)
            score = self.likelihood.score(self.outputs, targets)
        elif labels.fisher == "mc":
            _, score = self.likelihood.sample_score(self.outputs, self._keys(sample))
        else:
            score = self._signed_root(sample)
        factor = self.factor(normalised)
        if labels.fisher == "empirical" and labels.unit == "position":
            yield from self._by_position(score, factor, step)
            return
        score = self.scaled(score, factor, 0, own=self.likelihood.fresh_scores)
        yield trees.map(lambda t: t.unsqueeze(0), score)

    def log_likelihood(self) -> Tensor:
        """Return this chunk's share of the weighted mean log-probability of the units; 0-d."""
        targets = self.likelihood.neutral(self.targets, self.mask)
        log_prob = self.likelihood.log_prob(self.outputs, targets)
        if self.mask is not None:
            log_prob = torch.where(self.mask, log_prob, torch.zeros_like(log_prob))
        shares = _trailing(self.counted.root_weights**2, log_prob.dim())
        total = (log_prob * shares).sum()
        return total if self.poison is None else total * self.poison

    @property
    def mask(self) -> Tensor | None:
        """The mask, or None if everything counts."""
        return self.counted.mask if self.counted.masked else None

    def factor(self, normalised: bool) -> Tensor:
        """Return what each position's cotangent is multiplied by, `[B, *positions]`."""
        counted = self.counted
        if normalised:
            factor = _trailing(counted.root_weights, counted.mask.dim())
            factor = factor * counted.mask if counted.masked else factor.expand(counted.mask.shape)
        else:
            factor = counted.mask.to(counted.weights.dtype)
        return factor if self.poison is None else factor * self.poison

    def _keys(self, sample: int) -> Tensor:
        assert self.key is not None
        keys = random.fold_in(self.key.to(self.ids.device), self.ids)
        return random.fold_in(keys, sample)

    def _signed_root(self, sample: int) -> Any:
        shape = self.likelihood.positions_shape(self.outputs)
        keys = position_keys(self._keys(sample), shape)
        like = trees.leaves(self.outputs)[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        signs = random.rademacher(keys, (self.likelihood.columns(self.outputs),), dtype)
        return self.likelihood.root_mv(self.outputs, signs)

    def scaled(self, tree: Any, factor: Tensor, lead: int, *, own: bool = False) -> Any:
        """Return a tree times a factor over positions, in the outputs' dtype; may use `own` up."""
        factors = broadcast(factor, self.outputs, self.likelihood, lead)
        eager = not transformed()

        def one(t: Tensor, f: Tensor, out: Tensor) -> Tensor:
            free = eager and not (t.requires_grad or f.requires_grad)
            product = t.mul_(f) if own and free and t.dtype == f.dtype else t * f
            if self.mask is not None:
                # what is masked may have no finite score, so a product is not enough
                dead = f == 0
                product = _cleared(product, dead) if free else torch.where(dead, 0.0, product)
            return product.to(out.dtype)

        return trees.map(one, tree, factors, self.outputs)

    def _selectors(self, place: Tensor) -> Tensor:
        """Return, for indices of flattened positions, their indicator `[K, 1, *positions]`."""
        shape = self.likelihood.positions_shape(self.outputs)[1:]
        total = 1
        for n in shape:
            total *= n
        every = torch.arange(total, device=place.device)
        return (every == place.unsqueeze(-1)).reshape(-1, 1, *shape)

    def _by_position(self, score: Any, factor: Tensor, step: int) -> Iterator[Any]:
        places = factor[0].numel()
        for first in range(0, places, step):
            place = torch.arange(first, min(places, first + step), device=factor.device)
            chosen = self._selectors(place).to(factor.dtype) * factor
            yield self.scaled(score, chosen, 1)

    def _roots(self, factor: Tensor, step: int) -> Iterator[Any]:
        places, columns = factor[0].numel(), self.likelihood.columns(self.outputs)
        for first in range(0, places * columns, step):
            index = torch.arange(first, min(places * columns, first + step), device=factor.device)
            root = torch.func.vmap(lambda c: self.likelihood.root(self.outputs, c))(index % columns)
            chosen = self._selectors(index // columns).to(factor.dtype) * factor
            yield self.scaled(root, chosen, 1)
