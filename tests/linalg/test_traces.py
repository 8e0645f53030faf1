"""Traces and diagonals from random vectors: what they converge to, and what they say of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linalg.operators import SIZE, SPECTRA, Known, flat, operator, rotated, tree
from torch import Tensor

import fisherfn as ff

PROBES = ("rademacher", "gaussian", "sphere")
TRACES = {
    "hutchinson": ff.linalg.hutchinson,
    "hutchpp": ff.linalg.hutchpp,
    "xtrace": ff.linalg.xtrace,
}
TYPICAL = ("rank three", "identity", "geometric", "double top", "indefinite")
# What chance does to the ratio of two errors that are both taken from a few dozen runs.
SLACK = 1.4


def drawn(known: Known, count: int, probes: str, key: Tensor) -> Tensor:
    """The first probes of a key, `[count, P]`."""
    from fisherfn.linalg.probes import draw
    from fisherfn.linalg.space import Space

    space = Space("test", known.like)
    rows = draw(space, key, 0, count, probes)
    order = dict(zip(known.like, rows, strict=True))
    return torch.cat([order["w"], order["s"], order["b"]], dim=1)


# ---- against definitions written as loops --------------------------------------------------------


def leave_one_out(matrix: Tensor, omega: Tensor, uniform: bool) -> Tensor:
    """XTrace as the paper defines it: a factorisation for each test vector that is left out."""
    size, m = omega.shape
    found = []
    for i in range(m):
        others = [j for j in range(m) if j != i]
        q, _ = torch.linalg.qr(matrix @ omega[:, others])
        p = omega[:, i] - q @ (q.T @ omega[:, i])
        rest = p @ matrix @ p
        if uniform:
            rest = rest * (size - m + 1) / (p @ p)
        found.append((q.T @ matrix @ q).trace() + rest)
    return torch.stack(found)


def error_of_mean(single: Tensor, without: Callable[[list[int]], Tensor]) -> Tensor:
    """The standard error with the covariance of pairs, from estimates that leave one more out."""
    m, products = len(single), []
    for i, j in itertools.combinations(range(m), 2):
        one, other = [k for k in range(m) if k != j], [k for k in range(m) if k != i]
        mine = single[i] - without(one)[one.index(i)]
        products.append(mine * (single[j] - without(other)[other.index(j)]))
    return (single.var() / m + torch.stack(products).mean().clamp(min=0)).sqrt()


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("name", ["geometric", "indefinite", "flat", "double top", "negative"])
def test_xtrace_is_its_definition(name: str, probes: str) -> None:
    known, key = rotated(SPECTRA[name]), ff.random.key(3)
    omega = drawn(known, 8, probes, key).T
    single = leave_one_out(known.matrix, omega, probes != "rademacher")
    got = ff.linalg.xtrace(known.mv, known.like, num_matvecs=16, key=key, probes=probes)
    torch.testing.assert_close(got.value, single.mean(), rtol=1e-10, atol=1e-10)
    stderr = error_of_mean(
        single, lambda kept: leave_one_out(known.matrix, omega[:, kept], probes != "rademacher")
    )
    torch.testing.assert_close(got.stderr, stderr, rtol=1e-7, atol=1e-11)
    assert got.matvecs == len(known.calls) == 16


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("name", ["geometric", "indefinite", "flat", "double top"])
def test_xdiag_is_its_definition(name: str, probes: str) -> None:
    known, key, m = rotated(SPECTRA[name]), ff.random.key(3), 8
    omega = drawn(known, m, probes, key).T
    single = []
    for i in range(m):
        others = [j for j in range(m) if j != i]
        q, _ = torch.linalg.qr(known.matrix @ omega[:, others])
        low = q @ q.T @ known.matrix
        rest = known.matrix @ omega[:, i] - low @ omega[:, i]
        single.append(low.diagonal() + omega[:, i] * rest)
    want = torch.stack(single)
    got = ff.linalg.xdiag(known.mv, known.like, num_matvecs=16, key=key, probes=probes)
    torch.testing.assert_close(flat(got.value), want.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(got.stderr), want.std(0) / math.sqrt(m), rtol=1e-7, atol=1e-9)
    assert got.matvecs == len(known.calls) == 16


def test_hutchpp_is_its_definition() -> None:
    known, key = rotated(SPECTRA["geometric"]), ff.random.key(3)
    first, second = ff.random.split(key).unbind(0)
    q, _ = torch.linalg.qr(known.matrix @ drawn(known, 5, "rademacher", first).T)
    v = drawn(known, 5, "rademacher", second).T
    v = v - q @ (q.T @ v)
    values = (v * (known.matrix @ v)).sum(0)
    got = ff.linalg.hutchpp(known.mv, known.like, num_matvecs=15, key=key)
    inside = (q.T @ known.matrix @ q).trace()
    torch.testing.assert_close(got.value, inside + values.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.stderr, values.std() / math.sqrt(5), rtol=1e-8, atol=0)
    assert got.matvecs == len(known.calls) == 15


def test_hutchinson_is_its_definition() -> None:
    known, key = rotated(SPECTRA["indefinite"]), ff.random.key(3)
    v = drawn(known, 7, "gaussian", key)
    values = (v * (v @ known.matrix)).sum(1)
    got = ff.linalg.hutchinson(
        known.mv, known.like, num_matvecs=7, key=key, probes="gaussian", chunk_size=3
    )
    torch.testing.assert_close(got.value, values.mean(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.stderr, values.std() / math.sqrt(7), rtol=1e-12, atol=0)


# ---- against the truth ---------------------------------------------------------------------------


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("method", TRACES)
@pytest.mark.parametrize("name", TYPICAL)
def test_trace_is_unbiased_and_its_error_is_what_it_says(
    name: str, method: str, probes: str
) -> None:
    known, runs = rotated(SPECTRA[name]), 25
    truth = known.matrix.trace()
    found = [
        TRACES[method](known.mv, known.like, num_matvecs=12, key=ff.random.key(s), probes=probes)
        for s in range(runs)
    ]
    values = torch.stack([e.value for e in found])
    stderrs = torch.stack([e.stderr for e in found])
    rounding = 1e-12 * max(1.0, abs(SPECTRA[name][0]))
    spread = values.std() / math.sqrt(runs)
    assert (values.mean() - truth).abs() <= 5 * spread + rounding
    # the errors that are claimed are those that happen
    typical = stderrs.square().mean().sqrt()
    happened = (values - truth).square().mean().sqrt()
    assert happened <= SLACK * typical + rounding
    assert typical <= 2.0 * happened + rounding


@pytest.mark.parametrize(
    ("method", "products", "options"),
    [
        ("xtrace", 8, {}),
        ("xtrace", 12, {"probes": "rademacher"}),
        ("xnystrace", 6, {}),
        ("xnystrace", 16, {}),
        ("xnystrace", 12, {"probes": "rademacher"}),
    ],
)
@pytest.mark.parametrize("name", ["geometric", "flat"])
def test_errors_of_leaving_out_are_those_that_happen(
    name: str, method: str, products: int, options: dict[str, Any]
) -> None:
    known, runs = rotated(SPECTRA[name]), 150
    run = getattr(ff.linalg, method)
    options = {"num_matvecs": products, "chunk_size": products, **options}
    found = [run(known.mv, known.like, key=ff.random.key(s), **options) for s in range(runs)]
    happened = torch.stack([e.value - known.matrix.trace() for e in found]).square().mean()
    said = torch.stack([e.stderr for e in found]).square().mean()
    # taken as independent, single estimates say 1.2 to 2.2 times less than what happens
    assert 0.8 < (happened / said).sqrt() < 1.2


@pytest.mark.parametrize("method", ["hutchpp", "xtrace"])
@pytest.mark.parametrize("name", ["zero", "rank one", "rank three"])
def test_trace_of_low_rank_is_exact(name: str, method: str) -> None:
    known = rotated(SPECTRA[name])
    got = TRACES[method](known.mv, known.like, num_matvecs=12, key=ff.random.key(0))
    torch.testing.assert_close(got.value, known.matrix.trace(), rtol=1e-12, atol=1e-13)
    assert got.stderr <= 1e-12


@pytest.mark.parametrize("name", ["zero", "rank one", "rank three"])
def test_diagonal_of_low_rank_is_exact(name: str) -> None:
    known = rotated(SPECTRA[name])
    got = ff.linalg.xdiag(known.mv, known.like, num_matvecs=12, key=ff.random.key(0))
    torch.testing.assert_close(flat(got.value), known.matrix.diagonal(), rtol=1e-11, atol=1e-13)


def test_diagonal_is_unbiased() -> None:
    known, runs = rotated(SPECTRA["flat"]), 30
    found = [
        ff.linalg.xdiag(known.mv, known.like, num_matvecs=8, key=ff.random.key(s))
        for s in range(runs)
    ]
    values = torch.stack([flat(e.value) for e in found])
    z = (values.mean(0) - known.matrix.diagonal()) / (values.std(0) / math.sqrt(runs))
    assert z.abs().max() < 5
    stderr = torch.stack([flat(e.stderr) for e in found]).square().mean(0).sqrt()
    happened = (values - known.matrix.diagonal()).square().mean(0).sqrt()
    assert 0.9 < happened.norm() / stderr.norm() < 1.65  # as the documentation says


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
@pytest.mark.parametrize("method", [*TRACES, "xdiag"])
def test_chunk_size_does_not_matter(method: str, chunk_size: int) -> None:
    known, key = rotated(SPECTRA["geometric"]), ff.random.key(1)
    run = getattr(ff.linalg, method)
    want = run(known.mv, known.like, num_matvecs=12, key=key)
    got = run(known.mv, known.like, num_matvecs=12, key=key, chunk_size=chunk_size)
    for a, b in zip(ff.tree.leaves(got), ff.tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_operator_may_multiply_blocks_itself() -> None:
    known, key, seen = rotated(SPECTRA["geometric"]), ff.random.key(1), []

    class Blocks:
        def __call__(self, v: Any) -> Any:
            raise AssertionError("one at a time")

        def block(self, v: Any) -> Any:
            seen.append(v["s"].shape[0])
            return tree(flat(v, 1) @ known.matrix)

    got = ff.linalg.hutchinson(Blocks(), known.like, num_matvecs=7, key=key, chunk_size=3)
    want = ff.linalg.hutchinson(known.mv, known.like, num_matvecs=7, key=key)
    torch.testing.assert_close(got.value, want.value, rtol=1e-12, atol=0)
    assert seen == [3, 3, 1]


# ---- sparse probes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("probes", ["rademacher", "gaussian"])
def test_sparse_probes_are_isotropic(probes: str, dtype: torch.dtype) -> None:
    # Signs times zeros and ones without the factor 1/√density gave 7.68 for a trace of 75.
    n = 50
    like = torch.zeros(n, dtype=dtype)
    scale = torch.linspace(1.0, 2.0, n, dtype=torch.float64)  # trace 75
    got = ff.linalg.hutchinson(
        lambda v: scale * v.double(),
        like,
        num_matvecs=400,
        key=ff.random.key(0),
        probes=probes,
        density=0.1,
    )
    assert (got.value - 75.0).abs() < 5 * got.stderr
    assert 0.3 < got.stderr < 5.0


def test_sparse_probes_are_sparse() -> None:
    seen: list[Tensor] = []

    def mv(v: Tensor) -> Tensor:
        seen.append(v)
        return v

    ff.linalg.hutchinson(mv, torch.zeros(1000), num_matvecs=3, key=ff.random.key(0), density=0.1)
    share = torch.stack(seen).ne(0).float().mean()
    assert 0.07 < share < 0.13


@pytest.mark.parametrize("method", [*TRACES, "xdiag"])
def test_sparse_probes_keep_every_estimator_unbiased(method: str) -> None:
    known, runs = rotated(SPECTRA["flat"]), 30
    run = getattr(ff.linalg, method)
    found = [
        run(
            known.mv,
            known.like,
            num_matvecs=12,
            key=ff.random.key(s),
            density=0.5,
            probes="rademacher",
        )
        for s in range(runs)
    ]
    if method == "xdiag":
        values = torch.stack([flat(e.value).sum() for e in found])
    else:
        values = torch.stack([e.value for e in found])
    error = (values.mean() - known.matrix.trace()).abs()
    assert error < 5 * values.std() / math.sqrt(runs)


# ---- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRACES)
def test_target_stops_early(method: str) -> None:
    known, key = rotated([1.0 + 0.3 * (i % 7) for i in range(SIZE)]), ff.random.key(5)
    run = TRACES[method]
    full = run(known.mv, known.like, num_matvecs=60, key=key)
    target = 3.0 * float(full.stderr) + 0.5
    known.calls.clear()
    got = run(known.mv, known.like, num_matvecs=60, key=key, target_stderr=target)
    assert got.stderr <= target
    assert got.matvecs == len(known.calls) < 60
    share = target / float(got.value)
    again = run(known.mv, known.like, num_matvecs=60, key=key, target_stderr=share, relative=True)
    assert again.stderr <= share * again.value


@pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
def test_growing_is_the_same_as_starting_with_all(method: str) -> None:
    known, key = rotated(SPECTRA["indefinite"]), ff.random.key(5)
    run = TRACES[method]
    want = run(known.mv, known.like, num_matvecs=20, key=key)
    got = run(known.mv, known.like, num_matvecs=20, key=key, target_stderr=1e-30)
    assert got.matvecs == 20
    torch.testing.assert_close(got.value, want.value, rtol=1e-10, atol=1e-12)


def test_one_draw_tells_nothing_of_the_spread() -> None:
    known = rotated(SPECTRA["flat"])
    got = ff.linalg.hutchinson(known.mv, known.like, num_matvecs=1, key=ff.random.key(0))
    assert got.stderr == math.inf


# ---- trees of several dtypes ---------------------------------------------------------------------


@pytest.mark.parametrize("method", [*TRACES, "xdiag"])
def test_trees_of_several_dtypes(method: str) -> None:
    like = {
        "half": torch.zeros(10, dtype=torch.bfloat16),
        "single": torch.zeros(3, 4),
        "double": torch.zeros(8, dtype=torch.float64),
    }
    scale = {"half": 1.0, "single": 2.0, "double": 4.0}  # exact in every dtype

    def mv(v: Any) -> Any:
        assert {k: t.dtype for k, t in v.items()} == {k: t.dtype for k, t in like.items()}
        return {k: scale[k] * t for k, t in v.items()}

    got = getattr(ff.linalg, method)(mv, like, num_matvecs=12, key=ff.random.key(0))
    if method == "xdiag":
        assert {k: t.dtype for k, t in got.value.items()} == {
            "half": torch.float32,
            "single": torch.float32,
            "double": torch.float64,
        }
        total, stderr = [sum(t.double().sum() for t in part.values()) for part in got]
    else:
        assert got.value.dtype == got.stderr.dtype == torch.float64
        total, stderr = got
    # bfloat16 vectors lose the last digits of the basis
    assert abs(float(total) - 66.0) < 5 * float(stderr) + 0.3


def test_estimates_unpack_and_merge_by_count() -> None:
    a = ff.Estimate(torch.tensor(2.0), torch.tensor(0.3), torch.tensor(1.0))
    b = ff.Estimate(torch.tensor(4.0), torch.tensor(0.4), torch.tensor(1.0))
    value, stderr = ff.merge(a, b)
    assert (float(value), float(stderr)) == (3.0, 0.25)
    assert float(ff.merge(ff.empty_like(a), b)) == 4.0
    unknown = ff.Estimate(torch.tensor(4.0), torch.tensor(math.inf), torch.tensor(1.0))
    assert ff.merge(ff.empty_like(a), unknown).stderr == math.inf
    assert ff.merge(a, ff.empty_like(unknown)).stderr == pytest.approx(0.3)


@pytest.mark.parametrize("seed", range(6))  # random signs of few dimensions depend on each other
@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("probes", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("method", ["hutchpp", "xtrace", "xdiag", "xnystrace"])
def test_more_products_than_dimensions_are_exact(
    method: str, size: int, probes: str, spread: bool, seed: int
) -> None:
    scale = torch.arange(1.0, size + 1, dtype=torch.float64)
    scale = scale if spread else torch.full_like(scale, 2.0)
    estimate = getattr(ff.linalg, method)
    got = estimate(lambda v: scale * v, scale, key=ff.random.key(seed), probes=probes)
    want = scale if method == "xdiag" else scale.sum()
    rtol = 1e-10 if method == "xnystrace" else 1e-12  # it divides by products of test vectors
    torch.testing.assert_close(got.value, want, rtol=rtol, atol=0)
    assert got.stderr.max() < 1e-12
    assert got.matvecs <= 30


def test_operator_on_a_bare_tensor() -> None:
    matrix = rotated(SPECTRA["geometric"]).matrix
    got = ff.linalg.xtrace(
        lambda v: matrix @ v, torch.zeros(SIZE, dtype=torch.float64), key=ff.random.key(0)
    )
    assert (got.value - matrix.trace()).abs() < 5 * got.stderr
    assert operator(matrix).like["s"].shape == ()
