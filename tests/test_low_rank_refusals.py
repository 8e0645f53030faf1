"""What `LowRank` refuses, with the leaf that is to blame; or NaN where nothing may raise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_low_rank import N, difference, draw, same, thin
from torch import Tensor

import fisherfn as ff
from fisherfn.core import random, trees
from fisherfn.core.errors import (
    NotPositiveDefiniteError,
    ShapeError,
    TreeMismatchError,
    UnsupportedError,
)
from fisherfn.curvature import LowRank

INVERSES = {
    "solve": lambda F, damping: F.solve(draw(0), damping=damping),
    "pow": lambda F, damping: F.pow(draw(0), -0.5, damping=damping),
    "pow_integer": lambda F, damping: F.pow(draw(0), -2, damping=damping),
    "logdet": lambda F, damping: F.logdet(damping=damping),
    "sample": lambda F, damping: F.sample(random.key(0), damping=damping),
}


@pytest.mark.parametrize("ask", INVERSES.values(), ids=INVERSES)
def test_fewer_rows_than_parameters_are_singular(ask: Any) -> None:
    F = thin(0)
    F = LowRank({**F.rows, "0.bias": 0.0 * F.rows["0.bias"]}, F.weights, F.count)
    with pytest.raises(NotPositiveDefiniteError, match=r"singular.* at 0\.bias with damping 0\."):
        ask(F, 0.0)
    with pytest.raises(NotPositiveDefiniteError, match=r"singular.* with damping 0\."):
        ask(ff.empty_like(F), torch.tensor(0.0))


def test_compiled_a_missing_inverse_is_nan_and_an_existing_one_eager() -> None:
    F = thin(0)

    def inverses(F: Any, damping: Tensor) -> list[Any]:
        return [F.solve(draw(0), damping=damping), F.logdet(damping=damping)]

    fast = torch.compile(inverses, fullgraph=True, backend="eager")
    assert all(bool(x.isnan().all()) for x in trees.leaves(fast(F, torch.tensor(0.0))))
    same(fast(F, torch.tensor(0.5)), inverses(F, torch.tensor(0.5)))
    torch._dynamo.reset()


@pytest.mark.parametrize("ask", INVERSES.values(), ids=INVERSES)
def test_indefinite_and_nan_are_refused_and_named(ask: Any) -> None:
    F = thin(0)
    low = LowRank(
        {k: x[2:3] * (100.0 if k == "1.weight" else 1.0) for k, x in F.rows.items()},
        F.weights[2:3],
        F.count,
    )
    with pytest.raises(NotPositiveDefiniteError, match=r"indefinite.* at 1\.weight with damping 1"):
        ask((-1) * low, 1.0)
    bad = {**F.rows, "1.scale": F.rows["1.scale"] * math.nan}
    with pytest.raises(NotPositiveDefiniteError, match=r"or NaN at 1\.scale with damping 1"):
        ask(LowRank(bad, F.weights, F.count), 1.0)
    with pytest.raises(NotPositiveDefiniteError, match=r"or NaN at 0\.weight with damping 1"):
        ask(math.nan * F, 1.0)


def test_float32_rows_that_agree_to_rounding_are_singular() -> None:
    # Two parameters that always come as a sum: in float64 the rows' errors make it look regular.
    x = random.normal(random.key(0), (9, 1), torch.float32)
    rows = torch.cat([x, x * (1 + 1e-7 * random.normal(random.key(1), (9, 1)))], 1)
    F = LowRank({"w": rows}, torch.ones(9), N)
    with pytest.raises(NotPositiveDefiniteError, match="singular"):
        F.solve({"w": torch.ones(2)})
    assert bool(F.solve({"w": torch.ones(2)}, damping=1e-3)["w"].isfinite().all())


def test_the_gram_matrix_of_a_difference_does_not_exist() -> None:
    with pytest.raises(UnsupportedError, match=r"LowRank\.gram: .* Use eigenvalues\(\)"):
        difference(0).gram()


def test_bad_rows_are_refused() -> None:
    rows, ones = {"a": torch.ones(2, 3), "b": torch.ones(2)}, torch.ones(2)
    with pytest.raises(ShapeError, match=r"LowRank: expected 2 rows.*got shape \(3, 3\) at a\."):
        LowRank({**rows, "a": torch.ones(3, 3)}, ones, N)
    with pytest.raises(ShapeError, match=r"expected 2 rows.*got shape \(\) at b\."):
        LowRank({**rows, "b": torch.ones(())}, ones, N)
    with pytest.raises(TreeMismatchError, match=r"rows to be a tree of tensors, got float at b"):
        LowRank({**rows, "b": 1.0}, ones, N)
    with pytest.raises(ShapeError, match=r"rows to be floating point, got torch\.int64 at b"):
        LowRank({**rows, "b": torch.ones(2).long()}, ones, N)
    for weights, got in ((torch.ones(2, 1), "torch.float32 of shape"), (3.0, "float")):
        with pytest.raises(ShapeError, match=rf"weights to be floating point of shape.*got {got}"):
            LowRank(rows, weights, N)  # type: ignore[arg-type]


def test_results_about_other_parameters_are_not_joined() -> None:
    other = LowRank({"w": torch.ones(2, 3)}, torch.ones(2), N)
    with pytest.raises(TreeMismatchError, match="expected the second rows like the first"):
        ff.merge(thin(0), other)
    with pytest.raises(TreeMismatchError, match=r"LowRank\.solve: expected v like params"):
        thin(0).solve({"w": torch.ones(3)}, damping=1.0)
