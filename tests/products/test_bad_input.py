"""Every message of products, and what they must not do with bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import fisherfn as ff
from cases import normal

LIK = ff.likelihoods.categorical()
W = {"w": normal(3, 4)}
BATCH = ff.Batch(normal(2, 3, seed=1), torch.tensor([0, 1]))


def model(params: Any, buffers: Any, x: Tensor) -> Tensor:
    return x @ params["w"]


PRODUCTS: dict[str, Any] = {
    "fisher_vp": ff.fisher_vp,
    "empirical_vp": ff.empirical_vp,
    "hvp": ff.hvp,
    "finite_difference_vp": ff.finite_difference_vp,
}


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_tangents_that_do_not_match(name: str) -> None:
    product = PRODUCTS[name](model, LIK)
    with pytest.raises(ff.TreeMismatchError, match=rf"{name}: expected tangents like params.*at w"):
        product(W, {}, BATCH, {"w": torch.ones(3, 5)})
    with pytest.raises(ff.TreeMismatchError, match="no leaf at w"):
        product(W, {}, BATCH, {})
    with pytest.raises(ff.TreeMismatchError, match=r"floating-point tangents, got torch\.int64"):
        product(W, {}, BATCH, {"w": torch.ones(3, 4, dtype=torch.int64)})


@pytest.mark.parametrize("name", list(PRODUCTS)[:3])
def test_integer_params(name: str) -> None:
    bad = {"w": torch.ones(3, 4, dtype=torch.int64)}
    with pytest.raises(ff.ShapeError, match=rf"{name}: expected floating-point params"):
        PRODUCTS[name](model, LIK)(bad, {}, BATCH, bad)


@pytest.mark.parametrize("make", [ff.fisher_vp, ff.linearized, ff.implicit])
def test_options_that_make_no_sense(make: Any) -> None:
    with pytest.raises(ff.OptionError, match="num_samples= to be an integer of at least 1, got 0"):
        make(model, LIK, fisher="mc", num_samples=0)
    with pytest.raises(ff.OptionError, match="expected fisher= to be one of"):
        make(model, LIK, fisher="true")
    with pytest.raises(ff.OptionError, match="expected num_samples=1"):
        make(model, LIK, num_samples=2)
    with pytest.raises(ff.OptionError, match="expected chunk_size="):
        make(model, LIK, chunk_size=0)
    with pytest.raises(ff.OptionError, match="expected unit="):
        make(model, LIK, unit="token")
    with pytest.raises(ff.OptionError, match="expected a likelihood"):
        make(model, nn.MSELoss())
    with pytest.raises(ff.OptionError, match="expected a function"):
        make(nn.ReLU(), LIK)
    with pytest.raises(ff.OptionError, match="select= to be a regular expression, got '\\('"):
        make(model, LIK, select="(")
    with pytest.raises(ff.OptionError, match="select= to be a regular expression or a predicate"):
        make(model, LIK, select=3)


def test_a_missing_key() -> None:
    for make in (ff.fisher_vp, ff.linearized, ff.implicit):
        call = make(model, LIK, fisher="mc")
        arguments = (W,) if make is ff.fisher_vp else ()
        with pytest.raises(ff.OptionError, match="expected key= for fisher='mc', got None"):
            call(W, {}, BATCH, *arguments)


def test_nothing_selected() -> None:
    with pytest.raises(ff.OptionError, match="expected select= to choose at least one parameter"):
        ff.fisher_vp(model, LIK, select="bias")(W, {}, BATCH, {})
    with pytest.raises(ff.TreeMismatchError, match="like the selected params"):
        ff.fisher_vp(model, LIK, select="w")(W, {}, BATCH, {"v": W["w"]})


def test_batches_that_are_none() -> None:
    product = ff.fisher_vp(model, LIK)
    with pytest.raises(ff.DataError, match="expected a Batch or an iterable of batches"):
        product(W, {}, BATCH.inputs, W)
    with pytest.raises(ff.DataError, match="expected batches, got Tensor as number 1"):
        product(W, {}, [BATCH, BATCH.inputs], W)
    used = iter([BATCH])
    product(W, {}, used, W)
    with pytest.raises(ff.DataError, match="expected at least one batch, got none"):
        product(W, {}, used, W)


def test_data_that_cannot_be() -> None:
    with pytest.raises(ff.DataError, match="class indices from 0 to 3"):
        ff.empirical_vp(model, LIK)(W, {}, ff.Batch(BATCH.inputs, torch.tensor([0, 9])), W)
    with pytest.raises(ff.DataError, match=r"hvp: .*, got None.* a choice of fisher="):
        ff.hvp(model, LIK)(W, {}, ff.Batch(BATCH.inputs), W)
    nothing = ff.Batch(BATCH.inputs, mask=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ff.DataError, match="at least one unit to count"):
        ff.fisher_vp(model, LIK)(W, {}, nothing, W)


def test_models_that_mix_examples_or_are_random() -> None:
    def mixing(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return (x - x.mean(0)) @ params["w"]

    def dropping(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return nn.functional.dropout(x @ params["w"], 0.5, training=True)

    with pytest.raises(ff.UnsupportedError, match="treats examples apart"):
        ff.fisher_vp(mixing, LIK)(W, {}, BATCH, W)
    for make in (ff.fisher_vp, ff.hvp):
        with pytest.raises(ff.UnsupportedError, match="dropout"):
            make(dropping, LIK)(W, {}, BATCH, W)


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    def stored(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda h, w: (h @ w).tanh(), x, params["w"], use_reentrant=False)

    with pytest.raises(ff.UnsupportedError, match="without activation checkpointing"):
        ff.fisher_vp(stored, LIK)(W, {}, BATCH, W)
    with pytest.raises(ff.UnsupportedError, match="without activation checkpointing"):
        torch.vmap(lambda t: ff.fisher_vp(stored, LIK)(W, {}, BATCH, {"w": t}))(W["w"][None])


def test_blocks_of_vectors() -> None:
    bound = ff.linearized(model, LIK)(W, {}, BATCH)
    with pytest.raises(ff.TreeMismatchError, match="like params with a leading axis"):
        bound.block(W)
    with pytest.raises(ff.TreeMismatchError, match="leading axis of vectors, got a leaf without"):
        bound.block({"w": torch.tensor(1.0)})
    with pytest.raises(ff.TreeMismatchError, match="at least one vector"):
        bound.block({"w": torch.zeros(0, 3, 4)})
    for size in (0, True, 1.5):
        with pytest.raises(ff.OptionError, match="chunk_size= to be None or an integer"):
            bound.block({"w": torch.zeros(2, 3, 4)}, chunk_size=size)  # type: ignore[arg-type]


def test_the_hessian_side() -> None:
    with pytest.raises(ff.OptionError, match="step= to be a positive number or None, got 0"):
        ff.finite_difference_vp(model, LIK, step=0)
    with pytest.raises(ff.OptionError, match=r"method= to be one of 'exact'.*got 'lanczos'"):
        ff.hessian_trace(model, LIK, method="lanczos")
    with pytest.raises(ff.OptionError, match="expected key= for method='xtrace', got None"):
        ff.hessian_trace(model, LIK, method="xtrace")(W, {}, BATCH)
    with pytest.raises(ff.TreeMismatchError, match="cotangents like the outputs"):
        ff.output_vjp(model)(W, {}, BATCH.inputs, torch.ones(2, 3))
    with pytest.raises(ff.TreeMismatchError, match="returns one tensor, got 2"):
        ff.output_jacobian(lambda p, b, x: (x @ p["w"], x))(W, {}, BATCH.inputs)


def test_too_many_parameters_for_an_exact_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fisherfn.estimators.hessian.EXACT_BUDGET", 5)
    with pytest.raises(ff.OptionError, match="at most 5 parameters, got 12"):
        ff.hessian_diagonal(model, LIK)(W, {}, BATCH)


def test_options_are_read_only_and_visible() -> None:
    made = [ff.fisher_vp(model, LIK), ff.linearized(model, LIK), ff.implicit(model, LIK)]
    made.append(ff.hessian_diagonal(model, LIK))
    for thing in made:
        assert thing.model is model
        assert thing.likelihood == LIK
        with pytest.raises(TypeError):
            thing.options["unit"] = "position"
    assert cases.ALL
