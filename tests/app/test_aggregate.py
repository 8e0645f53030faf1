"""Sums, means and chunks of a diagonal."""

from __future__ import annotations

import math

import pytest
import torch

from fisherfn.app.aggregate import Share, by_component, by_layer, by_module, by_tensor

VALUES = {
    "model.embed_tokens.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "model.layers.0.mlp.up_proj.weight": torch.tensor([[5.0, 0.0, 1.0]]),
    "model.layers.0.mlp.up_proj.bias": torch.tensor([2.0, 2.0]),
    "model.layers.1.input_layernorm.weight": torch.tensor([0.5]),
}


def test_layers_and_tensors_are_ranked_by_their_sum() -> None:
    assert by_layer(VALUES) == [
        Share("embeddings", 10.0, 4),
        Share("layer_0", 10.0, 5),
        Share("layer_1", 0.5, 1),
    ]
    assert [share.name for share in by_tensor(VALUES)][:2] == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
    ]
    assert by_layer(VALUES)[1].fisher_mean == 2.0


def test_components_join_weight_and_bias() -> None:
    assert by_component(VALUES)[1] == Share("layer_0.mlp.up_proj", 10.0, 5)


@pytest.mark.parametrize("granularity", [2, 3, 4, 7])
def test_chunks_lose_no_element(granularity: int) -> None:
    chunks = by_component(VALUES, granularity)
    assert math.isclose(sum(c.fisher_sum for c in chunks), 20.5)
    assert sum(c.parameters for c in chunks) == 10
    sizes = [c.parameters for c in chunks if c.name.startswith("layer_0.mlp.up_proj[")]
    assert len(sizes) == min(granularity, 5)
    assert max(sizes) - min(sizes) <= 1


def test_chunks_are_named_in_order() -> None:
    chunks = {c.name: c for c in by_component(VALUES, 2)}
    assert chunks["layer_0.mlp.up_proj[0]"] == Share("layer_0.mlp.up_proj[0]", 6.0, 3)
    assert chunks["layer_0.mlp.up_proj[1]"] == Share("layer_0.mlp.up_proj[1]", 4.0, 2)


def test_module_rows() -> None:
    row = next(r for r in by_module(VALUES) if r.layer == "model.layers.0.mlp.up_proj")
    flat = torch.tensor([5.0, 0.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    assert row.num_params == 5
    assert (row.total_fisher, row.mean, row.max, row.min) == (10.0, 2.0, 5.0, 0.0)
    assert math.isclose(row.std, flat.std(correction=0).item())
    assert math.isclose(sum(r.percentage for r in by_module(VALUES)), 100.0)
    assert by_module(VALUES)[-1].std == 0.0


def test_float32_sums_do_not_drift() -> None:
    values = {"w": torch.full((4_000_000,), 0.1)}
    exact = 4_000_000 * torch.tensor(0.1).double().item()
    assert math.isclose(by_tensor(values)[0].fisher_sum, exact, rel_tol=1e-12)


def test_empty_tensors_and_zero_totals() -> None:
    values = {"a.weight": torch.zeros(3), "b.weight": torch.zeros(0)}
    assert [share.name for share in by_layer(values)] == ["other"]
    assert by_module(values)[0].percentage == 0.0
