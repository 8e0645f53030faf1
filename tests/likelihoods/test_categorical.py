"""The square root at extreme logits, the class axis, targets that are no classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fisherfn.core import random
from fisherfn.core.errors import DataError, OptionError, ShapeError
from fisherfn.likelihoods import categorical

logits = st.lists(
    st.one_of(st.floats(-30, 30), st.floats(-1e4, 1e4), st.sampled_from([0.0, -1e30, 700.0])),
    min_size=2,
    max_size=9,
).map(lambda row: torch.tensor([row], dtype=torch.float64))
temperatures = st.sampled_from([1.0, 0.5, 3.0])


def dense_root(z: Tensor, temperature: float = 1.0) -> Tensor:
    """B `[N, C, C - 1]`."""
    likelihood = categorical(temperature)
    index = torch.arange(likelihood.columns(z))
    return torch.vmap(likelihood.root, in_dims=(None, 0), out_dims=-1)(z, index)


def dense_fisher(z: Tensor, temperature: float = 1.0) -> Tensor:
    """(diag(p) - p p^T) / T^2, with p from the definition."""
    p = torch.softmax(z / temperature, -1)
    return (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)) / temperature**2


# ---- the square root -----------------------------------------------------------------------------


@given(logits, temperatures)
def test_root_is_a_root_at_any_logits(z: Tensor, temperature: float) -> None:
    root = dense_root(z, temperature)
    assert root.shape == (1, z.shape[1], z.shape[1] - 1)
    want = dense_fisher(z, temperature)
    assert_close(root @ root.mT, want, rtol=0, atol=1e-12 / temperature**2)


@given(logits, temperatures, st.integers(0, 100))
def test_products_agree_with_the_root_at_any_logits(
    z: Tensor, temperature: float, seed: int
) -> None:
    likelihood, root = categorical(temperature), dense_root(z, temperature)
    u = random.normal(random.key(seed), (1, root.shape[-1]), torch.float64)
    v = random.normal(random.key(seed + 1), tuple(z.shape), torch.float64)
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
    assert_close(likelihood.root_mv(z, u), (root @ u.unsqueeze(-1)).squeeze(-1), **close)
    assert_close(likelihood.root_t_mv(z, v), (root.mT @ v.unsqueeze(-1)).squeeze(-1), **close)
    want = (dense_fisher(z, temperature) @ v.unsqueeze(-1)).squeeze(-1)
    assert_close(likelihood.fisher_mv(z, v), want, **close)


@given(logits)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_are_finite_at_any_logits(dtype: torch.dtype, z: Tensor) -> None:
    z = z.to(dtype)
    likelihood = categorical()
    weights = torch.arange(1.0, z.shape[1] + 1, dtype=dtype).unsqueeze(0)

    def total(z: Tensor) -> Tensor:
        parts = [
            likelihood.root_mv(z, weights[:, 1:]),
            likelihood.root_t_mv(z, weights),
            likelihood.fisher_mv(z, weights),
            *(likelihood.root(z, k) for k in range(likelihood.columns(z))),
        ]
        return torch.stack([part.square().sum() for part in parts]).sum()

    assert torch.isfinite(torch.func.grad(total)(z)).all()


def test_root_where_all_that_follows_underflows() -> None:
    # 1 - cumsum(p) is 0 or negative here: a root made of it is NaN.
    z = torch.tensor([[0.0, 1e4, 5.0, -1e4, -1e4], [1e4, 0.0, 0.0, 0.0, 0.0]])
    for dtype in (torch.float32, torch.float64):
        root = dense_root(z.to(dtype))
        assert torch.isfinite(root).all()
        assert_close(root @ root.mT, dense_fisher(z.to(dtype)), rtol=0, atol=1e-25)


def test_root_has_relative_accuracy_for_confident_predictions() -> None:
    z = torch.tensor([[60.0, 40.0, 39.0, 0.0]])  # float32: 1 - p = 3e-9 is below rounding
    want = dense_fisher(z.double())
    exact = torch.softmax(z.double(), -1)[0]
    want[0, 0, 0] = exact[0] * exact[1:].sum()  # without the cancellation
    root = dense_root(z).double()
    unit = want.diagonal(dim1=-2, dim2=-1).rsqrt()
    unit = unit.unsqueeze(-1) * unit.unsqueeze(-2)
    assert_close(root @ root.mT * unit, want * unit, rtol=0, atol=1e-5)


def test_fisher_product_has_relative_accuracy_for_confident_predictions() -> None:
    z = torch.tensor([[60.0, 40.0, 39.0, 0.0]])
    v = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    p, w = torch.softmax(z.double(), -1), (v - v[:, :1]).double()
    want = p * (w - (p * w).sum())
    assert_close(categorical().fisher_mv(z, v).double(), want, rtol=1e-5, atol=1e-30)


def test_root_with_vocabulary_of_50k() -> None:
    z = 5 * random.normal(random.key(0), (2, 50_000))
    likelihood = categorical()
    v = random.normal(random.key(1), (2, 50_000))
    got = likelihood.root_mv(z, likelihood.root_t_mv(z, v))
    p, w = torch.softmax(z.double(), -1), v.double()
    want = p * (w - (p * w).sum(-1, keepdim=True))
    assert_close(got.double(), want, rtol=1e-4, atol=1e-9)


def test_forbidden_classes() -> None:
    z = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).double()
    likelihood, keep = categorical(), torch.tensor([0, 2])
    allowed = z[:, keep]
    root = dense_root(z)
    assert_close(
        (root @ root.mT)[:, keep][..., keep], dense_fisher(allowed), rtol=1e-12, atol=1e-13
    )
    score = likelihood.score(z, torch.tensor([2]))
    assert_close(score[:, keep], likelihood.score(allowed, torch.tensor([1])), rtol=0, atol=1e-15)
    assert likelihood.log_prob(z, torch.tensor([1])).item() == -torch.inf
    draws = likelihood.sample(z.expand(200, 4), random.split(random.key(0), 200))
    assert set(draws.tolist()) == {0, 2}


# ---- definitions ---------------------------------------------------------------------------------


@given(logits, temperatures)
def test_log_prob_and_score_at_any_logits(z: Tensor, temperature: float) -> None:
    likelihood, classes = categorical(temperature), z.shape[1]
    targets = torch.arange(classes)
    rows = z.expand(classes, classes).clone().requires_grad_()
    log_prob = likelihood.log_prob(rows, targets)
    want = torch.log_softmax(z[0] / temperature, -1)
    assert_close(log_prob, want, rtol=1e-12, atol=1e-12)
    score = likelihood.score(rows.detach(), targets)
    assert_close(score, torch.autograd.grad(log_prob.sum(), rows)[0], rtol=1e-10, atol=1e-12)
    assert_close(log_prob.detach().exp() @ score, torch.zeros(classes).double(), rtol=0, atol=1e-12)


def test_temperature_scales_drawing_and_scoring_alike() -> None:
    z = random.normal(random.key(0), (3, 4), torch.float64)
    keys, y = random.split(random.key(1), 3), torch.tensor([0, 1, 2])
    hot, scaled = categorical(2.0), categorical()
    assert torch.equal(hot.sample(z, keys), scaled.sample(z / 2, keys))
    assert_close(hot.score(z, y), scaled.score(z / 2, y) / 2)
    assert_close(hot.fisher_mv(z, z), scaled.fisher_mv(z / 2, z) / 4)


def test_class_axis_1_is_class_axis_last_transposed() -> None:
    z = random.normal(random.key(0), (2, 3, 4, 5), torch.float64)
    keys = random.split(random.key(1), 2)
    last, second = categorical(), categorical(class_axis=1)
    moved = z.movedim(-1, 1)
    y = last.sample(z, keys)
    assert torch.equal(second.sample(moved, keys), y)
    assert_close(second.log_prob(moved, y), last.log_prob(z, y))
    assert_close(second.score(moved, y), last.score(z, y).movedim(-1, 1))
    assert_close(second.root(moved, 2), last.root(z, 2).movedim(-1, 1))
    assert (second.event_axes, last.event_axes) == ((1,), (-1,))


def test_frequencies_of_draws() -> None:
    z = torch.tensor([[0.0, 1.0, -4.0, 2.0]], dtype=torch.float64)
    n = 20_000
    draws = categorical(0.8).sample(z.expand(n, 4), random.split(random.key(3), n))
    p = torch.softmax(z[0] / 0.8, -1)
    stderr = (p * (1 - p) / n).sqrt()
    assert ((torch.bincount(draws, minlength=4) / n - p).abs() < 5 * stderr).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_of_targets(dtype: torch.dtype) -> None:
    z, y = torch.zeros(2, 3), torch.tensor([0, 2])
    likelihood = categorical()
    likelihood.check_targets("test", z, y.to(dtype))
    assert torch.equal(likelihood.score(z, y.to(dtype)), likelihood.score(z, y))
    assert torch.equal(likelihood.log_prob(z, y.to(dtype)), likelihood.log_prob(z, y))
    mask = torch.tensor([True, False])
    assert likelihood.neutral(y.to(dtype), mask).dtype == dtype


def test_nan_logits_give_nan_and_no_crash() -> None:
    z = torch.full((2, 300), torch.nan)
    targets, score = categorical().sample_score(z, random.split(random.key(0), 2))
    assert ((targets >= 0) & (targets < 300)).all()
    assert torch.isnan(score).all()
    assert torch.isnan(categorical().fisher_mv(z, z)).all()


@pytest.mark.slow  # needs the C++ compiler that torch.compile uses on a CPU
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own import
def test_generated_code_is_eager() -> None:
    likelihood = categorical(0.7)
    z = random.normal(random.key(0), (2, 3, 300))
    keys, u = random.split(random.key(1), 2), random.normal(random.key(2), (2, 3, 299))

    def every(z: Tensor) -> tuple[Tensor, ...]:
        return (*likelihood.sample_score(z, keys), likelihood.root_mv(z, u))

    torch._dynamo.reset()
    assert_close(torch.compile(every, fullgraph=True)(z), every(z), rtol=1e-5, atol=1e-6)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), True, "1", None])
def test_temperature_that_is_none(temperature: Any) -> None:
    with pytest.raises(OptionError, match=r"categorical: expected a positive finite number, got"):
        categorical(temperature)


@pytest.mark.parametrize("axis", [0, 2, -2, None, True])
def test_class_axis_that_is_none(axis: Any) -> None:
    with pytest.raises(OptionError, match=r"categorical: expected -1 or 1, got .* at class_axis"):
        categorical(class_axis=axis)


def test_targets_out_of_range_are_named() -> None:
    likelihood, z = categorical(), torch.zeros(2, 3, 4)
    y = torch.tensor([[0, 1, 3], [2, 4, 0]])
    with pytest.raises(
        DataError,
        match=r"diagonal: expected class indices from 0 to 3, got 4 at targets\[1, 1\]\. Leave out "
        r"what does not count, as in Batch\(\.\.\., mask=Batch\.ignore\(targets, -100\)\)",
    ):
        likelihood.check_targets("diagonal", z, y)
    with pytest.raises(DataError, match=r"got -100 at targets\[0\]"):
        likelihood.check_targets("diagonal", z[0], torch.tensor([-100, 0, 0]))
    mask = torch.tensor([[True, True, True], [True, False, True]])
    likelihood.check_targets("diagonal", z, y, mask)


def test_targets_out_of_range_poison_what_cannot_raise(
    compiled: Callable[..., Callable[..., Any]],
) -> None:
    likelihood, z, y = categorical(), torch.zeros(2, 4), torch.tensor([1, 4])
    assert torch.equal(torch.isnan(likelihood.log_prob(z, y)), torch.tensor([False, True]))
    score = likelihood.score(z, y)
    assert torch.isfinite(score[0]).all()
    assert torch.isnan(score[1]).any()
    mask = torch.tensor([True, False])

    def run(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        likelihood.check_targets("test", z, y)  # structure only
        return likelihood.score(z, y), likelihood.poison(z, y), likelihood.poison(z, y, mask)

    got = compiled(run)(z, y)
    assert_close(got[0], score, equal_nan=True)
    assert [bool(flag) for flag in got[1:]] == [True, False]
    got = torch.vmap(run, in_dims=(None, 0))(z, torch.stack([y, y]))
    assert_close(got[0], torch.stack([score, score]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_targets_that_are_no_integers(dtype: torch.dtype) -> None:
    z, y = torch.zeros(2, 4), torch.zeros(2)
    with pytest.raises(
        ShapeError, match=rf"expected integer class indices .* got {dtype} of shape"
    ):
        categorical().check_targets("test", z, y.to(dtype))
    with pytest.raises(
        ShapeError, match=r"One-hot targets become indices with targets.argmax\(-1\)"
    ):
        categorical().score(z, torch.eye(4)[:2])


def test_targets_that_fit_the_other_class_axis() -> None:
    z = torch.zeros(2, 3, 4)
    with pytest.raises(ShapeError, match=r"If axis 1 holds the classes, use categorical\(class_ax"):
        categorical().check_targets("test", z, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"If axis -1 holds the classes, use categorical\(class_a"):
        categorical(class_axis=1).check_targets("test", z, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"\(2, 3\), got \(2, 3, 1\) at targets\. Reshape"):
        categorical().check_targets("test", z, torch.zeros(2, 3, 1, dtype=torch.int64))


def test_outputs_without_two_classes() -> None:
    with pytest.raises(
        ShapeError, match=r"expected at least 2 classes on axis -1, got shape \(5, 1"
    ):
        categorical().columns(torch.zeros(5, 1))
    with pytest.raises(
        ShapeError, match=r"expected outputs \[B, C, \*positions\], got shape \(5,\)"
    ):
        categorical(class_axis=1).positions_shape(torch.zeros(5))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("target", [1, 2])
def test_confident_predictions_keep_their_relative_accuracy(
    temperature: float, target: int
) -> None:
    """In float32 `1 - p` is zero here; derivatives of what is left of it are small, not gone."""
    lik = categorical(temperature)
    z, y = torch.tensor([[0.5, 21.0, -1.25]]), torch.tensor([target])

    def log_p(x: Tensor) -> Tensor:
        return lik.log_prob(x, y).sum()

    odds = ((z.double() - z[0, 1]) / temperature).exp()
    odds[0, 1] = 0.0
    p = odds / (1.0 + odds.sum())
    want = -p / temperature
    if target == 1:
        want[0, 1] = p.sum() / temperature
    else:
        want[0, 1] = -1.0 / (1.0 + odds.sum()) / temperature
        want[0, 2] = (1.0 - p[0, 2]) / temperature

    def close(got: Tensor, expected: Tensor) -> None:
        assert_close(got.double(), expected, rtol=1e-5, atol=0.0)

    close(lik.score(z, y), want)
    close(torch.func.grad(log_p)(z), want)
    live = z.clone().requires_grad_()
    close(lik.score(live, y).detach(), want)
    v = torch.tensor([[1.0, -2.0, 0.5]])
    got = torch.func.grad(lambda x: (torch.func.grad(log_p)(x) * v).sum())(z)
    close(got, -lik.fisher_mv(z.double(), v.double()))


def test_derivatives_where_classes_are_impossible_or_equal() -> None:
    lik, y = categorical(), torch.tensor([1, 0])
    for z in (
        torch.zeros(2, 3),
        torch.tensor([[0.0, 1.0, float("-inf")], [2.0, 2.0, float("-inf")]]),
    ):
        z = z.double()
        p = z.softmax(-1)
        want = p - torch.nn.functional.one_hot(y, 3)
        got = torch.func.grad(lambda x: -lik.log_prob(x, y).sum())(z)
        assert_close(got, want)
        slope = torch.func.grad(lambda x: -lik.log_prob(x, y).sum())
        second = torch.func.jacrev(slope)(z)
        blocks = torch.stack([second[n, :, n] for n in range(2)])
        assert_close(blocks, torch.diag_embed(p) - p[:, :, None] * p[:, None])
