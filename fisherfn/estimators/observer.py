"""From outputs and a batch to what is observed: checked, counted, with names and targets.

Estimators and products share it, so that they mean the same by N, a mask, a weight and an id.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.errors import DataError
from fisherfn.core.modes import concrete
from fisherfn.estimators import checks
from fisherfn.estimators.observe import Counted, Observed
from fisherfn.likelihoods.base import Likelihood


class Observer:
    """Checks the data of a batch against outputs, chunk by chunk, with one count for the whole."""

    def __init__(
        self,
        caller: str,
        likelihood: Likelihood,
        batch: Batch,
        key: Tensor | None,
        size: int,
        *,
        normalised: bool,
    ) -> None:
        """Observe a batch of `size` examples; `normalised` results need something that counts."""
        self.caller, self.likelihood = caller, likelihood
        self.batch, self.key, self.size = batch, key, size
        self.normalised = normalised
        self.counted: dict[str, Counted] = {}

    def observe(
        self, outputs: Any, units: Iterable[str], start: int, stop: int, *, targets_count: bool
    ) -> dict[str, Observed]:
        """Return what is observed of the examples `start` to `stop`, for each unit.

        Args:
            outputs: The model's outputs on these examples.
            units: The units to count in.
            start: First example.
            stop: One after the last.
            targets_count: Whether the targets are looked at, and so have to be valid.

        Returns:
            By unit.

        Raises:
            FisherError: outputs, mask, weights or targets do not fit each other.
        """
        self.likelihood.check_outputs(self.caller, outputs)
        shape = self.likelihood.positions_shape(outputs)
        like = trees.leaves(outputs)[0]
        units = tuple(units)
        for unit in units:
            if unit not in self.counted:
                full = (self.size, *shape[1:])
                checks.check_positions(self.caller, self.batch, full, unit)
                counted = Counted.of(self.batch.mask, self.batch.weights, full, unit, like)
                self._check_total(counted)
                self.counted[unit] = counted
        part = next(iter(self.counted.values())).part(start, stop)
        targets = self.batch.targets
        if targets is not None and (start, stop) != (0, self.size):
            targets = part_of(targets, start, stop)
        bad = None
        if targets_count:
            mask = part.mask if part.masked else None
            self.likelihood.check_targets(self.caller, outputs, targets, mask)
            bad = self._poison(outputs, targets, mask)
        ids = self.batch.ids
        if ids is None:
            ids = torch.arange(self.size, device=like.device)
        found = {}
        positions, weights = self.batch.positions, self.batch.weights
        full = (self.size, *shape[1:])
        for unit in units:
            own = self.counted[unit].part(start, stop)
            found[unit] = Observed(
                self.likelihood,
                outputs,
                targets,
                ids[start:stop],
                self.key,
                own,
                bad,
                None if positions is None else positions.expand(full)[start:stop],
                None if weights is None else weights[start:stop],
            )
        return found

    def _poison(self, outputs: Any, targets: Any, mask: Tensor | None) -> Tensor | None:
        """Where values cannot be looked at, return what turns every result into NaN, or 1."""
        if concrete(*trees.leaves((outputs, targets))):
            return None
        bad = self.likelihood.poison(outputs, targets, mask)
        dtype = torch.promote_types(trees.leaves(outputs)[0].dtype, torch.float32)
        one = torch.ones((), dtype=dtype, device=bad.device)
        return torch.where(bad, torch.full_like(one, float("nan")), one)

    def _check_total(self, counted: Counted) -> None:
        if not self.normalised:
            return
        if concrete(counted.total) and not bool(counted.total > 0):
            raise DataError(
                f"{self.caller}: expected at least one unit to count, got a total weight of "
                f"{counted.total.item():g}: everything is masked or has weight 0. Skip the batch."
            )


def without_dead(inputs: Any, outputs: Any, counted: Counted) -> Any | None:
    """Replace examples that do not count and are not finite: zero times NaN is NaN.

    Args:
        inputs: Inputs of a chunk.
        outputs: The model's outputs on them.
        counted: What counts of the chunk.

    Returns:
        Inputs without such examples, or None where there are none.
    """
    if not counted.masked or not concrete(counted.mask, *trees.leaves(outputs)):
        return None
    live = counted.mask.reshape(counted.mask.shape[0], -1).any(-1)
    dead = (~live).nonzero().flatten()
    if not len(dead) or not len(live.nonzero()):
        return None
    if all(bool(t[dead].isfinite().all()) for t in trees.leaves(outputs)):
        return None
    donor = live.nonzero().flatten()[0]
    index = torch.where(live, torch.arange(len(live), device=live.device), donor)
    return trees.map(lambda t: t[index] if isinstance(t, Tensor) else t, inputs)


def outside_inference(t: Any) -> Any:
    """Return a tensor that autograd may record, also if it was made in inference mode."""
    return t.clone() if isinstance(t, Tensor) and t.is_inference() else t


def part_of(tree: Any, start: int, stop: int) -> Any:
    """Return the examples `start` to `stop` of every tensor in a tree."""
    return trees.map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, tree)
