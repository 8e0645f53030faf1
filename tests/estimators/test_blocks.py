"""Large layers are contracted a few rows of one example at a time; here small ones are as well."""

from __future__ import annotations

import pytest

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
