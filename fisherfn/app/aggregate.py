"""Sums and means of a Fisher diagonal over layers, components and modules.

A sum says how much of the trace a group carries and favours large tensors; the mean, the sum over
the number of parameters, does not. Everything is added in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.groups.names import places


@dataclass(frozen=True)
class Share:
    """What one group of parameters carries."""

    name: str
    fisher_sum: float
    parameters: int

    @property
    def fisher_mean(self) -> float:
        """Sum over the number of parameters."""
        return self.fisher_sum / self.parameters


@dataclass(frozen=True)
class ModuleRow:
    """A row of `fisher.csv`: one module, that is, a parameter's name without its last part."""

    layer: str
    total_fisher: float
    percentage: float
    mean: float
    std: float
    max: float
    min: float
    num_params: int


def by_tensor(values: Mapping[str, Tensor]) -> list[Share]:
    """Return the share of every tensor, largest sum first."""
    return _ranked(Share(name, _sum(t), t.numel()) for name, t in values.items())


def by_layer(values: Mapping[str, Tensor]) -> list[Share]:
    """Return the share of every layer (see `names`), largest sum first."""
    located = places(values)
    return _ranked(
        Share(layer, math.fsum(map(_sum, group)), sum(t.numel() for t in group))
        for layer, group in _groups(values, lambda name: located[name].layer)
    )


def by_component(values: Mapping[str, Tensor], granularity: int = 1) -> list[Share]:
    """Return the share of every component, largest sum first.

    Args:
        values: The diagonal: name to tensor.
        granularity: With N > 1, each component is flattened, its tensors one after the other, and
            cut into N chunks `name[0]` ... `name[N-1]` whose sizes differ by at most one, so that
            no element is lost. Chunks that would be empty are left out.

    Returns:
        One share a component, or a chunk.
    """
    located = places(values)
    shares: list[Share] = []
    for name, group in _groups(values, lambda name: located[name].component):
        if granularity == 1:
            shares.append(Share(name, math.fsum(map(_sum, group)), sum(t.numel() for t in group)))
            continue
        flat = torch.cat([t.reshape(-1) for t in group])
        chunks = torch.tensor_split(flat, granularity)
        shares += [
            Share(f"{name}[{i}]", _sum(chunk), chunk.numel())
            for i, chunk in enumerate(chunks)
            if chunk.numel()
        ]
    return _ranked(shares)


def by_module(values: Mapping[str, Tensor]) -> list[ModuleRow]:
    """Return one row a module, largest sum first; `std` is the population's, 0 for one value."""
    total = math.fsum(map(_sum, values.values()))
    rows = []
    for module, group in _groups(values, lambda name: name.rpartition(".")[0] or name):
        count = sum(t.numel() for t in group)
        mass = math.fsum(map(_sum, group))
        mean = mass / count
        spread = math.fsum(((t.double() - mean) ** 2).sum().item() for t in group)
        rows.append(
            ModuleRow(
                layer=module,
                total_fisher=mass,
                percentage=100 * fraction(mass, total),
                mean=mean,
                std=math.sqrt(spread / count),
                max=max(t.max().item() for t in group),
                min=min(t.min().item() for t in group),
                num_params=count,
            )
        )
    return sorted(rows, key=lambda row: -row.total_fisher)


def fraction(part: float, total: float) -> float:
    """Return part / total, and 0 where nothing is there to share."""
    return part / total if total > 0 else 0.0


def _sum(t: Tensor) -> float:
    return t.sum(dtype=torch.float64).item()


def _ranked(shares: Iterable[Share]) -> list[Share]:
    return sorted(shares, key=lambda share: -share.fisher_sum)


def _groups(
    values: Mapping[str, Tensor], label: Callable[[str], str]
) -> Iterable[tuple[str, list[Tensor]]]:
    groups: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        if value.numel():
            groups.setdefault(label(name), []).append(value)
    return groups.items()
