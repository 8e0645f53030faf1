"""Extreme eigenvalues: right ones, as often as they occur, with residuals that are true."""

from __future__ import annotations

import pytest
import torch
from linalg.operators import SIZE, SPECTRA, Known, flat, operator, orthogonal, rotated, tree
from torch import Tensor

import fisherfn as ff
from fisherfn.linalg import Eigenpairs

KEY = ff.random.key(1)


def ends(values: Tensor, k: int, which: str) -> Tensor:
    """The wanted ones of descending eigenvalues."""
    parts = {"largest": [values[:k]], "smallest": [values[-k:]], "both": [values[:k], values[-k:]]}
    return torch.cat(parts[which])


def check(found: Eigenpairs, known: Known, k: int, which: str, tolerance: float = 1e-5) -> None:
    """Compare with the dense matrix: values, vectors, residuals."""
    truth = ends(known.eigenvalues, k, which)
    scale = known.eigenvalues.abs().max() + 1e-30
    assert found.converged, found.residuals
    vectors = flat(found.eigenvectors, 1)
    identity = torch.eye(len(truth), dtype=vectors.dtype)
    torch.testing.assert_close(vectors @ vectors.T, identity, rtol=0, atol=1e-12)
    rest = (vectors @ known.matrix - found.eigenvalues[:, None] * vectors).norm(dim=1)
    assert (rest <= found.residuals + 1e-13 * scale).all()
    assert (found.residuals <= 1.01 * tolerance * scale).all()
    torch.testing.assert_close(found.eigenvalues, truth, rtol=0, atol=float(1e-8 * scale))


@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_the_ends_of_every_spectrum(name: str, which: str) -> None:
    # Partial reorthogonalisation gave (10, 10, 10, 10, 10) for eigenvalues (10, 9, 1, ...), and
    # one eigenvalue of a matrix of rank one four times.
    known, k = rotated(SPECTRA[name]), 4
    found = ff.linalg.lanczos(known.mv, known.like, k=k, key=KEY, which=which, tolerance=1e-7)
    check(found, known, k, which, 1e-7)
    assert int(found.steps) == len(known.calls)


@pytest.mark.parametrize("block_size", [2, 3, 5])
@pytest.mark.parametrize("name", ["rank one", "double top", "cluster", "identity", "flat"])
def test_blocks_find_the_same(name: str, block_size: int) -> None:
    known = rotated(SPECTRA[name])
    found = ff.linalg.lanczos(known.mv, known.like, k=4, key=KEY, block_size=block_size)
    check(found, known, 4, "largest")


@pytest.mark.parametrize("max_basis", [10, 13, 20])
@pytest.mark.parametrize("name", ["double top", "flat", "indefinite", "rank three"])
def test_thick_restarts_find_the_same(name: str, max_basis: int) -> None:
    known = rotated(SPECTRA[name])
    found = ff.linalg.lanczos(known.mv, known.like, k=3, key=KEY, which="both", max_basis=max_basis)
    check(found, known, 3, "both")


def test_restarts_on_a_larger_operator() -> None:
    n = 400
    scale = 1.0 / torch.arange(1.0, n + 1, dtype=torch.float64).sqrt()
    known = operator(torch.diag(scale))
    small = ff.linalg.lanczos(known.mv, known.like, k=5, key=KEY, max_basis=15)
    check(small, known, 5, "largest")
    products = int(small.steps)
    large = ff.linalg.lanczos(known.mv, known.like, k=5, key=KEY)
    assert int(large.steps) <= products < 100


def test_multiplicities_larger_than_the_block_are_found() -> None:
    spectrum = [10.0] * 5 + [9.0] + [0.01 * i for i in range(194)]
    known = rotated(spectrum)
    found = ff.linalg.lanczos(known.mv, known.like, k=6, key=KEY)
    check(found, known, 6, "largest")
    blind = ff.linalg.lanczos(known.mv, known.like, k=6, key=KEY, verify=0, max_steps=30)
    assert (blind.eigenvalues > 9.5).sum() < 5  # the same without looking for what was missed


def test_rank_one_takes_few_products() -> None:
    known = rotated(SPECTRA["rank one"])
    found = ff.linalg.lanczos(known.mv, known.like, k=1, key=KEY, verify=0)
    assert int(found.steps) <= 3
    torch.testing.assert_close(found.eigenvalues, torch.tensor([5.0], dtype=torch.float64))


def test_all_eigenvalues_of_a_small_operator() -> None:
    known = rotated(SPECTRA["indefinite"][:9])
    found = ff.linalg.lanczos(known.mv, known.like, k=9, key=KEY)
    check(found, known, 9, "largest")
    assert int(found.steps) == 9


def test_too_few_steps_are_said_to_be_too_few() -> None:
    known = rotated(SPECTRA["flat"])
    found = ff.linalg.lanczos(known.mv, known.like, k=4, key=KEY, max_steps=8)
    assert not found.converged
    assert int(found.steps) == 8
    # each interval around a Ritz value still holds an eigenvalue
    distance = (found.eigenvalues[:, None] - known.eigenvalues).abs().amin(1)
    assert (distance <= found.residuals).all()
    fewer = ff.linalg.lanczos(known.mv, known.like, k=4, key=KEY, max_steps=3)
    assert fewer.eigenvalues.shape == (3,)
    assert not fewer.converged


def test_negative_curvature_is_visible() -> None:
    # The k algebraically largest Ritz values alone showed none.
    known = rotated([4.0, 3.0, 2.0] + [0.0] * 30 + [-6.0, -7.0])
    found = ff.linalg.lanczos(known.mv, known.like, k=2, key=KEY, which="both")
    want = torch.tensor([4.0, 3.0, -6.0, -7.0], dtype=torch.float64)
    torch.testing.assert_close(found.eigenvalues, want)


def test_start_vector_and_vector_access() -> None:
    known = rotated(SPECTRA["geometric"])
    top = torch.linalg.eigh(known.matrix)[1][:, -1]
    found = ff.linalg.lanczos(known.mv, known.like, k=1, key=KEY, start=tree(top), verify=0)
    assert int(found.steps) == 1
    assert abs(float(flat(found.vector(0)) @ top)) == pytest.approx(1.0, abs=1e-12)
    zero = ff.linalg.lanczos(known.mv, known.like, k=2, key=KEY, start=known.like)
    check(zero, known, 2, "largest")


def test_float32_vectors() -> None:
    known = rotated(SPECTRA["geometric"], dtype=torch.float32)
    found = ff.linalg.lanczos(known.mv, known.like, k=5, key=KEY)
    assert found.converged
    assert found.eigenvalues.dtype == torch.float32
    torch.testing.assert_close(
        found.eigenvalues.double(), known.eigenvalues[:5], rtol=1e-5, atol=1e-6
    )


def test_an_operator_that_gives_nan_gives_nan() -> None:
    known = rotated(SPECTRA["flat"])
    found = ff.linalg.lanczos(lambda v: ff.tree.scale(v, float("nan")), known.like, k=2, key=KEY)
    assert not found.converged
    assert found.eigenvalues.isnan().all()


# ---- LOBPCG --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("name", ["double top", "flat", "indefinite", "three values"])
def test_lobpcg_finds_the_ends(name: str, which: str) -> None:
    known = rotated(SPECTRA[name])
    found = ff.linalg.lobpcg(known.mv, known.like, k=3, key=KEY, which=which, max_steps=200)
    check(found, known, 3, which)
    assert int(found.steps) == len(known.calls)


def test_lobpcg_by_blocks_and_without_enough_steps() -> None:
    known = rotated(SPECTRA["flat"])
    want = ff.linalg.lobpcg(known.mv, known.like, k=2, key=KEY)
    got = ff.linalg.lobpcg(known.mv, known.like, k=2, key=KEY, chunk_size=2)
    torch.testing.assert_close(got.eigenvalues, want.eigenvalues, rtol=1e-10, atol=0)
    assert not ff.linalg.lobpcg(known.mv, known.like, k=2, key=KEY, max_steps=2).converged


# ---- quadrature ----------------------------------------------------------------------------------


def log_det(known: Known, damping: float) -> Tensor:
    return (known.eigenvalues + damping).log().sum()


@pytest.mark.parametrize("probes", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("name", ["rank one", "three values", "geometric", "flat", "double top"])
def test_log_determinant(name: str, probes: str) -> None:
    known = rotated(SPECTRA[name])
    got = ff.linalg.slq(
        known.mv,
        known.like,
        num_probes=30,
        num_steps=SIZE,
        key=KEY,
        damping=0.5,
        lower=None if name == "indefinite" else 0.0,
        probes=probes,
    )
    assert (got.value - log_det(known, 0.5)).abs() <= 5 * got.stderr + 1e-9
    assert got.stderr < 0.3 * log_det(known, 0.5).abs() + 1e-9


def test_trace_of_a_function_is_that_of_the_quadratic_forms() -> None:
    known, m = rotated(SPECTRA["indefinite"]), 5
    values, vectors = torch.linalg.eigh(known.matrix)
    exponential = (vectors * values.exp()) @ vectors.T
    from linalg.test_traces import drawn

    v = drawn(known, m, "rademacher", KEY)
    want = (v @ exponential * v).sum(1)
    got = ff.linalg.slq(known.mv, known.like, torch.exp, num_probes=m, num_steps=20, key=KEY)
    torch.testing.assert_close(got.value, want.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.stderr, want.std() / m**0.5, rtol=1e-9, atol=0)


def test_density_integrates_and_counts() -> None:
    spectrum = [5.0] * 4 + [1.0] * 36
    known = rotated(spectrum)
    density = ff.linalg.density(known.mv, known.like, num_probes=40, num_steps=10, key=KEY)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(40, dtype=torch.float64))
    grid = torch.linspace(-1.0, 7.0, 801, dtype=torch.float64)
    curve = density.evaluate(grid, 0.1)
    assert torch.trapezoid(curve, grid) == pytest.approx(1.0, abs=1e-6)
    top = torch.trapezoid(curve[grid > 3], grid[grid > 3])
    count = density.trace(lambda t: (t > 3).to(t.dtype))
    assert (count.value - 4.0).abs() < 5 * count.stderr
    assert float(top) * SIZE == pytest.approx(float(count.value), rel=1e-6)


def test_quadrature_takes_no_more_steps_than_there_are_dimensions() -> None:
    scale = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mv, like = lambda v: {"w": scale * v["w"]}, {"w": torch.zeros(3, dtype=torch.float64)}
    got = ff.linalg.slq(mv, like, key=KEY)
    torch.testing.assert_close(got.value, scale.log().sum(), rtol=1e-10, atol=1e-10)
    assert ff.linalg.density(mv, like, key=KEY).nodes.shape == (10, 3)
    one = {"w": torch.zeros(1)}
    root = ff.linalg.slq(lambda v: ff.tree.scale(v, 3.0), one, torch.sqrt, key=KEY)
    assert float(root.value) == pytest.approx(3**0.5)


def test_quadrature_on_a_function_that_is_not_defined_is_nan() -> None:
    known = rotated(SPECTRA["negative"])
    assert ff.linalg.slq(known.mv, known.like, key=KEY, num_probes=2).value.isnan()


def test_orthogonal_is_orthogonal() -> None:
    q = orthogonal(12)
    torch.testing.assert_close(q @ q.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-14)
