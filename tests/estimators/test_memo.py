"""Patches that are kept from one column to the next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
import fisherfn as ff
import oracles
from fisherfn.capture import scores
from fisherfn.layers.bands import Geometry
from fisherfn.layers.memo import Budget, Memo
from fisherfn.testing import assert_close


def test_a_memo_makes_once_what_fits() -> None:
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.ones(2)

    budget = Budget(20)
    first, second = Memo(budget), Memo(budget)
    assert first.reserve(16)
    assert not second.reserve(8)
    assert first.reserve(16), "the first answer holds"
    assert second.reserve(4) is False
    for _ in range(2):
        first.part((0, 2)).get("a", lambda: make("a"))
        first.part((2, 4)).get("a", lambda: make("b"))
    assert made == ["a", "b"]


@pytest.mark.parametrize("room", [0, 2**26])
@pytest.mark.parametrize("name", [n for n in cases.LAYERS if "conv" in n])
def test_exact_diagonal_with_and_without_room(
    name: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_KEPT", room)
    s = cases.LAYERS[name].setup()
    found = oracles.rows(s.problem, "exact")
    want = (found.weights.unsqueeze(1) * found.scores.square()).sum(0) / found.count
    got = ff.diagonal(s.model, s.likelihood)(*s.args)
    assert_close(got.values, oracles.unravel(want, s.params), cases.LAYERS[name].rtol)


def test_patches_are_cut_once_for_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = []
    whole = Geometry.patches
    monkeypatch.setattr(Geometry, "patches", lambda *a: cut.append(1) or whole(*a))
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 2, 3, 3, generator=generator)
    x = torch.randn(3, 2, 5, 5, generator=generator)

    def model(params: dict[str, Tensor], buffers: object, inputs: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(inputs, params["w"]).mean((2, 3))

    fim = ff.diagonal(model, ff.likelihoods.categorical())
    fim({"w": w}, {}, ff.Batch(x))
    cut.clear()
    fim({"w": w}, {}, ff.Batch(x))
    assert len(cut) == 1
