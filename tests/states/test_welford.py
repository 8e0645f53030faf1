"""Mean and spread: two passes over the data, exact merges, and errors over independent updates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from states.streams import STREAMS, count, tree
from states.test_ema import averaged as entries
from states.test_ema import close, folded

from fisherfn.core import random, trees
from fisherfn.core.errors import DataError, OptionError, TreeMismatchError
from fisherfn.core.merging import empty_like, merge
from fisherfn.curvature import Diagonal
from fisherfn.states import WelfordState, effective_updates, stderr, variance, welford
from fisherfn.states.blockwise import _PIECE, grow

WEIGHTS = st.lists(st.floats(0.1, 100), min_size=2, max_size=9)


def two_passes(members: list[Any], weights: list[float]) -> tuple[Any, Any]:
    """Mean and Σ w (x − mean)², by their definitions."""
    total = math.fsum(weights)
    columns = list(zip(*[entries(x) for x in members], strict=True))
    mean = [sum(w * x for w, x in zip(weights, xs, strict=True)) / total for xs in columns]
    m2 = [
        sum(w * (x - m) ** 2 for w, x in zip(weights, xs, strict=True))
        for xs, m in zip(columns, mean, strict=True)
    ]
    return mean, m2


@given(weights=WEIGHTS, offset=st.sampled_from([0.0, 1e3]))
@example(weights=[1.2141918054028362, 1.0], offset=1e3)  # whose reciprocal times itself is not 1
def test_it_is_the_two_pass_moments(weights: list[float], offset: float) -> None:
    members = [trees.map(lambda x: x + offset, tree(i)) for i in range(len(weights))]
    reading, state = folded(welford(), members, weights)
    mean, m2 = two_passes(members, weights)
    close(trees.leaves(reading), mean)
    for got, want in zip(trees.leaves(state.m2), m2, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12 * max(1.0, offset), atol=1e-12)
    assert state.mean is reading
    assert state.updates == len(weights)
    torch.testing.assert_close(state.count.item(), math.fsum(weights))
    torch.testing.assert_close(state.weight_sq.item(), math.fsum(w * w for w in weights))


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_merge_is_two_passes(stream: Any, cut: int) -> None:
    members, weights = [stream(i) for i in range(7)], [1.0, 3.0, 0.5, 2.0, 9.0, 4.0, 1.5]
    start = welford().init(members[0])
    states = []
    for part in (slice(None, cut), slice(cut, None)):
        state = start
        for x, w in zip(members[part], weights[part], strict=True):
            _, state = welford().update(x, state, w)
        states.append(state)
    mean, m2 = two_passes(members, weights)
    for joined in (merge(*states), merge(*reversed(states))):
        close(entries(joined.mean), mean)
        close(entries_of_spread(joined), m2)
        assert joined.updates == 7
        torch.testing.assert_close(joined.weight_sq.item(), sum(w * w for w in weights))


def entries_of_spread(state: Any) -> list[Any]:
    return trees.leaves(state.m2)


def test_merge_with_nothing_changes_no_bit() -> None:
    for stream in STREAMS.values():
        _, state = folded(welford(), [stream(1), stream(2)])
        for joined in (merge(state, empty_like(state)), merge(empty_like(state), state)):
            close(joined, state, 0.0)


def test_a_result_counts_with_its_units() -> None:
    members = [STREAMS["diagonal"](i) for i in range(4)]
    reading, state = folded(welford(), members)
    whole = members[0]
    for F in members[1:]:
        whole = merge(whole, F)
    close(reading.values, whole.values)
    torch.testing.assert_close(reading.count, whole.count)
    torch.testing.assert_close(state.count, whole.count)
    assert isinstance(state.m2, dict)  # a spread is no curvature


def test_variance_and_standard_error() -> None:
    x = random.normal(random.key(0), (12,), torch.float64)
    for weight in (1.0, 7.0):
        _, state = folded(welford(), list(x), [weight] * 12)
        torch.testing.assert_close(variance(state), x.var())
        torch.testing.assert_close(stderr(state), x.std() / math.sqrt(12))
        torch.testing.assert_close(effective_updates(state).item(), 12.0)


def test_reliability_weights_are_unbiased() -> None:
    weights = torch.tensor([1.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    x = random.normal(random.key(3), (4, 200_000), torch.float64)
    _, state = folded(welford(), list(x), list(weights))
    found, truth = variance(state), 1.0
    assert abs(found.mean() - truth) < 5 * found.std() / math.sqrt(found.numel())
    share = weights / weights.sum()
    want = (found * share.square().sum()).sqrt()
    torch.testing.assert_close(stderr(state), want)
    # the squared error of the weighted mean is what its standard error says
    error = state.mean.square()
    assert abs(error.mean() - share.square().sum()) < 5 * error.std() / math.sqrt(error.numel())


@pytest.mark.parametrize("weights", [[], [1.0], [0.0, 1.0, 0.0]])
def test_fewer_than_two_updates_have_no_spread(weights: list[float]) -> None:
    state = welford().init({"w": torch.zeros(2)})
    for w in weights:
        _, state = welford().update({"w": torch.ones(2)}, state, w)
    assert variance(state)["w"].isnan().all()
    assert stderr(state)["w"].isnan().all()
    assert welford().read(state)["w"].isnan().all() == (sum(weights) == 0)


def test_weight_zero_changes_nothing_but_the_number_of_updates() -> None:
    _, state = folded(welford(), [tree(0), tree(1)])
    _, after = welford().update(tree(2), state, 0)
    close(after._replace(updates=state.updates), state, 0.0)
    assert after.updates == 3


def test_dtype_is_the_users() -> None:
    x = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    for dtype, want in ((None, torch.float32), (torch.float64, torch.float64)):
        reading, state = folded(welford(dtype=dtype), [x, x])
        assert reading["w"].dtype == state.m2["w"].dtype == want
    with pytest.raises(OptionError, match=r"states.welford: expected dtype to be a floating-point"):
        welford(dtype=torch.int32)


def test_large_tensors_go_in_pieces() -> None:
    n = 5 * _PIECE + 17
    m2, mean, new = (random.normal(random.key(i), (n,), torch.float32) for i in range(3))
    c = torch.tensor(0.3)
    want = m2.double() + 0.3 * (new.double() - mean.double()).square()
    torch.testing.assert_close(grow(m2, mean, new, c), want.float())
    recorded = grow(m2.requires_grad_(), mean, new, c)
    torch.testing.assert_close(recorded, want.float())
    assert recorded.requires_grad


def test_absent_leaves_are_refused() -> None:
    state = welford().init({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(TreeMismatchError, match=r"welford.update: .* none at b"):
        welford().update({"a": torch.ones(1), "b": None}, state)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (-1.0, DataError, r"expected a finite weight >= 0, got -1\."),
        (float("nan"), DataError, "expected a finite weight >= 0, got nan"),
        (torch.tensor(float("inf")), DataError, "expected a finite weight >= 0, got inf"),
        (torch.ones(2), OptionError, r"a 0-d tensor, got torch.float32 of shape \(2,\)"),
        ("1", OptionError, "weight to be a number or a 0-d tensor, got str"),
        (True, OptionError, "weight to be a number or a 0-d tensor, got bool"),
    ],
)
def test_bad_weights_are_refused(weight: Any, error: type[Exception], message: str) -> None:
    state = welford().init({"a": torch.ones(1)})
    with pytest.raises(error, match="welford.update: .*" + message):
        welford().update({"a": torch.ones(1)}, state, weight)


def test_bad_weights_poison_what_is_traced() -> None:
    def f(w: torch.Tensor) -> Any:
        return welford().update(torch.ones(1), welford().init(torch.ones(1)), w)[0]

    good = torch.vmap(f)(torch.tensor([1.0, -1.0, float("nan")]))
    assert good.flatten().isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("read", [variance, stderr])
def test_other_states_are_refused(read: Any) -> None:
    with pytest.raises(OptionError, match=r"expected a state of welford\(\), got dict"):
        read({"m2": 1})


def test_mean_of_a_constant_is_exact() -> None:
    F = Diagonal(tree(0), count(5))
    reading, state = folded(welford(), [F] * 30)
    close(reading.values, F.values, 0.0)
    assert all(not m2.any() for m2 in trees.leaves(state.m2))
    assert isinstance(state, WelfordState)
