"""`Grouped` as a representation: what the shared tests of the algebra do not ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherfn as ff
from fisherfn.curvature import Grouped, Layout
from fisherfn.groups import GroupSpec

PARAMS = {"w": torch.zeros(4, 3, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}
N = torch.tensor(8.0)


def specs() -> dict[str, GroupSpec]:
    return {"w": ff.groups.heads((4, 3), 2), "b": ff.groups.elements((4,))}


def diagonal(seed: int = 0, **options: Any) -> ff.Diagonal:
    key = ff.random.key(seed)
    values = ff.tree.map(lambda x: x.square(), ff.tree.random_like(key, PARAMS))
    return ff.Diagonal(values, N, **options)


def grouped(seed: int = 0, **options: Any) -> Grouped:
    return Grouped.of(diagonal(seed, **options), specs())


def test_of_a_diagonal() -> None:
    D = diagonal(fisher="mc", unit="position")
    F = Grouped.of(D, {path: s.renamed(reduction="mean") for path, s in specs().items()})
    torch.testing.assert_close(F.values, ff.groups.reduce(D.values, specs()))
    torch.testing.assert_close(F.trace(), D.trace())
    assert (F.fisher, F.unit, F.count) == ("mc", "position", N)
    assert F.specs == specs()
    expanded = ff.groups.expand(F.values, F.specs)
    torch.testing.assert_close(F.diagonal(), expanded)
    torch.testing.assert_close(F.means()["w"], F.values["w"] / 6)
    with pytest.raises(ff.OptionError, match=r"Grouped.of: expected a Diagonal, got Grouped"):
        Grouped.of(F, specs())  # type: ignore[arg-type]
    with pytest.raises(ff.TreeMismatchError, match=r"Grouped.of: expected a spec for every leaf"):
        Grouped.of(D, {"w": specs()["w"]})


def test_merging_is_joining_the_data() -> None:
    a, b = diagonal(1), replace(diagonal(2), count=torch.tensor(24.0))
    joined = ff.merge(Grouped.of(a, specs()), Grouped.of(b, specs()))
    want = Grouped.of(ff.merge(a, b), specs())
    torch.testing.assert_close(joined.values, want.values)
    assert joined.count == want.count == 32.0
    empty = ff.empty_like(joined)
    assert torch.equal(ff.merge(empty, joined).values["w"], joined.values["w"])


def test_standard_errors_add_like_independent_ones() -> None:
    F = replace(grouped(fisher="mc"), stderr={"w": torch.tensor([3.0, 0.0]), "b": torch.ones(4)})
    G = replace(F, stderr={"w": torch.tensor([4.0, 0.0]), "b": torch.zeros(4)})
    both = F + G
    assert both.stderr is not None
    assert both.stderr["w"].tolist() == [5.0, 0.0]
    scaled = -2.0 * F
    assert scaled.stderr is not None
    assert scaled.stderr["w"].tolist() == [6.0, 0.0]
    assert (F + replace(G, stderr=None)).stderr is None


def test_what_does_not_belong_together() -> None:
    F = grouped()
    other = Grouped.of(diagonal(), {**specs(), "w": ff.groups.channels((4, 3))})
    with pytest.raises(
        ff.TreeMismatchError, match=r"merge: expected two results with the same gro"
    ):
        ff.merge(F, other)
    with pytest.raises(ff.TreeMismatchError, match=r"others at 'w'. Compute both with the same sp"):
        _ = F + other
    with pytest.raises(ff.OptionError, match=r"results of one class, got Grouped and Diagonal"):
        ff.merge(F, diagonal())
    with pytest.raises(ff.OptionError, match=r"the same unit, got 'example' and 'position'"):
        ff.merge(F, grouped(unit="position"))
    with pytest.raises(ff.OptionError, match=r"the same fisher, got 'exact' and 'mc'"):
        ff.merge(F, grouped(fisher="mc"))
    # the source of a spec, and how it would reduce, are no difference
    told = {path: s.renamed(source="a rule", reduction="mean") for path, s in specs().items()}
    assert ff.merge(F, Grouped.of(diagonal(), told)).count == 16.0


def test_fields_that_do_not_fit() -> None:
    F = grouped()
    with pytest.raises(ff.TreeMismatchError, match=r"Grouped: expected one spec for each leaf of"):
        replace(F, groups=F.groups[::-1])
    with pytest.raises(ff.TreeMismatchError, match=r"Grouped: expected one spec for each leaf of"):
        replace(F, groups=F.groups[:1])
    with pytest.raises(
        ff.TreeMismatchError, match=r"a vector of 2 groups, got shape \(3,\) at 'w'"
    ):
        replace(F, values={**F.values, "w": torch.ones(3)})
    with pytest.raises(ff.TreeMismatchError, match=r"a vector of 2 groups, got nothing at 'w'"):
        replace(F, stderr={"b": torch.ones(4)})
    with pytest.raises(ff.ShapeError, match=r"expected values to be floating point, got torch.int"):
        replace(F, values={**F.values, "w": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(
        ff.TreeMismatchError, match=r"Grouped.mv: expected v like params, got no le"
    ):
        F.mv({"w": torch.ones(4, 3)})
    with pytest.raises(ff.NotPositiveDefiniteError, match=r"at b with damping 0"):
        replace(F, values={**F.values, "b": torch.zeros(4)}).solve(PARAMS)


def test_pooled_groups_are_one_multiple_of_the_identity() -> None:
    pooled = {
        "w": ff.groups.channels((4, 3)).renamed(into="neurons"),
        "b": ff.groups.elements((4,)).renamed(into="neurons"),
    }
    D = diagonal()
    F = Grouped.of(D, pooled)
    rows = D.values["w"].sum(1) + D.values["b"]
    torch.testing.assert_close(F.values, {"neurons": rows})
    torch.testing.assert_close(F.diagonal()["b"], rows / 4)
    torch.testing.assert_close(F.diagonal()["w"], (rows / 4).unsqueeze(1).expand(4, 3))
    torch.testing.assert_close(F.trace(), D.trace())


@pytest.mark.parametrize("into", [None, "classes"])
def test_regrouping_by_label(into: str | None) -> None:
    F = replace(grouped(fisher="mc"), stderr=grouped().values)
    labels = {"w": ["a", "b"], "b": ["b", "b", "a", "b"]}
    got = F.regroup(labels, into=into)
    specs_by_label = ff.groups.relabel(specs(), labels, into=into)
    want = Grouped.of(diagonal(fisher="mc"), specs_by_label)
    torch.testing.assert_close(got.values, want.values)
    assert (got.groups, got.count, got.fisher, got.stderr) == (want.groups, N, "mc", None)
    torch.testing.assert_close(got.trace(), F.trace())
    with pytest.raises(ff.ShapeError, match=r"expected 2 labels, one a group, got 1 at 'w'"):
        F.regroup({"w": ["a"]})


@pytest.mark.parametrize("with_error", [False, True])
def test_saved_and_loaded(tmp_path: Path, with_error: bool) -> None:
    labelled = ff.groups.relabel(specs(), {"w": ["a", "b"]}, into="classes")
    F = Grouped.of(diagonal(fisher="mc"), labelled)
    if with_error:
        F = replace(F, stderr={name: 0.1 * x for name, x in F.values.items()})
    ff.io.save(tmp_path / "f.safetensors", F)
    G = ff.io.load(tmp_path / "f.safetensors")
    assert type(G) is Grouped
    assert (G.layout, G.groups, G.fisher, G.unit) == (F.layout, F.groups, F.fisher, F.unit)
    assert ff.tree.structure(G) == ff.tree.structure(F)
    for a, b in zip(ff.tree.leaves(G), ff.tree.leaves(F), strict=True):
        assert torch.equal(a, b)
    assert ff.merge(F, G).count == 16.0


def test_specs_are_saved_too(tmp_path: Path) -> None:
    kept = {"w": ff.groups.heads((12, 3), 2, layout="qkv").renamed(source="a test")}
    ff.io.save(tmp_path / "specs.safetensors", {**kept, "n": torch.ones(1)})
    loaded = ff.io.load(tmp_path / "specs.safetensors")
    assert loaded["w"] == kept["w"]
    assert loaded["w"].source == "a test"


def test_states_average_the_traces() -> None:
    ema = ff.states.ema(0.9)
    F = grouped()
    state = ema.init(F)
    for _ in range(5):
        reading, state = ema.update(F, state)
        assert type(reading) is Grouped
        torch.testing.assert_close(reading.values, F.values)


def test_eigenvalues_are_those_of_the_matrix_it_stands_for() -> None:
    F = grouped()
    assert F.eigenvalues().shape == (16,)
    torch.testing.assert_close(F.eigenvalues().sum(), F.trace())
    dense = F.to_dense()
    torch.testing.assert_close(F.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0))


def test_groups_without_scalars_play_no_part() -> None:
    spec = GroupSpec("label", (2, 2), 0, 3, order=(0, 2))
    layout = Layout.of({"w": torch.zeros(2, 2)})
    F = Grouped({"w": torch.tensor([2.0, 0.0, 4.0])}, N, layout, (("w", spec),))
    v = {"w": torch.ones(2, 2)}
    assert F.solve(v)["w"].tolist() == [[1.0, 1.0], [0.5, 0.5]]
    torch.testing.assert_close(F.logdet(), torch.tensor(4.0).log())
    assert F.frobenius() == torch.tensor(10.0).sqrt()
    assert F.quadratic(v) == F.trace() == 6.0
