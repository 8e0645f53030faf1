"""The loop that every estimator shares: chunks of examples, draws of labels, blocks of columns.

One forward for each chunk; one backward for each distinct kind of labels, draw and block of
columns; every statistic that asked for those labels receives the scores while they exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.capture.check import check_batch_size
from fisherfn.capture.plan import Plan
from fisherfn.capture.planning import plan_for, remember
from fisherfn.capture.scores import Captured, Consumer
from fisherfn.capture.tape import PlanMismatchError
from fisherfn.core import trees
from fisherfn.core.modes import concrete, transformed
from fisherfn.estimators import checks
from fisherfn.estimators.observe import (
    FORWARD_ONLY,
    Labels,
    Observed,
    check_budget,
    columns_needed,
)
from fisherfn.estimators.observer import (
    DeadExamplesError,
    Observer,
    outside_inference,
    part_of,
)
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.leaf import LeafScores
from fisherfn.likelihoods.base import Likelihood

# Bytes that whole rows of scores (the general path, dense matrices) may take at once, and that the
# cotangents of a block of columns may take.
_ROWS = 256 * 2**20
_COLUMNS = {"cpu": 64 * 2**20, "cuda": 2**30}


@dataclass(frozen=True)
class Task:
    """A kind of statistic, and the labels it wants."""

    labels: Labels
    make: Callable[[], Statistic]


@dataclass(frozen=True)
class _Job:
    """A statistic at work."""

    labels: Labels
    statistic: Statistic


def evaluate(
    caller: str,
    model: Any,
    likelihood: Likelihood,
    tasks: Sequence[Task],
    params: Any,
    buffers: Any,
    batch: Batch,
    key: Tensor | None,
    chunk_size: int | None,
    *,
    repair: bool = False,
) -> list[Any]:
    """Do all tasks on one batch.

    Args:
        caller: The function that was called, for errors.
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        tasks: What to compute.
        params: The parameters.
        buffers: What else the model reads.
        batch: The examples.
        key: For kinds that draw.
        chunk_size: Examples processed together.
        repair: Look right after each forward for examples that neither count nor are finite. On a
            GPU that waits, so it is done at the end, and everything once more if there were any.

    Returns:
        A result for each task.

    Raises:
        FisherError: params, batch, key or options do not fit.
        PlanMismatchError: the calls of the model cannot be followed.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            params, buffers, batch, key = trees.map(
                outside_inference, (params, buffers, batch, key)
            )
            return evaluate(
                caller, model, likelihood, tasks, params, buffers, batch, key, chunk_size
            )
    leaves = checks.check_params(caller, params)
    size = checks.check_batch(caller, batch)
    for task in tasks:
        checks.check_key(caller, task.labels, key)
    plan = plan_for(model, params, buffers, batch.inputs)
    jobs: list[_Job] = []
    totals: list[Tensor] = []
    for attempt in range(3):
        jobs = [_Job(task.labels, task.make()) for task in tasks]
        loop = _Loop(caller, model, likelihood, jobs, params, buffers, batch, key, size, repair)
        try:
            totals = loop.run(plan, chunk_size)
            break
        except DeadExamplesError:
            return evaluate(
                caller,
                model,
                likelihood,
                tasks,
                params,
                buffers,
                batch,
                key,
                chunk_size,
                repair=True,
            )
        except PlanMismatchError as error:
            if attempt == 0:  # other sizes than those of the plan may change the model's calls
                plan = plan_for(model, params, buffers, batch.inputs, afresh=True)
                continue
            if transformed() or attempt == 2:
                raise
            # layers that come and go with the data: nothing can be tapped reliably
            check_batch_size(model, params, buffers, batch.inputs)
            everything = dict.fromkeys(range(len(leaves)), str(error))
            plan = replace(plan, taps=(), unused=frozenset(), looped=True).without(everything)
            remember(model, params, buffers, batch.inputs, plan, exactly=True)
    frames = [
        Frame(params, leaves, total, job.labels.fisher, job.labels.unit, size)
        for total, job in zip(totals, jobs, strict=True)
    ]
    return [job.statistic.result(frame) for job, frame in zip(jobs, frames, strict=True)]


class _Loop:
    """One evaluation: what stays the same while chunks, draws and columns change."""

    def __init__(
        self,
        caller: str,
        model: Any,
        likelihood: Likelihood,
        jobs: Sequence[_Job],
        params: Any,
        buffers: Any,
        batch: Batch,
        key: Tensor | None,
        size: int,
        repair: bool,
    ) -> None:
        self.caller, self.repair = caller, repair
        self.model, self.likelihood, self.jobs = model, likelihood, jobs
        self.params, self.buffers, self.batch, self.size = params, buffers, batch, size
        normalised = any(job.statistic.normalised for job in jobs)
        self.observer = Observer(
            caller, likelihood, batch, key, size, normalised=normalised, later=True
        )
        for job in jobs:
            job.statistic.begin(params)
            job.statistic.expect(size)

    def run(self, plan: Plan, chunk_size: int | None) -> list[Tensor]:
        """Visit every chunk, draw and column; return N for each job."""
        groups: dict[Labels, list[_Job]] = {}
        for job in self.jobs:
            job.statistic.plan(plan)
            groups.setdefault(job.labels, []).append(job)
        step = self._chunk(plan, chunk_size)
        draws = max(labels.num_samples for labels in groups)
        if draws > 1 and step < self.size:
            # a draw is finished before the next begins, so that its error can be known
            passes: list[list[int]] = [[s] for s in range(draws)]
        else:
            passes = [list(range(draws))]
        for samples in passes:
            for start in range(0, self.size, step):
                stop = min(self.size, start + step)
                alone = step >= self.size
                self._chunk_pass(plan, groups, samples, start, stop, alone)
            if step < self.size:
                for sample in samples:
                    self._end_draw(groups, sample)
        self.observer.settle()
        return [self.observer.counted[job.labels.unit].total.clone() for job in self.jobs]

    def _end_draw(self, groups: dict[Labels, list[_Job]], sample: int) -> None:
        for labels, jobs in groups.items():
            if sample < labels.num_samples:
                for job in jobs:
                    job.statistic.end_draw()

    def _chunk(self, plan: Plan, chunk_size: int | None) -> int:
        """Return how many examples go together."""
        if chunk_size is not None:
            return min(chunk_size, self.size)
        leaves = trees.leaves(self.params)
        rows = sum(leaves[i].numel() for i in plan.general)
        if any(job.statistic.needs_rows for job in self.jobs):
            rows = sum(t.numel() for t in leaves)
        return min(self.size, max(1, _ROWS // max(1, 8 * rows))) if rows else self.size

    def _chunk_pass(
        self,
        plan: Plan,
        groups: dict[Labels, list[_Job]],
        samples: Sequence[int],
        start: int,
        stop: int,
        alone: bool,
    ) -> None:
        inputs = self.batch.inputs
        if (start, stop) != (0, self.size):
            inputs = part_of(inputs, start, stop)
        many = any(
            labels.fisher == "exact" or (labels.fisher, labels.unit) == ("empirical", "position")
            for labels in groups
        )
        captured = Captured(self.model, self.params, self.buffers, inputs, plan, plain=many)
        observed = self._observe(captured.outputs, groups, start, stop)
        counted = next(iter(observed.values())).counted
        repaired = None
        if self.repair or not _reading_waits(captured.outputs):
            repaired = self.observer.without_dead(inputs, captured.outputs, counted)
        elif counted.masked and concrete(counted.mask, *trees.leaves(captured.outputs)):
            self.observer.doubt(captured.outputs, counted)
        if repaired is not None:
            captured = Captured(self.model, self.params, self.buffers, repaired, plan, plain=many)
            observed = self._observe(captured.outputs, groups, start, stop)
        for job in self.jobs:
            job.statistic.sources(captured.run.sources)
        if samples[0] == 0:
            for labels, jobs in groups.items():
                for job in jobs:
                    job.statistic.observe(observed[labels.unit])
        pulls = [
            (labels, [job for job in jobs if job.statistic.needs_scores], sample)
            for sample in samples
            for labels, jobs in groups.items()
            if sample < labels.num_samples and any(j.statistic.needs_scores for j in jobs)
        ]
        for i, (labels, jobs, sample) in enumerate(pulls):
            self._pull(captured, observed[labels.unit], labels, jobs, sample, i == len(pulls) - 1)
            for job in jobs:
                job.statistic.end_chunk()
                if alone:
                    job.statistic.end_draw()

    def _pull(
        self,
        captured: Captured,
        observed: Observed,
        labels: Labels,
        jobs: Sequence[_Job],
        sample: int,
        final: bool,
    ) -> None:
        if labels.fisher == FORWARD_ONLY:
            captured.inputs_only(_receiver(jobs, observed))
            for job in jobs:
                job.statistic.end_pull()
            return
        normalised = all(job.statistic.normalised for job in jobs)
        columns = columns_needed(labels, self.likelihood, captured.outputs)
        check_budget(self.caller, labels, columns)
        step = self._column_step(captured, columns)
        root = observed.counted.root_weights

        def consume(leaf: int, scores: LeafScores) -> None:
            for job in jobs:
                mine = scores
                if job.statistic.normalised and not normalised:
                    mine = scores.scaled(root)
                job.statistic.take(leaf, mine, root)

        done = 0
        for block in observed.cotangents(labels, sample, normalised=normalised, step=step):
            done += trees.leaves(block)[0].shape[0]
            end = done == columns
            captured.scores(block, consume, last=final and end, more=not end)
            for job in jobs:
                job.statistic.end_pull()

    def _column_step(self, captured: Captured, columns: int) -> int:
        """Return how many columns are pulled back together."""
        if columns == 1 or captured.run.serial:
            return 1
        each = sum(t.numel() * t.element_size() for t in trees.leaves(captured.outputs))
        for group in captured.run.kept:
            each += sum(t.numel() * t.element_size() for t in group)
        leaves = captured.leaves
        rows = sum(leaves[i].numel() for i in captured.plan.general)
        if any(job.statistic.needs_rows for job in self.jobs):
            rows = sum(t.numel() for t in leaves)
        each += 8 * rows * captured.batch
        device = trees.leaves(captured.outputs)[0].device.type
        budget = _COLUMNS.get(device, _COLUMNS["cpu"])
        return max(1, min(columns, budget // max(1, each)))

    def _observe(
        self, outputs: Any, groups: dict[Labels, list[_Job]], start: int, stop: int
    ) -> dict[str, Observed]:
        """Check the data against the outputs, count it, and return it for each unit."""
        units = dict.fromkeys(labels.unit for labels in groups)
        targets_count = any(labels.fisher == "empirical" for labels in groups)
        return self.observer.observe(outputs, units, start, stop, targets_count=targets_count)


def _reading_waits(outputs: Any) -> bool:
    """Return True where looking at a value waits for all that was asked for before."""
    return trees.leaves(outputs)[0].device.type != "cpu"


def _receiver(jobs: Sequence[_Job], observed: Observed) -> Consumer:
    """Hand scores to every statistic."""
    root = observed.counted.root_weights

    def consume(leaf: int, scores: LeafScores) -> None:
        for job in jobs:
            job.statistic.take(leaf, scores, root)

    return consume
