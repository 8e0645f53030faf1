"""Averages of results that are more than their entries: Kronecker factors, bases, rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from states.test_ema import close, folded
from torch import Tensor

import fisherfn as ff
from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.states import accumulate, ema, variance, welford, window

LIKELIHOOD = ff.likelihoods.categorical()


def network() -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
        ).double()
    return ff.functional(net)


def batch(seed: int, n: int, lengths: bool = False) -> ff.Batch:
    shape = (n, 4, 4) if lengths else (n, 4)
    x = ff.random.normal(ff.random.key(seed), shape, torch.float64)
    mask = torch.arange(4) <= (torch.arange(n) + seed).unsqueeze(1) % 4 if lengths else None
    ids = torch.arange(n) + 100 * seed
    return ff.Batch(x, targets=torch.zeros(x.shape[:-1], dtype=torch.int64), mask=mask, ids=ids)


def factors(seed: int, n: int = 5, lengths: bool = False) -> Any:
    model, params, buffers = network()
    fim = ff.kfac(model, LIKELIHOOD, fisher="empirical")
    return fim(params, buffers, batch(seed, n, lengths))


def test_factors_are_averaged_not_their_products() -> None:
    members = [factors(i) for i in range(3)]
    reading, _ = folded(ema(0.5), members)
    for name in reading.inputs:
        for side in ("inputs", "outputs"):
            parts = [getattr(F, side)[name] for F in members]
            want = (0.25 * parts[0] + 0.5 * parts[1] + parts[2]) / 1.75
            torch.testing.assert_close(getattr(reading, side)[name], want)
    assert type(reading) is type(members[0])
    model_answer = reading.solve(network()[1], damping=0.1)
    assert all(t.isfinite().all() for t in trees.leaves(model_answer))


def test_a_constant_stays_in_every_field_that_is_no_count() -> None:
    F = factors(0)
    for transform in (ema(0.9), welford(), window(3)):
        reading, _ = folded(transform, [F] * 5)
        close(reading.inputs, F.inputs)
        close(reading.outputs, F.outputs)
        close(reading.eigenvalues(), F.eigenvalues())


def test_welford_of_factors_is_the_factors_of_all_data() -> None:
    # rows differ from batch to batch, so the mean over rows is not the mean of means
    model, params, buffers = network()
    fim = ff.kfac(model, LIKELIHOOD, fisher="empirical")
    data = [batch(i, n, lengths=True) for i, n in enumerate((3, 6, 2))]
    plain, _ = accumulate(fim, params, buffers, data)
    mean, state = accumulate(fim, params, buffers, data, transform=welford())
    for name in ("inputs", "outputs", "rows", "rest"):
        close(getattr(mean, name), getattr(plain, name), 1e-10)
    torch.testing.assert_close(mean.count, plain.count, check_dtype=False)
    assert set(variance(state.result)) == {"inputs", "outputs", "rest"}


def test_scales_in_one_basis_are_averaged_and_other_bases_refused() -> None:
    model, params, buffers = network()
    first = ff.ekfac(model, LIKELIHOOD, fisher="empirical")(params, buffers, batch(0, 5))
    given = ff.ekfac(model, LIKELIHOOD, fisher="empirical", basis=first)
    members = [given(params, buffers, batch(i, 5)) for i in range(3)]
    reading, _ = folded(ema(0.5), members)
    for name in reading.scales:
        parts = [F.scales[name] for F in members]
        want = (0.25 * parts[0] + 0.5 * parts[1] + parts[2]) / 1.75
        torch.testing.assert_close(reading.scales[name], want)
        assert torch.equal(reading.output_basis[name], first.output_basis[name])
    recent, _ = folded(window(2), members)
    for name in recent.scales:
        want = (members[1].scales[name] + members[2].scales[name]) / 2.0
        torch.testing.assert_close(recent.scales[name], want)
    for transform in (ema(0.5), welford(), window(2)):
        state = folded(transform, members)[1]
        joined = ff.merge(ff.empty_like(state), state)
        torch.testing.assert_close(transform.read(joined).scales, transform.read(state).scales)
    own = ff.ekfac(model, LIKELIHOOD, fisher="empirical")
    state = ema(0.5).init(first)
    with pytest.raises(OptionError, match="in the same bases"):
        ema(0.5).update(own(params, buffers, batch(3, 5)), state)


def test_rows_of_a_low_rank_result_are_kept_with_their_shares() -> None:
    model, params, buffers = network()
    fim = ff.low_rank(model, LIKELIHOOD, fisher="empirical")
    members = [fim(params, buffers, batch(i, 3)) for i in range(3)]
    reading, _ = folded(ema(0.5), members)
    dense = [F.to_dense() for F in members]
    want = (0.25 * dense[0] + 0.5 * dense[1] + dense[2]) / 1.75
    torch.testing.assert_close(reading.to_dense(), want)


def test_group_sums_are_averaged() -> None:
    model, params, buffers = network()
    fim = ff.grouped(model, LIKELIHOOD, ff.groups.infer(params), fisher="empirical")
    members: list[Any] = [fim(params, buffers, batch(i, 4)) for i in range(3)]
    reading, state = folded(welford(), members)
    whole = ff.merge(ff.merge(members[0], members[1]), members[2])
    close(reading.values, whole.values)
    columns: dict[str, Tensor] = {
        name: torch.stack([F.values[name] for F in members]) for name in whole.values
    }
    close(variance(state), {name: x.var(0) for name, x in columns.items()})


@pytest.mark.parametrize("counted", [True, False])
def test_standard_errors_of_estimates_are_those_of_an_average(counted: bool) -> None:
    def estimate(value: float, error: float, n: float) -> Any:
        parts = [torch.tensor(x, dtype=torch.float64) for x in (value, error, n)]
        return ff.linalg.Estimate(parts[0], parts[1], parts[2] if counted else None)

    members = [estimate(1.0, 0.3, 4.0), estimate(4.0, 0.4, 4.0)]
    reading, _ = folded(ema(0.5), members)  # shares 1/3 and 2/3
    torch.testing.assert_close(reading.value.item(), 3.0)
    torch.testing.assert_close(reading.stderr.item(), (0.1**2 + (0.8 / 3) ** 2) ** 0.5)
    assert (reading.count is not None) == counted
    mean, state = folded(welford(), members)
    torch.testing.assert_close(mean.value.item(), 2.5)
    torch.testing.assert_close(variance(state).item(), 4.5)
    assert state.count == (8 if counted else 2)
    other = ff.linalg.Estimate(*[members[0].value] * 3, fisher="mc")
    with pytest.raises(OptionError, match="states: expected two estimates with the same fisher"):
        ema(0.5).update(other, ema(0.5).init(members[0]))


def drawn(values: list[float], n: float) -> Any:
    draws = torch.tensor(values, dtype=torch.float64)
    error = draws.std() / len(values) ** 0.5
    return ff.linalg.Estimate(draws.mean(), error, torch.tensor(n).double(), draws=draws)


def test_estimates_from_the_same_random_vectors_are_averaged_draw_by_draw() -> None:
    a, b = drawn([1.0, 2.0, 6.0], 4.0), drawn([2.0, 4.0, 12.0], 12.0)  # wholly dependent
    together = ff.merge(a, b)
    torch.testing.assert_close(together.stderr, 0.25 * a.stderr + 0.75 * b.stderr)
    torch.testing.assert_close(together.draws, 0.25 * a.draws + 0.75 * b.draws)
    close(ff.merge(a, ff.empty_like(b)), a, 0.0)
    close(ff.merge(ff.empty_like(b), a), a, 0.0)
    reading, _ = folded(ema(0.5), [a, b])
    torch.testing.assert_close(reading.stderr, a.stderr / 3 + 2 * b.stderr / 3)


def test_errors_of_different_numbers_of_draws_add_up_at_most() -> None:
    a, b = drawn([1.0, 2.0, 6.0], 4.0), drawn([2.0, 4.0], 4.0)
    together = ff.merge(a, b)
    torch.testing.assert_close(together.stderr, 0.5 * a.stderr + 0.5 * b.stderr)
    assert together.draws is None


def test_folded_traces_know_their_error() -> None:
    model, params, buffers = network()
    fim = ff.trace(model, LIKELIHOOD, fisher="empirical", method="hutchinson", num_matvecs=6)
    batches, key = [batch(i, 1 + i % 2) for i in range(12)], ff.random.key(0)
    joined = ff.Batch(
        torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])
    )
    found, _ = accumulate(fim, params, buffers, batches, key=key)
    # all batches see the same random vectors, so this is what one batch of all of them gives
    close(found, fim(params, buffers, joined, key=key), 1e-12)


@pytest.mark.parametrize("method", ["hutchpp", "xtrace"])
def test_errors_of_folded_sketches_are_no_smaller_than_their_spread(method: str) -> None:
    model, params, buffers = network()
    fim = ff.trace(model, LIKELIHOOD, fisher="empirical", method=method, num_matvecs=8)
    batches = [dataclasses.replace(batch(0, 6), ids=torch.arange(6) + 6 * i) for i in range(9)]
    one = fim(params, buffers, batches[0], key=ff.random.key(3))
    found, _ = accumulate(fim, params, buffers, batches, key=ff.random.key(3))
    torch.testing.assert_close(found.stderr, one.stderr)  # the same data nine times: no news
    assert one.stderr > 0


def test_a_trace_of_one_draw_can_be_folded() -> None:
    model, params, buffers = network()
    fim = ff.trace(model, LIKELIHOOD, fisher="mc")
    batches, key = [batch(i, 3) for i in range(4)], ff.random.key(0)
    for transform in (None, ema(0.5), welford(), window(2)):
        found, state = accumulate(fim, params, buffers, batches, key=key, transform=transform)
        assert found.value > 0
        assert found.stderr == float("inf")  # nothing is known of it
        assert state.skipped == 0
