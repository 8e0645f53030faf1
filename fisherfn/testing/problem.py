"""A model with its data, and what one may do to a batch without changing its meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees


@dataclass(frozen=True)
class Problem:
    """Everything an estimator is called with, and what a law may assume of it.

    Attributes:
        name: Shown by Hypothesis when a law fails.
        model: A function `(params, buffers, inputs) -> outputs`.
        likelihood: What the outputs mean.
        params: Tree of tensors.
        buffers: Tree of constants.
        batch: The data.
        positions: Shape of the positions of one example, the mask's trailing axes.
        causal: Whether an output depends on no later input along the first position axis, so that
            examples may be padded at their end.
        unit: What the batch's weights are shaped for: "example" `[B]`, "position"
            `[B, *positions]`.
    """

    name: str
    model: Callable[[Any, Any, Any], Any]
    likelihood: Any
    params: Any
    buffers: Any
    batch: Batch
    positions: tuple[int, ...] = ()
    causal: bool = False
    unit: str = "example"

    @property
    def size(self) -> int:
        """Number of examples, counting what is masked."""
        return trees.leaves(self.batch.inputs)[0].shape[0]

    @property
    def args(self) -> tuple[Any, Any, Batch]:
        """The positional arguments of an estimator's call."""
        return self.params, self.buffers, self.batch

    def __repr__(self) -> str:
        """Name the model, the likelihood and the batch, short enough for a failure report."""
        given = [
            field
            for field in ("targets", "mask", "weights", "ids", "positions")
            if getattr(self.batch, field) is not None
        ]
        return f"Problem({self.name}, {self.likelihood}, B={self.size}, {', '.join(given)})"


def explicit(problem: Problem) -> Batch:
    """Return the batch with its defaults written out: mask, weights and ids.

    Args:
        problem: Any problem.

    Returns:
        A batch of the same meaning whose mask is `[B, *positions]` and whose weights and ids exist.
    """
    batch, size = problem.batch, problem.size
    device = trees.leaves(batch.inputs)[0].device
    shape = (size, *problem.positions)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    if batch.mask is not None:
        mask = batch.mask.expand(shape).clone()
    weights = batch.weights
    if weights is None:
        units = shape if problem.unit == "position" else shape[:1]
        weights = torch.ones(units, dtype=torch.float64, device=device)
    ids = torch.arange(size, device=device) if batch.ids is None else batch.ids
    return replace(batch, mask=mask, weights=weights, ids=ids)


def take(problem: Problem, index: Tensor) -> Problem:
    """Return the problem with only the examples `index`, in that order; their ids go along.

    Args:
        problem: Any problem.
        index: int64 `[K]`, rows of the batch; a row may come twice.

    Returns:
        The problem with K examples.
    """
    batch = explicit(problem)
    rows = {
        name: trees.map(lambda t: t[index], value)
        for name, value in vars(batch).items()
        if value is not None
    }
    return replace(problem, batch=Batch(**rows))


def join(first: Problem, second: Problem) -> Problem:
    """Return the problem of the examples of both.

    Args:
        first: Any problem.
        second: A problem of the same model whose batch has the same fields.

    Returns:
        The problem with the examples of `first`, then of `second`.
    """
    one, two = explicit(first), explicit(second)
    rows = {
        name: trees.map(lambda a, b: torch.cat([a, b]), value, getattr(two, name))
        for name, value in vars(one).items()
        if value is not None
    }
    return replace(first, batch=Batch(**rows))


def pad_examples(problem: Problem, count: int) -> Problem:
    """Return the problem with `count` more examples that the mask leaves out.

    Args:
        problem: Any problem.
        count: How many rows to append. They repeat the first row's inputs, under ids of their own,
            with weights that would show if they counted and targets that no likelihood accepts.

    Returns:
        The problem with `B + count` examples.
    """
    batch = explicit(problem)
    index = torch.cat([torch.arange(problem.size), torch.zeros(count, dtype=torch.int64)])
    longer = explicit(take(problem, index))
    new = torch.arange(problem.size + count) >= problem.size
    assert longer.mask is not None
    assert longer.weights is not None
    assert batch.ids is not None
    assert longer.ids is not None
    fresh = torch.arange(count) + int(batch.ids.max()) + 1
    return replace(
        problem,
        batch=replace(
            longer,
            targets=_spoil(longer.targets, new),
            mask=longer.mask & ~_lift(new, longer.mask.dim()),
            weights=torch.where(_lift(new, longer.weights.dim()), 7.0, longer.weights),
            ids=torch.cat([batch.ids, fresh]),
        ),
    )


def pad_positions(problem: Problem, count: int) -> Problem:
    """Return the problem with `count` more positions at the end of every example, all masked.

    Args:
        problem: A causal problem whose inputs, mask and targets have the first position axis at 1.
        count: How many positions to append; their inputs repeat the first position's.

    Returns:
        The problem with longer examples, of the same meaning.

    Raises:
        AssertionError: The problem is not causal.
    """
    if not problem.causal:
        raise AssertionError(f"pad_positions: expected a causal problem, got {problem!r}.")
    batch, length = explicit(problem), problem.positions[0]
    index = torch.cat([torch.arange(length), torch.zeros(count, dtype=torch.int64)])
    new = torch.arange(length + count) >= length

    def longer(tensor: Tensor) -> Tensor:
        return tensor.index_select(1, index.to(tensor.device))

    assert batch.mask is not None
    assert batch.weights is not None
    mask = longer(batch.mask)
    weights = longer(batch.weights) if batch.weights.dim() > 1 else batch.weights
    targets = None if batch.targets is None else longer(batch.targets).movedim(1, 0)
    spoiled = _spoil(targets, new)
    return replace(
        problem,
        positions=(length + count, *problem.positions[1:]),
        batch=replace(
            batch,
            inputs=trees.map(longer, batch.inputs),
            targets=None if spoiled is None else spoiled.movedim(0, 1),
            mask=mask & ~_lift(new, mask.dim() - 1),
            weights=weights,
            positions=None if batch.positions is None else longer(batch.positions),
        ),
    )


def _lift(rows: Tensor, ndim: int) -> Tensor:
    """Append axes of one until there are `ndim`."""
    return rows.reshape(rows.shape + (1,) * (ndim - rows.dim()))


def _spoil(targets: Tensor | None, rows: Tensor) -> Tensor | None:
    """Replace whole rows by a value that is valid under no likelihood."""
    if targets is None:
        return None
    bad = float("nan") if targets.is_floating_point() else -100
    return torch.where(_lift(rows, targets.dim()), bad, targets)
