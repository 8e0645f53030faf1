"""Trees of outputs and targets, what is missing, functions that return the wrong thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fisherfn as ff
from fisherfn.core import random
from fisherfn.core.errors import DataError, FisherError, OptionError, ShapeError, UnsupportedError
from fisherfn.likelihoods import Custom, custom

Outputs = dict[str, Tensor]


def normal_log_prob(z: Outputs, y: Tensor) -> Tensor:
    """A Gaussian whose scale the model predicts: outputs are a tree."""
    error = (y - z["mean"]) * (-z["log_scale"]).exp()
    return (-0.5 * error**2 - z["log_scale"] - 0.5 * torch.log(torch.tensor(2 * torch.pi))).sum(-1)


def normal_sample(z: Outputs, keys: Tensor) -> Tensor:
    noise = random.normal(keys, z["mean"].shape[-1:], z["mean"].dtype)
    return z["mean"] + z["log_scale"].exp() * noise


def normal_root(z: Outputs, index: Tensor) -> Outputs:
    """Columns 0..D-1 belong to the means, D..2D-1 to the log-scales, whose Fisher is 2."""
    at = torch.arange(2 * z["mean"].shape[-1]) == index
    means, scales = at.chunk(2)
    return {
        "mean": means * (-z["log_scale"]).exp(),
        "log_scale": scales * torch.full_like(z["mean"], 2**0.5),
    }


def columns(z: Outputs) -> int:
    return 2 * z["mean"].shape[-1]


@pytest.fixture
def full() -> Custom:
    return custom(
        normal_log_prob, normal_sample, root=normal_root, columns=columns, position_ndim=1
    )


@pytest.fixture
def outputs() -> Outputs:
    return {
        name: 0.5 * random.normal(random.key(seed), (2, 3, 2), torch.float64)
        for seed, name in enumerate(("mean", "log_scale"))
    }


def test_score_of_a_tree(full: Custom, outputs: Outputs) -> None:
    y = random.normal(random.key(5), (2, 3, 2), torch.float64)
    score = full.score(outputs, y)
    error = y - outputs["mean"]
    variance = (2 * outputs["log_scale"]).exp()
    assert_close(score["mean"], error / variance)
    assert_close(score["log_scale"], error**2 / variance - 1)


def test_drawn_scores_of_a_tree_have_the_fisher_of_the_root(full: Custom, outputs: Outputs) -> None:
    n = 4000
    keys = random.fold_in(
        random.fold_in(random.key(0), torch.arange(2)), torch.arange(n).unsqueeze(-1)
    )
    scores = torch.vmap(lambda k: full.sample_score(outputs, k)[1])(keys)
    v = {name: torch.ones_like(z) for name, z in outputs.items()}
    draws = (scores["mean"] + scores["log_scale"]).sum(-1)  # <v, score> at each position
    product = full.fisher_mv(outputs, v)
    want = (product["mean"] + product["log_scale"]).sum(-1)  # v^T H v
    assert (draws.mean(0).abs() < 5 * draws.std(0) / n**0.5).all()
    square = draws**2
    assert ((square.mean(0) - want).abs() < 5 * square.std(0) / n**0.5).all()


def test_products_of_a_tree(
    full: Custom, outputs: Outputs, compiled: Callable[..., Callable[..., Any]]
) -> None:
    u = random.normal(random.key(6), (2, 3, 4), torch.float64)
    v = {name: random.normal(random.key(7), (2, 3, 2), torch.float64) for name in outputs}

    def every(z: Outputs) -> tuple[Any, ...]:
        return full.root_mv(z, u), full.root_t_mv(z, v), full.fisher_mv(z, v)

    want_mv = {"mean": (-outputs["log_scale"]).exp() * u[..., :2], "log_scale": 2**0.5 * u[..., 2:]}
    parts = [(-outputs["log_scale"]).exp() * v["mean"], 2**0.5 * v["log_scale"]]
    want_fisher = {
        "mean": (-2 * outputs["log_scale"]).exp() * v["mean"],
        "log_scale": 2 * v["log_scale"],
    }
    want = (want_mv, torch.cat(parts, -1), want_fisher)
    assert_close(every(outputs), want)
    assert_close(compiled(every)(outputs), want)


def test_fisher_mv_of_the_user_is_used(outputs: Outputs) -> None:
    def double(z: Outputs, v: Outputs) -> Outputs:
        return {name: 2 * x for name, x in v.items()}

    likelihood = custom(normal_log_prob, fisher_mv=double, position_ndim=1)
    got = likelihood.fisher_mv(outputs, outputs)
    assert_close(got, {name: 2 * x for name, x in outputs.items()})
    likelihood = custom(normal_log_prob, fisher_mv=lambda z, v: v["mean"], position_ndim=1)
    with pytest.raises(
        FisherError, match=r"custom.fisher_mv: expected fisher_mv\(outputs, v\) like"
    ):
        likelihood.fisher_mv(outputs, outputs)


def test_shapes_of_a_tree(full: Custom, outputs: Outputs) -> None:
    assert full.positions_shape(outputs) == (2, 3)
    assert full.event_shape(outputs) == (4,)
    assert full.event_shape(outputs["mean"]) == (2,)
    assert full.columns(outputs) == 4


def test_low_precision_is_widened(full: Custom, outputs: Outputs) -> None:
    low = {name: z.bfloat16() for name, z in outputs.items()}
    score = full.score(low, torch.zeros(2, 3, 2))
    assert {x.dtype for x in score.values()} == {torch.float32}


def test_tree_of_targets_and_its_neutral_values() -> None:
    """Censored times: a duration and whether it was observed."""

    def log_prob(z: Tensor, y: dict[str, Tensor]) -> Tensor:
        return y["seen"] * z - z.exp() * y["time"].log().exp()

    likelihood = custom(log_prob)
    z = torch.zeros(3)
    y = {"time": torch.tensor([-1.0, 2.0, 3.0]), "seen": torch.tensor([1.0, 0.0, 1.0])}
    mask = torch.tensor([False, True, True])
    clean = likelihood.neutral(y, mask)
    assert clean["time"].tolist() == [2.0, 2.0, 3.0]
    assert clean["seen"].tolist() == [0.0, 0.0, 1.0]
    likelihood.check_targets("test", z, y, mask)
    assert not likelihood.poison(z, y, mask)
    with pytest.raises(
        DataError,
        match=r"test: expected a log_prob that is a number, got NaN at targets\[0\]\. Look",
    ):
        likelihood.check_targets("test", z, y)
    assert likelihood.poison(z, y)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert not likelihood.poison(z, y, nothing)


def test_keys_are_one_a_position() -> None:
    seen: list[Tensor] = []

    def sample(z: Tensor, keys: Tensor) -> Tensor:
        seen.append(keys)
        return torch.zeros(z.shape[:2])

    likelihood = custom(lambda z, y: z.sum(-1), sample, position_ndim=1)
    likelihood.sample(torch.zeros(2, 3, 4), random.split(random.key(0), 2))
    assert seen[0].shape == (2, 3, 2)
    assert len(seen[0].reshape(-1, 2).unique(dim=0)) == 6


# ---- what is missing -----------------------------------------------------------------------------


def test_what_is_missing_is_named() -> None:
    likelihood, z = custom(lambda z, y: -(y - z).abs().sum(-1)), torch.zeros(2, 3)
    with pytest.raises(
        UnsupportedError, match=r"custom.sample: .*likelihoods.custom\(log_prob, samp"
    ):
        likelihood.sample(z, random.split(random.key(0), 2))
    with pytest.raises(UnsupportedError, match=r"custom.sample: "):
        likelihood.sample_score(z, random.split(random.key(0), 2))
    match = r"custom.{}: expected a square root of the Fisher of the outputs, got none\. Pass lik"
    with pytest.raises(UnsupportedError, match=match.format("columns")):
        likelihood.columns(z)
    with pytest.raises(UnsupportedError, match=match.format("root")):
        likelihood.root(z, 0)
    with pytest.raises(UnsupportedError, match=match.format("root_mv")):
        likelihood.root_mv(z, torch.zeros(2, 3))
    with pytest.raises(UnsupportedError, match=match.format("root_t_mv")):
        likelihood.root_t_mv(z, z)
    with pytest.raises(
        UnsupportedError, match=r"custom.fisher_mv: expected .*fisher_mv=.*or root="
    ):
        likelihood.fisher_mv(z, z)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"log_prob": None}, r"expected a function, got None at log_prob"),
        ({"sample": 3}, r"expected a function, got 3 at sample"),
        ({"root": "B", "columns": 1}, r"expected a function, got 'B' at root"),
        ({"fisher_mv": 1.0}, r"expected a function, got 1.0 at fisher_mv"),
        ({"root": normal_root}, r"expected root and columns together, got columns=None"),
        ({"columns": 3}, r"expected root and columns together, got columns=3"),
        ({"root": normal_root, "columns": 0}, r"expected an integer >= 1 or a function, got 0"),
        (
            {"root": normal_root, "columns": True},
            r"expected an integer >= 1 or a function, got True",
        ),
        ({"position_ndim": -1}, r"expected an integer >= 0, got -1 at position_ndim"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match="custom: " + match):
        custom(**{"log_prob": normal_log_prob, **options})


def test_log_prob_of_the_wrong_shape() -> None:
    z, y = torch.zeros(2, 3), torch.zeros(2, 3)
    wrongs: list[Any] = [(lambda z, y: z - y, r"\(2, 3\)"), (lambda z, y: 1.0, "float")]
    for wrong, got in wrongs:
        for function in (custom(wrong).log_prob, custom(wrong).score):
            with pytest.raises(
                ShapeError, match=rf"custom.log_prob: expected a tensor of shape \(2,\), got {got} "
            ):
                function(z, y)


@pytest.mark.parametrize(
    "log_prob",
    [
        lambda z, y: (z.argmax(-1) == y).to(z.dtype),
        lambda z, y: -(y - z.detach().sum(-1)).abs(),
        lambda z, y: z.new_zeros(z.shape[:1]),
    ],
)
def test_log_prob_without_derivative(log_prob: Callable[..., Tensor]) -> None:
    likelihood, targets = custom(log_prob), torch.tensor([0, 1])
    with pytest.raises(UnsupportedError, match=r"custom\.log_prob.*without derivative.*zero"):
        likelihood.score(torch.ones(2, 3), targets)
    model, params = (lambda params, buffers, x: x @ params["w"]), {"w": torch.ones(4, 3)}
    batch = ff.Batch(torch.ones(2, 4), targets)
    for estimator in (
        ff.diagonal(model, likelihood, fisher="empirical"),
        ff.per_sample_gradients(model, likelihood),
    ):
        with pytest.raises(UnsupportedError, match="without derivative"):
            estimator(params, {}, batch)
    with pytest.raises(UnsupportedError, match="without derivative"):
        ff.hvp(model, likelihood)(params, {}, batch, params)


def test_root_that_is_not_like_the_outputs(outputs: Outputs) -> None:
    likelihood = custom(normal_log_prob, root=lambda z, k: z["mean"], columns=2, position_ndim=1)
    with pytest.raises(
        FisherError, match=r"custom.root: expected root\(outputs, index\) like outputs"
    ):
        likelihood.root(outputs, 0)


def test_trees_whose_leading_axes_differ(full: Custom, outputs: Outputs) -> None:
    y = torch.zeros(2, 3, 2)
    ragged = {**outputs, "log_scale": torch.zeros(2, 4, 2)}
    with pytest.raises(
        ShapeError, match=r"begins with \(2, 3\), got \(2, 4, 2\) at outputs/log_scale"
    ):
        full.score(ragged, y)
    with pytest.raises(
        ShapeError, match=r"begins with \(2, 3\), got \(3, 2\) at targets\. These are"
    ):
        full.score(outputs, y[0])
    with pytest.raises(ShapeError, match=r"begins with \(2, 3\), got int at targets/0"):
        full.score(outputs, [1])
    with pytest.raises(ShapeError, match=r"expected floating point outputs, got torch.int64"):
        full.score({**outputs, "mean": y.long()}, y)
    with pytest.raises(ShapeError, match=r"custom: expected tensors, got \{\} at outputs"):
        full.positions_shape({})


def test_an_absent_output_is_no_leaf(full: Custom, outputs: Outputs) -> None:
    with_none: dict[str, Any] = {**outputs, "cache": None}
    y = torch.zeros(2, 3, 2).double()
    score = full.score(with_none, y)
    assert score["cache"] is None
    assert_close(score["mean"], full.score(outputs, y)["mean"])
