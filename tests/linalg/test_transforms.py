"""Purity, and what runs under torch.compile, vmap and grad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linalg.operators import SPECTRA, flat, rotated, tree
from torch import Tensor

import fisherfn as ff

KEY = ff.random.key(2)
MATRIX = rotated(SPECTRA["geometric"][:12]).matrix + 0.1 * torch.eye(12, dtype=torch.float64)
RIGHT = ff.random.normal(KEY, 12, torch.float64)


def run(name: str, matrix: Tensor) -> Any:
    """A call whose number of steps is fixed."""

    def mv(v: Any) -> Any:
        return tree(matrix @ flat(v))

    like = tree(torch.zeros(12, dtype=matrix.dtype))
    if name == "cg":
        return ff.linalg.cg(mv, tree(RIGHT), max_steps=8, tolerance=1e-2, damping=0.3)
    if name == "slq":
        return ff.linalg.slq(mv, like, num_probes=2, num_steps=4, key=KEY)
    return getattr(ff.linalg, name)(mv, like, num_matvecs=6, key=KEY)


FIXED = ("hutchinson", "hutchpp", "xtrace", "xdiag", "slq", "cg")


def assert_equal(got: Any, want: Any, rtol: float = 1e-8) -> None:
    for a, b in zip(ff.tree.leaves(got), ff.tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("hutchinson", "xdiag") else pytest.mark.slow)
        for n in FIXED
    ],
)
def test_compiled_is_eager(name: str) -> None:
    torch._dynamo.reset()
    fast = torch.compile(lambda m: run(name, m), fullgraph=True, backend="aot_eager")
    got, want = fast(MATRIX), run(name, MATRIX)
    if name == "cg":
        # in the graph all steps are taken, and the smallest residual is kept
        assert bool(got.converged)
        got, want = got.value, want.value
    assert_equal(got, want)


@pytest.mark.parametrize("name", FIXED)
def test_batches_of_operators(name: str) -> None:
    scales = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    got = torch.vmap(lambda s: run(name, s * MATRIX))(scales)
    for i, s in enumerate(scales):
        mine, want = ff.tree.map(lambda t, i=i: t[i], got), run(name, s * MATRIX)
        if name == "cg":
            assert bool(mine.converged)
            mine, want = mine.value, want.value
        assert_equal(mine, want)


@pytest.mark.parametrize("name", ["hutchinson", "hutchpp", "xtrace", "xdiag", "cg"])
def test_derivative_is_a_finite_difference(name: str) -> None:
    direction = rotated(SPECTRA["flat"][:12], seed=4).matrix

    def number(t: Tensor) -> Tensor:
        found = run(name, MATRIX + t * direction)
        return torch.stack([(leaf * leaf).sum() for leaf in ff.tree.leaves(found.value)]).sum()

    zero = torch.zeros((), dtype=torch.float64)
    got = torch.func.grad(number)(zero)
    h = 1e-5
    want = (number(zero + h) - number(zero - h)) / (2 * h)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


EAGER: dict[str, Callable[[Any, Any], Any]] = {
    "lanczos": lambda mv, like: ff.linalg.lanczos(mv, like, k=3, key=KEY),
    "lobpcg": lambda mv, like: ff.linalg.lobpcg(mv, like, k=3, key=KEY),
    "density": lambda mv, like: ff.linalg.density(mv, like, key=KEY, num_steps=5),
    **{name: lambda mv, like, n=name: run(n, MATRIX) for name in FIXED},
}


@pytest.mark.parametrize("name", EAGER)
def test_purity(name: str) -> None:
    like = tree(torch.linspace(0.0, 1.0, 12, dtype=torch.float64))
    given = [MATRIX, RIGHT, KEY, *ff.tree.leaves(like)]
    before = [(t.clone(), t._version) for t in given]
    first = EAGER[name](lambda v: tree(MATRIX @ flat(v)), like)
    second = EAGER[name](lambda v: tree(MATRIX @ flat(v)), like)
    for t, (value, version) in zip(given, before, strict=True):
        assert t._version == version
        assert torch.equal(t, value)
    for a, b in zip(ff.tree.leaves(first), ff.tree.leaves(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*EAGER])
def test_operators_may_carry_a_graph(name: str) -> None:
    """Results about parameters that require gradients do not keep what Lanczos has computed."""
    weight = MATRIX.clone().requires_grad_()
    found = EAGER[name](lambda v: tree(weight @ flat(v)), tree(torch.zeros(12).double()))
    if name in ("lanczos", "lobpcg"):
        assert not any(leaf.requires_grad for leaf in ff.tree.leaves(found))


def test_results_are_trees_of_both_libraries() -> None:
    import torch.utils._pytree as pytree

    found = run("cg", MATRIX)
    assert len(pytree.tree_leaves(found)) == len(ff.tree.leaves(found)) == 7
    pairs = EAGER["lanczos"](lambda v: tree(MATRIX @ flat(v)), tree(torch.zeros(12).double()))
    assert len(pytree.tree_leaves(pairs)) == len(ff.tree.leaves(pairs)) == 7
