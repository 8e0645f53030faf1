"""The products beneath the factors: symmetric ones, those of patches, and decompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kfac import loops
from torch import Tensor

import fisherfn as ff
from fisherfn.curvature import kronecker_spectra as spectra
from fisherfn.layers import kronecker, shifts, symmetric
from fisherfn.layers.bands import Geometry
from fisherfn.layers.outer import Outer
from fisherfn.testing import assert_close


@pytest.mark.parametrize("d", [1, 127, 128, 300, 515])
@pytest.mark.parametrize("n", [1, 70])
def test_a_split_product_is_the_product(n: int, d: int) -> None:
    x = loops.normal(0, n, d)
    with torch.no_grad():
        got = symmetric.gram(x)
    assert_close(got, x.T @ x)
    assert_close(got, got.T)
    assert_close(torch.vmap(symmetric.gram)(x[None])[0], x.T @ x)
    slope = torch.func.grad(lambda x: symmetric.gram(x).cos().sum())(x)
    assert_close(slope, torch.func.grad(lambda x: (x.T @ x).cos().sum())(x))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_inputs_with_ones_for_the_bias_in_one_buffer(weighted: bool, grad: bool) -> None:
    a = loops.normal(1, 40, 1, 2, 200)
    form = Outer(a, torch.zeros(1, 40, 1, 2, 1, dtype=torch.float64))
    w = loops.normal(2, 40, 2).square() if weighted else None
    exists = None if w is None else torch.ones_like(w)
    with torch.set_grad_enabled(grad):
        found = kronecker.input_moments(form, kronecker.Weights(w, exists), reduce=False, bias=True)
    rows = torch.cat([a.reshape(80, 200), torch.ones(80, 1, dtype=torch.float64)], 1)
    each = torch.ones(80, dtype=torch.float64) if w is None else w.reshape(-1)
    assert_close(found.square[0], (rows * each[:, None]).T @ rows)
    assert_close(found.rows, each.sum())


@settings(max_examples=40)
@given(data=st.data())
def test_moments_of_patches_from_rows_of_the_image(data: st.DataObject) -> None:
    nd = data.draw(st.integers(1, 3))
    sizes = st.integers(1, 3)
    kernel = (data.draw(st.integers(2, 3)), *[data.draw(sizes) for _ in range(nd - 1)])
    dilation = tuple(data.draw(st.integers(1, 2)) for _ in range(nd))
    stride = (1, *[data.draw(st.integers(1, 2)) for _ in range(nd - 1)])
    padding = tuple((p, p) for p in [data.draw(st.integers(0, 1)) for _ in range(nd)])
    groups = data.draw(st.integers(1, 2))
    geometry = Geometry(kernel, stride, padding, dilation, groups)
    space = [e + data.draw(st.integers(4, 6)) for e in geometry.extents]
    x = loops.normal(data.draw(st.integers(0, 99)), 2, 2 * groups, *space)
    places = [
        (n + p + q - e) // s + 1
        for n, (p, q), e, s in zip(space, padding, geometry.extents, stride, strict=True)
    ]
    assert shifts.applies(geometry, places)
    patches = geometry.patches(x, places).transpose(0, 1).flatten(1, 2)
    rows = shifts.image_rows(geometry, x, places)
    got = shifts.patch_gram(geometry, rows, places[0], lambda r: r.mT @ r)
    assert_close(got, patches.mT @ patches)
    assert_close(shifts.patch_sum(geometry, rows, places[0]), patches.sum(1), rtol=1e-7)


def test_a_window_that_is_large_for_its_image_is_unfolded() -> None:
    geometry = Geometry((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    assert shifts.applies(geometry, (3, 1))
    assert not shifts.applies(geometry, (2, 5))
    assert not shifts.applies(Geometry((3,), (2,), ((0, 0),), (1,), 1), (9,))


def test_a_decomposition_that_fails_is_repeated_in_float64(monkeypatch: Any) -> None:
    true = torch.linalg.eigh
    seen = []

    def eigh(x: Tensor) -> Any:
        seen.append(x.dtype)
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return true(x)

    x = loops.normal(0, 1, 9, 5).float()
    factor = x.mT @ x
    want = spectra.decompose([factor], ["matrix"])[0]
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    got = spectra.decompose([factor], ["matrix"])[0]
    assert seen == [torch.float32, torch.float64]
    assert got.values.dtype == torch.float32
    torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-5)


def test_factors_of_one_shape_are_decomposed_in_one_call(monkeypatch: Any) -> None:
    true, shapes = torch.linalg.eigh, []

    def eigh(x: Tensor) -> Any:
        shapes.append(tuple(x.shape))
        return true(x)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    stacks = [loops.normal(i, r, 7, n) for i, (r, n) in enumerate([(1, 3), (2, 3), (1, 5)])]
    found = spectra.decompose([x.mT @ x for x in stacks], ["matrix"] * 3)
    assert sorted(shapes) == [(1, 5, 5), (3, 3, 3)]
    for x, e in zip(stacks, found, strict=True):
        assert e.basis is not None
        assert_close(e.basis @ (e.values.unsqueeze(-1) * e.basis.mT), x.mT @ x)


def test_float32_is_near_float64() -> None:
    model = lambda p, b, x: torch.tanh(x @ p["w"].T) @ p["v"].T  # noqa: E731
    params = {"w": loops.normal(0, 6, 5), "v": loops.normal(1, 3, 6)}
    batch = ff.Batch(loops.normal(2, 20, 5))
    low = {k: p.float() for k, p in params.items()}, {}, ff.Batch(batch.inputs.float())
    for make in (ff.kfac, ff.ekfac):
        fim = make(model, ff.likelihoods.categorical())
        want, got = fim(params, {}, batch), fim(*low)
        torch.testing.assert_close(got.to_dense().double(), want.to_dense(), rtol=1e-3, atol=1e-4)
        v = got.solve(low[0], damping=0.1)
        torch.testing.assert_close(
            v["w"].double(), want.solve(params, damping=0.1)["w"], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("few", [False, True])
def test_small_eigenvalues_of_wide_factors_are_kept_beside_a_small_damping(few: bool) -> None:
    n = 512 if few else 256
    spectrum = torch.logspace(0, -6, 256, dtype=torch.float64)
    basis = torch.linalg.qr(loops.normal(0, n, 256)).Q
    factor = ((basis * spectrum) @ basis.mT).float().unsqueeze(0)
    (found,) = spectra.decompose([factor], ["matrix"], [256] if few else None)
    assert found.form == ("rows" if few else "matrix")
    # in units of the largest: the bound n·eps for errors, 3e-5 or 6e-5, is a third of the damping
    damping = 1e-4
    assert found.basis is not None
    turned = basis.mT @ found.basis[0].double()
    inside = (turned / (found.values[0].double() + damping)) @ turned.mT
    want = (1.0 / (spectrum + damping)).diag()
    rest = (torch.eye(256, dtype=torch.float64) - turned @ turned.mT) / damping
    error = torch.linalg.matrix_norm(inside + rest - want, 2) * damping
    assert error < 0.1
