"""The general path: per-example scores of some parameters by differentiating example by example.

Exact for any model and any use of a parameter, at the price of a forward and a backward for each
example, batched by `vmap` where the model's operations allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfn.capture.engines import needs_composition
from fisherfn.capture.plain import PlainAttention
from fisherfn.core import trees
from fisherfn.core.modes import transformed


def scores(
    model: Any,
    params: Any,
    buffers: Any,
    inputs: Any,
    cotangents: Any,
    leaves: Sequence[int],
    *,
    looped: bool,
) -> list[Tensor]:
    """Return the scores of some parameters, each `[K, B, *shape]`.

    Args:
        model: The function `(params, buffers, inputs) -> outputs`.
        params: Its parameters.
        buffers: What else it reads.
        inputs: Inputs of B examples.
        cotangents: Like the outputs, with a leading axis K.
        leaves: Indices of the parameters.
        looped: Go example by example in Python, for models that refuse `vmap`.
    """
    values, structure = trees.flatten(params)
    chosen = [values[i] for i in leaves]

    def forward(some: list[Tensor], one: Any) -> Any:
        every = list(values)
        for i, t in zip(leaves, some, strict=True):
            every[i] = t
        single = trees.map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, one)
        return model(trees.unflatten(structure, every), buffers, single)

    def example(one: Any, cotangent: Any) -> list[Tensor]:
        pull = torch.func.vjp(lambda some: forward(some, one), chosen)[1]
        return torch.func.vmap(lambda c: pull(c)[0])(cotangent)

    # columns first within an example: [B, K, 1, ...]
    moved = trees.map(lambda c: c.transpose(0, 1).unsqueeze(2), cotangents)
    if not looped:
        with PlainAttention():
            found = torch.func.vmap(example)(inputs, moved)
        return [t.transpose(0, 1) for t in found]
    batch, columns = trees.leaves(moved)[0].shape[:2]
    composed = transformed() or needs_composition(params, buffers, inputs)
    pull = _composed_pull if composed else _eager_pull
    rows: list[Sequence[Tensor]] = []
    for b in range(batch):
        one = trees.map(lambda t, b=b: t[b] if isinstance(t, Tensor) else t, inputs)
        own = [trees.map(lambda c, b=b, k=k: c[b, k], moved) for k in range(columns)]
        rows += pull(lambda some, one=one: forward(some, one), chosen, own)
    return [
        torch.stack([row[i] for row in rows]).reshape(batch, columns, *t.shape).transpose(0, 1)
        for i, t in enumerate(chosen)
    ]


def _composed_pull(
    forward: Callable[[list[Tensor]], Any], chosen: list[Tensor], cotangents: Sequence[Any]
) -> list[Sequence[Tensor]]:
    with PlainAttention():
        pull = torch.func.vjp(forward, chosen)[1]
    return [pull(c)[0] for c in cotangents]


def _eager_pull(
    forward: Callable[[list[Tensor]], Any], chosen: list[Tensor], cotangents: Sequence[Any]
) -> list[Sequence[Tensor]]:
    """Use autograd itself, which also knows modules that `torch.func` does not."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in chosen]
        outputs = forward(leaves)
    pairs = [(i, out) for i, out in enumerate(trees.leaves(outputs)) if out.requires_grad]
    rows: list[Sequence[Tensor]] = []
    for c in cotangents:
        own = trees.leaves(c)
        found = torch.autograd.grad(
            [out for _, out in pairs],
            leaves,
            [own[i] for i, _ in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        rows.append(
            [torch.zeros_like(t) if g is None else g for g, t in zip(found, chosen, strict=True)]
        )
    return rows
