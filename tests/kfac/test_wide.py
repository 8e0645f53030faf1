"""Factors that are too wide to be formed: kept as rows, and equal to the dense answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kfac import loops
from kfac.layers import CASES
from torch import Tensor, nn

import fisherfn as ff
from fisherfn.core import trees
from fisherfn.testing import assert_close

SIDES = {"outputs": (4, 9), "inputs": (9, 4), "both": (9, 9)}


def problem(name: str, positions: bool = True) -> tuple[Any, ...]:
    """A layer wider than 6 on one side or both, with more rows than that or fewer."""
    inputs, outputs = SIDES[name]

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, 3))

    model, params, buffers = ff.functional(loops.seeded(build))
    shape = (2, 2, inputs) if positions else (2, inputs)
    mask = torch.tensor([[True, True], [True, False]]) if positions else None
    return model, params, buffers, ff.Batch(loops.normal(1, *shape), mask=mask)


def pair(name: str, **options: Any) -> tuple[Any, Any, Any]:
    model, params, buffers, batch = problem(name)
    likelihood = ff.likelihoods.categorical()
    full = ff.kfac(model, likelihood, **options)(params, buffers, batch)
    thin = ff.kfac(model, likelihood, widest=6, **options)(params, buffers, batch)
    return full, thin, params


def vector(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)])


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", SIDES)
def test_rows_are_the_matrix(name: str, approx: str) -> None:
    full, thin, params = pair(name, approx=approx)
    forms = {(b.output_form, b.input_form) for b in thin.blocks}
    assert any("rows" in form for form in forms)
    want = full.to_dense()
    assert_close(thin.to_dense(), want)
    v = {k: loops.normal(i, *p.shape) for i, (k, p) in enumerate(params.items())}
    x = vector(v)
    assert_close(vector(thin.mv(v)), want @ x)
    assert_close(thin.quadratic(v), x @ want @ x)
    assert_close(thin.trace(), want.trace())
    assert_close(thin.frobenius(), want.norm())
    assert_close(vector(thin.diagonal()), want.diagonal())
    torch.testing.assert_close(
        thin.eigenvalues(), torch.linalg.eigvalsh(want).flip(0), rtol=1e-10, atol=1e-14
    )
    for damping in (1e-3, 0.5):
        shifted = want + damping * torch.eye(len(want), dtype=want.dtype)
        assert_close(vector(thin.solve(v, damping=damping)), torch.linalg.solve(shifted, x))
        assert_close(thin.logdet(damping=damping), torch.logdet(shifted))
        values, vectors = torch.linalg.eigh(shifted)
        root = vectors @ (values**-0.5 * (vectors.T @ x))
        assert_close(vector(thin.pow(v, -0.5, damping=damping)), root)
        key = ff.random.key(4)
        draw = vector(thin.sample(key, damping=damping))
        z = vector(trees.random_like(key, params))
        assert_close(draw @ shifted @ draw, z @ z)


@pytest.mark.parametrize("name", SIDES)
def test_the_decomposed_form_answers_alike(name: str) -> None:
    full, thin, params = pair(name)
    E, want = thin.eigh(), full.to_dense()
    assert_close(E.to_dense(), want)
    assert_close(vector(E.diagonal()), want.diagonal())
    assert_close(E.trace(), want.trace())
    assert_close(E.frobenius(), want.norm())
    v = {k: loops.normal(i, *p.shape) for i, (k, p) in enumerate(params.items())}
    assert_close(vector(E.mv(v)), want @ vector(v))
    for F in (thin, E):
        with pytest.raises(ff.NotPositiveDefiniteError, match=r"singular.* at 0\.weight|2\.weight"):
            F.solve(v)


@pytest.mark.parametrize("name", SIDES)
def test_scales_in_a_thin_basis(name: str) -> None:
    model, params, buffers, batch = problem(name)
    likelihood = ff.likelihoods.categorical()
    args = params, buffers, batch
    full = ff.ekfac(model, likelihood)(*args)
    thin = ff.ekfac(model, likelihood, widest=6)(*args)
    # the span of the rows holds all scores, and within it the bases agree up to signs
    assert_close(thin.trace(), full.trace())
    assert_close(thin.frobenius(), full.frobenius())
    torch.testing.assert_close(thin.eigenvalues(), full.eigenvalues(), rtol=1e-8, atol=1e-13)
    assert bool((thin.eigenvalues() >= 0).all())


@pytest.mark.parametrize("name", SIDES)
def test_an_old_thin_basis_keeps_the_trace(name: str) -> None:
    model, params, buffers, batch = problem(name)
    likelihood = ff.likelihoods.categorical()
    other = replace(batch, inputs=loops.normal(50, *batch.inputs.shape))
    old = ff.kfac(model, likelihood, widest=6)(params, buffers, other)
    E = ff.ekfac(model, likelihood, basis=old, widest=6)(params, buffers, batch)
    want = ff.dense(model, likelihood)(params, buffers, batch).to_dense()
    assert_close(E.trace(), want.trace())
    # the complement's scale is the mean over it: the nearest matrix of this form
    got = E.to_dense()
    for b, place in zip(E.blocks, E._places(torch.device("cpu"))[0], strict=True):
        index = place.reshape(-1)
        exact = want[index][:, index]
        projectors = []
        for basis, form in (
            (E.output_basis[b.name][0], b.output_form),
            (E.input_basis[b.name][0], b.input_form),
        ):
            own = [torch.outer(q, q) for q in basis.T]
            if form == "rows":
                own.append(torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.T)
            projectors.append(own)
        nearest = torch.zeros_like(exact)
        for left in projectors[0]:
            for right in projectors[1]:
                P = torch.kron(left, right)
                if P.trace() > 1e-9:
                    nearest += (P @ exact).trace() / P.trace() * P
        assert_close(got[index][:, index], nearest)


def test_merged_rows_are_the_rows_of_both() -> None:
    model, params, buffers, batch = problem("both")
    likelihood = ff.likelihoods.categorical()
    fim = ff.kfac(model, likelihood, widest=6)
    assert batch.mask is not None
    parts = [
        replace(batch, inputs=batch.inputs[i : i + 1], mask=batch.mask[i : i + 1]) for i in (0, 1)
    ]
    merged = ff.merge(*[fim(params, buffers, part) for part in parts])
    whole = ff.kfac(model, likelihood)(params, buffers, batch)
    assert_close(merged.to_dense(), whole.to_dense())
    assert_close((2.5 * merged).to_dense(), 2.5 * whole.to_dense())
    assert_close((merged + 2.0 * merged).to_dense(), 3.0 * whole.to_dense())
    assert_close(ff.merge(merged, ff.empty_like(merged)).to_dense(), whole.to_dense())
    chunked = ff.kfac(model, likelihood, widest=6, chunk_size=1)(params, buffers, batch)
    assert_close(chunked.to_dense(), whole.to_dense())
    with pytest.raises(ff.UnsupportedError, match=r"c >= 0 for factors kept as rows, got -1 at 0"):
        _ = -1.0 * merged


def test_factored_damping_needs_matrices() -> None:
    _, thin, params = pair("outputs")
    with pytest.raises(ff.UnsupportedError, match=r"KFAC.solve: expected factors kept as matrices"):
        thin.solve(params, damping=0.1, factored=True)


def test_a_wide_vocabulary_is_never_squared() -> None:
    """A head of 30 000 outputs: its square would take 7 GB in float64."""
    width = 30_000
    params = {"head": 0.1 * loops.normal(0, width, 3), "table": loops.normal(1, width, 3)}

    def model(p: Any, buffers: Any, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, p["table"]) @ p["head"].T

    batch = ff.Batch(torch.tensor([[7, 9], [7, 29_999]]))
    likelihood = ff.likelihoods.categorical()
    args, key = (params, {}, batch), ff.random.key(0)
    F = ff.kfac(model, likelihood, fisher="mc")(*args, key=key)
    forms = {b.name: (b.output_form, b.input_form) for b in F.blocks}
    assert forms == {"head": ("rows", "matrix"), "table": ("matrix", "diagonal")}
    assert F.outputs["head"].shape == (1, 4, width)
    assert F.inputs["table"].shape == (1, width)
    x = F.solve(params, damping=0.1)
    back = trees.axpy(0.1, x, F.mv(x))
    for name in params:
        assert_close(back[name], params[name])
    E = ff.ekfac(model, likelihood, fisher="mc")(*args, key=key)
    exact = ff.diagonal(model, likelihood, fisher="mc")(*args, key=key)
    assert_close(E.trace(), exact.trace())
    assert E.scales["head"].shape == (1, 5, 3)


def test_the_width_is_a_number() -> None:
    case = CASES["linear"]()
    bad: Any
    for bad in (0, 2.5, True, None):
        with pytest.raises(ff.OptionError, match="kfac: expected widest= to be an integer"):
            ff.kfac(case.model, case.likelihood, widest=bad)


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_rows_of_the_data_are_left_as_they_are(bias: str) -> None:
    """Without a mask or weights the rows of a first layer are the batch itself."""
    model, params, buffers, batch = problem("both", positions=False)
    before = batch.inputs.clone()
    fim = ff.kfac(model, ff.likelihoods.categorical(), widest=6, bias=bias)
    first = fim(params, buffers, batch).to_dense()
    assert torch.equal(batch.inputs, before)
    full = ff.kfac(model, ff.likelihoods.categorical(), bias=bias)(params, buffers, batch)
    assert_close(first, full.to_dense())


@pytest.mark.parametrize("bias", ["joint", "separate", "diagonal"])
def test_nothing_pulled_back_needs_no_wide_identity(bias: str) -> None:
    model, params, buffers, batch = problem("outputs")
    likelihood = ff.likelihoods.categorical()
    options: dict[str, Any] = {"fisher": "forward_only", "bias": bias}
    full = ff.kfac(model, likelihood, **options)(params, buffers, batch)
    wide = ff.kfac(model, likelihood, widest=6, **options)(params, buffers, batch)
    forms = {b.outputs: b.output_form for b in wide.blocks}
    assert forms == {9: "diagonal", 3: "matrix"}
    found = wide.eigh()
    assert found.output_basis["0.weight"].shape == (1, 9, 0)
    assert_close(wide.to_dense(), full.to_dense())
    assert_close(found.to_dense(), full.to_dense())
    v = {k: loops.normal(i, *p.shape) for i, (k, p) in enumerate(params.items())}
    for got in (wide, found):
        assert_close(vector(got.solve(v, damping=0.1)), vector(full.solve(v, damping=0.1)))
        assert_close(got.logdet(damping=0.1), full.logdet(damping=0.1))
    half = 0.5 * wide
    assert_close(half.eigh().to_dense(), 0.5 * full.to_dense())
    assert_close(ff.merge(wide, wide).to_dense(), full.to_dense())


# ---- factors of fewer rows than dimensions -------------------------------------------------------


def few_rows(rows: int, dtype: torch.dtype = torch.float64) -> Any:
    """K-FAC of one wide layer on so many examples, with a spectrum over six decades."""
    model, params, buffers = ff.functional(loops.seeded(lambda: nn.Linear(150, 90)))
    params = {k: p.to(dtype) for k, p in params.items()}
    scales = torch.logspace(0, -3, rows, dtype=torch.float64).unsqueeze(-1)
    batch = ff.Batch((loops.normal(1, rows, 150) * scales).to(dtype))
    fim = ff.kfac(model, ff.likelihoods.categorical(), fisher="mc")
    return fim(params, buffers, batch, key=ff.random.key(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 30, 44])
def test_few_rows_are_decomposed_through_their_number(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    F = few_rows(rows, dtype)
    sizes = []
    plain = torch.linalg.eigh

    def counted(x: Tensor) -> Any:
        sizes.append(x.shape[-1])
        return plain(x)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    found = F.eigh()
    monkeypatch.undo()
    assert max(sizes) <= rows + 8
    whole = F.eigh(thin=False)
    want, got = whole.eigenvalues(), found.eigenvalues()
    allowed = float(500 * torch.finfo(dtype).eps * want[0])
    torch.testing.assert_close(got, want, rtol=0, atol=allowed)
    v = ff.tree.random_like(ff.random.key(2), F.diagonal())
    error = vector(found.mv(v)) - vector(F.mv(v))
    assert float(error.norm()) <= allowed * float(vector(v).norm())


@pytest.mark.parametrize("rows", [1.0, float("inf"), float("nan"), 0.0])
def test_a_number_of_rows_that_says_too_little_is_noticed(rows: float) -> None:
    """Factors that are averages of others, or weighted, may have a higher rank than that."""
    F = few_rows(40)
    told = replace(F, rows={name: torch.tensor(rows).double() for name in F.rows})
    v = ff.tree.random_like(ff.random.key(2), F.diagonal())
    assert_close(vector(told.eigh().mv(v)), vector(F.mv(v)))
    assert_close(told.eigh().trace(), F.trace())
