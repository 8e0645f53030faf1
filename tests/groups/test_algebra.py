"""Reducing, expanding, labelling and reporting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fisherfn as ff
from fisherfn.groups import GroupSpec

PARAMS = {
    "h.0.q.weight": torch.arange(24.0, dtype=torch.float64).reshape(6, 4),
    "h.0.q.bias": torch.arange(6.0, dtype=torch.float64),
    "h.1.q.weight": torch.arange(24.0, dtype=torch.float64).reshape(6, 4) ** 2,
    "table.weight": torch.arange(10.0, dtype=torch.float64).reshape(5, 2),
}


def specs(reduction: str = "sum") -> dict[str, GroupSpec]:
    found = {
        "h.0.q.weight": ff.groups.heads((6, 4), 3),
        "h.0.q.bias": ff.groups.elements((6,)),
        "h.1.q.weight": ff.groups.heads((6, 4), 3),
        "table.weight": ff.groups.rows((5, 2), bucket=2),
    }
    return {path: spec.renamed(reduction=reduction) for path, spec in found.items()}


def total(tree: Any) -> Tensor:
    return torch.stack([t.sum() for t in ff.tree.leaves(tree)]).sum()


def close(got: Any, want: Any) -> None:
    ff.tree.check_like("test", "got", got, want)
    for a, b in zip(ff.tree.leaves(got), ff.tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sums_and_means() -> None:
    sums = ff.groups.reduce(PARAMS, specs())
    assert sums["h.0.q.weight"].tolist() == [28.0, 92.0, 156.0]
    assert sums["table.weight"].tolist() == [6.0, 22.0, 17.0]
    means = ff.groups.reduce(PARAMS, specs("mean"))
    assert means["h.0.q.weight"].tolist() == [3.5, 11.5, 19.5]
    assert means["table.weight"].tolist() == [1.5, 5.5, 8.5]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("pooled", [False, True])
def test_expanding_conserves_the_trace(reduction: str, pooled: bool) -> None:
    given_specs = specs(reduction)
    if pooled:
        for path in ("h.0.q.weight", "h.1.q.weight"):
            given_specs[path] = given_specs[path].renamed(into="heads")
    reduced = ff.groups.reduce(PARAMS, given_specs)
    back = ff.groups.expand(reduced, given_specs)
    assert {path: t.shape for path, t in back.items()} == {p: t.shape for p, t in PARAMS.items()}
    torch.testing.assert_close(total(back), total(PARAMS), rtol=1e-14, atol=0)
    close(ff.groups.reduce(back, given_specs), reduced)  # a projection


def test_a_pool_adds_group_by_group() -> None:
    pooled = specs()
    for path in ("h.0.q.weight", "h.1.q.weight"):
        pooled[path] = pooled[path].renamed(into="heads")
    apart, together = ff.groups.reduce(PARAMS, specs()), ff.groups.reduce(PARAMS, pooled)
    assert list(together) == ["heads", "h.0.q.bias", "table.weight"]
    close(together["heads"], apart["h.0.q.weight"] + apart["h.1.q.weight"])
    means = {path: spec.renamed(reduction="mean") for path, spec in pooled.items()}
    close(ff.groups.reduce(PARAMS, means)["heads"], together["heads"] / 16)


def test_nested_trees_come_back() -> None:
    tree = {"a": {"w": torch.ones(2, 3)}, "b": [torch.ones(4)]}
    found = {"a/w": ff.groups.channels((2, 3)), "b/0": ff.groups.whole((4,))}
    reduced = ff.groups.reduce(tree, found)
    assert {path: t.tolist() for path, t in reduced.items()} == {"a/w": [3.0, 3.0], "b/0": [4.0]}
    close(ff.groups.expand(reduced, found, like=tree), tree)


def test_half_precision_is_added_up_in_float32() -> None:
    tree = {"w": torch.full((1, 5000), 1.0, dtype=torch.bfloat16)}
    found = {"w": ff.groups.channels((1, 5000))}
    assert ff.groups.reduce(tree, found)["w"].tolist() == [5000.0]
    assert ff.groups.expand({"w": torch.ones(1).half()}, found)["w"].dtype == torch.float32


def test_results_do_not_share_memory_with_their_arguments() -> None:
    tree = {"b": torch.ones(3)}
    found = {"b": ff.groups.elements((3,))}
    ff.groups.expand(tree, found)["b"].add_(1.0)
    ff.groups.reduce(tree, found)["b"].add_(1.0)
    assert tree["b"].tolist() == [1.0, 1.0, 1.0]


def test_empty_groups_have_mean_zero() -> None:
    found = {"w": GroupSpec("label", (2,), 0, 3, order=(2, 2), reduction="mean")}
    reduced = ff.groups.reduce({"w": torch.tensor([1.0, 3.0])}, found)
    assert reduced["w"].tolist() == [0.0, 0.0, 2.0]
    assert ff.groups.expand(reduced, found)["w"].tolist() == [2.0, 2.0]


# ---- labels --------------------------------------------------------------------------------------

LABELS = {
    "h.0.q.weight": ["induction", "other", "induction"],
    "h.1.q.weight": ["other", "positional", "other"],
}


@pytest.mark.parametrize("into", [None, "behaviour"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_labels(into: str | None, reduction: str) -> None:
    found = specs(reduction)
    labelled = ff.groups.relabel(found, LABELS, into=into)
    spec = labelled["h.1.q.weight"]
    assert (spec.kind, spec.names) == ("label", ("induction", "other", "positional"))
    assert labelled["table.weight"] == found["table.weight"]
    got = ff.groups.reduce(PARAMS, labelled)
    rows = {path: PARAMS[path].reshape(3, 2, 4).sum((1, 2)) for path in LABELS}
    want = {
        path: torch.stack(
            [
                sum(
                    (x for x, have in zip(rows[path], LABELS[path], strict=True) if have == name),
                    torch.zeros((), dtype=torch.float64),
                )
                for name in spec.names
            ]
        )
        for path in LABELS
    }
    counts = {path: [8 * LABELS[path].count(name) for name in spec.names] for path in LABELS}
    if into is None:
        for path in LABELS:
            sizes = torch.tensor(counts[path]).clamp_min(1) if reduction == "mean" else 1
            close(got[path], want[path] / sizes)
    else:
        sizes = torch.tensor(counts["h.0.q.weight"]) + torch.tensor(counts["h.1.q.weight"])
        both = want["h.0.q.weight"] + want["h.1.q.weight"]
        close(got[into], both / (sizes if reduction == "mean" else 1))
    close(ff.groups.regroup(ff.groups.reduce(PARAMS, found), found, LABELS, into=into), got)
    torch.testing.assert_close(total(ff.groups.expand(got, labelled)), total(PARAMS))


@given(labels=st.lists(st.integers(0, 3), min_size=3, max_size=3), again=st.booleans())
def test_labels_may_be_anything_and_be_labelled_again(labels: list[int], again: bool) -> None:
    found = {"h.0.q.weight": specs()["h.0.q.weight"]}
    tree = {"h.0.q.weight": PARAMS["h.0.q.weight"]}
    first = ff.groups.relabel(found, {"h.0.q.weight": labels})
    if again:
        n = first["h.0.q.weight"].num_groups
        first = ff.groups.relabel(first, {"h.0.q.weight": ["all"] * n})
    got = ff.groups.reduce(tree, first)["h.0.q.weight"]
    assert len(got) == (1 if again else len(set(labels)))
    torch.testing.assert_close(got.sum(), tree["h.0.q.weight"].sum())


# ---- reports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_totals(reduction: str) -> None:
    reduced = ff.groups.reduce(PARAMS, specs(reduction))
    by_layer = ff.groups.totals(reduced, specs(reduction))
    sums = {path: t.sum() for path, t in PARAMS.items()}
    assert list(by_layer) == ["layer_0", "layer_1", "other"]
    close(by_layer["layer_0"], sums["h.0.q.weight"] + sums["h.0.q.bias"])
    by_kind = ff.groups.totals(reduced, specs(reduction), by="kind")
    close(by_kind["head"], sums["h.0.q.weight"] + sums["h.1.q.weight"])
    close(ff.groups.totals(reduced, specs(reduction), by="leaf"), sums)
    assert list(ff.groups.totals(reduced, specs(reduction), by="component")) == [
        "layer_0.q",
        "layer_1.q",
        "other.table",
    ]


@pytest.mark.parametrize("by", ["layer", "component"])
def test_layers_as_groups(by: str) -> None:
    found = ff.groups.layers(PARAMS, by=by)
    want = ff.groups.totals(ff.groups.reduce(PARAMS, specs()), specs(), by=by)
    close(ff.groups.reduce(PARAMS, found), {name: t.reshape(1) for name, t in want.items()})


# ---- bad input -----------------------------------------------------------------------------------


def test_trees_that_do_not_fit() -> None:
    found = specs()
    fewer = {path: t for path, t in PARAMS.items() if path != "h.0.q.bias"}
    with pytest.raises(ff.TreeMismatchError, match=r"a leaf for every spec, got none at 'h.0.q.b"):
        ff.groups.reduce(fewer, found)
    with pytest.raises(ff.TreeMismatchError, match=r"a spec for every leaf, got none at 'more'"):
        ff.groups.reduce({**PARAMS, "more": torch.ones(1)}, found)
    with pytest.raises(ff.TreeMismatchError, match=r"shape \(6, 4\), got shape \(4, 6\) at 'h.0"):
        ff.groups.reduce({**PARAMS, "h.0.q.weight": torch.ones(4, 6)}, found)
    with pytest.raises(ff.TreeMismatchError, match=r"shape \(6,\), got int at 'h.0.q.bias'"):
        ff.groups.reduce({**PARAMS, "h.0.q.bias": 3}, found)
    with pytest.raises(ff.OptionError, match=r"expected a GroupSpec, got str at 'h.0.q.bias'"):
        ff.groups.expand(ff.groups.reduce(PARAMS, found), {**found, "h.0.q.bias": "row"})  # type: ignore[arg-type]


def test_reduced_values_that_do_not_fit() -> None:
    found, reduced = specs(), ff.groups.reduce(PARAMS, specs())
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"h.0.q.bias": torch.ones(2)}, r"shape \(2,\)"),
        ({"h.0.q.bias": None}, "nothing"),
        ({"h.0.q.bias": 3.0}, "float"),
    )
    for changed, got in changes:
        message = rf"expected a vector of 6 groups, got {got} at 'h.0.q.bias'"
        with pytest.raises(ff.TreeMismatchError, match=message):
            ff.groups.expand({**reduced, **changed}, found)
    with pytest.raises(ff.TreeMismatchError, match=r"values of 4 specs or pools, got one more at"):
        ff.groups.totals({**reduced, "more": torch.ones(1)}, found)


def test_pools_that_do_not_fit() -> None:
    found = specs()
    found["h.0.q.weight"] = found["h.0.q.weight"].renamed(into="pool")
    found["table.weight"] = found["table.weight"].renamed(into="pool", reduction="mean")
    message = r"the same groups in the pool 'pool', got 3 \(sum\) at 'h.0.q.weight' and 3 \(mean\)"
    with pytest.raises(ff.OptionError, match=message):
        ff.groups.reduce(PARAMS, found)
    found = specs()
    found["h.0.q.weight"] = found["h.0.q.weight"].renamed(into="h.1.q.weight")
    with pytest.raises(ff.OptionError, match=r"the same groups in the pool 'h.1.q.weight'"):
        ff.groups.reduce(PARAMS, found)


def test_labels_that_do_not_fit() -> None:
    found, reduced = specs(), ff.groups.reduce(PARAMS, specs())
    with pytest.raises(ff.ShapeError, match=r"expected 3 labels, one a group, got 2 at 'h.0.q.w"):
        ff.groups.relabel(found, {"h.0.q.weight": ["a", "b"]})
    with pytest.raises(ff.TreeMismatchError, match=r"labels at 'h.9', which has none"):
        ff.groups.relabel(found, {"h.9": ["a"]})
    with pytest.raises(ff.OptionError, match=r"labels for at least one path, got none"):
        ff.groups.relabel(found, {})
    with pytest.raises(ff.OptionError, match=r"into= to be a new name, got the path 'h.1.q.w"):
        ff.groups.relabel(found, LABELS, into="h.1.q.weight")
    pooled = ff.groups.relabel(found, LABELS, into="pool")
    values = ff.groups.reduce(PARAMS, pooled)
    with pytest.raises(ff.OptionError, match=r"parameters of their own, got 'h.0.q.weight' in the"):
        ff.groups.regroup(values, pooled, LABELS)
    with pytest.raises(ff.TreeMismatchError, match=r"regroup: expected a vector of 3 groups"):
        ff.groups.regroup({**reduced, "h.0.q.weight": torch.ones(2)}, found, LABELS)


def test_reports_that_do_not_exist() -> None:
    found, reduced = specs(), ff.groups.reduce(PARAMS, specs())
    with pytest.raises(ff.OptionError, match=r"totals: expected by= to be one of .* got 'head'"):
        ff.groups.totals(reduced, found, by="head")
    with pytest.raises(ff.OptionError, match=r"layers: expected by= to be 'layer' or 'component'"):
        ff.groups.layers(PARAMS, by="kind")
    pooled = ff.groups.relabel(found, LABELS, into="pool")
    with pytest.raises(ff.OptionError, match=r"the pool 'pool' in one layer, got \['layer_0', 'la"):
        ff.groups.totals(ff.groups.reduce(PARAMS, pooled), pooled)


def test_a_diagonal_is_reduced_like_its_values() -> None:
    values = {"w": torch.arange(6.0).reshape(2, 3)}
    F = ff.Diagonal(values, torch.tensor(1.0), fisher="exact", unit="example")
    specs = {"w": ff.groups.channels((2, 3))}
    assert torch.equal(ff.groups.reduce(F, specs)["w"], ff.groups.reduce(values, specs)["w"])
