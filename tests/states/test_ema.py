"""Exponential averages: their definition as a loop, constants to the last bit, clocks, meaning."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states.streams import STREAMS, count, tree
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import FisherError, OptionError, ShapeError, TreeMismatchError
from fisherfn.core.merging import empty_like, merge
from fisherfn.curvature import Dense, Diagonal, Layout
from fisherfn.states import EmaState, ema, welford


def folded(transform: Any, members: list[Any], weights: list[Any] | None = None) -> Any:
    state, reading = transform.init(members[0]), None
    for i, x in enumerate(members):
        reading, state = transform.update(x, state, None if weights is None else weights[i])
    return reading, state


def close(a: Any, b: Any, tol: float = 1e-12, equal_nan: bool = False) -> None:
    assert trees.structure(a) == trees.structure(b)
    for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol, equal_nan=equal_nan)


@given(
    decay=st.floats(0, 0.999),
    weights=st.lists(st.floats(0.01, 50), min_size=1, max_size=8),
    weighted=st.booleans(),
)
def test_it_is_the_debiased_zero_initialised_average(
    decay: float, weights: list[float], weighted: bool
) -> None:
    members = [tree(i) for i in range(len(weights))]
    reading, _ = folded(ema(decay), members, weights if weighted else None)
    value, bias = trees.zeros_like(members[0]), 0.0
    for x, w in zip(members, weights, strict=True):
        w = w if weighted else 1.0
        value = trees.map(lambda v, x, w=w: decay * v + (1 - decay) * w * x, value, x)
        bias = decay * bias + (1 - decay) * w
    close(reading, trees.scale(value, 1 / bias), 1e-10)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
def test_a_constant_is_that_constant_at_every_step(stream: Any) -> None:
    average, x = ema(0.9), stream(3)
    state = average.init(x)
    for step in range(60):
        reading, state = average.update(x, state)
        for got, want in zip(averaged(reading), averaged(x), strict=True):
            assert torch.equal(got, want)
        if step == 0:
            assert trees.structure(reading) == trees.structure(x)
            assert all(
                torch.equal(a, b)
                for a, b in zip(trees.leaves(reading), trees.leaves(x), strict=True)
            )
        close(average.read(state), reading, 0.0)


def test_float32_and_half_precision_constants_stay() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = {"w": torch.tensor([0.1, 1e-7, 3.0]).to(dtype)}
        average = ema(0.97)
        state = average.init(x)
        for _ in range(300):
            reading, state = average.update(x, state)
            assert reading["w"].dtype == torch.float32
            assert torch.equal(reading["w"], x["w"].float())


def test_absent_leaves_have_clocks_of_their_own() -> None:
    average = ema(0.5)
    x = {"a": torch.tensor([1.0]), "b": torch.tensor([10.0])}
    state = average.init(x)
    reading, state = average.update({"a": torch.tensor([1.0]), "b": None}, state)
    assert reading["a"].item() == 1
    assert reading["b"].isnan().all()  # never there, so unknown, not zero
    assert average.read(state)["b"].isnan().all()
    reading, state = average.update({"b": torch.tensor([10.0])}, state)
    assert (reading["a"].item(), reading["b"].item()) == (1, 10)
    reading, state = average.update({"b": torch.tensor([4.0]), "a": torch.tensor([4.0])}, state)
    # each leaf has been there twice, whatever happened to the other one
    assert torch.equal(state.updates, torch.tensor([2, 2]))
    torch.testing.assert_close(reading["a"], torch.tensor([(0.5 * 1 + 4) / 1.5]))
    torch.testing.assert_close(reading["b"], torch.tensor([(0.5 * 10 + 4) / 1.5]))


def test_absent_results_have_clocks_of_their_own() -> None:
    average = ema(0.5)
    x = {"mc": Diagonal(tree(0), count(0)), "emp": Diagonal(tree(1), count(1))}
    _, state = average.update(x, average.init(x))
    reading, state = average.update({"mc": x["mc"], "emp": None}, state)
    close(reading["emp"], x["emp"], 0.0)
    assert state.updates.tolist() == [2, 1]


def test_the_count_of_an_average_is_what_it_is_worth() -> None:
    # independent averages of N_i units with shares a_i have the variance Σ a_i² σ²/N_i = σ²/N
    decay, counts = 0.8, [2.0, 5.0, 3.0]
    members = [Diagonal(tree(i), torch.tensor(n)) for i, n in enumerate(counts)]
    reading, _ = folded(ema(decay), members)
    shares = torch.tensor([decay**2, decay, 1.0], dtype=torch.float64)
    shares = shares / shares.sum()
    worth = 1 / (shares.square() / torch.tensor(counts)).sum()
    torch.testing.assert_close(reading.count, worth)
    # with the numbers of units as weights and hardly any decay, all units count
    reading, _ = folded(ema(1 - 1e-12), members, counts)
    torch.testing.assert_close(reading.count, torch.tensor(10.0, dtype=torch.float64))


def test_standard_errors_are_those_of_independent_estimates() -> None:
    make = STREAMS["diagonal_stderr"]
    reading, _ = folded(ema(0.5), [make(0), make(1)])
    for name, error in reading.stderr.items():
        want = torch.hypot(make(0).stderr[name] / 3, 2 * make(1).stderr[name] / 3)
        torch.testing.assert_close(error, want)
    exact = Diagonal(tree(0), count(0), fisher="mc")
    reading, _ = folded(ema(0.5), [exact, make(1)])
    assert reading.stderr is None


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
def test_shards_of_a_stream_merge(stream: Any) -> None:
    left, right = [stream(i) for i in (1, 2, 3)], [stream(i) for i in (11, 12, 13)]
    weights = [[1.0, 2.0, 4.0], [3.0, 0.5, 1.0]]
    _, a = folded(ema(0.9), left, weights[0])
    _, b = folded(ema(0.9), right, weights[1])
    joined = merge(a, b)
    # the definition: at every step the weighted mean of both sides goes in
    plain, together = [], []
    for x, y, p, q in zip(left, right, *weights, strict=True):
        flat = [(p * s + q * t) / (p + q) for s, t in zip(averaged(x), averaged(y), strict=True)]
        plain.append(flat)
        together.append(p + q)
    reading, _ = folded(ema(0.9), plain, together)
    close(averaged(joined.mean), reading)
    assert torch.equal(merge(a, empty_like(a)).weight, a.weight)
    close(merge(empty_like(a), a), a, 0.0)
    close(merge(a, empty_like(a)), a, 0.0)


def averaged(x: Any) -> list[Tensor]:
    """Entries that are averaged."""
    if hasattr(x, "__fisher_tensors__"):
        return trees.leaves(x.__fisher_tensors__())
    if isinstance(x, dict):
        return [t for v in x.values() for t in averaged(v)]
    if isinstance(x, tuple):
        return [t for v in x for t in averaged(v)]
    return [] if x is None else [x]


def test_nothing_is_changed_and_dtype_is_chosen() -> None:
    x = {"w": torch.ones(2)}
    average = ema(0.9, dtype=torch.float64)
    state = average.init(x)
    kept = [t.clone() for t in trees.leaves((x, state))]
    reading, _ = average.update(x, state)
    assert reading["w"].dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(kept, trees.leaves((x, state)), strict=True))
    F = Diagonal({"w": torch.ones(2)}, torch.tensor(3.0))
    reading, _ = average.update(F, average.init(F))
    assert reading.values["w"].dtype == torch.float64


def test_before_the_first_update_nothing_is_known() -> None:
    average = ema(0.9)
    assert average.read(average.init({"w": torch.ones(2)}))["w"].isnan().all()
    F = Diagonal({"w": torch.ones(2)}, torch.tensor(3.0))
    assert average.read(average.init(F)).values["w"].isnan().all()


def test_containers_are_kept_and_matched_by_key() -> None:
    class Pair(NamedTuple):
        x: Any
        y: Any

    like = OrderedDict(b=Pair(torch.ones(1), [torch.zeros(2), None]), a=torch.ones(()))
    average = ema(0.9)
    new = OrderedDict(a=torch.zeros(()), b=Pair(torch.ones(1), [torch.zeros(2), None]))
    reading, _ = average.update(new, average.init(like))
    assert trees.structure(reading) == trees.structure(like)
    assert reading["a"] == 0


def test_keys_with_separators_are_no_paths() -> None:
    like = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    new = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1)}
    reading, _ = ema(0.9).update(new, ema(0.9).init(like))
    assert (reading["a/b"], reading["a"]["b"]) == (1, 0)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"a": torch.ones(2), "c": torch.ones(1)}, "that the state began with, got one at c"),
        ({"a": torch.ones(3)}, r"got shape \(3,\) where the state has \(2,\) at a"),
        (
            {"a": Diagonal({"w": torch.ones(2)}, torch.tensor(1.0))},
            "got Diagonal where the state has Tensor at a",
        ),
    ],
)
def test_other_members_are_refused(new: Any, message: str) -> None:
    average = ema(0.9)
    state = average.init({"a": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(TreeMismatchError, match="ema.update: expected .*" + message):
        average.update(new, state)


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        (Diagonal(tree(0), count(0), fisher="mc"), OptionError, "with the same fisher"),
        (Diagonal(tree(0), count(0), unit="position"), OptionError, "with the same unit"),
        (Diagonal({"w": tree(0)["0.bias"]}, count(0)), TreeMismatchError, "the second values"),
        (
            Dense(torch.eye(8).double(), count(0), Layout.of(tree(0))),
            TreeMismatchError,
            "got Dense where the state has Diagonal",
        ),
    ],
)
def test_results_of_another_kind_are_refused(
    new: Any, error: type[FisherError], message: str
) -> None:
    average = ema(0.9)
    F = Diagonal(tree(0), count(0))
    _, state = average.update(F, average.init(F))
    with pytest.raises(error, match=message):
        average.update(new, state)
    if isinstance(new, Diagonal):
        _, other = average.update(new, average.init(new))
        with pytest.raises(error, match=message):
            merge(state, other)


@pytest.mark.parametrize("decay", [1.0, -0.1, 2, "x", None, True, float("nan")])
def test_bad_decays_are_refused(decay: Any) -> None:
    with pytest.raises(OptionError, match=r"states.ema: expected decay in \[0, 1\), got"):
        ema(decay)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({}, "at least one tensor or result, got none"),
        ({"a": 1.0}, "and results, got float at a"),
        ({"a": torch.ones(1, dtype=torch.int64)}, "and results, got torch.int64 at a"),
    ],
)
def test_what_cannot_be_averaged_is_refused(like: Any, message: str) -> None:
    for transform in (ema(0.9), welford()):
        with pytest.raises(ShapeError, match=message):
            transform.init(like)


def test_states_are_tuples_of_tensors() -> None:
    state = ema(0.9).init({"w": torch.ones(2)})
    assert isinstance(state, EmaState)
    assert all(isinstance(t, Tensor) for t in trees.leaves(state))
