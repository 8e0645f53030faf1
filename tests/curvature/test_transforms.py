"""Under torch.compile, torch.vmap and torch.func.grad; as pytrees of torch and of optree."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from fisherfn.core import random, trees
from fisherfn.core.merging import empty_like, merge
from fisherfn.curvature import Dense, Diagonal, GradientMoments, Layout

# One of each class: compiling takes its time.
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("kfac", "ekfac")]
COMPILED = ("diagonal", "dense", "crossed", "grouped", *SLOW)


def everything(F: Any, v: Any, key: Tensor, damping: Any) -> dict[str, Any]:
    """Every question at once."""
    return {
        "mv": F.mv(v),
        "solve": F.solve(v, damping=damping),
        "root": F.pow(v, -0.5, damping=damping),
        "square": F.pow(v, 2, damping=damping),
        "quadratic": F.quadratic(v),
        "trace": F.trace(),
        "frobenius": F.frobenius(),
        "logdet": F.logdet(damping=damping),
        "diagonal": F.diagonal(),
        "eigenvalues": F.eigenvalues(),
        "sample": F.sample(key, damping=damping),
        "to_dense": F.to_dense(),
        "scaled": damping * (2 * F) * 0.5,
        "sum": F + F,
        "merged": merge(F, 2 * F),
        "empty": empty_like(F),
    }


def same(a: Any, b: Any, tol: float = 1e-10) -> None:
    assert trees.structure(a) == trees.structure(b)
    for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def with_stderr(F: Any) -> Any:
    if not isinstance(F, Diagonal):
        return F
    return dataclasses.replace(F, stderr=trees.scale(F.values, 0.1), fisher="mc")


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_is_eager(make: Any, layers: Any, kind: str) -> None:
    case = make(kind, layers)
    F, v, key = with_stderr(case.F), case.draw(0), random.key(1)
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    for damping in torch.tensor([0.3, 0.0], dtype=torch.float64):
        same(compiled(F, v, key, damping), everything(F, v, key, damping))


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_with_numbers_for_options(make: Any, layers: Any, kind: str) -> None:
    case = make(kind, layers)
    # The second and third number of a kind are traced as symbols.
    v = case.draw(0)
    for ask, numbers in (
        (lambda F, c: F.solve(v, damping=c), (0.1, 0.2, 0.3)),
        (lambda F, c: F.pow(v, c, damping=0.1), (0.5, -0.5, 2)),
        (lambda F, c: c * F, (2.0, 3.0, 4.0)),
    ):
        compiled = torch.compile(ask, fullgraph=True, backend="eager")
        for number in numbers:
            same(compiled(case.F, number), ask(case.F, number))


def test_results_that_are_made_inside_of_compiled_code() -> None:
    def make(params: Any, matrix: Tensor) -> Any:
        layout = Layout.of(params)
        return Dense(matrix, matrix.new_ones(()), layout), Diagonal(params, matrix.new_ones(()))

    params = {"a": {"w": torch.ones(2)}, "b": [torch.ones(1)]}
    compiled = torch.compile(make, fullgraph=True, backend="eager")
    dense, diagonal = compiled(params, torch.eye(3))
    assert dense.layout == Layout.of(params)
    again = Dense(torch.eye(3), torch.ones(()), Layout.of(params))
    same(dense + dense, again + again)
    same(diagonal.solve(params), params)


def test_vmap_is_a_loop(make: Any, case: Any, layers: Any) -> None:
    members = [with_stderr(make(case.kind, layers, seed).F) for seed in (3, 40, 500)]
    many = trees.map(lambda *xs: torch.stack(xs), *members)
    vs = trees.map(lambda *xs: torch.stack(xs), *[case.draw(i) for i in range(3)])
    keys, damping = random.split(random.key(0), 3), torch.tensor(0.3, dtype=torch.float64)
    found = torch.vmap(everything, in_dims=(0, 0, 0, None))(many, vs, keys, damping)
    for i, F in enumerate(members):
        want = everything(F, trees.map(lambda x, i=i: x[i], vs), keys[i], damping)
        same(trees.map(lambda x, i=i: x[i], found), want)


def scalars(v: Any, key: Tensor) -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """A number from every question; the second argument is the damping."""

    def total(tree: Any) -> Tensor:
        return trees.dot(tree, trees.map(torch.cos, v))

    return {
        "mv": lambda F, d: total(F.mv(v)) * d,
        "solve": lambda F, d: total(F.solve(v, damping=d)),
        "root": lambda F, d: total(F.pow(v, -0.5, damping=d)),
        "cube": lambda F, d: total(F.pow(v, 3, damping=d)),
        "quadratic": lambda F, d: F.quadratic(v) + d,
        "trace": lambda F, d: F.trace() + d,
        "frobenius": lambda F, d: F.frobenius() + d,
        "logdet": lambda F, d: F.logdet(damping=d),
        "diagonal": lambda F, d: total(F.diagonal()) + d,
        "eigenvalues": lambda F, d: (F.eigenvalues() ** 3).sum() * d,
        "sample": lambda F, d: total(F.sample(key, damping=d)),
        "to_dense": lambda F, d: (F.to_dense() ** 2).sum() * d,
        "algebra": lambda F, d: (d * F + 3 * F).trace(),
        "merged": lambda F, d: merge(F, d * F).frobenius(),
    }


@pytest.mark.parametrize("name", scalars({}, torch.zeros(2)))
def test_derivatives_are_finite_differences(case: Any, name: str) -> None:
    f = scalars(case.draw(0), random.key(1))[name]
    damping = torch.tensor(0.3, dtype=torch.float64)
    # A symmetric direction: another representation of the same kind. The count stays.
    direction = trees.map(lambda x: torch.zeros_like(x) if x.ndim == 0 else x.cos(), case.F)
    step = 1e-6

    def at(t: float) -> Tensor:
        return f(trees.axpy(t, direction, case.F), damping + t)

    want = (at(step) - at(-step)) / (2 * step)
    slopes = torch.func.grad(f, argnums=(0, 1))(case.F, damping)
    got = trees.dot(slopes[0], direction) + slopes[1]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_derivatives_are_eager_ones(make: Any, layers: Any, kind: str) -> None:
    case = make(kind, layers)
    questions = list(scalars(case.draw(0), random.key(1)).values())
    damping = torch.tensor(0.3, dtype=torch.float64)
    slope = torch.func.grad(lambda F: torch.stack([f(F, damping) for f in questions]).cos().sum())
    compiled = torch.compile(slope, fullgraph=True, backend="eager")
    same(compiled(case.F), slope(case.F), 1e-8)


def test_derivatives_of_a_solution_exist_where_eigenvalues_repeat(make: Any, layers: Any) -> None:
    F = make("dense", layers, rank=3, floor=0.0).F
    v = {name: torch.ones_like(x) for name, x in layers.items()}
    for ask in (
        lambda F: F.solve(v, damping=0.1),
        lambda F: F.pow(v, -2, damping=0.1),
        lambda F: F.pow(v, 2),
        lambda F: F.eigenvalues(),
    ):
        slope = torch.func.grad(lambda F, ask=ask: trees.norm(ask(F)))(F)
        assert bool(slope.matrix.isfinite().all())


def test_derivative_of_a_root_is_nan_where_eigenvalues_repeat(make: Any, layers: Any) -> None:
    # Autograd would divide rounding errors by rounding errors and give finite numbers.
    F = make("dense", layers, rank=3, floor=0.0).F
    v = {name: torch.ones_like(x) for name, x in layers.items()}
    slope = torch.func.grad(lambda F: trees.norm(F.pow(v, 0.5, damping=0.1)))(F)
    assert bool(slope.matrix.isnan().all())
    by_v = torch.func.grad(lambda v: trees.norm(F.pow(v, 0.5, damping=0.1)))(v)
    assert all(bool(x.isfinite().all()) for x in by_v.values())


def test_the_derivative_of_a_standard_error_of_zero_is_zero() -> None:
    zero, one = {"w": torch.zeros(2)}, torch.tensor(1.0)
    slope = torch.func.grad(
        lambda F: trees.norm(merge(F, F).stderr) + sum(merge(F, F).stderr["w"])
    )(Diagonal(zero, one, zero))
    assert torch.equal(slope.stderr["w"], torch.zeros(2))


def test_pytree_of_torch_and_optree(case: Any) -> None:
    for F in (case.F, with_stderr(case.F)):
        leaves, spec = torch_pytree.tree_flatten(F)
        assert all(isinstance(x, Tensor) for x in leaves)
        again = torch_pytree.tree_unflatten(leaves, spec)
        same(again, F, 0.0)
        for namespace in ("", trees.NAMESPACE):
            found, definition = optree.tree_flatten(F, namespace=namespace)
            assert len(found) == len(leaves)
            again = optree.tree_unflatten(definition, found)
            assert (type(again), again.fisher, again.unit) == (type(F), F.fisher, F.unit)
        assert "count" in trees.paths(F)


def test_structure_tells_kinds_apart(make: Any, layers: Any) -> None:
    a, b = make("dense", layers).F, make("dense", layers, fisher="mc").F
    assert trees.structure(a) != trees.structure(b)
    assert trees.structure(a) == trees.structure(a + a)


def test_frozen_and_copied(case: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.F.count = torch.tensor(1.0)
    copied = copy.deepcopy(case.F)
    same(copied, case.F, 0.0)
    assert hash(case.F) != hash(copied)  # a tensor has no other equality than identity
    assert case.F != copied


def test_repr_says_what_it_is_everywhere(case: Any) -> None:
    assert "count=30, fisher='exact', unit='example'" in repr(case.F)
    torch.vmap(lambda F: (repr(F), F.trace())[1])(trees.map(lambda x: x[None], case.F))
    assert "count=<(1,)>" in repr(trees.map(lambda x: x[None], case.F))
    assert type(case.F).__name__ in repr(trees.map(lambda x: None, case.F))
    moments = GradientMoments(torch.tensor(2.0), {"w": torch.ones(2)}, {"w": torch.ones(2)})
    assert repr(moments) == "GradientMoments(1 leaf, count=2, fisher='empirical', unit='example')"
