"""The scale: number or tensor, what it multiplies, what it may be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fisherfn.core import random
from fisherfn.core.errors import DataError, OptionError, ShapeError
from fisherfn.likelihoods import gaussian


def test_half_the_squared_error_over_the_variance() -> None:
    z = random.normal(random.key(0), (3, 2), torch.float64)
    y = random.normal(random.key(1), (3, 2), torch.float64)
    got = gaussian(0.5).log_prob(z, y)
    want = -0.5 * ((y - z) ** 2).sum(-1) / 0.25 - 2 * math.log(0.5) - math.log(2 * math.pi)
    assert_close(got, want)


def test_fisher_goes_with_the_inverse_variance() -> None:
    z = torch.zeros(1, 2)
    assert gaussian(0.1).fisher_mv(z, torch.ones(1, 2)).allclose(torch.full((1, 2), 100.0))
    scale = torch.tensor([0.5, 4.0])
    assert gaussian(scale).fisher_mv(z, torch.ones(1, 2)).tolist() == [[4.0, 0.0625]]
    assert gaussian(2).root(z, 1).tolist() == [[0.0, 0.5]]


def test_a_tensor_of_equal_scales_is_a_number() -> None:
    z = random.normal(random.key(0), (2, 3, 4))
    y, keys = z.flip(0), random.split(random.key(1), 2)
    for scale in (torch.tensor(0.3), torch.full((4,), 0.3), torch.full((1,), 0.3).double()):
        assert_close(gaussian(scale).log_prob(z, y), gaussian(0.3).log_prob(z, y))
        assert_close(gaussian(scale).sample(z, keys), gaussian(0.3).sample(z, keys))


def test_derivative_with_respect_to_the_scale() -> None:
    z, y = torch.zeros(1, 3).double(), torch.tensor([[1.0, 2.0, -1.0]]).double()

    def log_prob(scale: torch.Tensor) -> torch.Tensor:
        return gaussian(scale).log_prob(z, y).sum()

    scale = torch.tensor([0.5, 1.0, 2.0]).double()
    want = y[0] ** 2 / scale**3 - 1 / scale
    assert_close(torch.func.grad(log_prob)(scale), want)
    stack = torch.stack([scale, 2 * scale])
    assert_close(torch.vmap(log_prob)(stack), torch.stack([log_prob(s) for s in stack]))


def test_moments_of_draws() -> None:
    n, scale = 20_000, torch.tensor([0.1, 3.0])
    mean = torch.tensor([1.0, -2.0])
    draws = gaussian(scale).sample(mean.expand(n, 2), random.split(random.key(0), n))
    assert ((draws.mean(0) - mean).abs() < 5 * scale / n**0.5).all()
    assert ((draws.var(0) - scale**2).abs() < 5 * scale**2 * (2 / n) ** 0.5).all()


def test_equality() -> None:
    scale = torch.tensor([1.0, 2.0])
    assert gaussian(1.0) == gaussian(1)
    assert hash(gaussian(1.0)) == hash(gaussian(1))
    assert gaussian(scale) == gaussian(scale)
    assert gaussian(scale) != gaussian(scale.clone())
    assert gaussian(scale) != gaussian(1.0)
    assert gaussian(1.0) != gaussian(1.0, event_ndim=2)


@pytest.mark.parametrize(
    "scale",
    [
        *(0.0, -1.0, math.nan, math.inf, True, None, [1.0]),
        *(torch.tensor([1.0, 0.0]), torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(1)),
    ],
    ids=repr,
)
def test_scale_that_is_none(scale: Any) -> None:
    with pytest.raises(
        OptionError, match=r"gaussian: expected a positive finite number or .* at scale\. It is the"
    ):
        gaussian(scale)


def test_scale_that_does_not_broadcast_to_the_event() -> None:
    z = torch.zeros(3, 2)
    match = r"gaussian.score: expected a scale that broadcasts to one event, shape \(2,\), got "
    with pytest.raises(ShapeError, match=match + r"\(3,\) at scale"):
        gaussian(torch.ones(3)).score(z, z)
    with pytest.raises(ShapeError, match=match + r"\(3, 2\) at scale"):
        gaussian(torch.ones(3, 2)).score(z, z)


def test_missing_targets_are_named() -> None:
    z = torch.zeros(2, 2)
    for value, got in ((math.nan, "nan"), (-math.inf, "-inf")):
        y = torch.tensor([[0.0, 1.0], [2.0, value]])
        with pytest.raises(
            DataError, match=rf"test: expected finite targets, got {got} at targets\[1, 1\]\. Leave"
        ):
            gaussian(1.0).check_targets("test", z, y)
        gaussian(1.0).check_targets("test", z, y, torch.tensor([True, False]))
        assert torch.isnan(gaussian(1.0).score(z, y)[1, 1])


def test_integer_targets_are_numbers() -> None:
    z = torch.zeros(1, 2)
    gaussian(1.0).check_targets("test", z, torch.tensor([[1, 2]]))
    assert gaussian(1.0).score(z, torch.tensor([[1, 2]])).tolist() == [[1.0, 2.0]]
