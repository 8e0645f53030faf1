"""What is built from wrong parts, or asked with wrong vectors, is refused with its path."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn.core import random, trees
from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError, UnsupportedError
from fisherfn.curvature import (
    BlockDiagonal,
    Dense,
    Diagonal,
    GradientMoments,
    Layout,
    layer_groups,
    leaf_groups,
)

ONE = torch.tensor(1.0)
ASKS = {
    "mv": lambda F, v: F.mv(v),
    "solve": lambda F, v: F.solve(v, damping=1.0),
    "pow": lambda F, v: F.pow(v, 0.5, damping=1.0),
    "quadratic": lambda F, v: F.quadratic(v),
}


# --- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKS)
def test_vectors_unlike_the_parameters_are_refused(case: Any, name: str) -> None:
    caller = rf"{type(case.F).__name__}\.{name}: expected v like params, got "
    good = case.draw(0)
    fewer = {key: x for key, x in good.items() if key != "0.bias"}
    more = {**good, "2.bias": torch.ones(1)}
    shape = {**good, "0.bias": torch.ones(1, 2)}
    number = {**good, "0.bias": 1.0}
    advice = r"Build it with ff\.tree\.zeros_like\(params\)\."
    for bad, problem in (
        (fewer, r"no leaf at 0\.bias\. "),
        (more, r"an unexpected leaf at 2\.bias\. "),
        (shape, r"shape \(1, 2\) at 0\.bias, needs \(2,\)\. "),
        (number, r"a float at 0\.bias, needs a tensor of shape \(2,\)\. "),
        (torch.ones(8), r".* at the root .*"),
        (None, r"no leaf at 0\.weight\. "),
        ({**good, "0.bias": {"x": torch.ones(2)}}, r".*0\.bias/x.*0\.bias\. "),
    ):
        with pytest.raises(TreeMismatchError, match=caller + problem + advice):
            ASKS[name](case.F, bad)


@pytest.mark.parametrize("name", ASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_vectors_that_are_not_floating_point_are_refused(
    case: Any, name: str, dtype: torch.dtype
) -> None:
    v = {**case.draw(0), "0.bias": torch.ones(2, dtype=dtype)}
    message = rf"{name}: expected v to be floating point, got {dtype} at 0\.bias\. Convert it with"
    with pytest.raises(ShapeError, match=message):
        ASKS[name](case.F, v)


def test_bad_keys_are_refused(case: Any) -> None:
    with pytest.raises(OptionError, match=r"expected a key, got 3"):
        case.F.sample(3)
    with pytest.raises(ShapeError, match="expected a key, int64 of shape"):
        case.F.sample(torch.ones(2))


# --- construction ---------------------------------------------------------------------------------


def test_a_number_will_do_as_count() -> None:
    F = Diagonal({"w": torch.ones(2)}, 3)  # type: ignore[arg-type]
    assert isinstance(F.count, torch.Tensor)
    assert F.count == 3


@pytest.mark.parametrize("count", [torch.ones(2), None, "3", 1j], ids=str)
def test_bad_counts_are_refused(count: Any) -> None:
    with pytest.raises(ShapeError, match=r"Diagonal: expected count to be a 0-d tensor, got"):
        Diagonal({"w": torch.ones(2)}, count)


@pytest.mark.parametrize("build", [
    lambda **o: Diagonal({"w": torch.ones(2)}, ONE, **o),
    lambda **o: Dense(torch.eye(2), ONE, Layout.of(torch.ones(2)), **o),
    lambda **o: GradientMoments(ONE, torch.ones(2), torch.ones(2), **o),
])  # fmt: skip
def test_bad_labels_are_refused(build: Any) -> None:
    with pytest.raises(
        OptionError, match=r"unit to be one of \['example', 'position'\], got 'row'"
    ):
        build(unit="row")
    with pytest.raises(OptionError, match=r"expected fisher to be a string such as 'exact', got 3"):
        build(fisher=3)


def test_bad_trees_are_refused() -> None:
    for build in (
        lambda tree: Diagonal(tree, ONE),
        lambda tree: GradientMoments(ONE, tree, tree),
    ):
        with pytest.raises(TreeMismatchError, match=r"to be a tree of tensors, got float at a/b\."):
            build({"a": {"b": 1.0}})
        with pytest.raises(ShapeError, match=r"to be floating point, got torch.int64 at a/1\."):
            build({"a": [torch.ones(1), torch.ones(1, dtype=torch.int64)]})
    with pytest.raises(TreeMismatchError, match=r"Diagonal: expected stderr like values, got no"):
        Diagonal({"w": torch.ones(2)}, ONE, {})
    with pytest.raises(TreeMismatchError, match=r"GradientMoments: expected square like mean, got"):
        GradientMoments(ONE, {"w": torch.ones(2)}, {"w": torch.ones(3)})


def test_matrices_of_the_wrong_size_are_refused(layers: Any) -> None:
    layout = Layout.of(layers)
    for matrix, got in (
        (torch.ones(7, 7), r"shape \(7, 7\)"),
        (torch.ones(8), r"shape \(8,\)"),
        (None, "a NoneType"),
    ):
        with pytest.raises(
            ShapeError, match=rf"Dense: expected a matrix of shape \(8, 8\), got {got}"
        ):
            Dense(matrix, ONE, layout)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"Dense: expected the matrix to be floating point, got"):
        Dense(torch.ones(8, 8, dtype=torch.int64), ONE, layout)
    blocks = {"0": torch.eye(6), "1": torch.eye(3)}
    with pytest.raises(ShapeError, match=r"a matrix of shape \(2, 2\) at 1, got shape \(3, 3\)"):
        BlockDiagonal(blocks, ONE, layout, layer_groups(layout))


def test_groups_that_are_no_partition_are_refused(layers: Any) -> None:
    layout = Layout.of(layers)
    blocks = {"a": torch.eye(6), "b": torch.eye(2)}
    for groups in (
        (("a", ("0.weight", "0.bias")), ("b", ("0.bias",))),
        (("a", ("0.weight", "0.bias")), ("b", ())),
        (("a", ("0.weight", "0.bias")), ("b", ("1.weight", "9.bias"))),
    ):
        with pytest.raises(
            OptionError, match=r"groups that cover each leaf of the parameters once"
        ):
            BlockDiagonal(blocks, ONE, layout, groups)
    with pytest.raises(TreeMismatchError, match=r"expected one block for each of the groups \['0'"):
        BlockDiagonal(blocks, ONE, layout, layer_groups(layout))
    twice = (("a", ("0.weight", "0.bias")), ("a", ("1.weight",)))
    with pytest.raises(TreeMismatchError, match=r"expected one block for each of the groups"):
        BlockDiagonal({"a": torch.eye(6)}, ONE, layout, twice)


# --- layouts --------------------------------------------------------------------------------------


@given(data=st.data())
def test_layout_agrees_with_the_trees(params_trees: Any, data: st.DataObject) -> None:
    params = data.draw(params_trees)
    layout = Layout.of(params)
    assert list(layout.paths) == trees.paths(params)
    assert layout.size == trees.size(params)
    v = trees.random_like(random.key(0), params)
    vector, unravel = trees.ravel(v)
    assert torch.equal(layout.ravel("f", "v", v), vector)
    assert trees.structure(layout.unravel(vector)) == trees.structure(unravel(vector))
    for x, y in zip(trees.leaves(layout.unravel(vector)), trees.leaves(v), strict=True):
        assert torch.equal(x, y)
    template = layout.template()
    assert [x.dtype for x in trees.leaves(template)] == list(layout.dtypes)
    assert hash(layout) == hash(Layout.of(v))
    assert layout == Layout.of(v)


def test_layout_distinguishes_containers() -> None:
    x = torch.ones(1)
    trees_ = [x, [x], (x,), {"0": x}, OrderedDict([("0", x)])]
    assert len({Layout.of(tree) for tree in trees_}) == len(trees_)


def test_layout_refuses_other_containers_and_leaves() -> None:
    class Box:
        pass

    message = r"Layout.of: expected nested dicts, .* got (Box|float) at a/1\. Convert"
    for leaf in (Box(), 1.0):
        with pytest.raises(UnsupportedError, match=message):
            Layout.of({"a": [torch.ones(1), leaf]})


class One(NamedTuple):
    x: Any


class Other(NamedTuple):
    x: Any


def test_layout_refuses_another_class_of_the_same_shape() -> None:
    F = Dense(torch.eye(2), ONE, Layout.of(One(torch.ones(2))))
    with pytest.raises(TreeMismatchError, match=r"Dense.mv: expected v like params, got .*Other"):
        F.mv(Other(torch.ones(2)))


def test_groups_of_nested_parameters() -> None:
    layout = Layout.of({"enc": {"0.w": torch.ones(1), "0.b": torch.ones(1)}, "w": torch.ones(1)})
    assert layer_groups(layout) == (("enc/0", ("enc/0.w", "enc/0.b")), ("w", ("w",)))
    assert leaf_groups(layout)[0] == ("enc/0.w", ("enc/0.w",))
    single = Layout.of(torch.ones(2))
    assert layer_groups(single) == leaf_groups(single) == (("", ("",)),)


# --- moments --------------------------------------------------------------------------------------


@given(n=st.integers(2, 6), seed=st.integers(0, 99), correction=st.sampled_from([0.0, 1.0]))
def test_variance_is_that_of_the_scores(n: int, seed: int, correction: float) -> None:
    scores = random.normal(random.key(seed), (n, 3), torch.float64)
    moments = GradientMoments(
        torch.tensor(float(n)), {"w": scores.mean(0)}, {"w": scores.square().mean(0)}
    )
    got = moments.variance(correction=correction)["w"]
    torch.testing.assert_close(got, scores.var(0, correction=int(correction)))


def test_variance_is_not_negative_and_needs_enough_units() -> None:
    mean = {"w": torch.tensor([1.0, 1.0 + 1e-7])}
    moments = GradientMoments(ONE, mean, {"w": torch.ones(2)})
    assert torch.equal(moments.variance()["w"], torch.zeros(2))
    assert bool(moments.variance(correction=1.0)["w"].isnan().all())
    low = trees.map(lambda x: x.bfloat16(), moments)
    assert low.variance()["w"].dtype == torch.float32


def test_variance_refuses_a_bad_correction() -> None:
    moments = GradientMoments(ONE, torch.ones(2), torch.ones(2))
    for correction in ("1", None, math.nan, math.inf, True):
        with pytest.raises(OptionError, match=r"variance: expected correction to be a finite real"):
            moments.variance(correction=correction)  # type: ignore[arg-type]
