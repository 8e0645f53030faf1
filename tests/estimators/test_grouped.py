"""Traces over groups against loops over single examples, for every rule and every kind of group."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cases
import fisherfn as ff
import oracles
from fisherfn.groups import GroupSpec
from fisherfn.testing import assert_close

NAMES = list(cases.ALL)
Shape = tuple[int, ...]


# ---- groups, and independently of the library the number of each entry's group -------------------


def along(axis: int, run: int = 1) -> tuple[Callable[..., GroupSpec], Callable[..., int]]:
    """Runs along an axis; tensors without that axis are one group."""

    def spec(shape: Shape) -> GroupSpec:
        return ff.groups.rows(shape, axis=axis, bucket=run) if axis < len(shape) else whole(shape)

    return spec, lambda index, shape: index[axis] // run if axis < len(shape) else 0


def whole(shape: Shape) -> GroupSpec:
    return ff.groups.whole(shape)


def labelled(shape: Shape) -> GroupSpec:
    """Three classes along the last axis, one of which is empty where the axis is short."""
    if not shape:
        return GroupSpec("label", shape, None, 3, "whole", order=(1,))
    order = tuple((5 * i) % 3 for i in range(shape[-1]))
    return GroupSpec("label", shape, len(shape) - 1, 3, order=order)


def blocked(shape: Shape) -> GroupSpec:
    """Two blocks along the first axis and channels along the second."""
    if len(shape) < 2 or shape[0] % 2:
        return ff.groups.elements(shape)
    return ff.groups.channels(shape, axis=1, blocks=2)


def _number_of_element(index: Shape, shape: Shape) -> int:
    number = 0
    for i, n in zip(index, shape, strict=True):
        number = number * n + i
    return number


def _number_in_blocks(index: Shape, shape: Shape) -> int:
    if len(shape) < 2 or shape[0] % 2:
        return _number_of_element(index, shape)
    return (index[0] // (shape[0] // 2)) * shape[1] + index[1]


GROUPINGS: dict[str, tuple[Callable[[Shape], GroupSpec], Callable[[Shape, Shape], int]]] = {
    "outputs": along(0),
    "inputs": along(1),
    "last": along(2),
    "pairs_of_rows": along(0, 2),
    "pairs_of_columns": along(1, 2),
    "whole": (whole, lambda index, shape: 0),
    "labelled": (labelled, lambda index, shape: (5 * index[-1]) % 3 if shape else 1),
    "blocks": (blocked, _number_in_blocks),
    "elements": (ff.groups.elements, _number_of_element),
}


def sums(values: Tensor, spec: GroupSpec, number: Callable[[Shape, Shape], int]) -> Tensor:
    """Add up the entries of each group, one at a time."""
    shape = tuple(values.shape)
    total = [0.0] * spec.num_groups
    entries = values.tolist() if not shape else None
    for index in itertools.product(*(range(n) for n in shape)):
        total[number(index, shape)] += entries if entries is not None else values[index].item()
    return torch.tensor(total, dtype=torch.float64)


@functools.cache
def setup(name: str) -> cases.Setup:
    return cases.ALL[name].setup()


def truth(name: str, fisher: str) -> dict[str, Tensor]:
    found = oracles.rows(setup(name).problem, fisher)
    diagonal = (found.weights.unsqueeze(1) * found.scores.square()).sum(0) / found.count
    return oracles.unravel(diagonal, setup(name).problem.params)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_every_kind(name: str) -> None:
    s = setup(name)
    want = truth(name, "empirical")
    for kind, (make, number) in GROUPINGS.items():
        specs = {path: make(tuple(p.shape)) for path, p in s.params.items()}
        got = ff.grouped(s.model, s.likelihood, specs, fisher="empirical")(*s.args)
        wanted = {path: sums(want[path], specs[path], number) for path in specs}
        assert_close(got.values, wanted, cases.ALL[name].rtol, kind)
        reduced = ff.groups.reduce(want, specs)
        assert_close(reduced, wanted, 1e-10, f"reduce, {kind}")
