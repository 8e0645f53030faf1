"""Large layers are contracted a few rows of one example at a time; here small ones are as well."""

from __future__ import annotations

import pytest
import torch

import cases
import fisherfn as ff
import oracles
from fisherfn.layers import numerics, outer
from fisherfn.testing import assert_close


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("block", [1, 256])
@pytest.mark.parametrize("name", list(cases.LAYERS))
def test_diagonal_in_small_blocks(
    name: str, block: int, fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer, "_CPU_SCORE", 1)
    monkeypatch.setattr(numerics, "_CPU_BLOCK", block)
    s = cases.LAYERS[name].setup()
    found = oracles.rows(s.problem, fisher)
    want = (found.weights.unsqueeze(1) * found.scores.square()).sum(0) / found.count
    got = ff.diagonal(s.model, s.likelihood, fisher=fisher)(*s.args)
    assert_close(got.values, oracles.unravel(want, s.params), cases.LAYERS[name].rtol)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("columns", [1, 3])
def test_both_orientations_give_the_sum_of_squares(
    columns: int, groups: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer, "_CPU_SCORE", 1 if large else 2**30)
    source = torch.Generator().manual_seed(0)
    a = torch.randn(5, groups, 4, 7, generator=source, dtype=torch.float64)
    g = torch.randn(columns, 5, groups, 4, 3, generator=source, dtype=torch.float64)
    before = torch.randn(groups, 3, 7, generator=source, dtype=torch.float64)
    want = torch.einsum("kbrto,brti->kbroi", g, a).square().sum((0, 1))
    form = outer.Outer(a, g)
    with torch.no_grad():
        for total in (None, before):
            expected = want if total is None else want + total
            for way in (form.square_sum, form._turned, form._one_by_one):
                found = way(None if total is None else total.clone())
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
                assert found.is_contiguous()
