"""Two and three processes beside one: results, states, shards, traffic and refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import scenarios
from states.test_ema import close

import fisherfn as ff
from fisherfn.core import trees

ROOT = Path(__file__).resolve().parents[2]
Ranks = dict[str, list[Any]]


def started(world: int, backend: str, folder: Path) -> Ranks:
    """Run all scenarios in so many processes and return what each of them found."""
    places = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    processes = [
        subprocess.Popen(
            [sys.executable, scenarios.__file__ or "", str(rank), str(world), str(folder), backend],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=150)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return {
        scenario.__name__: [
            ff.io.load(folder / f"{scenario.__name__}-{rank}") for rank in range(world)
        ]
        for scenario in scenarios.SCENARIOS
    }


WORLDS = [
    pytest.param((2, "gloo"), id="2"),
    pytest.param((3, "gloo"), id="3", marks=pytest.mark.slow),
    pytest.param((2, scenarios.GPU_BACKEND), id="2-nccl", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    world, backend = request.param
    if backend == scenarios.GPU_BACKEND and torch.cuda.device_count() < world:
        pytest.skip(f"{world} processes over {backend} need as many GPUs")
    return started(world, backend, tmp_path_factory.mktemp("ranks"))


def identical(a: Any, b: Any) -> None:
    close(a, b, 0.0)


def dense(F: Any) -> Any:
    """What a result stands for: rows may come in another order."""
    return F.to_dense() if hasattr(F, "to_dense") else (F.mean, F.square)


@pytest.mark.parametrize("name", scenarios.estimators())
def test_results_are_those_of_one_process(ranks: Ranks, name: str) -> None:
    want = scenarios.fold(scenarios.estimators()[name], scenarios.batches())
    for found in ranks["results"]:
        state = found[name]
        close(dense(state.result), dense(want.result), 1e-12)
        torch.testing.assert_close(state.result.count, want.result.count)
        assert (state.batches, state.examples, state.units) == (5, 12, 12)
        assert (state.result.fisher, state.result.unit) == ("mc", "example")
        identical(state, ranks["results"][0][name])


def test_layers_with_a_common_block(ranks: Ranks) -> None:
    for found in ranks["joint"]:
        assert [b.name for b in found["F"].blocks] == ["up+gate", "head"]
        close(found["F"], found["whole"], 1e-12)
        close(found["inverse"].to_dense(), found["whole"].to_dense(), 1e-12)
        identical(found["F"], ranks["joint"][0]["F"])


def test_standard_errors_are_those_of_one_process(ranks: Ranks) -> None:
    name = "diagonal_stderr"
    want = scenarios.fold(scenarios.estimators()[name], scenarios.batches()).result
    for found in ranks["results"]:
        close(found[name].result.stderr, want.stderr, 1e-12)


@pytest.mark.parametrize("name", [*scenarios.TRANSFORMS, "kfac_ema", "kfac_welford"])
def test_states_are_those_of_merge(ranks: Ranks, name: str) -> None:
    states = [found["mine"][name] for found in ranks["states"]]
    want = states[0]
    for state in states[1:]:
        want = ff.merge(want, state)
    for found in ranks["states"]:
        close(found["joined"][name], want, 1e-12)


def test_welford_of_all_ranks_is_welford_of_all_data(ranks: Ranks) -> None:
    sizes = (2, 3, 1, 4)
    fim = scenarios.estimators()["diagonal"]
    want = scenarios.fold(fim, scenarios.batches(sizes), scenarios.TRANSFORMS["welford"])
    close(ranks["states"][0]["joined"]["welford"], want, 1e-12)


@pytest.mark.parametrize("name", scenarios.estimators())
def test_a_rank_may_have_no_data(ranks: Ranks, name: str) -> None:
    want = scenarios.fold(scenarios.estimators()[name], scenarios.batches((5,)))
    for found in ranks["no_data"]:
        close(dense(found[name].result), dense(want.result), 1e-12)
        assert found[name].examples == 5


@pytest.mark.parametrize("name", scenarios.TRANSFORMS)
def test_a_rank_without_data_gets_the_whole_state(ranks: Ranks, name: str) -> None:
    fim = scenarios.estimators()["diagonal"]
    want = scenarios.fold(fim, scenarios.batches((5,)), scenarios.TRANSFORMS[name])
    for found in ranks["no_data"]:
        assert trees.structure(found[name]) == trees.structure(want)
        for x, y in zip(trees.leaves(found[name]), trees.leaves(want), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_rows_together_are_the_whole(ranks: Ranks) -> None:
    world = len(ranks["sharded"])
    for name, first in ranks["sharded"][0].items():
        parts = [found[name] for found in ranks["sharded"]]
        for part in parts:
            close(part["whole"], first["wanted"], 1e-12)
        if name.endswith("none"):
            for field in ("values", "mean"):
                tree = getattr(first["wanted"].result, field, {})
                for path, whole in tree.items():
                    cut = list(whole.chunk(world))
                    cut += [whole[:0]] * (world - len(cut))
                    for part, want in zip(parts, cut, strict=True):
                        rows = getattr(part["rows"].result, field)[path]
                        torch.testing.assert_close(rows, want, rtol=1e-12, atol=1e-15)


def test_a_triangle_is_half_the_traffic_and_the_same_result(ranks: Ranks) -> None:
    for found in ranks["traffic"]:
        for name, size in (("dense", 43), ("block_diagonal", 20), ("kfac", 5)):
            plain, triangular = found[f"{name}-plain"], found[f"{name}-triangular"]
            close(triangular[0], plain[0], 1e-14)
            assert plain[1] == plain[2] == triangular[2]
            assert triangular[3] == plain[3] == 0.0
            assert triangular[1] / plain[1] == pytest.approx(0.5, abs=0.6 / size * 2)
        assert found["diagonal-triangular"][1] == found["diagonal-plain"][1]


def test_bfloat16_is_a_quarter_of_float64_and_its_error_is_bounded(ranks: Ranks) -> None:
    for found in ranks["traffic"]:
        for name in ("dense", "block_diagonal", "kfac", "diagonal", "low_rank"):
            (plain, *_), (value, sent, full, error) = (
                found[f"{name}-plain"],
                found[f"{name}-bfloat16"],
            )
            assert sent * 4 == full
            lost = (dense_matrix(value) - dense_matrix(plain)).norm() / dense_matrix(plain).norm()
            assert 0 < error < 2**-7
            if name not in ("low_rank", "kfac"):  # a product has twice the error of its factors
                assert lost <= error * 1.001
            assert value.count == plain.count
            assert trees.leaves(value)[0].dtype == torch.float64
        both, triangular = found["dense-both"], found["dense-triangular"]
        assert both[1] * 4 == triangular[1]
        identical(found["dense-both"], ranks["traffic"][0]["dense-both"])


def dense_matrix(F: Any) -> torch.Tensor:
    return F.to_dense()


REFUSALS = {
    "shapes": r"TreeMismatchError: distributed.all_reduce: expected the same model and estimator "
    r"on every rank, got float64 of shape \(5, 4\) on rank 0 and float64 of shape \(6, 4\) on "
    r"rank 1 at values/0\.weight\. Load the same weights",
    "kinds": r"TreeMismatchError: .*got 'mc' on rank 0 and 'empirical' on rank 1 at fisher",
    "periods": r"OptionError: distributed.all_reduce: expected states of one period, got \[2, 3\]",
    "units": r"TreeMismatchError: .*got 'example' on rank 0 and 'position' on rank 1 at unit",
    "classes": r"TreeMismatchError: .*on rank 0 and .* on rank 1 at the root",
    "names": r"TreeMismatchError: .*got 'b' on rank 0 and 'a' on rank 1",
    "tensors": r"(UnsupportedError: .*expected results that can be merged|DataError: .*expected "
    r"results on every rank, got an error on rank 1: .*expected results that can be merged)",
    "nothing": r"DataError: .*expected a result on at least one rank, got None on all",
    "rows": r"UnsupportedError: .*trees like the parameters for sharded=True, got Dense",
    "gathered_rows": r"UnsupportedError: .*trees like the parameters for sharded=True, got LowRank",
    "dtype": r"OptionError: .*expected dtype to be None, .* got torch.int8",
    "both": r"OptionError: .*expected dtype=None with sharded=True, got torch.bfloat16",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_gets_the_error(ranks: Ranks, name: str) -> None:
    for found in ranks["refusals"]:
        assert re.match(REFUSALS[name], found[name]), found[name]


def test_spread_parameters_are_refused_and_gathered_ones_work(ranks: Ranks) -> None:
    first = ranks["dtensors"][0]
    for found in ranks["dtensors"]:
        assert found["fits"]
        assert (
            "UnsupportedError: diagonal: expected whole parameters, got a DTensor at '0.weight'"
            in (found["refused"])
        )
    for name, whole in first["whole"].items():
        rows = torch.cat([found["solved"][name] for found in ranks["dtensors"]])
        torch.testing.assert_close(rows, whole, rtol=1e-10, atol=1e-14)


SPREAD = {
    "save": r"io.save: expected tensors of this process, got a DTensor at 0.weight\. Take",
    "offload": r"io.offload: expected tensors of this process, got a DTensor at 0.weight\. Offload",
    "reduce": r"distributed.all_reduce: expected tensors .* a DTensor at values/0.weight\. Take",
}


@pytest.mark.parametrize("name", SPREAD)
def test_spread_results_are_refused_where_they_would_be_copied(ranks: Ranks, name: str) -> None:
    for found in ranks["dtensors"]:
        assert re.match("UnsupportedError: " + SPREAD[name], found["elsewhere"][name])
