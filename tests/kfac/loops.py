"""Kronecker factors from their definition, one example, one position and one label at a time.

A module with plain layers is run on one example with hooks on one layer, which give its input and
output; a cotangent is a gradient with respect to that output. Rows are cut out by Python loops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fisherfn as ff
import oracles


@dataclass(frozen=True)
class Case:
    """A module, its data, and the layer that is looked at."""

    module: nn.Module
    layer: str
    inputs: Tensor
    likelihood: Any
    family: oracles.Family
    targets: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    positions: Tensor | None = None

    @property
    def args(self) -> tuple[Any, Any, ff.Batch]:
        _, params, buffers = ff.functional(self.module)
        batch = ff.Batch(
            self.inputs, self.targets, self.mask, self.weights, positions=self.positions
        )
        return params, buffers, batch

    @property
    def model(self) -> Any:
        return ff.functional(self.module)[0]

    @property
    def problem(self) -> oracles.Problem:
        """The same for the oracles of the whole matrix."""
        params = {k: p.detach().clone().requires_grad_() for k, p in self.args[0].items()}

        def forward(x: Tensor) -> Tensor:
            return torch.func.functional_call(self.module, params, (x,))

        return oracles.Problem(
            forward, params, self.inputs, self.family, self.targets, self.mask, self.weights
        )


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in float64 with weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double().eval()


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- rows of a layer, [groups][rows] lists of vectors --------------------------------------------


def input_rows(layer: Any, x: Tensor) -> list[list[Tensor]]:
    """The input vectors of one example, for each group; `x` has a leading axis of one."""
    if isinstance(layer, nn.Embedding):
        rows = []
        for index in x.reshape(-1).tolist():
            one = torch.zeros(layer.num_embeddings, dtype=torch.float64)
            one[index] = 1.0
            if index != layer.padding_idx:
                rows.append(one)
        return [rows]
    if not hasattr(layer, "kernel_size"):
        return [list(x.reshape(-1, x.shape[-1]))]
    x = nn.functional.pad(x, [p for size in reversed(layer.padding) for p in (size, size)])[0]
    width = x.shape[0] // layer.groups
    found: list[list[Tensor]] = []
    for group in range(layer.groups):
        channels = x[group * width : (group + 1) * width]
        rows = []
        for start in _starts(layer, x.shape[1:]):
            values = []
            for c in range(width):
                for offset in itertools.product(*(range(k) for k in layer.kernel_size)):
                    place = [
                        s + d * o for s, d, o in zip(start, layer.dilation, offset, strict=True)
                    ]
                    values.append(channels[(c, *place)])
            rows.append(torch.stack(values))
        found.append(rows)
    return found


def _starts(layer: Any, sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    ranges = []
    for size, k, s, d in zip(sizes, layer.kernel_size, layer.stride, layer.dilation, strict=True):
        ranges.append(range(0, size - d * (k - 1), s))
    return itertools.product(*ranges)


def output_rows(layer: Any, g: Tensor) -> list[list[Tensor]]:
    """The cotangent vectors of one example, for each group."""
    if not hasattr(layer, "kernel_size"):
        return [list(g.reshape(-1, g.shape[-1]))]
    width = g.shape[1] // layer.groups
    found = []
    for group in range(layer.groups):
        part = g[0, group * width : (group + 1) * width]
        places = itertools.product(*(range(n) for n in part.shape[1:]))
        found.append([part[(slice(None), *place)] for place in places])
    return found


# ---- the factors ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A [groups, I, I], G [groups, O, O], N and R."""

    A: Tensor
    G: Tensor
    count: float
    rows: float


def factors(
    case: Case,
    *,
    approx: str = "expand",
    fisher: str = "exact",
    unit: str = "example",
    bias: bool = True,
) -> Found:
    """A with a last input of one if `bias`; divided by R, and G divided by N."""
    layer = case.module.get_submodule(case.layer)
    problem = case.problem
    mask = problem.full_mask()
    exists = mask if case.positions is None else case.positions.expand(mask.shape)
    units = problem.unit_weights(unit)
    seen: dict[str, Tensor] = {}
    handle = layer.register_forward_hook(_remember(seen))
    A: Any = None
    G: Any = None
    count, many = units.sum().item(), 0.0
    for n in range(problem.size):
        out = problem.outputs(n)
        x, taps = seen["input"].detach(), seen["output"]
        if not bool(mask[n].any()):
            continue
        # how often each row of the input counts
        own = _given(case, n, mask[n])
        groups: Any = input_rows(layer, x)
        t = len(groups[0])
        if exists[n].numel() == t:
            keep = exists[n].reshape(-1).tolist()
            each = [w * k for w, k in zip(own.reshape(-1).tolist(), keep, strict=True)]
        else:
            each = [own[exists[n]].mean().item()] * t
            keep = [True] * t
        if approx == "reduce":
            weight = own[exists[n]].mean().item()
            groups = [
                [sum(a for a, k in zip(rows, keep, strict=True) if k) / sum(keep)]
                for rows in groups
            ]
            each = [weight]
        if bias:
            groups = [[torch.cat([a, a.new_ones(1)]) for a in rows] for rows in groups]
        blocks = [
            sum(w * torch.outer(a, a) for w, a in zip(each, rows, strict=True)) for rows in groups
        ]
        A = blocks if A is None else [p + q for p, q in zip(A, blocks, strict=True)]
        many += sum(each)
        for weight, scalar in _terms(case, problem, out, n, fisher, unit, units):
            (g,) = torch.autograd.grad(scalar, taps, retain_graph=True)
            cotangents: Any = output_rows(layer, g)
            if isinstance(layer, nn.Embedding):  # what is padding is never learnt
                pairs = zip(x.reshape(-1).tolist(), cotangents[0], strict=True)
                cotangents = [[row for index, row in pairs if index != layer.padding_idx]]
            if approx == "reduce":
                cotangents = [[sum(rows)] for rows in cotangents]
            blocks = [sum(weight * torch.outer(r, r) for r in rows) for rows in cotangents]
            G = blocks if G is None else [p + q for p, q in zip(G, blocks, strict=True)]
    handle.remove()
    return Found(torch.stack(A) / many, torch.stack(G) / count, count, many)


def _remember(seen: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        seen.update(input=args[0], output=out)

    return hook


def _given(case: Case, n: int, mask: Tensor) -> Tensor:
    """What the batch says of the weight of each position of example n."""
    if case.weights is None:
        return torch.ones(mask.shape, dtype=torch.float64)
    w = case.weights[n]
    return w.expand(mask.shape) if w.dim() == 0 else w


def _terms(
    case: Case,
    problem: oracles.Problem,
    out: Tensor,
    n: int,
    fisher: str,
    unit: str,
    units: Tensor,
) -> Iterator[tuple[float, Tensor]]:
    """Scalars whose gradients make the Fisher information of example n, with their weights."""
    mask = problem.full_mask()[n]
    if fisher == "empirical":
        assert problem.targets is not None
        targets = problem.targets[n : n + 1].clone()
        targets[0][~mask] = 0
        log_p = problem.family.log_prob(out, targets)[0]
        if unit == "example":
            yield units[n].item(), log_p[mask].sum()
            return
        for place in itertools.product(*(range(size) for size in mask.shape)):
            if bool(mask[place]):
                yield units[n][place].item(), log_p[place]
        return
    for place, weight, scalar in problem.family.terms(out):
        if bool(mask[place]):
            multiplicity = units[n] if unit == "example" else units[n][place]
            yield weight * multiplicity.item(), scalar


def block(G: Tensor, A: Tensor) -> Tensor:
    """The matrix of one group, as a loop over its entries."""
    outputs, inputs = len(G), len(A)
    found = torch.zeros(outputs * inputs, outputs * inputs, dtype=torch.float64)
    for o, i, p, j in itertools.product(
        range(outputs), range(inputs), range(outputs), range(inputs)
    ):
        found[o * inputs + i, p * inputs + j] = G[o, p] * A[i, j]
    return found


def places(params: dict[str, Tensor], name: str) -> Tensor:
    """Where the entries of a parameter are in a vector of all of them."""
    start = 0
    for key, leaf in params.items():
        if key == name:
            return torch.arange(start, start + leaf.numel()).reshape(leaf.shape)
        start += math.prod(leaf.shape)
    raise KeyError(name)
