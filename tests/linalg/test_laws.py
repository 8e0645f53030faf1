"""What holds for every symmetric operator, drawn at random with spectra that are awkward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg.operators import flat, rotated, tree

import fisherfn as ff

# few distinct values, so that clusters, multiplicities and low ranks are common
VALUES = st.sampled_from([0.0, 1e-9, 0.1, 1.0, 1.0 + 1e-6, 2.0, 7.0])
POSITIVE = st.lists(VALUES, min_size=9, max_size=24)
ANY = st.lists(st.one_of(VALUES, VALUES.map(lambda x: -x)), min_size=9, max_size=24)
LOW_RANK = st.builds(
    lambda some, size: some + [0.0] * (size - len(some)),
    st.lists(VALUES.flatmap(lambda x: st.sampled_from([x, -x])), max_size=2),
    st.integers(9, 24),
)
SEEDS = st.integers(0, 100)
EXAMPLES = settings(max_examples=25)


@EXAMPLES
@given(ANY, SEEDS, st.sampled_from(["largest", "smallest", "both"]), st.integers(1, 3))
def test_lanczos_is_the_end_of_the_dense_spectrum(
    spectrum: list[float], seed: int, which: str, block_size: int
) -> None:
    known, k = rotated(spectrum, seed), 3
    found = ff.linalg.lanczos(
        known.mv, known.like, k=k, key=ff.random.key(seed), which=which, block_size=block_size
    )
    top, bottom = known.eigenvalues[:k], known.eigenvalues[-k:]
    want = {"largest": top, "smallest": bottom, "both": torch.cat([top, bottom])}[which]
    scale = float(known.eigenvalues.abs().max())
    torch.testing.assert_close(found.eigenvalues, want, rtol=0, atol=2e-5 * scale + 1e-14)
    vectors = flat(found.eigenvectors, 1)
    identity = torch.eye(len(want), dtype=torch.float64)
    torch.testing.assert_close(vectors @ vectors.T, identity, rtol=0, atol=1e-12)


@EXAMPLES
@given(POSITIVE, SEEDS, st.sampled_from([1e-3, 0.1, 3.0]))
def test_cg_solves_every_damped_system(spectrum: list[float], seed: int, damping: float) -> None:
    known = rotated(spectrum, seed)
    b = ff.random.normal(ff.random.key(seed), len(spectrum), torch.float64)
    found = ff.linalg.cg(known.mv, tree(b), damping=damping, tolerance=1e-9)
    assert found.converged, found.reason
    damped = known.matrix + damping * torch.eye(len(spectrum), dtype=torch.float64)
    rest = (b - damped @ flat(found.value)).norm() / b.norm()
    assert rest <= 1e-9
    torch.testing.assert_close(found.residual, rest, rtol=1e-3, atol=1e-12)


@EXAMPLES
@given(LOW_RANK, SEEDS)
def test_traces_are_exact_where_the_test_vectors_span_the_range(
    spectrum: list[float], seed: int
) -> None:
    """Hutch++ spends a third of its products on the range, XTrace every vector but one."""
    known = rotated(spectrum, seed)
    scale = max(abs(x) for x in spectrum)
    for method in (ff.linalg.hutchpp, ff.linalg.xtrace):
        found = method(known.mv, known.like, num_matvecs=8, key=ff.random.key(seed))
        assert (found.value - known.matrix.trace()).abs() <= 1e-10 * scale
        assert found.stderr <= 1e-10 * scale


@EXAMPLES
@given(ANY, SEEDS)
def test_as_many_test_vectors_as_dimensions_give_the_trace(
    spectrum: list[float], seed: int
) -> None:
    known = rotated(spectrum, seed)
    key, most = ff.random.key(seed), 2 * len(spectrum)
    found = ff.linalg.xtrace(known.mv, known.like, num_matvecs=most, key=key)
    torch.testing.assert_close(found.value, known.matrix.trace(), rtol=1e-11, atol=1e-12)


@EXAMPLES
@given(POSITIVE, SEEDS)
def test_all_steps_and_one_unit_vector_are_an_exact_quadratic_form(
    spectrum: list[float], seed: int
) -> None:
    """Quadrature with as many steps as dimensions: the error is that of the random vector alone."""
    known, m = rotated(spectrum, seed), 3
    size = len(spectrum)
    density = ff.linalg.density(
        known.mv, known.like, num_probes=m, num_steps=size, key=ff.random.key(seed)
    )
    first = density.trace(lambda t: t)
    plain = ff.linalg.hutchinson(known.mv, known.like, num_matvecs=m, key=ff.random.key(seed))
    torch.testing.assert_close(first.value, plain.value, rtol=1e-10, atol=1e-10)
    assert float(density.trace(torch.ones_like).value) == pytest.approx(size, rel=1e-12)
