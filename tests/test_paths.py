"""Leaves are named by their paths, so two leaves with one path are refused, never mixed up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fisherfn as ff
from fisherfn.core import trees
from fisherfn.core.errors import TreeMismatchError
from fisherfn.groups import channels, infer, layers, reduce

#: Two leaves that read "a/b", and two that read "3".
JOINED: dict[str, Any] = {"a/b": torch.ones(3, 4), "a": {"b": torch.ones(2, 3)}}
NUMBERED: dict[Any, Any] = {3: torch.ones(3, 4), "3": torch.ones(2, 3)}
BATCH = ff.Batch(torch.ones(5, 4), torch.tensor([0, 1, 1, 0, 1]))
LIKELIHOOD = ff.likelihoods.categorical()
SPECS = {"a/b": channels((2, 3))}


def two_layers(params: Any, buffers: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = trees.leaves(params)
    return torch.tanh(x @ first.T) @ second.T


def estimate(estimator: Any) -> Any:
    return estimator(JOINED, {}, BATCH)


def stored(tree: Any) -> ff.tasks.TaskStore:
    return ff.tasks.TaskStore().put("task", tree)


DIAGONAL = ff.Diagonal(JOINED, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("caller", "call"),
    [
        ("groups.infer", lambda: infer(JOINED)),
        ("groups.layers", lambda: layers(JOINED)),
        ("groups.reduce", lambda: reduce(JOINED, SPECS)),
        ("Grouped.of", lambda: ff.Grouped.of(DIAGONAL, SPECS)),
        ("grouped", lambda: estimate(ff.grouped(two_layers, LIKELIHOOD, SPECS))),
        ("kfac", lambda: estimate(ff.kfac(two_layers, LIKELIHOOD))),
        ("ekfac", lambda: estimate(ff.ekfac(two_layers, LIKELIHOOD))),
        ("block_diagonal", lambda: estimate(ff.block_diagonal(two_layers, LIKELIHOOD))),
        ("TaskStore.to_flat", lambda: stored(DIAGONAL).to_flat()),
        ("TaskStore.to_flat", lambda: stored(JOINED).to_flat()),
        ("TaskStore.leaf", lambda: stored(JOINED).leaf("task", "a/b")),
    ],
)
def test_two_leaves_of_one_path_are_refused(caller: str, call: Callable[[], Any]) -> None:
    message = rf"^{caller}: expected a path of its own for every leaf, got two leaves at 'a/b'"
    with pytest.raises(TreeMismatchError, match=message):
        call()


def test_numbers_read_like_text() -> None:
    with pytest.raises(TreeMismatchError, match=r"groups.infer: .* at '3'. Rename one"):
        infer(NUMBERED)


def test_what_goes_by_position_does_not_mind() -> None:
    apart = dict(enumerate(trees.leaves(JOINED)))
    for make in (ff.diagonal, ff.dense):
        found = estimate(make(two_layers, LIKELIHOOD)).to_dense()
        assert torch.equal(found, make(two_layers, LIKELIHOOD)(apart, {}, BATCH).to_dense())
