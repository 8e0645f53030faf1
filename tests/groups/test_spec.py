"""Specs: which scalar is in which group, against an index written down entry by entry."""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fisherfn as ff
from fisherfn.groups import GroupSpec

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def specs(draw: st.DrawFn) -> GroupSpec:
    """Specs of every layout, with and without an order."""
    shape = draw(SHAPES)
    axis = draw(st.integers(0, len(shape) - 1))
    made = [
        ff.groups.rows(shape, axis=axis, bucket=draw(st.integers(1, 6))),
        ff.groups.channels(shape, axis=axis),
        ff.groups.elements(shape),
        ff.groups.whole(shape),
    ]
    if len(shape) > 1 and shape[0] % 2 == 0:
        made.append(ff.groups.channels(shape, axis=1, blocks=2))
    spec = draw(st.sampled_from(made))
    if draw(st.booleans()):
        order = draw(
            st.lists(st.integers(0, 3), min_size=spec.base_groups, max_size=spec.base_groups)
        )
        spec = spec.renamed(kind="label", order=tuple(order), num_groups=4)
    return spec


def group_of(spec: GroupSpec, index: tuple[int, ...]) -> int:
    """The definition of the layouts, for one entry."""
    if spec.layout == "whole":
        base = 0
    elif spec.layout == "elements":
        base = 0
        for i, n in zip(index, spec.shape, strict=True):
            base = base * n + i
    elif spec.layout == "blocks":
        base = index[0] // (spec.shape[0] // spec.blocks) * spec.shape[1] + index[1]
    else:
        assert spec.axis is not None
        base = index[spec.axis] // spec.run
    return base if spec.order is None else spec.order[base]


@given(spec=specs(), seed=st.integers(0, 99))
def test_fold_spread_index_and_sizes_are_the_definition(spec: GroupSpec, seed: int) -> None:
    t = torch.arange(prod(spec.shape), dtype=torch.float64).reshape(spec.shape) + seed
    total, sizes = [0.0] * spec.num_groups, [0] * spec.num_groups
    index = torch.as_tensor(spec.index()).expand(spec.shape)
    values = torch.arange(spec.num_groups, dtype=torch.float64) + 0.5
    spread = spec.spread(values).expand(spec.shape)
    for place in itertools.product(*(range(n) for n in spec.shape)):
        g = group_of(spec, place)
        total[g] += t[place].item()
        sizes[g] += 1
        assert index[place] == g
        assert spread[place] == values[g]
    torch.testing.assert_close(spec.fold(t), torch.tensor(total, dtype=torch.float64))
    assert spec.sizes == tuple(sizes)


def test_scalars_and_empty_tensors() -> None:
    assert ff.groups.elements(()).sizes == ff.groups.whole(()).sizes == (1,)
    assert ff.groups.elements(()).fold(torch.tensor(3.0)).tolist() == [3.0]
    assert ff.groups.elements((0, 3)).num_groups == 0
    assert ff.groups.channels((2, 0)).sizes == (0, 0)
    assert ff.groups.channels((0, 2)).fold(torch.zeros(0, 2)).shape == (0,)
    assert ff.groups.whole((0,)).fold(torch.zeros(0)).tolist() == [0.0]


@pytest.mark.parametrize("transform", ["compile", "vmap", "grad"])
def test_under_transformations(transform: str) -> None:
    spec = ff.groups.heads((6, 4), 3).renamed(order=(1, 0, 1), num_groups=2)

    def both(t: Tensor) -> Tensor:
        return spec.spread(spec.fold(t)) * t

    t = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    if transform == "compile":
        got = torch.compile(both, fullgraph=True, backend="eager")(t)
        torch.testing.assert_close(got, both(t))
    elif transform == "vmap":
        many = torch.stack([t, 2 * t])
        torch.testing.assert_close(torch.vmap(both)(many), torch.stack([both(t), both(2 * t)]))
    else:
        slope = torch.func.grad(lambda t: both(t).sum())(t)
        torch.testing.assert_close(slope, 2 * spec.spread(spec.fold(t)).expand(6, 4))


# ---- heads ---------------------------------------------------------------------------------------


def rows_of(spec: GroupSpec, group: int) -> list[int]:
    """Indices along the axis that belong to a group."""
    flat = torch.as_tensor(spec.index()).flatten().tolist()
    return [i for i, g in enumerate(flat) if g == group]


def test_separate_heads_along_both_axes() -> None:
    spec = ff.groups.heads((6, 8), 3, head_dim=2)
    assert [rows_of(spec, g) for g in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert ff.groups.heads((8, 6), 3, axis=1).sizes == (16, 16, 16)


def test_fused_heads_are_kept_apart() -> None:
    spec = ff.groups.heads((5, 16), 4, axis=1, layout="qkv", num_kv_heads=2)
    assert spec.parts == (("q", 4), ("k", 2), ("v", 2))
    parts = spec.split(torch.arange(8))
    assert {name: part.tolist() for name, part in parts.items()} == {
        "q": [0, 1, 2, 3],
        "k": [4, 5],
        "v": [6, 7],
    }
    assert rows_of(spec, 4) == [8, 9]
    both = ff.groups.heads((4, 2), 2, layout="kv")
    assert (both.parts, both.num_groups) == ((("k", 2), ("v", 2)), 4)


def test_interleaved_heads_come_out_as_q_k_v() -> None:
    # GPT-NeoX: q0 k0 v0 q1 k1 v1
    spec = ff.groups.heads((6, 3), 2, layout="interleaved")
    assert [rows_of(spec, g) for g in range(6)] == [[0], [3], [1], [4], [2], [5]]
    # Falcon: for each of two key heads two queries, the key, the value
    spec = ff.groups.heads((8, 3), 4, layout="interleaved", num_kv_heads=2)
    assert [rows_of(spec, g)[0] for g in range(8)] == [0, 1, 4, 5, 2, 6, 3, 7]


def test_nothing_to_split() -> None:
    with pytest.raises(ff.OptionError, match=r"split: expected a spec with parts, got head"):
        ff.groups.heads((6, 4), 3).split(torch.zeros(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ff.groups.heads((7, 4), 3), r"3 heads along axis 0, got the shape \(7, 4\)"),
        (lambda: ff.groups.heads((6, 4), 3, head_dim=4), r"3 heads of 4 entries along axis 0"),
        (lambda: ff.groups.heads((6, 4), 3, axis=2), r"heads: expected an axis of the shape"),
        (lambda: ff.groups.heads((0, 4), 3), r"which they do not divide so"),
        (
            lambda: ff.groups.heads((10, 4), 3, layout="interleaved", num_kv_heads=2),
            r"num_kv_heads to divide num_heads=3, got 2",
        ),
        (lambda: ff.groups.channels((2, 3), axis=2), r"channels: expected an axis of the shape"),
        (lambda: ff.groups.channels((2, 3), axis=-1), r"expected an axis .* got -1"),
        (lambda: ff.groups.channels((3, 3), axis=1, blocks=2), r"expected blocks along axis 0"),
        (lambda: ff.groups.rows((), bucket=2), r"rows: expected an axis of the shape \(\), got 0"),
        (
            lambda: GroupSpec("row", (2, 3), None, 2),
            r"expected an axis of the shape \(2, 3\) for layout 'runs', got None",
        ),
        (
            lambda: GroupSpec("tensor", (2, 3), 0, 1, "whole"),
            r"expected an axis .* for layout 'whole'",
        ),
        (lambda: GroupSpec("row", (2, 3), 0, 3), r"expected num_groups=2 for the shape \(2, 3\)"),
        (
            lambda: GroupSpec("label", (2, 3), 0, 2, order=(0, 2)),
            r"each of 2 base groups a group below 2, got 2 numbers up to 2",
        ),
        (
            lambda: GroupSpec("head", (4, 3), 0, 4, parts=(("q", 3),)),
            r"expected parts with 4 groups in all",
        ),
        (lambda: GroupSpec("label", (2,), 0, 2, names=("a",)), r"expected 2 names, got 1"),
    ],
)
def test_shapes_that_do_not_fit(call: Any, message: str) -> None:
    with pytest.raises(ff.ShapeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ff.groups.heads((6, 4), 3, layout="vkq"),
            r"layout to be one of \['separate', 'qkv', 'kv', 'interleaved'\], got 'vkq'",
        ),
        (lambda: ff.groups.heads((6, 4), 0), r"num_heads to be an integer of at least 1, got 0"),
        (lambda: ff.groups.heads((6, 4), 3.0), r"num_heads to be an integer"),  # type: ignore[arg-type]
        (
            lambda: ff.groups.heads((6, 4), 3, num_kv_heads=1),
            r"num_kv_heads for fused projections only",
        ),
        (lambda: ff.groups.rows((6, 4), bucket=0), r"bucket to be an integer of at least 1, got 0"),
        (lambda: GroupSpec("neuron", (2,), 0, 2), r"kind to be one of .* got 'neuron'"),
        (lambda: GroupSpec("row", (2,), 0, 2, "columns"), r"layout to be one of .* 'columns'"),
        (
            lambda: GroupSpec("row", (2,), 0, 2, reduction="max"),
            r"reduction to be one of \['sum', 'mean'\], got 'max'",
        ),
        (lambda: GroupSpec("row", (2,), 0, 2, run=0), r"expected positive numbers, got run=0"),
    ],
)
def test_options_that_do_not_exist(call: Any, message: str) -> None:
    with pytest.raises(ff.OptionError, match=message):
        call()
