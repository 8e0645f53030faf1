"""Small problems in float64 on which Kronecker factors are compared entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fisherfn as ff
from benchmarks import models
from benchmarks.kronecker_peers import Options
from benchmarks.workloads import Workload

EXAMPLES, CLASSES, TOKENS = 4, 3, 5


@dataclass(frozen=True)
class Case:
    """A problem, and what its users choose."""

    workload: Workload
    options: Options


class Pooled(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, width]` to `[B, width]`."""
        return x.mean(1)


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self, width: int) -> None:
        """Build the layer."""
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, width]` to the same."""
        return self.linear(torch.tanh(self.linear(x)))


def _vectors(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(EXAMPLES, *shape, dtype=torch.float64)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def _dilated() -> nn.Module:
    layers = nn.Conv2d(2, 3, 2, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, CLASSES)
    return nn.Sequential(*layers)


def _grouped() -> nn.Module:
    layers = nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, CLASSES)
    return nn.Sequential(*layers)


def _pooled() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Pooled(), nn.Linear(5, CLASSES))


def _reused() -> nn.Module:
    layers = nn.Linear(4, 5), nn.Tanh(), Twice(5), nn.Tanh(), nn.Linear(5, CLASSES)
    return nn.Sequential(*layers)


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def _transformer() -> nn.Module:
    return models.GPT(CLASSES, TOKENS, width=4, layers=1, heads=2)


def _ids(vocabulary: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(vocabulary, (EXAMPLES, TOKENS))


# What is asked: (model, inputs, whether each position has a label)
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], bool]] = {
    "mlp": (_mlp, _vectors(4), False),
    "mlp, loss summed": (_mlp, _vectors(4), False),
    "mlp, class weights": (_mlp, _vectors(4), False),
    "mlp, four draws": (_mlp, _vectors(4), False),
    "convolution": (_convolution, _vectors(2, 5, 5), False),
    "convolution, dilated": (_dilated, _vectors(2, 5, 5), False),
    "convolution, grouped": (_grouped, _vectors(4, 3, 3), False),
    "sequence, pooled": (_pooled, _vectors(TOKENS, 4), False),
    "sequence, labels": (_mlp, _vectors(TOKENS, 4), True),
    "sequence, masked": (_mlp, _vectors(TOKENS, 4), True),
    "embedding": (_embedding, _ids(6), True),
    "transformer": (_transformer, _ids(CLASSES), True),
    "layer used twice": (_reused, _vectors(4), False),
}


def build(name: str) -> Case:
    """Build a case from its name, always the same."""
    make, draw, labelled = PROBLEMS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, inputs = make().double().eval(), draw()
        targets = torch.randint(CLASSES, (EXAMPLES, TOKENS) if labelled else (EXAMPLES,))
    mask = weights = class_weight = None
    if name == "sequence, masked":
        mask = torch.arange(TOKENS) < torch.tensor([5, 3, 4, 2]).unsqueeze(1)
    if name == "mlp, class weights":
        targets = torch.tensor([0, 1, 2, 1])
        class_weight = torch.tensor([0.5, 0.75, 2.0], dtype=torch.float64)
        weights = class_weight[targets]  # which add up to the number of examples
    batch = ff.Batch(inputs, targets, mask, weights)
    workload = Workload(name, module, batch, CLASSES, {}, smooth=True)
    options = Options(
        "sum" if name in ("mlp, loss summed", "sequence, masked") else "mean",
        class_weight,
        reused=name == "layer used twice",
        draws=4 if name == "mlp, four draws" else 1,
    )
    return Case(workload, options)
