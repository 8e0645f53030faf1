"""`Implicit`: the algebra that products answer, exactly; the rest says where to go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import cases
import fisherfn as ff
from fisherfn import Implicit, testing
from fisherfn.testing import assert_close
from fisherfn.testing.members import FISHERS, UNITS

KEY = ff.random.key(3)


@pytest.fixture(scope="module")
def s() -> cases.Setup:
    return cases.ALL["mlp"].setup()


def vector(params: Any, seed: int = 1) -> Any:
    return ff.tree.random_like(ff.random.key(seed), params)


def flat(tree: Any) -> Tensor:
    return ff.tree.ravel(tree)[0]


def both(s: cases.Setup, **options: Any) -> tuple[Implicit, Any]:
    reuse = {"reuse_forward": options.pop("reuse_forward")} if "reuse_forward" in options else {}
    F = ff.implicit(s.model, s.likelihood, **options, **reuse)(*s.args, key=KEY)
    return F, ff.dense(s.model, s.likelihood, **options)(*s.args, key=KEY)


@pytest.mark.parametrize("reuse_forward", [True, False])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("fisher", FISHERS)
def test_products_and_matrix_are_those_of_dense(
    fisher: str, unit: str, reuse_forward: bool
) -> None:
    s = cases.ALL["linear_3d"].setup()
    F, dense = both(s, fisher=fisher, unit=unit, reuse_forward=reuse_forward)
    v = vector(s.params)
    assert_close(F.mv(v), dense.mv(v), rtol=1e-10)
    assert_close(F.quadratic(v), dense.quadratic(v), rtol=1e-10)
    assert_close(F.to_dense(), dense.to_dense(), rtol=1e-10)
    assert_close(F.count, dense.count)
    assert (F.fisher, F.unit) == (fisher, unit)


def test_solve_is_that_of_the_matrix(s: cases.Setup) -> None:
    F, dense = both(s)
    v = vector(s.params)
    for damping in (1e-1, torch.tensor(1e-2)):
        want = dense.solve(v, damping=damping)
        assert_close(F.solve(v, damping=damping), want, rtol=1e-6)
        assert_close(F.pow(v, -1, damping=damping), want, rtol=1e-6)
    single = ff.tree.map(lambda t: t.float(), v)
    assert {t.dtype for t in F.solve(single, damping=0.1).values()} == {torch.float32}
    helped = F.solve(v, damping=1e-1, preconditioner=lambda x: dense.solve(x, damping=1e-1))
    assert_close(helped, dense.solve(v, damping=1e-1), rtol=1e-6)


def test_whole_powers_are_those_of_the_matrix(s: cases.Setup) -> None:
    F, dense = both(s)
    v = vector(s.params)
    for p in (0, 1, 3):
        assert_close(F.pow(v, p, damping=0.3), dense.pow(v, p, damping=0.3), rtol=1e-8)


def test_sums_and_multiples_are_matrix_algebra(s: cases.Setup) -> None:
    F, dense = both(s)
    G, other = both(s, fisher="exact")
    v = vector(s.params)
    assert_close((3.0 * F).mv(v), (3.0 * dense).mv(v), rtol=1e-10)
    assert_close((torch.tensor(2.0) * F + G).mv(v), (2.0 * dense + other).mv(v), rtol=1e-10)
    assert_close((F + G).count, (dense + other).count)
    assert "2 terms" in repr(F + G)
    assert_close((F + G).to_dense(), (dense + other).to_dense(), rtol=1e-10)


def test_merge_is_the_result_on_the_joined_data(s: cases.Setup) -> None:
    make = ff.implicit(s.model, s.likelihood)
    x = s.batch.inputs
    parts = [ff.Batch(x[:1]), ff.Batch(x[1:])]
    a, b = (make(s.params, s.buffers, part) for part in parts)
    whole = make(s.params, s.buffers, ff.Batch(x))
    v = vector(s.params)
    merged = ff.merge(a, b)
    assert_close(merged.mv(v), whole.mv(v), rtol=1e-10)
    assert_close(merged.count, whole.count)
    several = make(s.params, s.buffers, iter(parts))
    assert_close(several.mv(v), whole.mv(v), rtol=1e-10)
    assert_close(several.count, whole.count)
    empty = ff.empty_like(a)
    assert_close(ff.merge(empty, a).mv(v), a.mv(v), rtol=0)
    assert all(not t.any() for t in empty.mv(v).values())
    assert not empty.to_dense().any()
    mc = ff.implicit(s.model, s.likelihood, fisher="mc")(*s.args, key=KEY)
    hessian = ff.implicit(s.model, s.likelihood, matrix="hessian")(*s.args)
    for wrong in (mc, hessian):
        with pytest.raises(ff.OptionError, match="same fisher"):
            ff.merge(a, wrong)


def test_hessian_as_implicit(s: cases.Setup) -> None:
    H = ff.implicit(s.model, s.likelihood, matrix="hessian")(*s.args)
    v = vector(s.params)
    assert_close(H.mv(v), ff.hvp(s.model, s.likelihood)(*s.args, v), rtol=1e-10)
    assert H.fisher == "hessian"
    diagonal = ff.hessian_diagonal(s.model, s.likelihood)(*s.args)
    assert_close(H.to_dense().diagonal(), flat(diagonal), rtol=1e-8)


def test_a_block_of_selected_parameters(s: cases.Setup) -> None:
    F = ff.implicit(s.model, s.likelihood, select="bias")(*s.args)
    want = ff.dense(s.model, s.likelihood)(*s.args).to_dense()
    keep = flat({k: torch.full_like(p, "bias" in k) for k, p in s.params.items()}) > 0
    assert_close(F.to_dense(), want[keep][:, keep], rtol=1e-10)
    assert set(F.mv({k: p for k, p in s.params.items() if "bias" in k})) == {
        k for k in s.params if "bias" in k
    }


def test_scipy_takes_it(s: cases.Setup) -> None:
    from scipy.sparse.linalg import eigsh

    F, dense = both(s)
    operator = F.linear_operator()
    assert operator.shape == tuple(dense.to_dense().shape)
    assert operator.dtype == np.float64
    x = np.random.default_rng(0).standard_normal(operator.shape[0])
    np.testing.assert_allclose(operator @ x, dense.to_dense().numpy() @ x, rtol=1e-9, atol=1e-12)
    top = eigsh(operator, k=2, return_eigenvectors=False, v0=x)
    np.testing.assert_allclose(np.sort(top)[::-1], dense.eigenvalues()[:2].numpy(), rtol=1e-8)


def test_linalg_takes_it(s: cases.Setup) -> None:
    F, dense = both(s)
    value, stderr = ff.linalg.hutchinson(F.mv, s.params, num_matvecs=20, key=KEY)
    assert abs(value - dense.trace()) < 5 * stderr
    top = ff.linalg.lanczos(F.mv, s.params, k=3, key=KEY).eigenvalues
    assert_close(top, dense.eigenvalues()[:3], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("trace", "xtrace"),
        ("frobenius", "hutchpp"),
        ("logdet", "slq"),
        ("diagonal", "xdiag"),
        ("eigenvalues", "lanczos"),
    ],
)
def test_other_questions_name_the_function_of_linalg(s: cases.Setup, name: str, call: str) -> None:
    F, _ = both(s)
    with pytest.raises(ff.UnsupportedError, match=rf"Implicit\.{name}.*linalg\.{call}"):
        getattr(F, name)()
    assert hasattr(ff.linalg, call)


def test_sample_and_roots_name_what_can(s: cases.Setup) -> None:
    F, _ = both(s)
    with pytest.raises(ff.UnsupportedError, match=r"Implicit\.sample.*low_rank"):
        F.sample(KEY)
    with pytest.raises(ff.UnsupportedError, match=r"Implicit\.pow.*lanczos"):
        F.pow(s.params, -0.5)


def test_it_is_a_pytree(s: cases.Setup) -> None:
    F, dense = both(s)
    v = vector(s.params)
    leaves, structure = pytree.tree_flatten(F)
    again = pytree.tree_unflatten(leaves, structure)
    assert_close(again.mv(v), dense.mv(v), rtol=1e-10)
    stacked = ff.tree.map(lambda p: torch.stack([p, 2 * p]), s.params)
    make = ff.implicit(s.model, s.likelihood)
    found = torch.vmap(lambda p: make(p, s.buffers, s.batch).quadratic(v))(stacked)
    for k in range(2):
        params = {name: p[k] for name, p in stacked.items()}
        assert_close(found[k], make(params, s.buffers, s.batch).quadratic(v), rtol=1e-9)


def test_singular_solves_do_not_pass_for_solutions(s: cases.Setup) -> None:
    F, _ = both(s)
    with pytest.raises(ff.NotPositiveDefiniteError, match=r"Implicit\.solve.*residual"):
        F.solve(vector(s.params), max_steps=3)
    with pytest.raises(ff.NotPositiveDefiniteError, match="not positive definite"):
        (-1.0 * F).solve(vector(s.params), damping=1e-3)
    poisoned = torch.vmap(lambda t: F.solve(t, max_steps=2))(
        ff.tree.map(lambda t: t.unsqueeze(0), vector(s.params))
    )
    assert all(t.isnan().all() for t in poisoned.values())


def test_faults_are_named(s: cases.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    F, _ = both(s)
    with pytest.raises(ff.TreeMismatchError, match=r"Implicit\.mv: expected v like params"):
        F.mv({"w": torch.ones(2)})
    with pytest.raises(ff.OptionError, match="matrix= to be 'fisher' or 'hessian'"):
        ff.implicit(s.model, s.likelihood, matrix="ntk")
    with pytest.raises(ff.OptionError, match="no fisher= or num_samples="):
        ff.implicit(s.model, s.likelihood, matrix="hessian", fisher="mc")
    monkeypatch.setattr("fisherfn.curvature.implicit.MATRIX_BUDGET", 100)
    with pytest.raises(ff.OptionError, match=r"Implicit\.to_dense: expected a matrix of at most"):
        F.to_dense()


def test_without_scipy_the_error_says_so(s: cases.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    F, _ = both(s)
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse", None)
    with pytest.raises(ff.UnsupportedError, match="expected scipy, got none"):
        F.linear_operator()


def test_its_matrix_obeys_the_laws() -> None:
    assert {"products-exact-example", "products-hessian"} <= set(testing.ESTIMATORS)
