"""One case for each option of linear layers, embeddings and normalisations."""

from __future__ import annotations

import torch
from torch import nn

from cases.base import FLOAT, Built, Case, Net, normal, table, tokens
from cases.builders import between, embedded, features, pooled


def _mlp() -> Built:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    return Built(net.double(), normal(4, 4, seed=1))


LINEAR = table(
    Case("linear_alone", lambda: Built(nn.Linear(4, 3).double(), normal(5, 4))),
    Case("linear_no_bias", lambda: Built(nn.Linear(4, 3, bias=False).double(), normal(5, 4))),
    Case("mlp", _mlp),
    Case("linear_3d", lambda: features(nn.Linear(4, 5), 5, 6, 4)),
    Case("linear_4d", lambda: features(nn.Linear(4, 5), 5, 2, 3, 4)),
    Case("linear_3d_pooled", lambda: pooled(nn.Linear(4, 5), 5, 6, 4)),
    Case("linear_3d_pooled_no_bias", lambda: pooled(nn.Linear(4, 5, bias=False), 5, 6, 4)),
    Case("linear_3d_long_thin", lambda: pooled(nn.Linear(2, 3), 3, 40, 2)),
    Case("linear_3d_short_wide", lambda: pooled(nn.Linear(24, 20), 20, 2, 24)),
    Case("linear_one_position", lambda: pooled(nn.Linear(4, 5), 5, 1, 4)),
    Case("linear_one_feature", lambda: pooled(nn.Linear(1, 1), 1, 4, 1)),
    Case("bilinear", lambda: _bilinear(), general=("layer.weight", "layer.bias")),
)


def _bilinear() -> Built:
    net = Net(
        lambda m, x, y: m.head(torch.tanh(m.layer(x, y))),
        layer=nn.Bilinear(3, 4, 5),
        head=nn.Linear(5, 3),
    )
    return Built(net.double(), (normal(3, 3), normal(3, 4, seed=1)))


EMBEDDING = table(
    Case("embedding", lambda: embedded(nn.Embedding(7, 4), 4, tokens(3, 5))),
    Case(
        "embedding_repeated_tokens",
        lambda: embedded(nn.Embedding(7, 4), 4, torch.tensor([[1, 1, 2, 1], [3, 3, 3, 3]])),
    ),
    Case(
        "embedding_padding_idx",
        lambda: embedded(
            nn.Embedding(7, 4, padding_idx=2), 4, torch.tensor([[1, 2, 2], [2, 0, 6]])
        ),
    ),
    Case(
        "embedding_negative_padding_idx",
        lambda: embedded(nn.Embedding(7, 4, padding_idx=-1), 4, torch.tensor([[1, 6], [6, 6]])),
    ),
    Case("embedding_one_token", lambda: embedded(nn.Embedding(7, 4), 4, tokens(4))),
    Case("embedding_grid", lambda: embedded(nn.Embedding(5, 3), 3, tokens(2, 2, 3, high=5))),
    Case(
        "embedding_bag",
        lambda: embedded(nn.EmbeddingBag(7, 4, mode="sum"), 4, tokens(3, 5)),
        general=("layer.weight",),
    ),
    Case(
        "embedding_by_index",
        lambda: Built(
            Net(
                lambda m, t: m.head(torch.tanh(m.table[t])),
                table=normal(7, 4),
                head=nn.Linear(4, 3),
            ).double(),
            tokens(3, 4),
        ),
        general=None,
    ),
    Case(
        "embedding_pooled",
        lambda: Built(
            Net(
                lambda m, t: m.head(torch.tanh(m.layer(t)).mean(1)),
                layer=nn.Embedding(7, 4),
                head=nn.Linear(4, 3),
            ).double(),
            tokens(3, 6),
        ),
    ),
)


def _batch_norm(layer: nn.Module, width: int, *shape: int) -> Built:
    built = between(layer, width, *shape)
    rng = torch.Generator().manual_seed(0)
    layer.running_mean = torch.randn(width, generator=rng, dtype=FLOAT)
    layer.running_var = torch.rand(width, generator=rng, dtype=FLOAT) + 0.5
    return built


NORMALISATION = table(
    Case("layer_norm", lambda: features(nn.LayerNorm(4), 4, 3, 4)),
    Case("layer_norm_flat", lambda: features(nn.LayerNorm(4), 4, 4)),
    Case("layer_norm_pooled", lambda: pooled(nn.LayerNorm(4), 4, 3, 4)),
    Case("layer_norm_two_axes", lambda: features(nn.LayerNorm([3, 4]), 4, 3, 4)),
    Case("layer_norm_no_bias", lambda: features(nn.LayerNorm(4, bias=False), 4, 3, 4)),
    Case(
        "layer_norm_not_affine",
        lambda: features(nn.LayerNorm(4, elementwise_affine=False), 4, 3, 4),
    ),
    Case("rms_norm", lambda: pooled(nn.RMSNorm(4), 4, 3, 4)),
    Case("rms_norm_flat", lambda: features(nn.RMSNorm(4), 4, 4)),
    Case("group_norm", lambda: between(nn.GroupNorm(2, 4), 4, 4, 3, 3)),
    Case("group_norm_flat", lambda: between(nn.GroupNorm(2, 4), 4, 4)),
    Case("instance_norm1d", lambda: between(nn.InstanceNorm1d(3, affine=True), 3, 3, 5)),
    Case("instance_norm2d", lambda: between(nn.InstanceNorm2d(3, affine=True), 3, 3, 3, 4)),
    Case("batch_norm1d", lambda: _batch_norm(nn.BatchNorm1d(4), 4, 4)),
    Case("batch_norm1d_sequence", lambda: _batch_norm(nn.BatchNorm1d(4), 4, 4, 3)),
    Case("batch_norm2d", lambda: _batch_norm(nn.BatchNorm2d(3), 3, 3, 3, 4)),
    Case("batch_norm3d", lambda: _batch_norm(nn.BatchNorm3d(2), 2, 2, 2, 2, 2)),
)


ALL = LINEAR | EMBEDDING | NORMALISATION
