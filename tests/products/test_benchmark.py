"""The benchmark of products runs, and its numbers are checked; other libraries agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fisherfn as ff
from benchmarks import products
from benchmarks.workloads import build
from fisherfn.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")


def test_benchmark_runs_and_checks_its_products(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    arguments = ["--problem", "tiny", "--repeats", "1", "--output", str(output)]
    assert products.main(arguments) == 0
    rows = json.loads(output.read_text())["tiny"]
    for name in ("single", "linearised", "block of 8, a vector"):
        assert rows[name]["error"] < 1e-5
        assert rows[name]["gradients"] > 0
    assert "goal 2.5" in capsys.readouterr().out


def test_benchmark_notices_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    right = products.reference
    monkeypatch.setattr(
        products,
        "reference",
        lambda w, v: {name: 2 * t for name, t in right(w, v).items()},
    )
    assert products.main(["--problem", "tiny", "--repeats", "1"]) == 1


@pytest.mark.peers
@pytest.mark.parametrize("problem", ["tiny", "mlp"])
def test_curvlinops_agrees(problem: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    workload = build(problem, "cpu").double()
    model, params, buffers = ff.functional(workload.module)
    v = ff.tree.random_like(ff.random.key(1), params)
    matrix = curvlinops.GGNLinearOperator(
        workload.module,
        torch.nn.CrossEntropyLoss(),
        list(workload.module.parameters()),
        [(workload.batch.inputs, workload.batch.targets)],
        check_deterministic=False,
    )
    want = dict(zip(params, matrix @ list(v.values()), strict=True))
    product = ff.fisher_vp(model, ff.likelihoods.categorical())
    got = product(params, buffers, workload.batch, v)
    assert_close(got, {name: t.detach() for name, t in want.items()}, rtol=1e-8)
