"""Counts: the quantile function against scipy's, draws at every rate, counts that are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fisherfn.core import random
from fisherfn.core.errors import DataError
from fisherfn.likelihoods import poisson
from fisherfn.likelihoods.poisson import quantile

TAILS = [2.0**-k for k in range(1, 54)]
UNIFORMS = [0.0, *TAILS, *(1 - u for u in TAILS), *np.linspace(0.003, 0.997, 101).tolist()]


@pytest.mark.parametrize("exponent", range(-12, 6))
def test_quantile_is_the_definition(exponent: int) -> None:
    u = torch.tensor(UNIFORMS, dtype=torch.float64)
    for rate in (10.0**exponent, 3.7 * 10.0**exponent):
        count = quantile(torch.full_like(u, rate), u).numpy()
        assert (count == np.floor(count)).all()
        assert (count >= 0).all()
        # Smallest count with P(Y <= count) > u, up to the accuracy of gammaincc.
        tiny = 1e-9
        assert (scipy.stats.poisson.cdf(count, rate) > u.numpy() - tiny).all()
        assert (scipy.stats.poisson.cdf(count - 1, rate) <= u.numpy() + tiny).all()


@pytest.mark.parametrize("rate", [1e7, 1e9, 1e12])
def test_quantile_at_high_rates(rate: float) -> None:
    # torch's gammaincc is wrong in the tails here; the counts stay next to the guess all the same.
    u = torch.tensor(UNIFORMS[1:], dtype=torch.float64)
    count, z = quantile(torch.full_like(u, rate), u), torch.special.ndtri(u)
    # The next term of the expansion, 8^3 / (72 sqrt(rate)), is below 1.
    assert ((count - (rate + rate**0.5 * z + (z * z - 1) / 6)).abs() <= 17).all()
    middle = z.abs() < 4.4
    count, u = count[middle].numpy(), u[middle].numpy()
    assert (scipy.stats.poisson.cdf(count, rate) > u - 1e-9).all()
    assert (scipy.stats.poisson.cdf(count - 1, rate) <= u + 1e-9).all()


def test_the_search_never_meets_its_bounds() -> None:
    # The guess is at most 12 too high and 2 too low: 16 counts on either side are enough.
    u = np.array(UNIFORMS[1:])
    z = scipy.stats.norm.ppf(u)
    for rate in 10.0 ** np.linspace(-12, 6, 49):
        guess = np.floor(rate + np.sqrt(rate) * z + (z * z - 1) / 6)
        off = scipy.stats.poisson.ppf(u, rate) - np.maximum(guess, 0)
        assert -12 <= off.min()
        assert off.max() <= 2


def test_quantile_at_the_ends() -> None:
    rate = torch.tensor([0.0, 1e-300, 1e17, torch.inf, torch.nan], dtype=torch.float64)
    got = quantile(rate, torch.full((5,), 0.5).double())
    assert got[:2].tolist() == [0.0, 0.0]
    assert_close(got[2], rate[2], rtol=1e-12, atol=0)
    assert torch.isnan(got[3:]).all()


@pytest.mark.parametrize("rate", [0.05, 1.0, 12.0, 300.0, 1e6])
def test_moments_of_draws(rate: float) -> None:
    n = 5000
    z = torch.full((n, 1), math.log(rate), dtype=torch.float64)
    draws = poisson().sample(z, random.split(random.key(0), n)).squeeze(-1)
    square = (draws - rate) ** 2
    assert (draws.mean() - rate).abs() < 5 * (rate / n) ** 0.5
    assert (square.mean() - rate).abs() < 5 * square.std() / n**0.5


def test_frequencies_of_draws() -> None:
    n, rate = 20_000, 2.5
    z = torch.full((n, 1), math.log(rate))
    draws = poisson().sample(z, random.split(random.key(0), n)).squeeze(-1).long()
    p = torch.from_numpy(scipy.stats.poisson.pmf(np.arange(12), rate))
    stderr = (p * (1 - p) / n).sqrt()
    assert ((torch.bincount(draws, minlength=12)[:12] / n - p).abs() < 5 * stderr + 1 / n).all()


def test_equal_keys_equal_counts(compiled: Callable[..., Callable[..., Any]]) -> None:
    z = 5 * random.normal(random.key(0), (4, 3, 2))
    keys = random.split(random.key(1), 4)
    want = poisson().sample(z, keys)
    assert want.dtype == torch.float32
    assert torch.equal(compiled(poisson().sample)(z, keys), want)
    each = torch.vmap(lambda z, key: poisson().sample(z.unsqueeze(0), key.unsqueeze(0)))(z, keys)
    assert torch.equal(each.squeeze(1), want)


@given(st.floats(-20, 20), st.integers(0, 50))
def test_definitions_at_any_rate(value: float, count: int) -> None:
    z = torch.full((1, 1), value, dtype=torch.float64)
    y = torch.full((1, 1), count)
    want = scipy.stats.poisson.logpmf(count, math.exp(value))
    assert_close(poisson().log_prob(z, y).item(), float(want), rtol=1e-9, atol=1e-9)
    assert_close(poisson().score(z, y).item(), count - math.exp(value))
    assert_close(poisson().root(z, 0).item() ** 2, math.exp(value))


@pytest.mark.parametrize(
    ("counts", "got"),
    [
        (torch.tensor([[0, -2]]), "-2"),
        (torch.tensor([[0.0, 1.5]]), "1.5"),
        (torch.tensor([[0.0, math.nan]]), "nan"),
        (torch.tensor([[0.0, math.inf]]), "inf"),
    ],
)
def test_counts_that_are_none(counts: Tensor, got: str) -> None:
    z = torch.zeros(1, 2)
    with pytest.raises(
        DataError,
        match=rf"test: expected whole numbers >= 0, got {got} at targets\[0, 1\]\. Counts",
    ):
        poisson().check_targets("test", z, counts)
    assert poisson().poison(z, counts)
    assert torch.isnan(poisson().score(z, counts)).tolist() == [[False, True]]
    assert torch.isnan(poisson().log_prob(z, counts)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float16])
def test_any_dtype_of_counts(dtype: torch.dtype) -> None:
    z, y = torch.zeros(1, 2), torch.tensor([[0, 1]]).to(dtype)
    poisson().check_targets("test", z, y)
    assert poisson().score(z, y).tolist() == [[-1.0, 0.0]]
