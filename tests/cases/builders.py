"""Small networks around one layer or operation, so that its inputs and cotangents vary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cases.base import Built, Net, normal


def between(layer: nn.Module, width: int, *shape: int, labels: int = 3) -> Built:
    """Put a layer between curved functions, then pool everything but examples and channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.layer(torch.sin(x)))
        return m.head(h.flatten(2).mean(-1) if h.ndim > 2 else h)

    net = Net(forward, layer=layer, head=nn.Linear(width, labels)).double()
    return Built(net, normal(3, *shape, seed=3))


def features(layer: nn.Module, width: int, *shape: int) -> Built:
    """Put a layer that acts on the last axis between curved functions; every position answers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.layer(torch.sin(x))))

    net = Net(forward, layer=layer, head=nn.Linear(width, 3)).double()
    return Built(net, normal(3, *shape, seed=4))


def pooled(layer: nn.Module, width: int, *shape: int) -> Built:
    """One answer from all positions: their scores meet before squaring."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.layer(torch.sin(x))).mean(1))

    net = Net(forward, layer=layer, head=nn.Linear(width, 3)).double()
    return Built(net, normal(3, *shape, seed=5))


def embedded(layer: nn.Module, width: int, ids: Tensor) -> Built:
    net = Net(lambda m, t: m.head(torch.tanh(m.layer(t))), layer=layer, head=nn.Linear(width, 3))
    return Built(net.double(), ids)


def elementwise(forward: Any, *shape: int, **parts: Any) -> Built:
    """`forward(m, h)` on curved features `[B, *shape]`, then a linear head on the last axis."""

    def whole(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(forward(m, torch.sin(x))))

    net = Net(whole, head=nn.Linear(shape[-1], 3), **parts).double()
    return Built(net, normal(3, *shape, seed=6))


def function(forward: Any, x: Tensor, **params: Tensor) -> Built:
    """A model that is a plain function of its parameters."""

    def model(p: dict[str, Tensor], buffers: Any, inputs: Tensor) -> Tensor:
        return forward(p, inputs)

    return Built(model, x, params)


def data(*shape: int) -> Tensor:
    return normal(3, *shape, seed=7)


def net(forward: Any, inputs: Any, **parts: Any) -> Built:
    return Built(Net(forward, **parts).double(), inputs)


def rows(*shape: int) -> Tensor:
    return normal(3, *shape, seed=12)


def linear(width_in: int = 4, width_out: int = 3, bias: bool = True) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=bias)


def two_layers() -> dict[str, nn.Module]:
    return {"a": linear(4, 5), "b": linear(5, 3)}
