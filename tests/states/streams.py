"""What streams the tests of states run on: trees, and every entrywise result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.curvature import BlockDiagonal, Dense, Diagonal, GradientMoments, Layout, leaf_groups

PARAMS = {"0.weight": torch.zeros(2, 3).double(), "0.bias": torch.zeros(2).double()}
LAYOUT = Layout.of(PARAMS)


def tree(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    key = random.key(seed)
    return {
        name: scale * random.normal(random.fold_in(key, i), tuple(p.shape), p.dtype)
        for i, (name, p) in enumerate(PARAMS.items())
    }


def matrix(seed: int, n: int) -> Tensor:
    root = random.normal(random.key(seed), (n, n + 1), torch.float64)
    return root @ root.T


def count(seed: int) -> Tensor:
    return torch.tensor(1.0 + seed % 7, dtype=torch.float64)


def nested(seed: int) -> Any:
    return {"plain": tree(seed), "pair": (Diagonal(tree(seed + 50), count(seed)), None)}


STREAMS: dict[str, Any] = {
    "tree": tree,
    "tensor": lambda seed: tree(seed)["0.weight"],
    "diagonal": lambda seed: Diagonal(tree(seed), count(seed)),
    "diagonal_stderr": lambda seed: Diagonal(
        tree(seed), count(seed), {k: v.abs() for k, v in tree(seed + 9).items()}, fisher="mc"
    ),
    "dense": lambda seed: Dense(matrix(seed, 8), count(seed), LAYOUT),
    "blocks": lambda seed: BlockDiagonal(
        {"0.weight": matrix(seed, 6), "0.bias": matrix(seed, 2)},
        count(seed),
        LAYOUT,
        leaf_groups(LAYOUT),
    ),
    "moments": lambda seed: GradientMoments(count(seed), tree(seed), tree(seed + 5)),
    "nested": nested,
}
