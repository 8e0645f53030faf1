"""From outputs and a batch to what is observed: checked, counted, with names and targets.

Estimators and products share it, so that they mean the same by N, a mask, a weight and an id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


class DeadExamplesError(Exception):
    """Examples that do not count spoilt the others: their outputs are not finite."""


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
        later: bool = False,
    ) -> None:
        """Observe a batch of `size` examples; `normalised` results need something that counts.

        `later` puts off what is raised for values until `settle`: reading them right away would
        make a GPU wait between the forward and the backward.
        """
        self.caller, self.likelihood = caller, likelihood
        self.batch, self.key, self.size = batch, key, size
        self.normalised = normalised
        self.later = later
        self.counted: dict[str, Counted] = {}
        self._open: list[Callable[[], None]] = []
        self._doubts: list[Tensor] = []

    def settle(self) -> None:
        """Raise for the values that were put off.

        Raises:
            DataError: targets that count are no targets, or nothing counts.
            DeadExamplesError: `doubt` was right about a chunk.
        """
        for question in self._open:
            question()
        self._open.clear()
        if any(bool(flag) for flag in self._doubts):
            raise DeadExamplesError

    def doubt(self, outputs: Any, counted: Counted) -> None:
        """Remember to look whether examples of a chunk that do not count are not finite."""
        dead = ~_alive(counted)
        for t in trees.leaves(outputs):
            # finite numbers may overflow: then a repair is made that was not needed
            fine = t.reshape(t.shape[0], -1).sum(-1).isfinite()
            self._doubts.append((dead & ~fine).any())

    def without_dead(self, inputs: Any, outputs: Any, counted: Counted) -> Any | None:
        """Replace examples that do not count and are not finite: zero times NaN is NaN.

        Args:
            inputs: Inputs of a chunk.
            outputs: The model's outputs on them.
            counted: What counts of the chunk.

        Returns:
            Inputs with an example that counts in the place of such ones, or None where there are
            none.
        """
        if not counted.masked or not concrete(counted.mask, *trees.leaves(outputs)):
            return None
        live = _alive(counted)
        dead = (~live).nonzero().flatten()
        if not len(dead) or all(bool(t[dead].isfinite().all()) for t in trees.leaves(outputs)):
            return None
        donors = _alive(next(iter(self.counted.values()))).nonzero().flatten()[:1]

        def repaired(t: Any, whole: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            t = t.clone()
            t[dead] = whole[donors] if len(donors) else torch.zeros_like(t[:1])
            return t

        return trees.map(repaired, inputs, self.batch.inputs)

    def _ask(self, question: Callable[[], None]) -> None:
        if self.later:
            self._open.append(question)
        else:
            question()

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
        checks.check_devices(self.caller, self.batch, outputs, targets_count=targets_count)
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
            bad = self._check_targets(outputs, targets, mask)
        ids = self.batch.ids
        if ids is None:
            ids = torch.arange(self.size, device=like.device)
        ids = ids.to(like.device)
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

    def _check_targets(self, outputs: Any, targets: Any, mask: Tensor | None) -> Tensor | None:
        """Check the targets; return what poisons every result where values cannot be looked at."""
        self.likelihood.check_targets_fit(self.caller, outputs, targets)
        if concrete(*trees.leaves((outputs, targets))):
            bad = self.likelihood.invalid(outputs, targets, mask)
            shapes = trees.map(lambda t: t.new_empty(()).expand(t.shape), outputs)
            raise_invalid = self.likelihood.raise_invalid
            self._ask(lambda: raise_invalid(self.caller, shapes, targets, bad))
            return None
        bad = self.likelihood.poison(outputs, targets, mask)
        dtype = torch.promote_types(trees.leaves(outputs)[0].dtype, torch.float32)
        one = torch.ones((), dtype=dtype, device=bad.device)
        return torch.where(bad, torch.full_like(one, float("nan")), one)

    def _check_total(self, counted: Counted) -> None:
        if not self.normalised or not concrete(counted.total):
            return
        if self.batch.mask is not None or self.batch.weights is not None:
            self._ask(lambda: self._raise_empty(counted.total))

    def _raise_empty(self, total: Tensor) -> None:
        if not bool(total > 0):
            raise DataError(
                f"{self.caller}: expected at least one unit to count, got a total weight of "
                f"{total.item():g}: everything is masked or has weight 0. Skip the batch."
            )


def _alive(counted: Counted) -> Tensor:
    """Return which examples have a unit that counts, [B]."""
    return counted.mask.reshape(counted.mask.shape[0], -1).any(-1)


def outside_inference(t: Any) -> Any:
    """Return a tensor that autograd may record, also if it was made in inference mode."""
    return t.clone() if isinstance(t, Tensor) and t.is_inference() else t


def part_of(tree: Any, start: int, stop: int) -> Any:
    """Return the examples `start` to `stop` of every tensor in a tree."""
    return trees.map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, tree)
