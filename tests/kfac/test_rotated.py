"""Squares of scores in a Kronecker basis, against the rotated scores of every example."""

import pytest
import torch
from torch import Tensor

from fisherfn.layers import numerics
from fisherfn.layers.outer import Outer
from fisherfn.layers.rotated import rotated_squares
from fisherfn.testing import assert_close


def basis(groups: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(
        torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    )[0]


# few positions, more than a score has rows, more than it has columns as well
@pytest.mark.parametrize("positions", [1, 2, 9, 40])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(
    ("shared", "groups", "parts"), [(False, 1, 1), (False, 3, 1), (True, 1, 2)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [1, 2**20])
def test_squares_are_those_of_rotated_scores(
    positions: int,
    columns: int,
    shared: bool,
    groups: int,
    parts: int,
    bias: bool,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numerics, "_CPU_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, groups, positions, 6, generator=generator, dtype=torch.float64)
    g = torch.randn(columns, 5, groups, positions, 4, generator=generator, dtype=torch.float64)
    blocks = groups * parts
    left = basis(blocks, 4 // parts, 1)
    right = basis(1 if shared else blocks, 6 + bias, 2)

    found = rotated_squares(
        Outer(a, g), left, right, thin=(False, False), bias=bias, factor=3.0, parts=parts
    )

    whole = 3.0 * a
    if bias:
        whole = torch.cat([whole, torch.ones_like(a[..., :1])], -1)
    scores = torch.einsum("kbrto,brti->kbroi", g, whole).reshape(columns, 5, blocks, -1, 6 + bias)
    turned = torch.einsum("rop,kbroi,riq->kbrpq", left, scores, right.expand(blocks, -1, -1))
    assert_close(found, turned.square().sum((0, 1)), 1e-12)
