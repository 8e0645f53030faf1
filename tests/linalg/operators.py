"""Operators with known spectra, as functions of trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fisherfn as ff

SIZE = 40

#: Spectra that go wrong where reorthogonalisation, pivots or stopping do.
SPECTRA: dict[str, list[float]] = {
    "zero": [0.0] * SIZE,
    "rank one": [5.0] + [0.0] * (SIZE - 1),
    "rank three": [5.0, 2.0, 1.0] + [0.0] * (SIZE - 3),
    "identity": [1.0] * SIZE,
    "geometric": [0.7**i for i in range(SIZE)],
    "three values": [10.0, 9.0] + [1.0] * (SIZE - 2),
    "double top": [10.0, 10.0, 9.0] + [0.1 * i for i in range(SIZE - 3)],
    "cluster": [10.0, 10.0 - 1e-7, 10.0 - 2e-7, 9.0] + [0.1 * i for i in range(SIZE - 4)],
    "indefinite": [(-0.9) ** i for i in range(SIZE)],
    "negative": [-1.0 - i for i in range(SIZE)],
    "flat": [1.0 + 0.01 * i for i in range(SIZE)],
}


@dataclass(frozen=True)
class Known:
    """A symmetric operator with its matrix; counts its products."""

    matrix: Tensor
    like: dict[str, Tensor]
    mv: Callable[[Any], Any]
    calls: list[int]

    @property
    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.matrix.double()).flip(0)


def tree(vector: Tensor) -> dict[str, Tensor]:
    """Cut the last axis of a tensor into leaves of different ranks."""
    lead = vector.shape[:-1]
    a, b, c = vector.split([6, 1, vector.shape[-1] - 7], dim=-1)
    return {"w": a.reshape(*lead, 2, 3), "s": b.reshape(lead), "b": c}


def flat(values: Any, lead: int = 0) -> Tensor:
    """Undo `tree`."""
    leaves = [values[name] for name in ("w", "s", "b")]
    rows = [leaf.flatten(lead) if leaf.dim() > lead else leaf.unsqueeze(-1) for leaf in leaves]
    return torch.cat(rows, dim=-1)


def operator(matrix: Tensor) -> Known:
    """Return the operator of a matrix, on trees."""
    calls: list[int] = []

    def mv(v: Any) -> Any:
        calls.append(1)
        return tree(matrix @ flat(v))

    return Known(matrix, tree(torch.zeros(len(matrix), dtype=matrix.dtype)), mv, calls)


def rotated(spectrum: list[float], seed: int = 0, dtype: torch.dtype = torch.float64) -> Known:
    """Return an operator with these eigenvalues and random eigenvectors."""
    q = orthogonal(len(spectrum), seed)
    values = torch.tensor(spectrum, dtype=torch.float64)
    matrix = (q * values) @ q.T
    return operator(((matrix + matrix.T) / 2).to(dtype))


def orthogonal(n: int, seed: int = 0) -> Tensor:
    noise = ff.random.normal(ff.random.key(seed), (n, n), torch.float64)
    return torch.linalg.qr(noise)[0]
