"""Folding with transforms of one's own, and batches in which nothing counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from states.test_ema import close
from states.test_fold import KEY, PARAMS, batches, squares
from torch.utils.data import DataLoader, IterableDataset

import fisherfn as ff
from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.errors import DataError, FisherError, OptionError
from fisherfn.states import Transform, accumulate, ema, welford, window


def channel_sums() -> Transform:
    """An average of one's own, which takes results and nothing else."""
    inner = ema(0.9)

    def sums(F: Any) -> Any:
        return {"w": F.values["w"].sum()}

    return Transform(
        lambda like: inner.init(sums(like)),
        lambda new, state, weight=None: inner.update(sums(new), state, weight),
        inner.read,
    )


class Total(NamedTuple):
    values: Any
    members: torch.Tensor


def plain_total(named: bool) -> Transform:
    """A sum, in a state of one's own."""

    def update(new: Any, state: Any, weight: Any = None) -> tuple[Any, Any]:
        if not named:
            return (after := trees.add(state, new.values)), after
        after = Total(trees.add(state.values, new.values), state.members + 1)
        return after.values, after

    def init(like: Any) -> Any:
        zeros = trees.zeros_like(like.values)
        return Total(zeros, torch.zeros(())) if named else zeros

    return Transform(init, update, lambda state: state.values if named else state)


@pytest.mark.parametrize(
    "make", [channel_sums, lambda: plain_total(True), lambda: plain_total(False)]
)
def test_transforms_of_ones_own_go_on(make: Any) -> None:
    data, transform = batches([2, 3, 1, 4]), make()
    want, uninterrupted = accumulate(squares(), PARAMS, {}, data, transform=transform)
    _, state = accumulate(squares(), PARAMS, {}, data[:2], transform=transform)
    found, after = accumulate(squares(), PARAMS, {}, data[2:], transform=transform, state=state)
    close(found, want, 0.0)
    close(after, uninterrupted, 0.0)
    with pytest.raises(OptionError, match=r"expected transform=states.welford\(\) with target"):
        accumulate(squares(), PARAMS, {}, data, transform=transform, target_stderr=0.1)


NETWORK = ff.functional(torch.nn.Linear(3, 3).double())


@pytest.mark.parametrize("transform", [None, ema(0.5), welford(), window(2)])
@pytest.mark.parametrize("how", ["mask", "positions", "weights", "both", "apart"])
def test_a_batch_in_which_everything_is_masked_adds_nothing(transform: Any, how: str) -> None:
    model, params, buffers = NETWORK
    fim = ff.diagonal(model, ff.likelihoods.categorical(), fisher="mc")
    inputs = ff.random.normal(KEY, (9, 2, 3), torch.float64)
    off = {
        "mask": {"mask": torch.zeros(3, 1, dtype=torch.bool)},
        "positions": {"mask": torch.zeros(3, 2, dtype=torch.bool)},
        "weights": {"weights": torch.zeros(3)},
        "both": {"mask": torch.ones(3, 2, dtype=torch.bool), "weights": torch.zeros(3)},
        "apart": {
            "mask": torch.tensor([[True, True], [False, False], [False, False]]),
            "weights": torch.tensor([0.0, 1.0, 1.0]),
        },
    }[how]
    data = [Batch(inputs[:3], **off), Batch(inputs[3:6]), Batch(inputs[6:])]
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
        given = [data[i] for i in order]
        found, state = accumulate(
            fim, params, buffers, given, key=KEY, transform=transform, on_nonfinite="skip"
        )
        assert (state.batches, state.examples, state.skipped, state.units) == (3, 9, 0, 6)
        ids = [torch.arange(3) + 3 * i for i in range(3) if order[i]]
        kept = [
            dataclasses.replace(b, ids=i)
            for b, i in zip([b for b in given if b is not data[0]], ids, strict=True)
        ]
        want, _ = accumulate(fim, params, buffers, kept, key=KEY, transform=transform)
        close(found, want, 0.0)
    with pytest.raises(DataError, match="in the others everything is masked or has weight 0"):
        accumulate(fim, params, buffers, data[:1], key=KEY, transform=transform)


@pytest.mark.parametrize(
    "bad", [{"mask": torch.ones(2, 7, dtype=torch.bool), "weights": torch.ones(3)}]
)
def test_masks_that_do_not_fit_are_the_estimators_to_refuse(bad: Any) -> None:
    model, params, buffers = NETWORK
    fim = ff.diagonal(model, ff.likelihoods.categorical(), fisher="exact")
    with pytest.raises(FisherError, match="diagonal: "):
        accumulate(fim, params, buffers, [Batch(torch.ones(3, 2, 3).double(), **bad)])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Batch]:
        return iter(batches([2, 3, 1]))


class Endless:
    """Has a method `__len__` that only raises, as wrappers of streams do."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(batches([2, 3, 1]))

    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.parametrize("data", [DataLoader(Stream(), batch_size=None), Endless()])
@pytest.mark.moves_global_rng  # a DataLoader seeds its workers from it
def test_streams_that_do_not_know_their_length_are_folded(data: Any) -> None:
    calls: list[tuple[int, int | None]] = []

    def note(done: int, total: int | None) -> None:
        calls.append((done, total))

    found, _ = accumulate(squares(), PARAMS, {}, data, progress=note)
    close(found, accumulate(squares(), PARAMS, {}, batches([2, 3, 1]))[0], 0.0)
    assert calls == [(1, None), (2, None), (3, None)]


def test_an_empty_batch_adds_nothing() -> None:
    data = batches([2, 3, 1])
    found, state = accumulate(squares(), PARAMS, {}, [data[0], Batch(torch.ones(0, 3)), *data[1:]])
    close(found, accumulate(squares(), PARAMS, {}, data)[0], 0.0)
    assert (state.batches, state.examples, state.units) == (4, 6, 6)
