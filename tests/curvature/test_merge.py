"""Joining results: the laws of `merge`, `F + G` and `c * F`, and what cannot be joined."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError, UnsupportedError
from fisherfn.core.merging import check_mergeable, empty_like, merge, merge_weights
from fisherfn.curvature import BlockDiagonal, Dense, Diagonal, GradientMoments, Layout, layer_groups

WEIGHTS = st.sampled_from([0.5, 1.0, 3.0, 1000.0])


def same(a: Any, b: Any, tol: float = 1e-12) -> None:
    assert trees.structure(a) == trees.structure(b)
    for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def identical(a: Any, b: Any) -> None:
    assert trees.structure(a) == trees.structure(b)
    for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True):
        assert torch.equal(x, y)


def three(make: Any, kind: str, params: Any, counts: tuple[float, float, float]) -> list[Any]:
    """Three results about the same parameters, with these counts."""
    found: list[Any] = []
    for seed, count in enumerate(counts):
        n = torch.tensor(count, dtype=torch.float64)
        F = make("diagonal" if kind in ("moments", "stderr") else kind, params, 10 * seed).F
        if kind == "moments":
            mean = make("diagonal", params, 10 * seed + 5).F.values
            found.append(GradientMoments(n, mean, F.values))
        elif kind == "stderr":
            stderr = make("diagonal", params, 10 * seed + 5).F.values
            found.append(Diagonal(F.values, n, stderr, fisher="mc"))
        else:
            found.append(trees.map(lambda x: x, F))
            object.__setattr__(found[-1], "count", n)
    return found


@pytest.fixture(params=["diagonal", "stderr", "dense", "leaves", "crossed", "moments"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


ALL = st.sampled_from(["diagonal", "dense", "leaves", "crossed", "moments"])


@given(data=st.data(), counts=st.tuples(WEIGHTS, WEIGHTS, WEIGHTS), kind=ALL)
def test_merge_is_commutative_associative_and_weighted(
    make: Any, params_trees: Any, data: st.DataObject, counts: Any, kind: str
) -> None:
    a, b, c = three(make, kind, data.draw(params_trees), counts)
    same(merge(a, b), merge(b, a))
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    n = sum(counts)
    want = trees.map(lambda x, y, z: (counts[0] * x + counts[1] * y + counts[2] * z) / n, a, b, c)
    object.__setattr__(want, "count", torch.tensor(n, dtype=torch.float64))
    same(merge(merge(a, b), c), want)


def test_standard_errors_are_those_of_independent_estimates(make: Any, layers: Any) -> None:
    a, b, c = three(make, "stderr", layers, (1.0, 3.0, 6.0))
    together = merge(merge(a, b), c)
    same(together, merge(a, merge(b, c)))
    for name, got in together.stderr.items():
        va, vb, vc = [F.stderr[name] ** 2 for F in (a, b, c)]
        want = ((1 * va + 9 * vb + 36 * vc) / 100).sqrt()
        torch.testing.assert_close(got, want)


def test_standard_error_is_the_spread_of_merged_estimates() -> None:
    # Independent estimates of spread 2 and 3, from 4 and 6 units, merged ten thousand times.
    from fisherfn.core import random

    z = random.normal(random.key(0), (2, 10000), torch.float64)
    values = 5.0 + torch.tensor([[2.0], [3.0]]) * z
    ones = torch.ones(10000, dtype=torch.float64)
    a = Diagonal({"w": values[0]}, torch.tensor(4.0), {"w": 2.0 * ones})
    b = Diagonal({"w": values[1]}, torch.tensor(6.0), {"w": 3.0 * ones})
    both = merge(a, b)
    assert both.stderr is not None
    spread = both.values["w"].std()
    assert abs(spread - both.stderr["w"][0]) < 5 * spread / math.sqrt(2 * 10000)


def test_an_unknown_standard_error_stays_unknown(make: Any, layers: Any) -> None:
    a, b, _ = three(make, "stderr", layers, (1.0, 3.0, 6.0))
    b = Diagonal(b.values, b.count, fisher="mc")
    assert merge(a, b).stderr is None
    assert (a + b).stderr is None
    assert merge(b, b).stderr is None


def test_the_empty_result_is_the_identity_to_the_last_bit(
    make: Any, kind: str, layers: Any
) -> None:
    a, _, _ = three(make, kind, layers, (3.0, 1.0, 1.0))
    empty = empty_like(a)
    assert empty.count == 0
    assert type(empty) is type(a)
    assert (empty.fisher, empty.unit) == (a.fisher, a.unit)
    identical(merge(a, empty), a)
    identical(merge(empty, a), a)
    identical(merge(empty, empty), empty)


def test_the_empty_result_of_nan_is_empty(case: Any) -> None:
    identical(empty_like(math.nan * case.F), empty_like(case.F))


@pytest.mark.parametrize("kind", ["diagonal", "stderr", "dense", "crossed"])
def test_merge_is_the_weighted_sum_in_every_field(make: Any, kind: str, layers: Any) -> None:
    a, b, _ = three(make, kind, layers, (1.0, 3.0, 1.0))
    same(merge(a, b), 0.25 * a + 0.75 * b)
    assert (a + b).count == 4
    same((2 * a).count, a.count)


def test_scaling_scales_the_standard_error(make: Any, layers: Any) -> None:
    a, b, _ = three(make, "stderr", layers, (1.0, 3.0, 1.0))
    same((-2 * a).stderr, trees.scale(a.stderr, 2.0))
    same((a + b).stderr, trees.map(torch.hypot, a.stderr, b.stderr))


def test_merge_equals_the_average_over_all_scores() -> None:
    from fisherfn.core import random

    scores = random.normal(random.key(1), (10, 3), torch.float64)
    layout = Layout.of({"w": torch.zeros(3)})

    def result(s: Tensor) -> Any:
        n = torch.tensor(float(len(s)))
        square = {"w": s.square().mean(0)}
        return {
            "dense": Dense(s.T @ s / len(s), n, layout),
            "rest": (Diagonal(square, n), GradientMoments(n, {"w": s.mean(0)}, square)),
        }

    same(merge(result(scores[:3]), result(scores[3:])), result(scores))


def test_inputs_are_left_alone(make: Any, kind: str, layers: Any) -> None:
    a, b, _ = three(make, kind, layers, (1.0, 3.0, 1.0))
    before = [x.clone() for x in trees.leaves([a, b])]
    _ = merge(a, b), empty_like(a)
    assert all(torch.equal(x, y) for x, y in zip(before, trees.leaves([a, b]), strict=True))


def test_dtypes_are_promoted(case: Any) -> None:
    low: Any = trees.map(lambda x: x.bfloat16(), case.F)
    narrowest = torch.float32
    if case.kind == "ekfac":  # a basis that was rounded is another one, so it stays in float64
        low = dataclasses.replace(case.F, scales=low.scales, rest=low.rest, count=low.count)
        narrowest = torch.float64
    assert merge(low, low).to_dense().dtype == narrowest
    assert merge(low, case.F).to_dense().dtype == torch.float64


def test_shares_are_not_rounded_to_the_precision_of_the_counts() -> None:
    a, b, n = merge_weights(torch.tensor(1.0), torch.tensor(2.0))
    assert (a, b) == (1 / 3, 2 / 3)  # 0.3333333433 in float32
    assert n.dtype == torch.float32


def test_counts_of_zero_do_not_divide() -> None:
    zero = torch.tensor(0.0)
    assert [float(x) for x in merge_weights(zero, zero)] == [0.0, 0.0, 0.0]
    assert [float(x) for x in merge_weights(zero, torch.tensor(2.0))] == [0.0, 1.0, 2.0]
    assert all(bool(x.isnan()) for x in merge_weights(zero, torch.tensor(math.nan)))


# --- containers -----------------------------------------------------------------------------------


class Both(NamedTuple):
    left: Any
    right: Any


def test_containers_merge_member_by_member(case: Any) -> None:
    F = case.F
    for wrap in (
        lambda x: {"a": x, "b": None},
        lambda x: [x, x],
        lambda x: (x, (x,)),
        lambda x: Both(x, {"c": x}),
    ):
        identical(merge(wrap(F), wrap(F)), wrap(merge(F, F)))
        identical(empty_like(wrap(F)), wrap(empty_like(F)))
        check_mergeable("f", wrap(F))


def test_containers_that_differ_are_refused(case: Any) -> None:
    F = case.F
    with pytest.raises(
        TreeMismatchError, match=r"merge: expected the same keys on both sides, got"
    ):
        merge({"a": F}, {"b": F})
    with pytest.raises(TreeMismatchError, match=r"merge: expected the same length .* 1 and 2 at x"):
        merge({"x": [F]}, {"x": [F, F]})
    with pytest.raises(OptionError, match=r"one class, got dict and OrderedDict"):
        merge({"a": F}, OrderedDict(a=F))


@pytest.mark.parametrize("thing", [torch.ones(2), 1.0, {"x": [torch.ones(2)]}, "text"], ids=str)
def test_what_has_no_merge_is_refused(thing: Any) -> None:
    where = r" at x/0" if isinstance(thing, dict) else ""
    message = rf"expected results that can be merged .* got (Tensor|float|str){where}\. Average"
    with pytest.raises(UnsupportedError, match="merge: " + message):
        merge(thing, thing)
    with pytest.raises(UnsupportedError, match="empty_like: " + message):
        empty_like(thing)
    with pytest.raises(UnsupportedError, match="caller: " + message):
        check_mergeable("caller", thing)


# --- refusals -------------------------------------------------------------------------------------


def add(a: Any, b: Any) -> Any:
    return a + b


@pytest.mark.parametrize(("join", "name"), [(merge, "merge"), (add, r"F \+ G")])
def test_other_kinds_units_and_classes_are_refused(
    make: Any, layers: Any, join: Any, name: str, case: Any
) -> None:
    for option, ours, theirs in (("fisher", "exact", "mc"), ("unit", "example", "position")):
        other = make(case.kind, layers, **{option: theirs}).F
        message = (
            rf"{name}: expected two results with the same {option}, got '{ours}' and '{theirs}'"
        )
        with pytest.raises(OptionError, match=message):
            join(case.F, other)
    other = make("dense" if case.kind == "diagonal" else "diagonal", layers).F
    message = rf"{name}: expected two results of one class, got {type(case.F).__name__} and "
    with pytest.raises(OptionError, match=message):
        join(case.F, other)


@pytest.mark.parametrize(("join", "name"), [(merge, "merge"), (add, r"F \+ G")])
def test_other_structures_are_refused(
    make: Any, layers: Any, join: Any, name: str, case: Any
) -> None:
    fewer = {key: x for key, x in layers.items() if key != "0.bias"}
    with pytest.raises(TreeMismatchError, match=rf"{name}: .* no leaf at 0\.bias"):
        join(case.F, make(case.kind, fewer).F)
    longer = {**layers, "0.bias": torch.zeros(3)}
    with pytest.raises(TreeMismatchError, match=r"shape \(3,\) at 0\.bias, needs \(2,\)"):
        join(case.F, make(case.kind, longer).F)


@pytest.mark.parametrize("kind", ["dense", "leaves"])
def test_matrices_about_another_order_are_refused(make: Any, layers: Any, kind: str) -> None:
    turned = dict(reversed(layers.items()))
    with pytest.raises(TreeMismatchError, match="expected parameters in the same order, got"):
        merge(make(kind, layers).F, make(kind, turned).F)


def test_diagonals_are_matched_by_key(make: Any, layers: Any) -> None:
    a = make("diagonal", layers).F
    b = Diagonal(dict(reversed(a.values.items())), a.count)
    identical(merge(a, b).values, a.values)


def test_other_blocks_are_refused(make: Any, layers: Any) -> None:
    a, b = make("leaves", layers).F, make("layers", layers).F
    with pytest.raises(TreeMismatchError, match="expected two results with the same groups, got"):
        merge(a, b)


def test_moments_refuse_other_structures() -> None:
    one = torch.tensor(1.0)
    a = GradientMoments(one, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    b = GradientMoments(one, {"w": torch.ones(3)}, {"w": torch.ones(3)})
    with pytest.raises(TreeMismatchError, match=r"merge: expected the second mean like the first"):
        merge(a, b)


def test_a_batch_of_results_has_to_be_mapped(case: Any) -> None:
    many = trees.map(lambda x: torch.stack([x, x]), case.F)
    for ask in (lambda F: merge(F, F), lambda F: F + F, lambda F: 2 * F, lambda F: F.trace()):
        with pytest.raises(ShapeError, match=r"count to be a 0-d tensor, got shape \(2,\).*vmap"):
            ask(many)


@pytest.mark.parametrize("other", [2, "text", None, torch.ones(2)], ids=str)
def test_what_cannot_be_added_is_a_type_error(case: Any, other: Any) -> None:
    with pytest.raises(TypeError, match=r"unsupported operand|no implementation"):
        _ = case.F + other


@pytest.mark.parametrize("other", ["text", None, [1], True], ids=str)
def test_what_cannot_scale_is_a_type_error(case: Any, other: Any) -> None:
    with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
        _ = other * case.F


@pytest.mark.parametrize("other", [torch.ones(2), torch.tensor(1j)], ids=str)
def test_tensors_that_are_no_number_cannot_scale(case: Any, other: Any) -> None:
    message = r"c \* F: expected c to be a real number or a 0-d tensor, got torch"
    with pytest.raises(ShapeError, match=message):
        _ = other * case.F
    with pytest.raises(ShapeError, match=message):
        _ = case.F * other


def test_torch_functions_do_not_take_representations(case: Any) -> None:
    with pytest.raises(TypeError, match=r"__torch_function__|no implementation"):
        torch.add(torch.ones(2), case.F)


def test_layers_partition() -> None:
    layout = Layout.of({"a.w": torch.zeros(1), "b": torch.zeros(1), "a.b": torch.zeros(1)})
    groups = layer_groups(layout)
    assert groups == (("a", ("a.w", "a.b")), ("b", ("b",)))
    blocks = {"a": torch.tensor([[2.0, 1.0], [1.0, 3.0]]), "b": torch.tensor([[5.0]])}
    F = BlockDiagonal(blocks, torch.tensor(1.0), layout, groups)
    want = torch.tensor([[2.0, 0.0, 1.0], [0.0, 5.0, 0.0], [1.0, 0.0, 3.0]])
    assert torch.equal(F.to_dense(), want)
