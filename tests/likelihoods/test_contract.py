"""What every likelihood has to satisfy, on the table of conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fisherfn.core import random
from fisherfn.core.errors import DataError, OptionError, ShapeError
from fisherfn.likelihoods import Custom, Gaussian

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def dense_root(case: Any) -> Tensor:
    """B of each position `[N, E, K]`, column by column."""
    likelihood, z = case.likelihood, case.outputs
    columns = [case.rows(likelihood.root(z, k)) for k in range(likelihood.columns(z))]
    return torch.stack(columns, -1)


def vector(case: Any, seed: int, *, columns: bool = False) -> Tensor:
    z = case.outputs
    shape = tuple(z.shape)
    if columns:
        shape = (*case.likelihood.positions_shape(z), case.likelihood.columns(z))
    return random.normal(random.key(seed), shape, torch.float64)


# ---- definitions ---------------------------------------------------------------------------------


def test_log_prob_is_the_definition(case: Any) -> None:
    got = case.likelihood.log_prob(case.outputs, case.targets)
    assert got.shape == case.likelihood.positions_shape(case.outputs)
    want = case.row_log_prob(case.rows(case.outputs), case.row_targets(case.targets).double())
    assert_close(got.reshape(-1), want, **EXACT)


def test_score_is_the_gradient_of_log_prob(case: Any) -> None:
    got = case.likelihood.score(case.outputs, case.targets)
    assert got.shape == case.outputs.shape
    want = case.naive_scores(case.rows(case.outputs), case.row_targets(case.targets))
    assert_close(case.rows(got), want, **EXACT)


def test_expected_score_is_zero_and_root_is_a_root_of_its_second_moment(case: Any) -> None:
    mean, fisher = case.naive_moments()
    assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
    root = dense_root(case)
    assert_close(root @ root.mT, fisher, rtol=1e-9, atol=1e-12)


def test_products_are_those_of_the_dense_root(case: Any) -> None:
    likelihood, z, root = case.likelihood, case.outputs, dense_root(case)
    u, v = vector(case, 1, columns=True), vector(case, 2)
    rows_u, rows_v = u.reshape(len(root), -1, 1), case.rows(v).unsqueeze(-1)
    assert_close(case.rows(likelihood.root_mv(z, u)), (root @ rows_u).squeeze(-1), **EXACT)
    got = likelihood.root_t_mv(z, v)
    assert got.shape == u.shape
    assert_close(got.reshape(len(root), -1), (root.mT @ rows_v).squeeze(-1), **EXACT)
    want = (root @ root.mT @ rows_v).squeeze(-1)
    assert_close(case.rows(likelihood.fisher_mv(z, v)), want, **EXACT)


def test_transpose_in_the_sense_of_inner_products(case: Any) -> None:
    u, v = vector(case, 3, columns=True), vector(case, 4)
    left = (case.likelihood.root_mv(case.outputs, u) * v).sum()
    right = (case.likelihood.root_t_mv(case.outputs, v) * u).sum()
    assert_close(left, right, **EXACT)


def test_event_shape_and_axes_state_the_event(case: Any) -> None:
    z, axes = case.outputs, case.likelihood.event_axes
    if axes is None:
        assert isinstance(case.likelihood, Custom)
        axes = range(2, z.ndim)
    event = case.likelihood.event_shape(z)
    assert event == tuple(z.shape[a] for a in axes)
    assert case.likelihood.positions_shape(z) + event == tuple(z.movedim(case.class_axis, -1).shape)


# ---- draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [400, 4000])
def test_drawn_scores_have_mean_zero_and_the_fisher_as_second_moment(
    case: Any, keys: Callable[..., Tensor], draws: int
) -> None:
    z, likelihood = case.outputs, case.likelihood
    each = random.fold_in(keys(z, draws), torch.arange(draws).unsqueeze(-1))
    scores = torch.vmap(lambda k: likelihood.sample_score(z, k)[1])(each)
    flat = torch.stack([case.rows(s) for s in scores])
    mean, fisher = case.naive_moments()
    # Along random directions: single entries belong to labels that may not be drawn at all.
    along = random.normal(random.key(20), (*mean.shape, 5), torch.float64)
    first = torch.einsum("mne,nek->mnk", flat, along)
    for got, want in (
        (first, torch.einsum("ne,nek->nk", mean, along)),
        (first**2, torch.einsum("nek,nef,nfk->nk", along, fisher, along)),
    ):
        stderr = got.std(0) / draws**0.5
        assert ((got.mean(0) - want).abs() < 5 * stderr).all()


def test_sample_score_is_sample_then_score(case: Any, keys: Callable[..., Tensor]) -> None:
    targets, score = case.likelihood.sample_score(case.outputs, keys(case.outputs))
    assert_close(targets, case.likelihood.sample(case.outputs, keys(case.outputs)), rtol=0, atol=0)
    assert_close(score, case.likelihood.score(case.outputs, targets), rtol=0, atol=0)


def test_draws_are_valid_targets(case: Any, keys: Callable[..., Tensor]) -> None:
    targets = case.likelihood.sample(case.outputs, keys(case.outputs))
    assert targets.shape == case.targets.shape
    case.likelihood.check_targets("test", case.outputs, targets)
    assert not case.likelihood.poison(case.outputs, targets)


def test_batch_order_split_and_padding_never_change_a_draw(
    case: Any, keys: Callable[..., Tensor]
) -> None:
    likelihood, z, key = case.likelihood, case.outputs, keys(case.outputs)
    want = likelihood.sample(z, key)
    order = torch.arange(z.shape[0] - 1, -1, -1)
    assert torch.equal(likelihood.sample(z[order], key[order]), want[order])
    parts = [likelihood.sample(z[n : n + 1], key[n : n + 1]) for n in range(z.shape[0])]
    assert torch.equal(torch.cat(parts), want)
    for axis in range(1, len(likelihood.positions_shape(z))):
        at = axis + 1 if case.class_axis == 1 else axis
        longer = torch.cat([z, torch.full_like(z, 0.3)], at)
        got = likelihood.sample(longer, key)
        assert got.shape[axis] == 2 * want.shape[axis]
        assert torch.equal(got.narrow(axis, 0, want.shape[axis]), want)


def test_positions_and_keys_give_different_draws(case: Any, keys: Callable[..., Tensor]) -> None:
    likelihood = case.likelihood
    z = torch.zeros_like(case.outputs[:1]).expand(64, *case.outputs.shape[1:])
    draws = likelihood.sample(z, keys(z)).reshape(64, -1)
    assert (draws != draws[0]).any()  # not the same for every key
    positions = likelihood.positions_shape(z)[1:]
    if positions and max(positions) > 1:
        flat = draws.reshape(64, positions.numel() if hasattr(positions, "numel") else -1)
        assert (flat != flat[:, :1]).any()  # nor at every position
    assert not torch.equal(likelihood.sample(z, keys(z, 1)).reshape(64, -1), draws)


def test_draws_are_constants(case: Any, keys: Callable[..., Tensor]) -> None:
    z = case.outputs.clone().requires_grad_()
    targets, score = case.likelihood.sample_score(z, keys(z))
    assert not targets.requires_grad
    want = torch.autograd.grad(case.likelihood.score(z, targets).square().sum(), z)
    assert_close(torch.autograd.grad(score.square().sum(), z), want, **EXACT)


# ---- transformations -----------------------------------------------------------------------------


def methods(case: Any, key: Tensor) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every tensor method with arguments."""
    likelihood, z, y = case.likelihood, case.outputs, case.targets
    mask = torch.arange(z.shape[0]) % 2 == 0
    positions = likelihood.positions_shape(z)
    mask = mask.reshape(-1, *[1] * (len(positions) - 1)).expand(positions)
    u, v = vector(case, 5, columns=True), vector(case, 6)
    return {
        "log_prob": (likelihood.log_prob, (z, y)),
        "score": (likelihood.score, (z, y)),
        "sample": (likelihood.sample, (z, key)),
        "sample_score": (likelihood.sample_score, (z, key)),
        "root": (likelihood.root, (z, torch.tensor(0))),
        "root_mv": (likelihood.root_mv, (z, u)),
        "root_t_mv": (likelihood.root_t_mv, (z, v)),
        "fisher_mv": (likelihood.fisher_mv, (z, v)),
        "neutral": (likelihood.neutral, (y, mask)),
        "poison": (likelihood.poison, (z, y, mask)),
    }


NAMES = "log_prob score sample sample_score root root_mv root_t_mv fisher_mv neutral poison".split()


def test_compiled_is_eager(
    case: Any, keys: Callable[..., Tensor], compiled: Callable[..., Callable[..., Any]]
) -> None:
    if case.name in ("categorical-two-position-axes", "categorical-hot", "bernoulli-positions"):
        return  # traced alike in other cases, and tracing is slow
    table = methods(case, keys(case.outputs))
    arguments = {name: arguments for name, (_, arguments) in table.items()}

    def every(arguments: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {name: table[name][0](*arguments[name]) for name in arguments}

    assert_close(compiled(every)(arguments), every(arguments), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_outputs_is_a_loop(case: Any, keys: Callable[..., Tensor], name: str) -> None:
    function, arguments = methods(case, keys(case.outputs))[name]
    if name == "neutral":
        stack = torch.stack([arguments[0], arguments[0] + 1])
    else:
        stack = torch.stack([arguments[0], arguments[0] * 0.5, arguments[0] + 1])
    got = torch.vmap(lambda x: function(x, *arguments[1:]))(stack)
    want = [function(x, *arguments[1:]) for x in stack]
    if name == "sample_score":
        want = tuple(torch.stack(parts) for parts in zip(*want, strict=True))
    else:
        want = torch.stack(want)
    assert_close(got, want, **EXACT)


@pytest.mark.parametrize("name", ["sample", "sample_score", "root_mv", "root_t_mv", "fisher_mv"])
def test_vmap_over_the_second_argument_alone_is_a_loop(
    case: Any, keys: Callable[..., Tensor], name: str
) -> None:
    function, (z, argument, *_) = methods(case, keys(case.outputs))[name]
    stack = torch.stack([argument, argument.flip(0), argument * 3])
    got = torch.vmap(function, in_dims=(None, 0))(z, stack)
    want = [function(z, x) for x in stack]
    if name == "sample_score":
        want = tuple(torch.stack(parts) for parts in zip(*want, strict=True))
    else:
        want = torch.stack(want)
    assert_close(got, want, **EXACT)


def test_vmap_over_targets_alone_is_a_loop(case: Any) -> None:
    likelihood, z, y = case.likelihood, case.outputs, case.targets
    stack = torch.stack([y, y.flip(0)])
    for function in (likelihood.log_prob, likelihood.score):
        got = torch.vmap(function, in_dims=(None, 0))(z, stack)
        assert_close(got, torch.stack([function(z, x) for x in stack]), **EXACT)


def test_vmap_over_columns_is_a_loop(
    case: Any, compiled: Callable[..., Callable[..., Any]]
) -> None:
    likelihood, z = case.likelihood, case.outputs
    index = torch.arange(likelihood.columns(z))
    want = torch.stack([likelihood.root(z, int(k)) for k in index])

    def columns(z: Tensor, index: Tensor) -> Tensor:
        return torch.vmap(likelihood.root, in_dims=(None, 0))(z, index)

    assert_close(columns(z, index), want, rtol=0, atol=0)
    assert_close(compiled(columns)(z, index), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["log_prob", "score", "root", "root_mv", "root_t_mv", "fisher_mv"])
def test_derivatives_are_those_of_finite_differences(
    case: Any, keys: Callable[..., Tensor], name: str
) -> None:
    if case.outputs.numel() > 100:
        return  # the same formulas with more classes
    function, arguments = methods(case, keys(case.outputs))[name]
    got = torch.func.grad(lambda x: function(x, *arguments[1:]).square().sum())(case.outputs)
    z = case.outputs.clone().requires_grad_()
    value = function(z, *arguments[1:])
    if not value.requires_grad:  # the Fisher of a Gaussian does not depend on its mean
        assert isinstance(case.likelihood, Gaussian)
        assert not got.any()
        return
    assert torch.autograd.gradcheck(lambda x: function(x, *arguments[1:]), (z,))
    assert_close(got, torch.autograd.grad(value.square().sum(), z)[0], **EXACT)


# ---- dtypes, shapes, purity ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_are_at_least_float32(
    case: Any, keys: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    want = torch.promote_types(dtype, torch.float32)
    low = case.outputs.to(dtype)
    for name, (function, (_, *rest)) in methods(case, keys(low)).items():
        if name in ("neutral", "poison", "sample"):
            continue
        rest = [x.to(dtype) if x.is_floating_point() else x for x in rest]
        wide = [x.to(want) if x.is_floating_point() else x for x in rest]
        if name in ("log_prob", "score"):
            rest = wide = case.targets.to(torch.float32).to(case.targets.dtype), *rest[1:]
        got, same = function(low, *rest), function(low.to(want), *wide)
        if name == "sample_score":
            got, same = got[1], same[1]
        assert got.dtype == want
        assert_close(got, same, rtol=2e-6, atol=2e-6)


def test_empty_batch(case: Any, keys: Callable[..., Tensor]) -> None:
    likelihood, z = case.likelihood, case.outputs[:0]
    positions = likelihood.positions_shape(z)
    assert positions[0] == 0
    y = case.targets[:0]
    likelihood.check_targets("test", z, y)
    u = torch.zeros(*positions, likelihood.columns(z)).double()
    assert likelihood.log_prob(z, y).shape == positions
    assert likelihood.sample(z, keys(z)).shape == y.shape
    assert likelihood.neutral(y, torch.ones(positions, dtype=torch.bool)).shape == y.shape
    for got in (
        likelihood.score(z, y),
        likelihood.root(z, 0),
        likelihood.root_mv(z, u),
        likelihood.fisher_mv(z, z),
    ):
        assert got.shape == z.shape
    assert likelihood.root_t_mv(z, z).shape == u.shape


def test_arguments_are_left_alone(case: Any, keys: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        for function, arguments in methods(case, keys(case.outputs)).values():
            before = [x.clone() for x in arguments]
            function(*arguments)
            assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


def test_likelihoods_are_equal_and_hashable_by_their_options(case: Any) -> None:
    assert case.likelihood == case.likelihood
    assert hash(case.likelihood) == hash(case.likelihood)
    assert case.likelihood != object()
    with pytest.raises(AttributeError):
        case.likelihood.name = "other"


# ---- bad input -----------------------------------------------------------------------------------


def test_neutral_hides_what_is_masked(case: Any) -> None:
    likelihood, z, y = case.likelihood, case.outputs, case.targets
    assert likelihood.neutral(y, None) is y
    bad = y.clone()
    bad[-1] = -3 if not y.is_floating_point() else float("nan")
    mask = torch.ones(likelihood.positions_shape(z), dtype=torch.bool)
    mask[-1] = False
    clean = likelihood.neutral(bad, mask)
    assert clean.dtype == y.dtype
    assert torch.equal(clean[:-1], y[:-1])
    assert torch.isfinite(likelihood.log_prob(z, clean)).all()
    assert torch.isfinite(likelihood.score(z, clean)).all()
    likelihood.check_targets("test", z, bad, mask)
    assert not likelihood.poison(z, bad, mask)


def test_no_targets_and_targets_of_another_shape(case: Any) -> None:
    likelihood, z, y = case.likelihood, case.outputs, case.targets
    with pytest.raises(DataError, match=r"caller: expected targets, got None at targets\. Give"):
        likelihood.check_targets("caller", z, None)
    with pytest.raises(ShapeError, match=r"caller: expected .*, got (list|int) at targets"):
        likelihood.check_targets("caller", z, [1, 2])
    with pytest.raises(ShapeError, match=r"caller: expected .*\(\d+.*\), got \(\d+"):
        likelihood.check_targets("caller", z, y[1:])
    for function in (likelihood.log_prob, likelihood.score):
        with pytest.raises(ShapeError, match=r"\.(log_prob|score): expected"):
            function(z, y[:1])


def test_outputs_that_are_none(case: Any) -> None:
    likelihood, z = case.likelihood, case.outputs
    for bad, got in ((z.long(), "torch.int64"), (None, "None(Type)?"), (z.sum(), r"shape \(\)")):
        with pytest.raises(ShapeError, match=rf"expected .*, got {got} at outputs"):
            likelihood.positions_shape(bad)


def test_vectors_keys_and_columns_of_the_wrong_shape(
    case: Any, keys: Callable[..., Tensor]
) -> None:
    likelihood, z = case.likelihood, case.outputs
    u = vector(case, 1, columns=True)
    with pytest.raises(ShapeError, match=r"root_mv: expected shape .* at u"):
        likelihood.root_mv(z, u[1:])
    with pytest.raises(ValueError, match=r"root_t_mv: expected (shape .* at v|v like outputs)"):
        likelihood.root_t_mv(z, z[1:])
    if not isinstance(likelihood, Custom) or likelihood.fisher_mv_function is not None:
        with pytest.raises(ValueError, match=r"fisher_mv: expected (shape .* at v|v like outputs)"):
            likelihood.fisher_mv(z, z[1:])
    no_keys: list[Any] = [keys(z)[1:], keys(z).double(), None]
    for bad in no_keys:
        with pytest.raises(
            ShapeError, match=r"sample: expected one key an example, int64 of shape"
        ):
            likelihood.sample(z, bad)
    columns = likelihood.columns(z)
    no_columns: list[Any] = [-1, columns, True, 0.0]
    for bad in no_columns:
        with pytest.raises(OptionError, match=rf"root: expected a column from 0 to {columns - 1}"):
            likelihood.root(z, bad)
    with pytest.raises(ShapeError, match=r"root: expected an integer or an integer scalar"):
        likelihood.root(z, torch.arange(2))


def test_a_single_key_is_that_of_examples_in_order(case: Any) -> None:
    z, keys = case.outputs, random.fold_in(random.key(3), torch.arange(len(case.outputs)))
    assert_close(case.likelihood.sample(z, random.key(3)), case.likelihood.sample(z, keys))
