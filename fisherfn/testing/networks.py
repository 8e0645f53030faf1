"""Small modules with random weights, for the strategies: one builder for each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 5


@dataclass(frozen=True)
class Network:
    """A module in evaluation mode, its inputs, and the positions it answers at."""

    module: nn.Module
    inputs: Callable[[int, int], Any]
    positions: tuple[int, ...]
    causal: bool


def normal(seed: int, *shape: int) -> Tensor:
    """Return normal numbers from a generator of their own.

    Args:
        seed: Seed of the generator.
        *shape: Sizes.

    Returns:
        float64 tensor `[*shape]`.
    """
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def tokens(seed: int, *shape: int) -> Tensor:
    """Return random tokens below `VOCABULARY`.

    Args:
        seed: Seed of the generator.
        *shape: Sizes.

    Returns:
        int64 tensor `[*shape]`.
    """
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, shape, generator=rng)


def call(module: nn.Module, inputs: Any) -> Tensor:
    """Call a module with a tensor, a tuple or a mapping.

    Args:
        module: Any module that returns a tensor.
        inputs: Its inputs.

    Returns:
        Its outputs.
    """
    if isinstance(inputs, Tensor):
        return module(inputs)
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


class Sequence(nn.Module):
    """Token and place embedding, a causal mean, two norms, a head tied to the embedding or not."""

    def __init__(self, length: int, width: int, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4)
        self.place = nn.Parameter(torch.zeros(8, 4))
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, width)
        self.tied = tied

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits `[B, T, width]`."""
        length = ids.shape[1]
        h = self.embed(ids) + self.place[:length]
        past = h.cumsum(1) / torch.arange(1, length + 1).unsqueeze(1)
        h = h + torch.tanh(self.mix(self.norm(past))) * self.scale
        if self.tied:
            return self.head(h) + F.linear(h, self.embed.weight).sum(-1, keepdim=True).sin()
        return self.head(h)


class Image(nn.Module):
    """Convolution, group norm, pooling, head."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2, stride=1, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, width]`."""
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((-1, -2)))


class Reuse(nn.Module):
    """One linear layer in every step of a recurrence; answers at each step."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 3)
        self.step = nn.Linear(3, 3)
        self.head = nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, T, width]`."""
        h = torch.zeros_like(x[:, 0])
        answers = []
        for t in range(x.shape[1]):
            h = torch.tanh(self.enter(x[:, t]) + self.step(h))
            answers.append(self.head(h))
        return torch.stack(answers, 1)


class Unknown(nn.Module):
    """Parameters used in ways that no layer rule knows, next to a linear head."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3, 2))
        self.second = nn.Parameter(torch.zeros(3, 2))
        self.head = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, T, width]`."""
        weight = torch.cat([self.first, self.second.tanh()], dim=1)
        return self.head(torch.einsum("bti,io->bto", x, weight).tanh())


class Mapped(nn.Module):
    """Two inputs, handed over by name; no positions."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return logits `[B, width]`."""
        return self.head(torch.sigmoid(self.left(a)) * self.right(b))


class Gated(nn.Module):
    """A layer, then two that read its output, of different sizes, and a head."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 4)
        self.gate = nn.Linear(4, 3)
        self.up = nn.Linear(4, 2)
        self.head = nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, T, width]`."""
        h = torch.tanh(self.enter(x))
        return self.head(torch.sigmoid(self.gate(h)) * self.up(h).sum(-1, keepdim=True))


def _mlp(length: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, width)
    )


def _floats(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda size, seed: normal(seed, size, *shape)


def _named(size: int, seed: int) -> dict[str, Tensor]:
    return {"a": normal(seed, size, 3), "b": normal(seed + 1, size, 2)}


#: Kind to (module from length and width, inputs from length, positions from length, causal).
BUILDERS: dict[str, tuple[Any, Any, Any, bool]] = {
    "mlp": (_mlp, lambda t: _floats(3), lambda t: (), False),
    "positionwise": (_mlp, lambda t: _floats(t, 3), lambda t: (t,), True),
    "grid": (_mlp, lambda t: _floats(t, 2, 3), lambda t: (t, 2), True),
    "image": (Image, lambda t: _floats(2, 2 + t, 3), lambda t: (), False),
    "sequence": (
        lambda t, w: Sequence(t, w, tied=False),
        lambda t: lambda size, seed: tokens(seed, size, t),
        lambda t: (t,),
        True,
    ),
    "tied": (
        lambda t, w: Sequence(t, w, tied=True),
        lambda t: lambda size, seed: tokens(seed, size, t),
        lambda t: (t,),
        True,
    ),
    "reuse": (Reuse, lambda t: _floats(t, 3), lambda t: (t,), True),
    "unknown": (Unknown, lambda t: _floats(t, 3), lambda t: (t,), True),
    "gated": (Gated, lambda t: _floats(t, 3), lambda t: (t,), True),
    "mapped": (Mapped, lambda t: _named, lambda t: (), False),
}


def build(kind: str, seed: int, length: int, width: int) -> Network:
    """Build one network, without touching torch's global generator.

    Args:
        kind: A key of `BUILDERS`.
        seed: Seed of the weights.
        length: Number of positions, where it has any.
        width: Size of the last axis of the outputs.

    Returns:
        The network, float64, in evaluation mode.
    """
    make, inputs, positions, causal = BUILDERS[kind]
    with torch.random.fork_rng(devices=[]):
        module = make(length, width).double().eval()
    with torch.no_grad():
        for number, param in enumerate(module.parameters()):
            param.copy_(0.7 * normal(seed + 31 * number, *param.shape))
    return Network(module, inputs(length), positions(length), causal)
