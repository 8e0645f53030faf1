"""The benchmark of products runs, and its numbers are checked; other libraries agree."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fisherfn as ff
from benchmarks import definitions, oracle, product_peers, products
from benchmarks.peers import NotOffered
from benchmarks.workloads import Workload, build
from fisherfn.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")

OURS = [
    "single", "single, mc", "single, empirical", "single, hessian", "linearised",
    "block of 8, a vector", "linearised, hessian", "block of 8, hessian, a vector",
]  # fmt: skip


def measured(tmp_path: Path, problem: str, *options: str) -> dict[str, Any]:
    output = tmp_path / "found.json"
    arguments = ["--problem", problem, "--repeats", "1", "--threads", "1", *options]
    assert products.main([*arguments, "--output", str(output)]) == 0
    return json.loads(output.read_text())[problem]


def vectors(workload: Workload, many: int = 2) -> dict[str, Tensor]:
    params = {name: p.detach() for name, p in workload.module.named_parameters()}
    return ff.tree.random_like(ff.random.split(ff.random.key(1), many), params)


@pytest.mark.parametrize("problem", ["tiny", "small_gpt"])
def test_benchmark_runs_and_checks_its_products(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str
) -> None:
    rows = measured(tmp_path, problem, "--no-peers")
    for name in OURS:
        assert rows[name]["error"] < 1e-5, name
        assert rows[name]["gradients"] > 0
        assert rows[name]["by"] == "fisherfn"
    assert "goal 2.5" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", definitions.MATRICES)
def test_benchmark_notices_wrong_products(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = definitions.products

    def doubled(workload: Any, matrix: str, *rest: Any) -> Any:
        found = right(workload, matrix, *rest)
        return ff.tree.scale(found, 2.0) if matrix == wrong else found

    monkeypatch.setattr(definitions, "products", doubled)
    arguments = ["--problem", "tiny", "--repeats", "1", "--no-peers", "--threads", "1"]
    assert products.main(arguments) == 1


def test_what_this_library_raises_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ff.UnsupportedError("not today")

    monkeypatch.setattr(ff, "hvp", lambda *_, **__: fail)
    with pytest.raises(ff.UnsupportedError, match="not today"):
        products.main(["--problem", "tiny", "--repeats", "1", "--no-peers", "--threads", "1"])


def test_what_another_library_raises_is_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(workload: Workload, matrix: str) -> product_peers.Products:
        if matrix == "empirical":
            raise NotOffered("no scores")
        v = vectors(workload, 1)
        halves = {name: t[0] / 2 for name, t in v.items()}

        def multiply(_: Any) -> Any:
            if matrix == "hessian":
                raise ZeroDivisionError("by zero\nand more")
            return halves

        return product_peers.Products(multiply, lambda found: found)

    peer = product_peers.ProductPeer("torch", prepare)
    monkeypatch.setattr(products, "PRODUCT_PEERS", {"other": peer})
    rows = measured(tmp_path, "tiny")
    assert rows["other, single"]["error"] > 0.1
    assert rows["other, single, empirical"]["message"] == "not offered: no scores"
    assert rows["other, single, hessian"]["message"] == "failed: ZeroDivisionError: by zero"
    assert "WRONG" in capsys.readouterr().out
    missing = product_peers.ProductPeer("no-such-distribution", prepare)
    monkeypatch.setattr(products, "PRODUCT_PEERS", {"other": missing})
    assert not any(name.startswith("other") for name in measured(tmp_path, "tiny"))


def test_definition_of_the_fisher_is_the_expectation_over_labels() -> None:
    workload = build("tiny", "cpu").double()
    v = vectors(workload)
    total = ff.tree.zeros_like(v)
    for c in range(workload.classes):
        targets = torch.full_like(workload.batch.targets, c)
        p = workload.logits(workload.module, workload.batch.inputs).softmax(-1)[:, c]
        for n, score in enumerate(oracle.scores(workload, targets)):
            for name, g in score.items():
                along = sum((v[k].flatten(1) @ s.flatten() for k, s in score.items()))
                share = torch.as_tensor(along).reshape(-1, *[1] * g.dim()) * p[n].detach()
                total[name] = total[name] + share * g / workload.examples
    assert_close(definitions.products(workload, "fisher", v), total, rtol=1e-10)
    got = definitions.dense_fisher(workload)
    flat = torch.cat([t.flatten(1) for t in v.values()], dim=1)
    assert_close(flat @ got, torch.cat([t.flatten(1) for t in total.values()], 1), rtol=1e-10)


@pytest.mark.parametrize("problem", ["tiny", "small_gpt"])
def test_definition_of_the_hessian_is_the_slope_of_the_gradient(problem: str) -> None:
    workload = build(problem, "cpu").double()
    leaves = list(workload.module.parameters())
    v = vectors(workload, 1)

    def gradient(distance: float) -> Tensor:
        with torch.no_grad():
            for p, t in zip(leaves, v.values(), strict=True):
                p.add_(distance * t[0])
        loss = workload.positions * workload.loss(workload.module)
        found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
        with torch.no_grad():
            for p, t in zip(leaves, v.values(), strict=True):
                p.sub_(distance * t[0])
        return found

    step = 1e-5
    want = (gradient(step) - gradient(-step)) / (2 * step)
    got = definitions.products(workload, "hessian", v)
    flat = torch.cat([t[0].flatten() for t in got.values()])
    assert (flat - want).norm() < 1e-6 * want.norm()


@pytest.mark.peers
def test_other_libraries_agree_or_say_why_not(tmp_path: Path) -> None:
    for library in ("curvlinops", "hessian_eigenthings", "pyhessian"):
        assert importlib.util.find_spec(library), f"{library} is not installed"
    vector = measured(tmp_path, "tiny")
    for name, row in vector.items():
        assert row.get("error", 0.0) < 1e-5, name
        offered = not (name.startswith("PyHessian") and "hessian" not in name)
        assert ("message" in row) == (not offered), name
    sequence = measured(tmp_path, "small_gpt")
    for name in ("curvlinops, single", "hessian-eigenthings, single"):
        assert "NotImplementedError" in sequence[name]["message"]
        assert sequence[f"{name}, plain attention"]["error"] < 1e-5
    for name in (
        "hessian-eigenthings, single, empirical",
        "hessian-eigenthings, single, hessian, plain attention",
        "PyHessian, linearised, hessian, plain attention",
    ):
        assert sequence[name]["error"] < 1e-5
