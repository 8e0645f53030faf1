"""The last members, and two streams with a lever between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from states.streams import STREAMS, tree
from states.test_ema import averaged as entries
from states.test_ema import close, folded

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, TreeMismatchError
from fisherfn.core.merging import empty_like, merge
from fisherfn.curvature import Diagonal
from fisherfn.states import EveryPair, EveryState, due, ema, every, welford, window


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
def test_window_is_the_weighted_mean_of_the_last(stream: Any) -> None:
    transform, weights = window(3), [2.0, 1.0, 4.0, 0.5, 3.0]
    state = transform.init(stream(0))
    for i, w in enumerate(weights):
        reading, state = transform.update(stream(i), state, w)
        kept = list(range(max(0, i - 2), i + 1))
        total = sum(weights[k] for k in kept)
        columns = zip(*[entries(stream(k)) for k in kept], strict=True)
        want = [
            sum(weights[k] * x for k, x in zip(kept, xs, strict=True)) / total for xs in columns
        ]
        close(entries(reading), want)
        close(entries(transform.read(state)), want)
    assert state.updates == 5
    close(entries(state.entries[-1]), entries(stream(4)), 0.0)


def test_window_leaves_no_trace_of_what_has_gone() -> None:
    reading, _ = folded(window(1), [torch.tensor([1e30]), torch.tensor([1e-30])])
    assert torch.equal(reading, torch.tensor([1e-30]))


def test_window_before_the_first_update() -> None:
    assert window(2).read(window(2).init(torch.ones(2))).isnan().all()


def test_windows_merge_time_by_time() -> None:
    left, right = [tree(i) for i in range(4)], [tree(i) for i in range(10, 14)]
    _, a = folded(window(2), left, [1.0, 2.0, 3.0, 4.0])
    _, b = folded(window(2), right, [4.0, 3.0, 2.0, 1.0])
    joined = merge(a, b)
    want = trees.map(
        lambda p, q, r, s: (3 * p + 2 * q + 4 * r + s) / 10, left[2], right[2], left[3], right[3]
    )
    close(window(2).read(joined), want)
    close(merge(a, empty_like(a)), a, 0.0)
    with pytest.raises(OptionError, match="expected windows of one size, got 2 and 3"):
        merge(a, folded(window(3), left)[1])


@pytest.mark.parametrize("size", [0, -1, 1.5, "3", None, True])
def test_bad_sizes_are_refused(size: Any) -> None:
    with pytest.raises(OptionError, match=r"states.window: expected size to be a positive integer"):
        window(size)


def test_window_refuses_absent_leaves() -> None:
    state = window(2).init({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(TreeMismatchError, match=r"window.update: .* got none at b"):
        window(2).update({"a": torch.ones(1)}, state)


def sampled(i: int) -> Diagonal:
    return Diagonal(tree(i), torch.tensor(4.0), fisher="mc")


def observed(i: int) -> Diagonal:
    return Diagonal(tree(i), torch.tensor(4.0), fisher="empirical")


def test_every_keeps_two_states_of_two_kinds() -> None:
    lever = every(3, ema(0.5), otherwise=welford())
    state = lever.init(EveryPair(sampled(0), observed(0)))
    dues: list[bool] = []
    reading: Any = None
    for i in range(7):
        dues.append(bool(due(state)))
        reading, state = lever.update(sampled(i) if dues[-1] else observed(i), state)
    assert dues == [True, False, False, True, False, False, True]
    want, _ = folded(ema(0.5), [sampled(i) for i in (0, 3, 6)])
    other, _ = folded(welford(), [observed(i) for i in (1, 2, 4, 5)])
    close(reading, EveryPair(want, other), 0.0)
    close(lever.read(state), reading, 0.0)
    with pytest.raises(OptionError, match="with the same fisher"):
        lever.update(sampled(0), state)  # not due


def test_every_may_forget_what_is_between() -> None:
    lever = every(2, welford())
    reading, state = folded(lever, [torch.tensor([float(i)]) for i in range(5)])
    assert torch.equal(reading, torch.tensor([2.0]))
    assert state.otherwise is None
    assert (state.step, state.every.updates) == (5, 3)


def test_every_under_vmap_takes_both_and_chooses() -> None:
    lever = every(2, welford(), otherwise=ema(0.5))
    members = [torch.tensor([float(i), -float(i)]) for i in range(5)]
    want, _ = folded(lever, members)

    def run(*xs: Any) -> Any:
        return folded(lever, list(xs))[0]

    got = torch.vmap(run)(*[x.unsqueeze(1) for x in members])
    close(trees.map(torch.flatten, got), want)


def test_every_merges() -> None:
    lever = every(2, welford(), otherwise=welford())
    _, a = folded(lever, [tree(i) for i in range(4)])
    _, b = folded(lever, [tree(i) for i in range(4, 8)])
    joined = merge(a, b)
    close(joined.every, merge(a.every, b.every), 0.0)
    assert joined.step == 4
    close(merge(a, empty_like(a)), a, 0.0)
    _, c = folded(every(3, welford(), otherwise=welford()), [tree(0)])
    with pytest.raises(OptionError, match="expected two states of the same period, got 2 and 3"):
        merge(a, c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, ema(0.5)), "expected n to be a positive integer, got 0"),
        ((2.0, ema(0.5)), r"expected n to be a positive integer, got 2\.0"),
        ((2, None), "expected a to be a transform, got NoneType"),
        ((2, ema(0.5), 0.5), "expected otherwise to be a transform, got float"),
    ],
)
def test_bad_levers_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(OptionError, match="states.every: " + message):
        every(*arguments)


def test_due_asks_for_a_state_of_every() -> None:
    with pytest.raises(OptionError, match=r"states.due: expected a state of every\(\), got int"):
        due(3)  # type: ignore[arg-type]
    assert isinstance(every(2, ema(0.5)).init(torch.ones(1)), EveryState)


@pytest.mark.parametrize(
    "transform", [ema(0.9), welford(), window(2)], ids=["ema", "welford", "window"]
)
def test_an_average_over_weight_zero_is_not_a_number(transform: Any) -> None:
    state = transform.init(torch.ones(2))
    for zero in (0.0, torch.tensor(0.0)):
        reading, after = transform.update(torch.ones(2), state, zero)
        assert bool(reading.isnan().all())
        assert bool(transform.read(after).isnan().all())
        assert torch.equal(transform.update(torch.ones(2), after, 2.0)[0], torch.ones(2))
    run = torch.compile(
        lambda x, state, w: transform.update(x, state, w)[0], fullgraph=True, backend="aot_eager"
    )
    assert bool(run(torch.ones(2), state, torch.tensor(0.0)).isnan().all())


@pytest.mark.parametrize(
    "transform", [ema(0.9), welford(), window(2)], ids=["ema", "welford", "window"]
)
def test_states_of_another_kind(transform: Any) -> None:
    for state in (None, (1, 2), every(2, ema(0.5)).init(torch.ones(2))):
        with pytest.raises(
            TreeMismatchError, match=r"update: expected a \w+State, got .*init\(like"
        ):
            transform.update(torch.ones(2), state)
        with pytest.raises(TreeMismatchError, match=r"read: expected a \w+State, got "):
            transform.read(state)


def test_a_state_of_another_size_or_period_is_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(OptionError, match=r"window.update: expected a state of 3 members, got one"):
        window(3).update(x, window(2).init(x))
    lever = every(5, ema(0.5), otherwise=ema(0.5)).init(x)
    with pytest.raises(OptionError, match=r"every.update: expected a state of the period 2, got"):
        every(2, ema(0.5), otherwise=ema(0.5)).update(x, lever)
