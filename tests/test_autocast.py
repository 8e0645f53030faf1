"""Under autocast models compute in less precision; what is made of them does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cases
import fisherfn as ff
from cases import Net, normal
from fisherfn.core.modes import unmixed

LIK = ff.likelihoods.categorical()
KEY = ff.random.key(0)


def mixed() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def setup() -> tuple[Any, Any, Any, ff.Batch]:
    with cases.seeded(0):
        module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    batch = ff.Batch(normal(6, 5).float(), torch.arange(6) % 3)
    return *ff.functional(module), batch


def same(got: Any, want: Any) -> None:
    tensors = [[t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)] for x in (got, want)]
    for a, b in zip(*tensors, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


ESTIMATORS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda m: ff.dense(m, LIK),
    "block_diagonal": lambda m: ff.block_diagonal(m, LIK),
    "diagonal": lambda m: ff.diagonal(m, LIK),
    "kfac": lambda m: ff.kfac(m, LIK),
    "ekfac": lambda m: ff.ekfac(m, LIK),
    "low_rank": lambda m: ff.low_rank(m, LIK),
    "score_gram": lambda m: ff.score_gram(m, LIK),
    "gram_spectrum": lambda m: ff.gram_spectrum(m, LIK),
    "per_sample_gradients": lambda m: ff.per_sample_gradients(m, LIK),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_sends_nothing_to_the_general_path(dtype: torch.dtype, inside: bool) -> None:
    with cases.seeded(0):
        layers = nn.Linear(50, 60), nn.ReLU(), nn.LayerNorm(60), nn.Linear(60, 60), nn.Tanh()
        module = nn.Sequential(*layers, nn.Linear(60, 3))
    model, params, buffers = ff.functional(module)
    batch = ff.Batch(normal(8, 50).float(), torch.arange(8) % 3)

    def alone(p: Any, b: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(p, b, x).float()

    estimator = ff.diagonal(alone if inside else model, LIK, fisher="empirical")
    with torch.autocast("cpu", dtype, enabled=not inside):
        assert ff.explain(estimator)(params, buffers, batch).general == ()


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_only_the_model_sees_it(name: str) -> None:
    model, params, buffers, batch = setup()

    def alone(p: Any, b: Any, x: Tensor) -> Tensor:
        with mixed():
            return model(p, b, x)

    want = ESTIMATORS[name](alone)(params, buffers, batch)
    with mixed():
        got = ESTIMATORS[name](model)(params, buffers, batch)
    same(got, want)


QUESTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "mv": lambda F, v: F.mv(v),
    "solve": lambda F, v: F.solve(v, damping=0.1),
    "pow": lambda F, v: F.pow(v, -0.5, damping=0.1),
    "quadratic": lambda F, v: F.quadratic(v),
    "logdet": lambda F, v: F.logdet(damping=0.1),
    "eigenvalues": lambda F, v: F.eigenvalues(),
    "diagonal": lambda F, v: F.diagonal(),
    "to_dense": lambda F, v: F.to_dense(),
    "sample": lambda F, v: F.sample(KEY, damping=0.1),
}


@pytest.mark.parametrize("question", list(QUESTIONS))
@pytest.mark.parametrize("name", ["dense", "block_diagonal", "kfac", "ekfac", "low_rank"])
def test_answers_are_exact(name: str, question: str) -> None:
    model, params, buffers, batch = setup()
    F, ask = ESTIMATORS[name](model)(params, buffers, batch), QUESTIONS[question]
    v = ff.tree.random_like(KEY, params)
    want = ask(F, v)
    with mixed():
        same(ask(F, v), want)


def test_matrix_free_answers_are_exact() -> None:
    model, params, buffers, batch = setup()
    v = ff.tree.random_like(KEY, params)
    F = ff.linearized(model, LIK)(params, buffers, batch)
    asked: list[Callable[[], Any]] = [
        lambda: F(v),
        lambda: ff.implicit(model, LIK, reuse_forward=True)(params, buffers, batch).count,
        lambda: ff.linalg.cg(F, v, damping=0.1).value,
        lambda: ff.linalg.lanczos(F, params, k=3, key=KEY).eigenvalues,
        lambda: ff.linalg.lobpcg(F, params, k=2, key=KEY).eigenvalues,
        lambda: ff.linalg.xtrace(F, params, key=KEY).value,
        lambda: ff.linalg.xnystrace(F, params, key=KEY).value,
        lambda: ff.linalg.hutchpp(F, params, key=KEY).value,
        lambda: ff.linalg.xdiag(F, params, key=KEY).value,
    ]
    for ask in asked:
        want = ask()
        with mixed():
            same(ask(), want)


def test_a_step_along_the_natural_gradient_is_exact() -> None:
    model, params, buffers, batch = setup()
    gradient = ff.tree.random_like(KEY, params)
    for make in (ff.kfac, ff.low_rank, ff.dense):
        estimator = make(lambda p, b, x: model(p, b, x).float(), LIK)
        descent = ff.optim.natural_gradient(estimator, learning_rate=0.1, damping=0.1)
        seen = {"params": params, "buffers": buffers, "batch": batch, "key": KEY}
        state = descent.update(gradient, descent.init(params), **seen)[1]
        want = descent.update(gradient, state, **seen)[0]
        with mixed():
            got = descent.update(gradient, state, **seen)[0]
        for name in want:  # the model itself is less precise
            assert got[name].dtype == want[name].dtype
            assert (got[name] - want[name]).norm() <= 0.05 * want[name].norm()


def test_norms_whose_tangents_have_another_dtype_have_products() -> None:
    with cases.seeded(0):
        net = Net(
            lambda m, x: m.head(torch.tanh(m.norm(m.conv(x))).mean((2, 3))),
            conv=nn.Conv2d(2, 4, 3),
            norm=nn.GroupNorm(2, 4),
            head=nn.Linear(4, 3),
        )
    model, params, buffers = ff.functional(net.eval())
    batch, v = ff.Batch(normal(6, 2, 5, 5).float()), ff.tree.ones_like(params)
    want = ff.fisher_vp(model, LIK)(params, buffers, batch, v)
    with mixed():
        got = ff.linearized(model, LIK)(params, buffers, batch)(v)
    for name in want:
        assert (got[name] - want[name]).norm() <= 0.1 * want[name].norm() + 1e-3


def test_compiled_answers_are_exact() -> None:
    model, params, buffers, batch = setup()
    F, v = ff.kfac(model, LIK)(params, buffers, batch), ff.tree.random_like(KEY, params)
    want = F.solve(v, damping=0.1)

    def step(F: Any, v: Any) -> Any:
        with mixed():
            return F.solve(v, damping=0.1)

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(F, v)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


def test_unmixed_functions_keep_their_name_and_doc() -> None:
    assert unmixed(mixed).__name__ == "mixed"
    assert ff.KFAC.solve.__doc__ is not None
