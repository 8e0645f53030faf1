"""Other libraries' Kronecker blocks are judged fairly: right, off by a scale, or wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    agreement,
    agreement_cases,
    agreement_draws,
    kronecker,
    kronecker_blocks,
    kronecker_checks,
    oracle,
    run,
)
from benchmarks.agreement_libraries import LIBRARIES, own
from benchmarks.kronecker_peers import PLAIN, Options
from benchmarks.oracle import Values
from benchmarks.peers import PEERS, NotOffered, Peer, Prepared
from benchmarks.workloads import Workload, build
from fisherfn.testing import assert_close

Prepare = Callable[[Workload, str, Options], Prepared]


def changed(change: Callable[[Values], Values]) -> Prepare:
    """Return this package as another library, which says something else."""

    def prepare(workload: Workload, quantity: str, options: Options = PLAIN) -> Prepared:
        right = own(workload, quantity, options)
        return Prepared(right.run, lambda result: change(right.values(result)))

    return prepare


def times(factor: float, prefix: str) -> Callable[[Values], Values]:
    return lambda values: {k: x * factor if k.startswith(prefix) else x for k, x in values.items()}


def asked(
    monkeypatch: pytest.MonkeyPatch,
    prepare: Prepare,
    case: str = "mlp",
    structure: str = "kfac",
    fisher: str = "exact",
) -> agreement.Finding:
    monkeypatch.setitem(LIBRARIES, "other", prepare)
    return agreement.ask(agreement_cases.build(case), "other", structure, fisher)


@pytest.mark.parametrize("case", agreement_cases.PROBLEMS)
def test_the_package_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    monkeypatch.setattr(agreement_draws, "REPEATS", 30)
    arguments = ["--library", "fisherfn", "--case", case, "--output", str(tmp_path)]
    assert agreement.main(arguments) == 0
    written = json.loads((tmp_path / "kronecker-agreement.json").read_text())
    assert {f["structure"] for f in written["findings"]} == {"kfac", "ekfac"}
    for f in written["findings"]:
        assert f["verdict"] == "right", f
        assert f["reading"] == ""
        if "draws" not in case:
            assert f["error"] < 1e-12
            assert f["layers"][0] == f["layers"][1]
    assert f"kfac, {case}" in capsys.readouterr().out


@pytest.mark.parametrize(("structure", "prefix"), [("kfac", "A/"), ("kfac", "G/"), ("ekfac", "S/")])
def test_a_scale_is_found(monkeypatch: pytest.MonkeyPatch, structure: str, prefix: str) -> None:
    found = asked(monkeypatch, changed(times(4.0, prefix)), structure=structure)
    assert found.verdict == "off"
    assert found.text == "off by ×4"
    assert list(found.ratios.values()) == pytest.approx([4.0, 4.0])
    one = asked(monkeypatch, changed(times(4.0, f"{prefix}0.")), structure=structure)
    assert one.text == "off by ×1, ×4, not the same for all layers"


def test_a_scale_may_sit_in_either_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(values: Values) -> Values:
        return times(0.25, "G/")(times(4.0, "A/")(values))

    assert asked(monkeypatch, changed(moved)).verdict == "right"


def test_a_wrong_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(values: Values) -> Values:
        return {k: x.diag().diag() if k == "G/0.weight" else x for k, x in values.items()}

    def other_size(values: Values) -> Values:
        return {k: x[:-1, :-1] if k == "G/0.weight" else x for k, x in values.items()}

    found = asked(monkeypatch, changed(wrong))
    assert found.verdict == "wrong"
    assert found.text.startswith("wrong (relative error 0.")
    assert found.text.endswith("; 1 of 2 blocks right)")
    found = asked(monkeypatch, changed(other_size))
    assert "a block of another size" in found.text


def test_what_is_not_finite_is_written_as_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(monkeypatch, changed(times(float("nan"), "G/0.")))
    assert found.verdict == "wrong"
    written = json.loads(agreement.write(tmp_path, [found]).read_text())["findings"][0]
    assert written["error"] is None
    assert written["ratios"] == {"0.weight": None, "2.weight": pytest.approx(1.0)}


def test_wrong_bases_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(values: Values) -> Values:
        return {k: x.flip(0) if k == "QA/2.weight" else x for k, x in values.items()}

    found = asked(monkeypatch, changed(swapped), structure="ekfac")
    assert found.verdict == "wrong"


def test_a_bias_apart_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(values: Values) -> Values:
        found = dict(values)
        for name in ("0", "2"):
            found[f"A/{name}.weight"] = values[f"A/{name}.weight"][:-1, :-1]
            found[f"A/{name}.bias"] = torch.ones(1, 1, dtype=torch.float64)
            found[f"G/{name}.bias"] = values[f"G/{name}.weight"]
        return found

    found = asked(monkeypatch, changed(apart))
    assert found.verdict == "right"
    assert len(found.errors) == 4


def test_what_a_library_lacks_or_fails_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: Any) -> Prepared:
        raise NotOffered("no such thing")

    def fails(*_: Any) -> Prepared:
        raise ValueError("too large\nby far")

    assert asked(monkeypatch, lacks).text == "not offered: no such thing"
    assert asked(monkeypatch, fails).text == "raises ValueError: too large"


def test_another_reading_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = agreement_cases.build("mlp, class weights")
    reading = agreement.READINGS["weights in G alone"]
    known = kronecker_blocks.layers(case.workload, "exact", reading)

    def unweighted_inputs(values: Values) -> Values:
        return {**values, **{f"A/{name}.weight": x.A[0] for name, x in known.items()}}

    found = asked(monkeypatch, changed(unweighted_inputs), "mlp, class weights")
    assert found.verdict == "right"
    assert found.text == "right (weights in G alone)"


def test_the_summary_has_a_word_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    off = asked(monkeypatch, changed(times(4.0, "G/0.")))
    right = asked(monkeypatch, own, fisher="empirical")
    own_row = agreement.ask(agreement_cases.build("mlp"), "fisherfn", "kfac", "exact")
    text = agreement.summary([own_row, off, right])
    assert text.split() == ["kfac", "fisherfn", "other", "mlp", "right", "×1,4/right"]
    off.verdict = right.verdict = "not offered"
    assert agreement.summary([off, right]).split()[-1] == "-"


def test_draws_that_are_scaled_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement_draws, "REPEATS", 30)
    found = asked(monkeypatch, changed(times(0.25, "G/")), "mlp, four draws", fisher="mc")
    assert found.verdict == "off"
    assert found.ratios["trace"] == pytest.approx(0.25, rel=0.1)


def test_a_known_cause_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "kronfluence", changed(times(2.0, "G/0.")))
    case = agreement_cases.build("convolution")
    found = agreement.ask(case, "kronfluence", "kfac", "empirical")
    assert found.cause == "G is an average over positions, whose number differs from layer to layer"
    assert f"because {found.cause}" in agreement.table([found])


def test_blocks_agree_with_the_loops_of_the_other_benchmark() -> None:
    workload = build("tiny", "cpu").double()
    exact = oracle.exact_diagonal(workload, workload.batch.targets)
    for fisher, targets in (("empirical", workload.batch.targets), ("exact", None)):
        known = kronecker_blocks.layers(workload, fisher)
        wanted = kronecker.factors(workload, targets)
        for name, layer in known.items():
            assert_close(layer.A[0], wanted[f"A/{name}.weight"])
            assert_close(layer.G[0], wanted[f"G/{name}.weight"])
            if targets is None:
                assert_close(layer.diagonal()[:, :-1], exact[f"{name}.weight"])
                assert_close(layer.diagonal()[:, -1], exact[f"{name}.bias"])


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_traces_need_no_matrices(structure: str) -> None:
    workload = build("tiny", "cpu").double()
    (found,) = kronecker_checks.drawn_traces(workload, structure, 1, seed=3)
    (labels,) = oracle.drawn_labels(workload, 1, seed=3)
    known = kronecker_blocks.layers(_labelled(workload, labels), "empirical")
    for name, layer in known.items():
        wanted = layer.kfac().trace() if structure == "kfac" else layer.diagonal().sum()
        assert found[name] == pytest.approx(float(wanted))


def _labelled(workload: Workload, labels: Tensor) -> Workload:
    return replace(workload, batch=replace(workload.batch, targets=labels))


@pytest.mark.parametrize(
    ("prefix", "factor", "agrees"),
    [("A/", 1.0, True), ("G/", 1.5, False), ("S/", 1.5, False), ("A/2", 1.5, False)],
)
def test_peers_are_checked_before_they_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, factor: float, agrees: bool
) -> None:
    def prepare(workload: Workload, quantity: str) -> Prepared:
        return changed(times(factor, prefix))(workload, quantity, PLAIN)

    monkeypatch.setitem(PEERS, "other", Peer("torch", prepare, prepare))
    quantity = "ekfac/mc" if prefix == "S/" else "kfac/mc"
    arguments = ["--problem", "tiny", "--repeats", "1", "--peers", "--quantity", quantity]
    assert run.main([*arguments, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "tiny-cpu.json").read_text())["rows"]
    row = next(row for row in rows if row["source"] == "other")
    assert row["agrees"] is agrees
    assert (row["error"] < 1e-10) is agrees
    assert row["message"] == ""
    assert row["gradients"] > 0


def test_what_a_peer_leaves_out_is_counted() -> None:
    workload = build("tiny", "cpu")
    square = torch.eye(7)
    got = {"A/0.weight": square, "G/0.weight": torch.eye(5)}
    text = kronecker_checks.left_out(workload, got)
    assert text == "without 2 of 4 tensors, 34% of the parameters"
    alone = {"A/0.weight": square[:-1, :-1], "G/0.weight": torch.eye(5), "rest/2.bias": square}
    text = kronecker_checks.left_out(workload, alone)
    assert text == "without 2 of 4 tensors, 38% of the parameters"


def test_other_libraries_without_blocks_are_not_asked() -> None:
    with pytest.raises(NotOffered, match="no such quantity"):
        PEERS["vmap(grad)"].prepare(build("tiny", "cpu"), "kfac/mc")


@pytest.mark.peers
@pytest.mark.moves_global_rng  # peers draw labels from it
@pytest.mark.filterwarnings("ignore")
def test_peers_agree_where_they_are_known_to(tmp_path: Path) -> None:
    for library in ("asdl", "backpack", "curvlinops", "kronfluence", "nngeometry"):
        assert importlib.util.find_spec(library), f"{library} is not installed"
    agreement.main(["--case", "mlp", "convolution", "--output", str(tmp_path)])
    findings = json.loads((tmp_path / "kronecker-agreement.json").read_text())["findings"]
    verdicts = {
        (f["library"], f["structure"], f["case"]): f["verdict"]
        for f in findings
        if f["fisher"] == ("exact" if f["library"] == "BackPACK" else "empirical")
    }
    for library in ("ASDL", "BackPACK", "NNGeometry", "curvlinops", "kronfluence"):
        assert verdicts[library, "kfac", "mlp"] == "right"
    for library in ("NNGeometry", "curvlinops"):
        for structure in ("kfac", "ekfac"):
            assert verdicts[library, structure, "convolution"] == "right"
    assert verdicts["kronfluence", "kfac", "convolution"] == "off"
    assert verdicts["BackPACK", "kfac", "convolution"] == "wrong"
