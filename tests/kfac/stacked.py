"""Networks in which several layers read one tensor, beside those in which they are one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kfac.layers import CATEGORICAL, Flattened, Product
from kfac.loops import Case, normal, seeded
from torch import Tensor, nn

from fisherfn.core import trees

MASK = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])


class Several(nn.Module):
    """Layers that read one tensor, then a head on what they give; or one layer in their place."""

    def __init__(self, layers: Sequence[nn.Module], sizes: Sequence[int], kind: Kind) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            dict(zip("qkv", layers, strict=True)) if len(layers) > 1 else {"all": layers[0]}
        )
        self.head = nn.Linear(sum(sizes), 3)
        self.sizes, self.kind = sizes, kind

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        found = [layer(h) for layer in self.layers.values()]
        axis, groups = (1, self.kind.groups) if self.kind.channels else (-1, 1)
        if len(found) == 1:
            pieces = found[0].movedim(axis, -1).unflatten(-1, (groups, -1))
            cut = pieces.split([n // groups for n in self.sizes], -1)
            found = [piece.flatten(-2).movedim(-1, axis) for piece in cut]
        h = torch.cat([torch.tanh((i + 1) * y) for i, y in enumerate(found)], axis)
        if self.kind.channels:
            h = h.flatten(2).transpose(1, 2)
        return self.head(h.mean(1) if self.kind.pool else h)


@dataclass(frozen=True)
class Kind:
    """Layers of one kind, of some numbers of outputs.

    Attributes:
        make: From a number of outputs to a layer.
        shape: That of the input of one example.
        sizes: Numbers of outputs.
        pool: Whether positions are averaged before the head.
        channels: Whether the outputs are along axis 1.
        groups: Those of a convolution.
        axis: That of the weight along which the outputs are, within a group.
    """

    make: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = (2, 4, 2)
    pool: bool = False
    channels: bool = False
    groups: int = 1
    axis: int = 0

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weights, or the biases, of all layers as those of one."""
        axis = self.axis if tensors[0].dim() > 1 else 0
        if self.groups == 1 or axis:
            return torch.cat(list(tensors), axis)
        cut = [t.unflatten(0, (self.groups, -1)) for t in tensors]
        return torch.cat(cut, 1).flatten(0, 1)


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda n: nn.Linear(4, n), (4,)),
    "linear_without_bias": Kind(lambda n: nn.Linear(4, n, bias=False), (4,)),
    "linear_positions": Kind(lambda n: nn.Linear(4, n), (3, 4)),
    "linear_pooled": Kind(lambda n: nn.Linear(4, n), (3, 4), pool=True),
    "flattened": Kind(lambda n: Flattened(4, n), (3, 4), axis=1),
    "product": Kind(lambda n: Product(4, n), (3, 4), pool=True, axis=1),
    "conv1d": Kind(
        lambda n: nn.Conv1d(2, n, 2, dilation=2, padding=1), (2, 5), pool=True, channels=True
    ),
    "conv2d_groups": Kind(
        lambda n: nn.Conv2d(4, n, (2, 3), stride=2, padding=(0, 1), groups=2),
        (4, 4, 3),
        pool=True,
        channels=True,
        groups=2,
    ),
    "transposed": Kind(
        lambda n: nn.ConvTranspose1d(4, n, 2, stride=2, bias=False), (4, 2), channels=True, axis=1
    ),
}


@dataclass(frozen=True)
class Pair:
    """The same function twice: with several layers, and with one in their place."""

    several: Case
    one: Case
    kind: Kind

    @property
    def joint(self) -> list[tuple[str, ...]]:
        return [tuple(f"layers.{name}.weight" for name in "qkv")]

    @property
    def name(self) -> str:
        return "+".join(self.joint[0])

    def stacked(self, tree: dict[str, Tensor]) -> dict[str, Tensor]:
        """A tree like the parameters of the several layers as one like those of the other."""
        found = {}
        for name in self.one.args[0]:
            if name.startswith("layers."):
                end = name.rsplit(".", 1)[1]
                found[name] = self.kind.stack([tree[f"layers.{part}.{end}"] for part in "qkv"])
            else:
                found[name] = tree[name]
        return found

    @property
    def order(self) -> Tensor:
        """Where in the parameters of the several layers those of the other are."""
        start, index = 0, {}
        for name, leaf in self.several.args[0].items():
            index[name] = torch.arange(start, start + leaf.numel()).reshape(leaf.shape)
            start += leaf.numel()
        return torch.cat([x.reshape(-1) for x in self.stacked(index).values()])

    def both(self, make: Any, key: Tensor | None = None, **options: Any) -> tuple[Any, Any]:
        """The result with a joint block, and that of the single layer."""
        found = []
        for case, own in ((self.several, {"joint": self.joint}), (self.one, {})):
            fim = make(case.model, case.likelihood, **own, **options)
            found.append(fim(*case.args, key=key))
        return found[0], found[1]


def pair(name: str, size: int = 3, **fields: Any) -> Pair:
    """Both networks on the same data; `fields` are those of a `Case`."""
    kind = KINDS[name]
    several = seeded(lambda: Several([kind.make(n) for n in kind.sizes], kind.sizes, kind))
    one = seeded(lambda: Several([kind.make(sum(kind.sizes))], kind.sizes, kind))
    inputs = normal(1, size, *kind.shape)
    with torch.no_grad():
        shape = several(inputs).shape[:-1]
    targets = torch.randint(3, shape, generator=torch.Generator().manual_seed(5))
    cases = [
        Case(module, "layers.all", inputs, *CATEGORICAL, targets, **fields)
        for module in (several, one)
    ]
    found = Pair(cases[0], cases[1], kind)
    stacked = found.stacked({k: p.detach() for k, p in several.named_parameters()})
    one.load_state_dict(stacked)
    torch.testing.assert_close(several(inputs), one(inputs), rtol=1e-12, atol=1e-12)
    return found


def block_places(found: Pair) -> Tensor:
    """Where in the parameters of the several layers the entries of the joint block are."""
    params = found.one.args[0]
    start, places = 0, []
    for name, leaf in params.items():
        index = found.order[start : start + leaf.numel()].reshape(leaf.shape)
        start += leaf.numel()
        if name == "layers.all.weight":
            places.insert(0, index.T if found.kind.axis else index)
        elif name == "layers.all.bias":
            places.append(index.unsqueeze(1))
    return torch.cat(places, 1).reshape(-1)


def draw(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: normal(i, *p.shape) for i, (name, p) in enumerate(params.items())}


def vector(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)])
