"""What is remembered of batches in which everything counts once."""

from __future__ import annotations

import torch
from torch import Tensor

import fisherfn as ff
from fisherfn.estimators import observe
from fisherfn.testing import assert_close

LIK = ff.likelihoods.categorical()
PARAMS = {"w": torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)}
BATCH = ff.Batch(torch.tensor([[1.0, 2.0], [0.0, -1.0], [4.0, 1.0]], dtype=torch.float64))


def model(params: dict[str, Tensor], buffers: object, x: Tensor) -> Tensor:
    """Multiply."""
    return x @ params["w"]


def test_a_result_that_is_written_to_changes_no_other() -> None:
    fim = ff.diagonal(model, LIK)
    first = fim(PARAMS, {}, BATCH)
    before = ff.tree.map(torch.clone, first)
    first.count.zero_()
    first.values["w"].zero_()
    assert_close(fim(PARAMS, {}, BATCH), before, 1e-15)


def test_inference_mode_is_not_remembered() -> None:
    observe._everything.cache_clear()
    fim, product = ff.diagonal(model, LIK), ff.fisher_vp(model, LIK)
    with torch.inference_mode():
        inside = fim(PARAMS, {}, BATCH)
        product(PARAMS, {}, BATCH, PARAMS)
    weights = observe._everything((3,), (3,), torch.float64, torch.device("cpu"))
    assert not weights.root_weights.is_inference()
    assert not weights.weights.is_inference()
    slope = torch.func.grad(lambda p: fim(p, {}, BATCH).trace())(PARAMS)
    assert slope["w"].isfinite().all()
    live = {"w": PARAMS["w"].clone().requires_grad_()}
    fim(live, {}, BATCH).trace().backward()
    assert_close(live["w"].grad, slope["w"], 1e-12)
    assert_close(ff.tree.map(torch.clone, inside), fim(PARAMS, {}, BATCH), 1e-15)
