"""Confidence intervals: scipy's quantiles, simulated coverage, and clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from states.streams import tree
from states.test_ema import close, folded

from fisherfn.core import random
from fisherfn.core.errors import DataError, FisherError, OptionError, ShapeError
from fisherfn.curvature import Diagonal
from fisherfn.states import interval, welford, window
from fisherfn.states.quantiles import normal_quantile, t_quantile

STREAMS = 5000
KEY = random.key(5)


def coverage(found: Any, truth: float) -> float:
    return float(((found.lower <= truth) & (truth <= found.upper)).double().mean())


def folded_state(x: torch.Tensor) -> Any:
    return folded(welford(), list(x))[1]


def test_t_covers_at_20_gaussian_observations() -> None:
    x = 3.0 + random.normal(random.key(1), (20, STREAMS), torch.float64)
    state = folded_state(x)
    found = interval(state, method="t")
    assert 0.93 <= coverage(found, 3.0) <= 0.97
    # the normal quantile is too short for so few
    assert coverage(interval(state, method="normal"), 3.0) < coverage(found, 3.0)


def test_normal_covers_at_200_observations_of_any_distribution() -> None:
    x = -random.uniform(random.key(2), (200, STREAMS), torch.float64).log()  # mean 1, skewed
    assert 0.93 <= coverage(interval(folded_state(x), method="normal"), 1.0) <= 0.97


def test_bootstrap_covers_at_200_observations_of_any_distribution() -> None:
    x = -random.uniform(random.key(3), (200, STREAMS), torch.float64).log()
    assert 0.93 <= coverage(interval(x, method="bootstrap", key=KEY, replicates=400), 1.0) <= 0.97


def test_t_with_weights_covers() -> None:
    weights = (1.0 + torch.arange(30.0, dtype=torch.float64) % 4).tolist()
    x = random.normal(random.key(4), (30, STREAMS), torch.float64)
    _, state = folded(welford(), list(x), weights)
    assert 0.93 <= coverage(interval(state), 0.0) <= 0.97


def test_tokens_of_a_sequence_are_no_independent_observations() -> None:
    # 20 sequences of 50 tokens that are alike within a sequence
    alike = random.normal(random.key(6), (20, 1, STREAMS), torch.float64)
    tokens = alike + 0.1 * random.normal(random.key(7), (20, 50, STREAMS), torch.float64)
    assert coverage(interval(tokens.reshape(1000, STREAMS)), 0.0) < 0.3
    assert 0.93 <= coverage(interval(tokens.mean(1)), 0.0) <= 0.97


@given(p=st.floats(0.001, 0.999), nu=st.floats(0.4, 1e6))
def test_quantiles_are_those_of_scipy(p: float, nu: float) -> None:
    freedom = torch.tensor(nu, dtype=torch.float64)
    want = torch.tensor(float(scipy.stats.t.ppf(p, nu)), dtype=torch.float64)
    torch.testing.assert_close(t_quantile(p, freedom), want, rtol=1e-7, atol=1e-9)
    assert abs(normal_quantile(p) - scipy.stats.norm.ppf(p)) < 1e-9


def test_quantile_without_freedom_is_unknown() -> None:
    assert t_quantile(0.9, torch.tensor([0.0, -1.0]).double()).isnan().all()


@pytest.mark.parametrize("method", ["normal", "t"])
def test_samples_a_window_and_a_state_agree(method: str) -> None:
    x = {"w": random.normal(random.key(8), (9, 2, 3), torch.float64)}
    members = [{"w": row} for row in x["w"]]
    of_samples = interval(x, method=method, level=0.9)
    _, recent = folded(window(9), members)
    _, longer = folded(window(12), members)  # three places are not filled
    _, moments = folded(welford(), members)
    for state in (recent, longer, moments):
        close(interval(state, method=method, level=0.9), of_samples)
    p = scipy.stats.t(8).ppf(0.95) if method == "t" else scipy.stats.norm.ppf(0.95)
    mean, error = x["w"].mean(0), x["w"].std(0) / 3
    close(of_samples.lower["w"], mean - p * error)
    close(of_samples.upper["w"], mean + p * error)


def test_bootstrap_of_a_window_is_that_of_its_members() -> None:
    x = random.normal(random.key(9), (9, 2), torch.float64)
    whole = interval(x, method="bootstrap", key=KEY)
    for size in (9, 14):
        _, state = folded(window(size), list(x))
        found = interval(state, method="bootstrap", key=KEY)
        if size == 9:
            close(found, whole)
        width = (found.upper - found.lower) / (whole.upper - whole.lower)
        assert ((0.85 < width) & (width < 1.15)).all()
    weighted = interval(
        folded(window(9), list(x), [1.0] + [1e-9] * 8)[1], method="bootstrap", key=KEY
    )
    assert torch.isfinite(weighted.lower).all()


@pytest.mark.parametrize("where", [0, 1, 3])
def test_bootstrap_leaves_out_members_of_no_weight(where: int) -> None:
    members, weights = [tree(i) for i in range(4)], [1.0, 2.0, 0.5, 1.5]
    plain, other = window(5), window(5)
    kept, state = plain.init(members[0]), other.init(members[0])
    for i, (x, w) in enumerate(zip(members, weights, strict=True)):
        if i == where:
            _, state = other.update(tree(99, scale=1e3), state, weight=0.0)
        _, kept = plain.update(x, kept, weight=w)
        _, state = other.update(x, state, weight=w)
    want = interval(kept, method="bootstrap", key=KEY)
    found = interval(state, method="bootstrap", key=KEY)
    close(found, want, 1e-14)


def test_bootstrap_in_pieces_is_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    from fisherfn.states import interval as function

    x = random.normal(random.key(10), (7, 50), torch.float64)
    want = interval(x, method="bootstrap", key=KEY, replicates=100)
    monkeypatch.setitem(function.__globals__, "_ROOM", 1000)
    close(interval(x, method="bootstrap", key=KEY, replicates=100), want)


def test_intervals_of_results_are_about_their_entries() -> None:
    members = [
        Diagonal({"w": random.normal(random.key(i), (3,), torch.float64)}, torch.tensor(4.0))
        for i in range(5)
    ]
    _, moments = folded(welford(), members)
    _, recent = folded(window(5), members, [4.0] * 5)
    found = interval(moments)
    assert list(found.lower) == ["w"]
    close(interval(recent), found)


@pytest.mark.parametrize(
    ("observations", "options", "error", "message"),
    [
        (torch.ones(3), {"level": 1.0}, OptionError, r"expected level in \(0, 1\), got 1\.0"),
        (torch.ones(3), {"level": "x"}, OptionError, r"expected level in \(0, 1\), got 'x'"),
        (torch.ones(3), {"method": "z"}, OptionError, "method to be one of .* got 'z'"),
        (
            torch.ones(3),
            {"method": "bootstrap"},
            OptionError,
            "a key for method=.*, got None",
        ),
        (
            torch.ones(3),
            {"method": "bootstrap", "key": KEY, "replicates": 1},
            OptionError,
            "replicates to be an integer > 1, got 1",
        ),
        (torch.ones(1), {}, DataError, "at least 2 observations, got 1"),
        (window(3).init(torch.ones(2)), {}, DataError, "at least 2 observations, got 0"),
        (torch.tensor(1.0), {}, ShapeError, r"got torch.float32 of shape \(\)"),
        ({"a": 3}, {}, ShapeError, r"tensors \[n, ...\] .* got int at a"),
        ({}, {}, ShapeError, "at least one tensor, got none"),
        (
            {"a": torch.ones(3), "b": torch.ones(2)},
            {},
            ShapeError,
            "expected 3 observations in every leaf, got 2 at b",
        ),
        (
            welford().init(torch.ones(2)),
            {"method": "bootstrap", "key": KEY},
            OptionError,
            "observations to resample .* which has forgotten them",
        ),
    ],
)
def test_bad_input_is_refused(
    observations: Any, options: Any, error: type[FisherError], message: str
) -> None:
    with pytest.raises(error, match="states.interval: .*" + message):
        interval(observations, **options)
