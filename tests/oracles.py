"""Fisher information written down from its definition, as Python loops.

Imports torch and nothing else: whatever the library does cleverly is checked against what is done
here slowly. One example at a time goes through the model, one scalar at a time through
`torch.autograd.grad`; a matrix is a sum of outer products.

    F = (1/N) sum_n w_n E_y[ s_n s_n^T ],     s_n = grad of sum over positions of log p(y | x_n)

A family (`Categorical`, `Bernoulli`, ...) knows two things, both on outputs of ONE example
`[1, ...]`: `log_prob(outputs, targets)`, one number for each position, and `terms(outputs)`, which
lists triples `(position, weight, scalar)` such that the output Fisher information of that position
is the sum of weight * grad(scalar) grad(scalar)^T.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Position = tuple[int, ...]
Term = tuple[Position, float, Tensor]


# ---- families ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Categorical:
    """Classes from logits divided by the temperature, for drawing and for scoring alike."""

    temperature: float = 1.0
    class_axis: int = -1

    def log_probs(self, outputs: Tensor) -> Tensor:
        return torch.log_softmax(outputs.movedim(self.class_axis, -1) / self.temperature, dim=-1)

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        return tuple(outputs.movedim(self.class_axis, -1).shape[1:-1])

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        table = self.log_probs(outputs)
        return table.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def terms(self, outputs: Tensor) -> Iterator[Term]:
        table = self.log_probs(outputs)[0]
        for position in _indices(table.shape[:-1]):
            for label in range(table.shape[-1]):
                log_p = table[position][label]
                yield position, math.exp(log_p.item()), log_p

    def labels(self, outputs: Tensor) -> int:
        return outputs.shape[self.class_axis]


@dataclass(frozen=True)
class Bernoulli:
    """Independent yes/no answers from logits; the last `event_ndim` axes are one observation."""

    event_ndim: int = 1

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        return _batch_shape(outputs, self.event_ndim)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        sign = 2.0 * targets.to(outputs.dtype) - 1.0
        return _sum_last(torch.nn.functional.logsigmoid(sign * outputs), self.event_ndim)

    def terms(self, outputs: Tensor) -> Iterator[Term]:
        for index in _indices(outputs.shape[1:]):
            logit = outputs[0][index]
            for answer in (1.0, -1.0):
                log_p = torch.nn.functional.logsigmoid(answer * logit)
                yield _position(index, self.event_ndim), math.exp(log_p.item()), log_p


@dataclass(frozen=True)
class Gaussian:
    """Independent normals around the outputs; `scale` is a standard deviation, also per output."""

    scale: float | tuple[float, ...] = 1.0
    event_ndim: int = 1

    def _scale(self, outputs: Tensor) -> Tensor:
        return torch.as_tensor(self.scale, dtype=outputs.dtype).expand(outputs.shape)

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        return _batch_shape(outputs, self.event_ndim)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scale = self._scale(outputs)
        z = (targets - outputs) / scale
        return _sum_last(-0.5 * z * z - scale.log() - 0.5 * math.log(2 * math.pi), self.event_ndim)

    def terms(self, outputs: Tensor) -> Iterator[Term]:
        scale = self._scale(outputs)[0]
        for index in _indices(outputs.shape[1:]):
            weight = 1.0 / scale[index].item() ** 2  # E[(y - mean)^2] / scale^4
            yield _position(index, self.event_ndim), weight, outputs[0][index]


@dataclass(frozen=True)
class Poisson:
    """Independent counts; the outputs are log-rates."""

    event_ndim: int = 1

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        return _batch_shape(outputs, self.event_ndim)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.dtype)
        value = targets * outputs - outputs.exp() - torch.lgamma(targets + 1.0)
        return _sum_last(value, self.event_ndim)

    def terms(self, outputs: Tensor) -> Iterator[Term]:
        for index in _indices(outputs.shape[1:]):
            log_rate = outputs[0][index]
            rate = math.exp(log_rate.item())  # E[(y - rate)^2]
            yield _position(index, self.event_ndim), rate, log_rate


Family = Categorical | Bernoulli | Gaussian | Poisson


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in shape))


def _position(index: tuple[int, ...], event_ndim: int) -> Position:
    return index[: len(index) - event_ndim]


def _batch_shape(outputs: Tensor, event_ndim: int) -> tuple[int, ...]:
    return tuple(outputs.shape[1 : outputs.ndim - event_ndim])


def _sum_last(value: Tensor, ndim: int) -> Tensor:
    return value.sum(tuple(range(value.ndim - ndim, value.ndim))) if ndim else value


# ---- problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A model with its data, in the plainest form.

    `forward(inputs)` reads the tensors of `params` (leaves that require grad) and returns outputs;
    `inputs` is a tensor, or a tuple or dict of tensors, with the examples as leading axis.
    """

    forward: Callable[[Any], Tensor]
    params: dict[str, Tensor]
    inputs: Any
    family: Family
    targets: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None

    @property
    def size(self) -> int:
        return _first(self.inputs).shape[0]

    def outputs(self, n: int) -> Tensor:
        """Outputs of example n alone, with a leading axis of one."""
        return self.forward(_row(self.inputs, n))

    def positions(self) -> tuple[int, ...]:
        with torch.no_grad():
            return self.family.positions(self.outputs(0))

    def observed(self, n: int) -> Tensor:
        """Log-probability of each position of example n; masked targets are never looked at."""
        assert self.targets is not None
        targets, keep = _row(self.targets, n), self.full_mask()[n]
        for position in _indices(tuple(keep.shape)):
            if not bool(keep[position]):
                targets[0][position] = 0
        return self.family.log_prob(self.outputs(n), targets)[0]

    def full_mask(self) -> Tensor:
        """The mask, `[B, *positions]`."""
        shape = (self.size, *self.positions())
        mask = torch.ones(shape, dtype=torch.bool) if self.mask is None else self.mask
        return mask.expand(shape)

    def unit_weights(self, unit: str) -> Tensor:
        """Multiplicity of each unit, zero for what does not count: `[B]` or `[B, *positions]`."""
        mask = self.full_mask()
        if unit == "position":
            weights = torch.ones(mask.shape) if self.weights is None else self.weights
            return torch.where(mask, weights.double(), 0.0)
        counted = mask.reshape(self.size, -1).any(1)
        weights = torch.ones(self.size) if self.weights is None else self.weights
        return torch.where(counted, weights.double(), 0.0)


@dataclass(frozen=True)
class Rows:
    """`scores` `[K, P]` and their `weights` `[K]`; the Fisher is their weighted second moment."""

    scores: Tensor
    weights: Tensor
    count: float


def _first(inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs
    return _first(next(iter(inputs.values() if isinstance(inputs, dict) else inputs)))


def _row(inputs: Any, n: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[n : n + 1].clone()
    if isinstance(inputs, dict):
        return {name: _row(value, n) for name, value in inputs.items()}
    return tuple(_row(value, n) for value in inputs)


def gradient(scalar: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Gradient as one vector, parameters in insertion order, each row-major."""
    pieces = []
    if scalar.requires_grad:
        grads = torch.autograd.grad(
            scalar, list(params.values()), retain_graph=True, allow_unused=True
        )
    else:
        grads = [None] * len(params)
    for grad, param in zip(grads, params.values(), strict=True):
        pieces.append((torch.zeros_like(param) if grad is None else grad).detach().reshape(-1))
    return torch.cat([piece.double() for piece in pieces])


# ---- definitions ---------------------------------------------------------------------------------


def scores(problem: Problem) -> Tensor:
    """Scores of the observed targets `[B, P]`: unweighted, zero where masked."""
    mask = problem.full_mask()
    rows = []
    for n in range(problem.size):
        log_p = problem.observed(n)
        rows.append(gradient(log_p[mask[n]].sum(), problem.params))
    return torch.stack(rows)


def position_scores(problem: Problem) -> Tensor:
    """Scores of the observed target of each position alone `[B * positions, P]`."""
    mask = problem.full_mask()
    rows = []
    for n in range(problem.size):
        log_p = problem.observed(n)
        for position in _indices(log_p.shape):
            row = gradient(log_p[position], problem.params)
            rows.append(row if bool(mask[n][position]) else torch.zeros_like(row))
    return torch.stack(rows)


def rows(problem: Problem, fisher: str = "exact", unit: str = "example") -> Rows:
    """The weighted scores whose second moment is the Fisher information matrix.

    `fisher` is "exact" (the sum over every position and every label, or its closed form) or
    "empirical" (the observed targets).
    """
    unit_weights = problem.unit_weights(unit)
    count = unit_weights.sum().item()
    if fisher == "empirical":
        table = scores(problem) if unit == "example" else position_scores(problem)
        return Rows(table, unit_weights.reshape(-1), count)
    mask = problem.full_mask()
    vectors, weights = [], []
    for n in range(problem.size):
        for position, weight, scalar in problem.family.terms(problem.outputs(n)):
            if not bool(mask[n][position]):
                continue
            multiplicity = unit_weights[n] if unit == "example" else unit_weights[n][position]
            vectors.append(gradient(scalar, problem.params))
            weights.append(weight * multiplicity.item())
    return Rows(torch.stack(vectors), torch.tensor(weights, dtype=torch.float64), count)


def joint_dense(problem: Problem) -> Tensor:
    """The exact Fisher by enumerating every JOINT labelling of an example's positions.

    Categorical only; exponential in the number of positions. This is the definition that `rows`
    simplifies: labels of different positions are independent given the inputs, so that the cross
    terms of their scores vanish.
    """
    assert isinstance(problem.family, Categorical)
    unit_weights = problem.unit_weights("example")
    size = sum(param.numel() for param in problem.params.values())
    matrix = torch.zeros(size, size, dtype=torch.float64)
    mask = problem.full_mask()
    for n in range(problem.size):
        table = problem.family.log_probs(problem.outputs(n))[0]
        free = [position for position in _indices(table.shape[:-1]) if bool(mask[n][position])]
        for labels in itertools.product(range(table.shape[-1]), repeat=len(free)):
            if not free:
                continue
            chosen = [table[at][label] for at, label in zip(free, labels, strict=True)]
            log_p = torch.stack(chosen).sum()
            score = gradient(log_p, problem.params)
            matrix += unit_weights[n] * math.exp(log_p.item()) * torch.outer(score, score)
    return matrix / unit_weights.sum()


def dense(problem: Problem, fisher: str = "exact", unit: str = "example") -> Tensor:
    """The matrix `[P, P]`, one outer product at a time."""
    found = rows(problem, fisher, unit)
    size = found.scores.shape[1]
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for score, weight in zip(found.scores, found.weights, strict=True):
        matrix += weight * torch.outer(score, score)
    return matrix / found.count


def diagonal(problem: Problem, fisher: str = "exact", unit: str = "example") -> Tensor:
    """The diagonal `[P]`: mean of squared scores."""
    found = rows(problem, fisher, unit)
    total = torch.zeros(found.scores.shape[1], dtype=torch.float64)
    for score, weight in zip(found.scores, found.weights, strict=True):
        total += weight * score * score
    return total / found.count


def blocks(matrix: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diagonal blocks of a dense matrix, one for each parameter."""
    found, start = {}, 0
    for name, param in params.items():
        stop = start + param.numel()
        found[name] = matrix[start:stop, start:stop]
        start = stop
    return found


def moments(problem: Problem) -> tuple[float, Tensor, Tensor]:
    """Count, mean and mean square of the observed scores, weighted."""
    found = rows(problem, "empirical")
    mean = torch.zeros(found.scores.shape[1], dtype=torch.float64)
    square = torch.zeros_like(mean)
    for score, weight in zip(found.scores, found.weights, strict=True):
        mean += weight * score
        square += weight * score * score
    return found.count, mean / found.count, square / found.count


def unravel(vector: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the last axis of `vector` into tensors shaped like the parameters."""
    found, start = {}, 0
    for name, param in params.items():
        piece = vector[..., start : start + param.numel()]
        found[name] = piece.reshape(vector.shape[:-1] + param.shape)
        start += param.numel()
    return found


def central_difference(
    function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, step: float = 1e-5
) -> Tensor:
    """Derivative of `function` along `direction`, fourth order."""

    def at(distance: float) -> Tensor:
        return function(point + distance * direction).detach()

    near = at(step) - at(-step)
    far = at(2 * step) - at(-2 * step)
    return (8 * near - far) / (12 * step)
