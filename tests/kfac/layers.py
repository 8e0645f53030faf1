"""Small networks around one layer, so that its inputs and cotangents vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kfac.loops import Case, normal, seeded
from torch import Tensor, nn

import fisherfn as ff
import oracles

CATEGORICAL = ff.likelihoods.categorical(), oracles.Categorical()


class Around(nn.Module):
    """A layer between curved functions, then a head on each position, or on their mean."""

    def __init__(self, layer: nn.Module, width: int, *, pool: bool, channels: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, 3)
        self.pool, self.channels = pool, channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(torch.sin(x) if x.is_floating_point() else x)
        if self.channels:
            h = h.flatten(2).transpose(1, 2)
        h = torch.tanh(h)
        return self.head(h.mean(1) if self.pool else h)


class Flattened(nn.Module):
    """GPT-2's Conv1D: the weight is stored [in, out], and rows are flattened first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(0.3 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], rows.shape[-1])


class Product(nn.Module):
    """`x @ W`, without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def around(layer: Callable[[], nn.Module], width: int, *shape: int, **options: Any) -> Case:
    """A case of three examples; `shape` is that of one."""
    module = seeded(lambda: Around(layer(), width, **options))
    inputs = normal(1, 3, *shape)
    return _case(module, inputs)


def _case(module: nn.Module, inputs: Tensor) -> Case:
    with torch.no_grad():
        shape = module(inputs).shape[:-1]
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(3, shape, generator=generator)
    return Case(module, "layer", inputs, *CATEGORICAL, targets)


def embedding(padding: int | None) -> Case:
    table = seeded(lambda: Around(nn.Embedding(5, 4, padding), 4, pool=False))
    ids = torch.tensor([[0, 1, 1], [4, 2, 0], [3, 3, 3]])
    return _case(table, ids)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: around(lambda: nn.Linear(4, 3), 3, 4, pool=False),
    "linear_without_bias": lambda: around(lambda: nn.Linear(4, 3, bias=False), 3, 4, pool=False),
    "linear_positions": lambda: around(lambda: nn.Linear(4, 3), 3, 3, 4, pool=False),
    "linear_pooled": lambda: around(lambda: nn.Linear(4, 3), 3, 3, 4, pool=True),
    "flattened": lambda: around(lambda: Flattened(4, 3), 3, 3, 4, pool=False),
    "product": lambda: around(lambda: Product(4, 3), 3, 3, 4, pool=True),
    "conv1d": lambda: around(
        lambda: nn.Conv1d(2, 4, 2, dilation=2, padding=1), 4, 2, 5, pool=True, channels=True
    ),
    "conv2d_groups": lambda: around(
        lambda: nn.Conv2d(4, 2, (2, 3), stride=2, padding=(0, 1), groups=2),
        2,
        4,
        4,
        3,
        pool=True,
        channels=True,
    ),
    "conv2d_positions": lambda: around(
        lambda: nn.Conv2d(2, 3, 2), 3, 2, 3, 3, pool=False, channels=True
    ),
    "depthwise": lambda: around(
        lambda: nn.Conv2d(3, 3, 2, groups=3, bias=False), 3, 3, 3, 3, pool=True, channels=True
    ),
    "conv3d": lambda: around(
        lambda: nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 1)),
        3,
        2,
        2,
        4,
        3,
        pool=True,
        channels=True,
    ),
    "embedding": lambda: embedding(None),
    "embedding_padding": lambda: embedding(0),
}
