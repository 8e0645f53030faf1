"""Row and column sums of outer products against the scores themselves, at every length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cases
import fisherfn as ff
from fisherfn.core.dtypes import wide
from fisherfn.layers import grouping
from fisherfn.layers.grouping import column_sums, group_sum, row_sums
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.outer import Outer
from fisherfn.layers.views import Factor, Permute, Reshape, Slice

LENGTHS = st.sampled_from([1, 2, 5, 31])
SMALL = st.integers(1, 4)
Sizes = tuple[int, int, int, int, int, int]


def outer(sizes: Sizes, seed: int = 0) -> Outer:
    k, b, r, t, o, i = sizes
    return Outer(cases.normal(b, r, t, i, seed=seed), cases.normal(k, b, r, t, o, seed=seed + 1))


def squares(form: Outer) -> Tensor:
    """Σ score² over columns and examples `[R, O, I]`, one score at a time."""
    total = torch.zeros(form.shape, dtype=torch.float64)
    for k in range(form.columns):
        for b in range(form.batch):
            for r in range(form.shape[0]):
                score = torch.zeros(form.shape[1:], dtype=torch.float64)
                for t in range(form.positions):
                    score += torch.outer(form.g[k, b, r, t], form.a[b, r, t])
                total[r] += score**2
    return total


def check(form: Outer) -> None:
    want = squares(form)
    for got, axis in ((row_sums(form), 2), (column_sums(form), 1)):
        torch.testing.assert_close(got, want.sum(axis), rtol=1e-11, atol=1e-11)


@given(sizes=st.tuples(SMALL, SMALL, SMALL, LENGTHS, SMALL, SMALL), seed=st.integers(0, 9))
def test_short_sequences(sizes: Sizes, seed: int) -> None:
    check(outer(sizes, seed))


@pytest.mark.parametrize("t", [127, 128, 131, 260])
@pytest.mark.parametrize("way", ["positions", "score"])
@pytest.mark.parametrize("recorded", [False, True])
def test_long_sequences_both_ways(
    t: int, way: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "_cost", lambda parts, g: (0, way == "positions"))
    with torch.set_grad_enabled(recorded):
        check(outer((2, 2, 2, t, 3, 2)))
        check(outer((1, 3, 1, t, 2, 3)))


def test_blocks_of_examples_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fisherfn.layers.numerics._CPU_BLOCK", 1)
    check(outer((2, 5, 1, 3, 40, 50)))
    check(outer((1, 5, 2, 50, 3, 4)))


@pytest.mark.parametrize(
    ("sizes", "positions"),
    [
        ((1, 4, 1, 64, 512, 128), True),
        ((1, 4, 1, 64, 64, 64), False),  # 64² (64 + 64) against 64³
        ((1, 4, 1, 128, 300, 300), True),  # halves: 3/4 of the pairs
        ((1, 4, 1, 784, 64, 75), False),  # a convolution
        ((20, 4, 1, 8, 16, 16), True),
        ((1, 4, 1, 1, 2, 2), True),
    ],
)
def test_the_cheaper_way_is_taken(sizes: Sizes, positions: bool) -> None:
    k, b, r, t, o, i = sizes
    form = Outer(torch.empty(b, r, t, i, device="meta"), torch.empty(k, b, r, t, o, device="meta"))
    cost, chosen = grouping._cost([form.a], form.g)
    assert chosen == positions
    assert cost <= form.multiplications() or t == 1


def test_no_score_is_formed_where_positions_are_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Outer) -> Tensor:
        raise AssertionError("a score was formed")

    monkeypatch.setattr(Outer, "scores", forbidden)
    form = outer((1, 2, 1, 3, 30, 40))
    leaf = LeafScores(((form, (Reshape((30, 40)),)),), (30, 40))
    for spec in (
        ff.groups.channels((30, 40)),
        ff.groups.channels((30, 40), axis=1),
        ff.groups.heads((30, 40), 5),
        ff.groups.heads((30, 40), 8, axis=1),
        ff.groups.whole((30, 40)),
    ):
        assert group_sum(leaf, spec).shape == (spec.num_groups,)
    with pytest.raises(AssertionError, match="a score was formed"):
        group_sum(leaf, ff.groups.elements((30, 40)))


VIEWS: dict[str, tuple[tuple[int, ...], tuple[object, ...]]] = {
    "as it is": ((1, 6, 8), ()),
    "a matrix": ((6, 8), (Reshape((6, 8)),)),
    "transposed": ((8, 6), (Permute((1, 0)), Reshape((6, 8)))),
    "a slice of rows": ((18, 8), (Slice(0, 6, 12, 18), Reshape((6, 8)))),
    "a slice of columns": ((6, 24), (Slice(1, 3, 11, 24), Reshape((6, 8)))),
    "heads and entries": ((2, 3, 8), (Reshape((2, 3, 8)),)),
    "a kernel": ((6, 2, 2, 2), (Reshape((6, 2, 2, 2)),)),
    "inputs apart": ((3, 2, 4, 2), (Permute((0, 1, 3, 2)), Reshape((3, 2, 2, 4)))),
    "three times": ((6, 8), (Factor(3.0), Reshape((6, 8)))),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("run", [1, 2, 5])
def test_groups_through_views(name: str, axis: int, run: int) -> None:
    shape, view = VIEWS[name]
    if axis >= len(shape):
        return
    form = outer((2, 3, 1, 2, 6, 8))
    leaf = LeafScores(((form, view),), shape)  # type: ignore[arg-type]
    spec = ff.groups.rows(shape, axis=axis, bucket=run)
    want = spec.fold(leaf.scores().square().sum((0, 1)))
    torch.testing.assert_close(group_sum(leaf, spec), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", [ff.groups.rows((7, 4)), ff.groups.rows((7, 4), bucket=3)])
def test_rows_of_a_tied_table_without_its_score(
    spec: ff.groups.GroupSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = torch.tensor([[1, 1, 6], [0, 3, 1]])
    lookup = Lookup(index, cases.normal(2, 2, 3, 4, seed=4), 7)
    form = outer((2, 2, 1, 2, 7, 4))
    leaf = LeafScores(((form, (Reshape((7, 4)),)), (lookup, ())), (7, 4))
    want = spec.fold(leaf.scores().square().sum((0, 1)))
    monkeypatch.setattr(LeafScores, "square_sum", None)
    torch.testing.assert_close(group_sum(leaf, spec), want, rtol=1e-12, atol=1e-12)


def test_half_precision_is_made_wide_before_it_arrives() -> None:
    with cases.seeded(0):
        net = torch.nn.Linear(4, 3).bfloat16()
    model, params, buffers = ff.functional(net)
    specs = ff.groups.infer(params, net)
    batch = ff.Batch(cases.normal(5, 4).bfloat16(), torch.tensor([0, 1, 2, 0, 1]))
    got = ff.grouped(model, ff.likelihoods.categorical(), specs, fisher="empirical")(
        params, buffers, batch
    )
    assert all(v.dtype == torch.float32 for v in got.values.values())
    assert wide(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32


MAKERS: dict[str, Callable[[tuple[int, ...]], ff.groups.GroupSpec]] = {
    "channels": ff.groups.channels,
    "elements": ff.groups.elements,
    "whole": ff.groups.whole,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_derivatives_of_a_contraction(kind: str) -> None:
    a, g = cases.normal(3, 1, 5, 4), cases.normal(1, 3, 1, 5, 6, seed=1)
    spec = MAKERS[kind]((6, 4))

    def sums(a: Tensor, g: Tensor) -> Tensor:
        return group_sum(LeafScores(((Outer(a, g), (Reshape((6, 4)),)),), (6, 4)), spec)

    assert torch.autograd.gradcheck(sums, (a.requires_grad_(), g.requires_grad_()))
