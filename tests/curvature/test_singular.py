"""Matrices without an inverse: an error that says where, or NaN where no value can be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn.core import random, trees
from fisherfn.core.errors import NotPositiveDefiniteError, OptionError
from fisherfn.core.merging import empty_like
from fisherfn.curvature import BlockDiagonal, Dense, Diagonal, Layout, leaf_groups

INVERSES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "solve": lambda F, v, damping: F.solve(v, damping=damping),
    "pow": lambda F, v, damping: F.pow(v, -0.5, damping=damping),
    "pow_integer": lambda F, v, damping: F.pow(v, -2, damping=damping),
    "logdet": lambda F, v, damping: F.logdet(damping=damping),
    "sample": lambda F, v, damping: F.sample(random.key(0), damping=damping),
}


def all_nan(tree: Any) -> bool:
    return all(bool(x.isnan().all()) for x in trees.leaves(tree))


def none_nan(tree: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in trees.leaves(tree))


def singular_at_the_second_leaf(kind: str) -> Any:
    params = {"a": torch.zeros(2), "b": torch.zeros(2)}
    layout, count = Layout.of(params), torch.tensor(1.0)
    block, bad = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    if kind == "diagonal":
        return Diagonal({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 0.0])}, count)
    if kind == "dense":
        return Dense(torch.block_diag(block, bad), count, layout)
    return BlockDiagonal({"a": block, "b": bad}, count, layout, leaf_groups(layout))


@pytest.mark.parametrize("ask", INVERSES.values(), ids=INVERSES)
@pytest.mark.parametrize("kind", ["diagonal", "dense", "blocks"])
def test_singular_without_damping_raises_and_names_the_leaf(kind: str, ask: Any) -> None:
    F = singular_at_the_second_leaf(kind)
    v = {"a": torch.ones(2), "b": torch.ones(2)}
    message = (
        r"expected F \+ damping·I to be positive definite, got one that is singular, indefinite or "
        r"NaN at b with damping 0. Pass a larger damping."
    )
    with pytest.raises(NotPositiveDefiniteError, match=message):
        ask(F, v, 0.0)
    with pytest.raises(ArithmeticError, match="damping 0"):
        ask(F, v, torch.tensor(0.0))
    assert not all_nan(ask(F, v, 0.1))


@pytest.mark.parametrize("kind", ["diagonal", "dense", "blocks"])
def test_where_nothing_may_raise_the_whole_result_is_nan(kind: str) -> None:
    F = singular_at_the_second_leaf(kind)
    v = {"a": torch.ones(2), "b": torch.ones(2)}

    def everything(F: Any, damping: Any) -> Any:
        return {name: ask(F, v, damping) for name, ask in INVERSES.items()}

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    for damping in (0.0, -1.0, math.inf, math.nan):
        assert all_nan(compiled(F, torch.tensor(damping)))
    assert all_nan(compiled(math.nan * F, torch.tensor(1.0)))
    assert none_nan(compiled(F, torch.tensor(0.1)))
    assert all_nan(torch.compile(lambda F: F.solve(v), fullgraph=True, backend="eager")(F))
    # One member of an ensemble may be singular; the others are not concerned.
    both = trees.map(lambda x, y: torch.stack([x, y]), F, F + F)
    found = torch.vmap(everything)(both, torch.tensor([0.0, 0.1]))
    assert all_nan(trees.map(lambda x: x[0], found))
    assert none_nan(trees.map(lambda x: x[1], found))


@pytest.mark.parametrize("ask", INVERSES.values(), ids=INVERSES)
def test_nan_and_no_data_raise(case: Any, ask: Any) -> None:
    v = case.draw(0)
    with pytest.raises(NotPositiveDefiniteError, match="or NaN at"):
        ask(math.nan * case.F, v, 1.0)
    with pytest.raises(NotPositiveDefiniteError, match="singular"):
        ask(empty_like(case.F), v, 0.0)


def test_eigenvalues_of_nan_are_nan(case: Any) -> None:
    assert all_nan((math.nan * case.F).eigenvalues())


@given(
    n=st.integers(2, 30),
    lost=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    skew=st.sampled_from([0.0, 3.0, 8.0]),
)
def test_rank_deficient_is_never_taken_for_regular(
    make: Any, n: int, lost: int, seed: int, dtype: torch.dtype, skew: float
) -> None:
    # Rounding makes about half of these positive definite, with an inverse made of rounding errors.
    params = {"w": torch.zeros(n)}
    F = make("dense", params, seed, rank=max(1, n - lost), floor=0.0, dtype=dtype).F
    scale = torch.logspace(0, -skew, n, dtype=dtype)
    F = Dense(scale[:, None] * F.matrix * scale, F.count, F.layout)
    v = {"w": torch.ones(n, dtype=dtype)}
    for ask in INVERSES.values():
        with pytest.raises(NotPositiveDefiniteError, match="singular"):
            ask(F, v, 0.0)


@given(
    n=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    spread=st.sampled_from([0.0, 10.0]),
)
def test_regular_is_not_taken_for_singular_whatever_its_units(
    make: Any, n: int, seed: int, dtype: torch.dtype, spread: float
) -> None:
    # Parameters in different units scale rows and columns; the problem stays as easy as it was.
    F = make("dense", {"w": torch.zeros(n)}, seed, rank=3 * n + 5, floor=0.1, dtype=dtype).F
    scale = torch.logspace(spread / 2, -spread / 2, n, dtype=dtype)
    scaled = Dense(scale[:, None] * F.matrix * scale, F.count, F.layout)
    v = {"w": torch.ones(n, dtype=dtype)}
    got = scaled.solve(v)["w"] * scale
    want = torch.linalg.solve(F.matrix.double(), 1.0 / scale.double())
    assert (got.double() - want).norm() < 1e-3 * want.norm()


@given(seed=st.integers(0, 1000), damping=st.sampled_from([1e-6, 1e-3, 1.0]))
def test_damping_makes_rank_deficient_matrices_regular(
    make: Any, seed: int, damping: float
) -> None:
    case = make("dense", {"w": torch.zeros(9)}, seed, rank=4, floor=0.0)
    v = case.draw(seed)
    A = case.matrix + damping * torch.eye(9, dtype=torch.float64)
    want = torch.linalg.solve(A, v["w"])
    torch.testing.assert_close(case.F.solve(v, damping=damping)["w"], want, rtol=1e-7, atol=1e-7)
    half = case.F.pow(case.F.pow(v, -0.5, damping=damping), -0.5, damping=damping)
    torch.testing.assert_close(half["w"], want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("p", [0.5, 1.5, 0.25])
def test_rounding_below_zero_is_zero_under_a_root(make: Any, p: float) -> None:
    case = make("dense", {"w": torch.zeros(12)}, 5, rank=4, floor=0.0, dtype=torch.float32)
    assert torch.linalg.eigvalsh(case.matrix)[0] < 0
    values, vectors = torch.linalg.eigh(case.matrix)
    want = vectors @ (values.clamp_min(0.0) ** p * (vectors.T @ torch.ones(12).double()))
    got = case.F.pow({"w": torch.ones(12)}, p)["w"]
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("p", [-0.5, 0.5, 1.5])
def test_indefinite_has_no_fractional_power(case: Any, p: float) -> None:
    F, v = -1.0 * case.F, case.draw(0)
    with pytest.raises(NotPositiveDefiniteError, match=r"indefinite or NaN at [01]\."):
        F.pow(v, p, damping=0.01)
    power = torch.compile(lambda F: F.pow(v, p, damping=0.01), fullgraph=True, backend="eager")
    assert all_nan(power(F))


def test_indefinite_has_integer_powers_but_no_inverse(case: Any) -> None:
    F, v = -1.0 * case.F, case.draw(0)
    want = case.matrix @ case.matrix @ case.vector(v)
    torch.testing.assert_close(case.vector(F.pow(v, 2)), want, rtol=1e-10, atol=1e-10)
    with pytest.raises(NotPositiveDefiniteError, match="Pass a larger damping"):
        F.solve(v)


@pytest.mark.parametrize(
    "damping",
    [
        -1e-9,
        -1,
        math.nan,
        math.inf,
        1j,
        "0.1",
        None,
        True,
        torch.tensor([0.1]),
        torch.tensor(-1.0),
        torch.tensor(math.nan),
        torch.tensor(1j),
        torch.tensor(True),
    ],
    ids=str,
)
@pytest.mark.parametrize("ask", INVERSES.values(), ids=INVERSES)
def test_bad_damping_is_refused(case: Any, ask: Any, damping: Any) -> None:
    with pytest.raises(OptionError, match=r"expected damping (>= 0|to be a real number), got .*λ"):
        ask(case.F, case.draw(0), damping)


@pytest.mark.parametrize("p", [math.nan, math.inf, 1j, "2", None, True, torch.tensor(2.0)], ids=str)
def test_bad_power_is_refused(case: Any, p: Any) -> None:
    with pytest.raises(OptionError, match=r"\.pow: expected p to be a finite real number, got"):
        case.F.pow(case.draw(0), p)
