"""The benchmark of traces and spectra runs, and is right on a small model."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from linalg.operators import flat, rotated

import fisherfn as ff
from benchmarks import solves, spectra, spectra_language, spectra_peers, spectra_truth
from benchmarks.definitions import dense_fisher
from benchmarks.workloads import SMALL_PROBLEMS, build


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_small_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "spectra.json"
    arguments = ["--problem", "tiny", "--training", "2", "--repeats", "1", "--threads", "1"]
    assert spectra.main([*arguments, "--output", str(out)]) == 0
    found = json.loads(out.read_text("utf-8"))["found"]["tiny"]
    assert set(found) == {"after 0 steps of training", "after 2 steps of training"}
    for measured in found.values():
        xtrace = measured["trace"]["xtrace"]
        assert abs(xtrace["relative error"]) < 6 * xtrace["relative stderr"] + 1e-5
        assert measured["spectrum"]["within 40 products"]["largest relative error"] < 1e-3
    assert "tiny, after 0 steps of training" in capsys.readouterr().out


@pytest.mark.parametrize(
    "problem", ["small_mlp", *[pytest.param(n, marks=pytest.mark.slow) for n in SMALL_PROBLEMS[1:]]]
)
def test_methods_beside_dense_matrices(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    problem: str,
) -> None:
    monkeypatch.setattr(spectra_truth, "KEYS", 4)
    out = tmp_path / "truth.json"
    arguments = ["--truth", "--problem", problem, "--threads", "1", "--output", str(out)]
    assert spectra.main(arguments) == 0
    content = json.loads(out.read_text("utf-8"))
    assert content["versions"]["torch"] == torch.__version__
    rows = content["found"][problem]
    for row in rows:
        if row.get("keys", 1) > 1:
            assert 0.05 < row["z"] < 5.0, row
            assert row["error"] < 0.2
            continue
        double = row["precision"] == "float64"
        assert row["error"] < (1e-8 if double else 1e-4), row
        assert row["claim"] <= (1e-10 if double else 1e-5), row
        assert row["truth"] > 0
    questions = ["trace"] * 6 + ["eigenvalue"] * 10 + ["log-determinant"] + ["solve"] * 8
    assert sorted(row["question"] for row in rows) == sorted(questions)
    assert "lanczos, number 5" in capsys.readouterr().out


def test_eigenpairs_invert_what_they_span() -> None:
    known = rotated([7.0, 3.0] + [0.0] * 38)
    pairs = ff.linalg.lanczos(known.mv, known.like, k=2, key=ff.random.key(0))
    v = ff.tree.random_like(ff.random.key(1), known.like)
    got = solves.by_eigenpairs(pairs, 0.5)(v)
    shifted = known.matrix + 0.5 * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(flat(got), torch.linalg.solve(shifted, flat(v)))


def test_right_hand_side_is_the_gradient() -> None:
    workload = build("small_gpt", "cpu")
    model, params, buffers = ff.functional(workload.module)
    got = solves.gradient(model, params, buffers, workload.batch)
    loss = workload.positions * workload.loss(workload.module)
    want = torch.autograd.grad(loss, list(workload.module.parameters()))
    torch.testing.assert_close(list(got.values()), list(want))


def test_known_spectra_are_what_this_library_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra_peers, "installed", lambda distribution: False)
    for problem in spectra_peers.SPECTRA:
        rows = spectra_peers.beside_peers(problem, "cpu", 0)
        for row in rows:
            eigenvalues = row["method"].startswith("eigenvalues")
            assert row["error"] < (1e-6 if eigenvalues else 5 * row["claim"] + 1e-5), row
            assert row["products"] <= 40


@pytest.mark.parametrize(
    "problem", ["small_mlp", pytest.param("small_gpt", marks=pytest.mark.slow)]
)
def test_truths_of_a_model_are_those_of_its_matrix(
    monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    monkeypatch.setattr(spectra_peers, "installed", lambda distribution: False)
    matrix = dense_fisher(build(problem, "cpu").double())
    want = torch.linalg.eigvalsh(matrix).flip(0)[:5]
    rows = [r for r in spectra_peers.beside_peers(problem, "cpu", 0) if r["matrix"] == "fisher"]
    assert rows[0]["truth"] == pytest.approx(want.tolist(), rel=1e-6)
    assert rows[0]["error"] < 1e-5
    known = rows[-1].get("stderr of truth", 1e-10)
    assert rows[-1]["truth"][0] == pytest.approx(float(matrix.trace()), rel=5 * known)


@pytest.mark.peers
@pytest.mark.moves_global_rng
def test_other_libraries_are_asked_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--peers", "--problem", "rank one", "small_gpt", "--threads", "1"]
    assert spectra.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "hessian-eigenthings" in printed
    assert "PyHessian" in printed
    for row in spectra_peers.beside_peers("small_gpt", "cpu", 0):
        assert "message" not in row, row
        assert row["error"] < 0.5
        assert row["products"] > 1


def test_questions_to_a_language_model_on_a_small_one() -> None:
    names = ["plain", "eigenpairs", "diagonal", "K-FAC"]
    asked = spectra.parser().parse_args(["--steps", "30", "--preconditioners", *names])
    workload = build("small_gpt", "cpu")
    model, params, buffers = ff.functional(workload.module)
    found = spectra_language.answers(asked, model, (params, buffers, workload.batch))
    trace = found["trace, 4 draws of labels"]
    assert abs(found["trace, random vectors"]["value"] - trace["value"]) < 6 * trace["stderr"]
    top = found["five largest eigenvalues"]["eigenvalues"][0]
    for name in names:
        solve = found[f"solve, {name}"]
        assert solve["reason"] == "converged"
        assert solve["residual"] <= 1e-2
        assert solve["damping"] == pytest.approx(0.01 * top)
    assert found["solve, eigenpairs"]["steps"] <= found["solve, plain"]["steps"] < 40


@pytest.mark.lm
@pytest.mark.slow
def test_language_model_within_twelve_gibibytes(tmp_path: Path) -> None:
    out = tmp_path / "spectra.json"
    assert spectra.main(["--problem", "smollm2", "--output", str(out)]) == 0
    found = json.loads(out.read_text("utf-8"))["found"]["smollm2"]
    trace = found["trace, 4 draws of labels"]
    assert 0 < trace["stderr"] < trace["value"]
    probes = found["trace, random vectors"]
    assert abs(probes["value"] - trace["value"]) < 5 * (probes["stderr"] + trace["stderr"])
    pairs = found["five largest eigenvalues"]
    values = pairs["eigenvalues"]
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] <= values[0] < trace["value"] + 5 * trace["stderr"]
    assert max(pairs["residuals"]) < 0.2 * values[0]
    for name in ("plain", "eigenpairs"):
        solve = found[f"solve, {name}"]
        assert solve["converged"]
        assert solve["residual"] <= 1e-2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 < 12.0
