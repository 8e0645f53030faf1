"""Chains, also with torchopt, and what is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torchopt import transform as parts

import fisherfn as ff
from fisherfn import optim
from fisherfn.core import random, trees
from fisherfn.core.errors import OptionError, TreeMismatchError
from fisherfn.optim.quadratic import minimum, products

LIK = ff.likelihoods.categorical()


def network() -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(4, 3)).double()
    return ff.functional(module)


def data() -> ff.Batch:
    return ff.Batch(random.normal(random.key(0), (9, 4), torch.float64), torch.arange(9) % 3)


def gradient(model: Any, params: Any, buffers: Any) -> Any:
    def loss(p: Any) -> Tensor:
        return nn.functional.cross_entropy(model(p, buffers, data().inputs), data().targets)

    return torch.func.grad(loss)(params)


def flat(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)])


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---- chains --------------------------------------------------------------------------------------


def test_a_chain_of_torchopt_takes_ours() -> None:
    model, params, buffers = network()
    ours = optim.scale_by_fisher(ff.kfac(model, LIK), damping=0.1)
    bound: Any = ours.bind(buffers=buffers, batch=data())
    chain = torchopt.chain(bound, parts.trace(0.9), parts.scale(-0.5))
    state, velocity = chain.init(params), torch.zeros(15).double()
    for _ in range(3):
        grads = gradient(model, params, buffers)
        kept = trees.map(torch.clone, grads)
        updates, state = chain.update(grads, state, params=params, inplace=False)
        F = ff.kfac(model, LIK)(params, buffers, data())
        velocity = 0.9 * velocity + flat(F.solve(kept, damping=0.1))
        close(flat(updates), -0.5 * velocity)
        assert torch.equal(flat(grads), flat(kept))
        params = torchopt.apply_updates(params, updates, inplace=False)
    assert state[0].step == 3


def test_ours_takes_transforms_of_torchopt_and_passes_data_on() -> None:
    model, params, buffers = network()
    chain = optim.chain(
        torchopt.clip_grad_norm(0.01),
        optim.natural_gradient(ff.diagonal(model, LIK, fisher="mc"), damping=0.1),
        parts.scale(2.0),
    )
    grads = gradient(model, params, buffers)
    assert flat(grads).norm() > 0.01
    key = random.key(1)
    updates, state = chain.update(
        grads, chain.init(params), params, buffers=buffers, batch=data(), key=key
    )
    est = ff.diagonal(model, LIK, fisher="mc")
    F = est(params, buffers, data(), key=random.fold_in(key, 0))
    clipped = trees.scale(grads, 0.01 / flat(grads).norm())
    close(flat(updates), -2.0 * flat(F.solve(clipped, damping=0.1)), 1e-5)
    assert len(state) == 3


def test_pairs_of_other_libraries_are_called_with_what_they_know() -> None:
    class Pair(NamedTuple):
        init: Any
        update: Any

    def plain(updates: Any, state: Any) -> Any:
        return trees.scale(updates, 2.0), state + 1

    def with_params(updates: Any, state: Any, params: Any) -> Any:
        return trees.add(updates, params), state

    chain = optim.chain(Pair(lambda p: 0, plain), Pair(lambda p: None, with_params))
    got, state = chain.update({"w": torch.ones(1)}, (0, None), {"w": torch.full((1,), 5.0)}, key=1)
    assert got["w"] == 7.0
    assert state == (1, None)


def test_what_cannot_be_chained_is_refused() -> None:
    with pytest.raises(OptionError, match=r"optim\.chain: expected at least one transform, got no"):
        optim.chain()
    with pytest.raises(OptionError, match=r"expected pairs of functions \(init, update\), got int"):
        optim.chain(3)
    one = optim.GradientTransform(lambda p: (), lambda u, s: (u, s))
    with pytest.raises(OptionError, match=r"expected a tuple of 2 states.*got 1\. Make it with"):
        optim.chain(one, one).update({}, ((),))
    with pytest.raises(OptionError, match=r"expected a tuple of 2 states.*got NoneType\. Make it"):
        optim.chain(one, one).update({}, None)


def test_updates_are_added_in_the_dtype_of_the_parameters() -> None:
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    new = optim.apply_updates(params, {"w": torch.full((2,), 0.5)})
    assert new["w"].dtype == torch.bfloat16
    assert torch.equal(new["w"], torch.full((2,), 1.5, dtype=torch.bfloat16))
    assert torch.equal(params["w"], torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TreeMismatchError, match=r"optim\.apply_updates: expected updates like par"):
        optim.apply_updates(params, {"w": torch.ones(3)})
    with pytest.raises(
        TreeMismatchError, match=r"apply_updates: expected params to be tensors, got f"
    ):
        optim.apply_updates({"w": 1.0}, {"w": torch.ones(3)})


# ---- matrix-free ---------------------------------------------------------------------------------


def test_conjugate_gradients_give_the_natural_gradient() -> None:
    model, params, buffers = network()
    grads = gradient(model, params, buffers)
    opt = optim.natural_gradient(ff.implicit(model, LIK), damping=0.1, decay=0.0)
    step, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=data())
    want = ff.dense(model, LIK)(params, buffers, data()).solve(grads, damping=0.1)
    close(flat(step), -flat(want), 1e-5)
    step, _ = opt.update(grads, state, params, buffers=buffers, batch=data())
    close(flat(step), -flat(want), 1e-5)
    opt = optim.natural_gradient(ff.implicit(model, LIK), damping=0.1)
    with pytest.raises(OptionError, match=r"expected decay=0 for implicit, got 0\.95"):
        opt.update(grads, opt.init(params), params, buffers=buffers, batch=data())


# ---- the quadratic model -------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "position"])
def test_products_are_those_of_the_dense_matrix(unit: str) -> None:
    model, params, buffers = network()
    x = random.normal(random.key(0), (5, 2, 4), torch.float64)
    mask = torch.tensor([[True, True], [True, False], [False, False], [True, True], [True, True]])
    x = torch.where(mask[..., None], x, float("nan"))  # what is masked is not looked at
    x = torch.where(mask.any(1)[:, None, None] & ~mask[..., None], 0.0, x)
    x[2] = 0.0
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.5]).double()
    batch = ff.Batch(x, mask=mask, weights=weights)
    est = ff.kfac(model, LIK, unit=unit)
    vectors = [trees.random_like(random.key(i), params) for i in (1, 2)]
    got = products("test", est, params, buffers, batch, vectors)
    matrix = ff.dense(model, LIK, unit=unit)(params, buffers, batch).to_dense()
    V = torch.stack([flat(v) for v in vectors])
    close(got, V @ matrix @ V.T)
    mapped = torch.func.vmap(lambda v: products("test", est, params, buffers, batch, [v])[0, 0])
    many = trees.map(lambda a, b: torch.stack([a, b]), *vectors)
    close(mapped(many), got.diagonal())


def test_products_of_a_model_without_forward_derivative() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            return 3 * x**2 * g

    def model(params: Any, buffers: Any, x: Tensor) -> Any:
        return Cube.apply(x @ params["w"])

    params = {"w": 0.3 * random.normal(random.key(0), (4, 3), torch.float64)}
    batch, v = data(), trees.random_like(random.key(1), params)
    est = ff.dense(model, LIK)
    got = products("test", est, params, {}, batch, [v])
    close(got[0, 0], est(params, {}, batch).quadratic(v))


def test_minimum_leaves_out_directions_of_no_curvature() -> None:
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([1.0, -1.0]).double()
    close(minimum(A, b), -torch.linalg.solve(A, b), 1e-7)
    same = torch.ones(2, 2).double()
    found = minimum(same, torch.ones(2).double())
    assert bool(found.isfinite().all())
    close(found.sum(), torch.tensor(-1.0).double(), 1e-6)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"expected decay in \[0, 1\), got 1\.0"),
        ({"decay": -0.1}, r"expected decay in \[0, 1\), got -0\.1"),
        ({"decay": "0.9"}, r"expected decay in \[0, 1\), got '0\.9'"),
        ({"update_every": 0}, "expected update_every to be an integer of at least 1, got 0"),
        ({"invert_every": 2.5}, r"expected invert_every to be an integer of at least 1, got 2\.5"),
        ({"invert": 3}, "expected invert to be a function, got int"),
        ({"learning_rate": 0.0}, r"expected learning_rate to be a positive number, got 0\.0"),
        ({"learning_rate": "fast"}, "expected learning_rate to be a positive number, got 'fast'"),
        ({"momentum": -0.1}, r"expected momentum to be a number of at least 0, got -0\.1"),
        ({"momentum": 1.0}, r"expected momentum below 1, got 1\.0"),
        ({"momentum": "exact"}, "expected learning_rate=None for momentum='exact', got"),
        ({"momentum": 0.5, "learning_rate": None}, "expected momentum=0 or 'exact' for learning"),
        ({"kl_clip": 0.0}, r"expected kl_clip to be a positive number, got 0\.0"),
        ({"kl_clip": 1.0, "learning_rate": None}, "expected kl_clip=None for learning_rate=None"),
        ({"weight_decay": -1.0}, r"expected weight_decay to be a number of at least 0, got -1\.0"),
    ],
)
def test_bad_options_are_refused_at_once(options: Any, message: str) -> None:
    model, _, _ = network()
    with pytest.raises(OptionError, match=f"natural_gradient: {message}"):
        optim.natural_gradient(ff.diagonal(model, LIK), **options)


def test_bad_estimators_are_refused() -> None:
    model, params, buffers = network()
    for bad in (None, nn.Tanh(), 3, model, ff.fisher_vp(model, LIK), ff.kfac):
        with pytest.raises(OptionError, match="expected an estimator of curvature, got"):
            optim.natural_gradient(bad)
    needy: list[Any] = [{"learning_rate": None}, {"damping": optim.levenberg_marquardt()}]
    for options in needy:
        with pytest.raises(
            OptionError, match="an estimator of this library for learning_rate=None"
        ):
            optim.natural_gradient(lambda *a, **k: None, **options)
    opt = optim.natural_gradient(ff.per_sample_gradients(model, LIK))
    with pytest.raises(OptionError, match="expected an estimator of curvature, got one that gives"):
        opt.update(params, opt.init(params), params, buffers=buffers, batch=data())
    for power in ("1", float("nan"), None):
        with pytest.raises(
            OptionError, match="scale_by_fisher: expected power to be a finite real"
        ):
            optim.scale_by_fisher(ff.diagonal(model, LIK), power)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [optim.natural_gradient, optim.scale_by_fisher])
def test_bad_arguments_of_a_step_are_refused(make: Any) -> None:
    model, params, buffers = network()
    opt = make(ff.diagonal(model, LIK, fisher="mc"))
    state, name, key = opt.init(params), opt_name(make), random.key(0)
    rest: Any = {"buffers": buffers, "batch": data(), "key": key}
    with pytest.raises(OptionError, match=rf"{name}: expected key= for fisher='mc', got None"):
        opt.update(params, state, params, buffers=buffers, batch=data())
    with pytest.raises(OptionError, match=rf"{name}: expected batch= at the first step, got None"):
        opt.update(params, state, params, buffers=buffers)
    with pytest.raises(OptionError, match=rf"{name}\.update: expected params, got None"):
        opt.update(params, state, **rest)
    for bad in (None, (), 3):
        with pytest.raises(OptionError, match=rf"{name}\.update: expected a state of {name}, got"):
            opt.update(params, bad, params, **rest)
    with pytest.raises(TreeMismatchError, match=rf"{name}\.update: expected grads like params"):
        opt.update({"w": torch.ones(1)}, state, params, **rest)


def opt_name(make: Any) -> str:
    return make.__name__


def test_a_state_of_another_model_is_refused() -> None:
    model, params, buffers = network()
    other = {"w": torch.ones(2)}
    opt = optim.natural_gradient(ff.kfac(model, LIK), momentum=0.9)
    _, state = opt.update(params, opt.init(params), params, buffers=buffers, batch=data())
    with pytest.raises(TreeMismatchError, match="update: expected grads like the state, got"):
        opt.update(other, state)
    plain = optim.natural_gradient(ff.kfac(model, LIK))
    _, state = plain.update(params, plain.init(params), params, buffers=buffers, batch=data())
    with pytest.raises(TreeMismatchError, match="expected v like params"):
        plain.update(other, state)
    with pytest.raises(
        OptionError, match="init: expected params with at least one tensor, got non"
    ):
        plain.init({})


def test_what_exact_lengths_need() -> None:
    model, params, buffers = network()
    opt = optim.natural_gradient(ff.kfac(model, LIK), learning_rate=None)
    _, state = opt.update(params, opt.init(params), params, buffers=buffers, batch=data())
    with pytest.raises(OptionError, match="expected batch= where learning_rate is None, got None"):
        opt.update(params, state, params)


@pytest.mark.parametrize(
    ("rate", "got"),
    [
        ("fast", "str"),
        (torch.ones(1), r"torch.float32 of shape \(1,\)"),
        (torch.ones((), dtype=torch.complex64), r"torch.complex64 of shape \(\)"),
    ],
)
def test_a_schedule_gives_numbers(rate: Any, got: str) -> None:
    model, params, buffers = network()
    bad = optim.natural_gradient(ff.kfac(model, LIK), learning_rate=lambda step: rate)
    with pytest.raises(OptionError, match=f"expected the learning rate to be a number, got {got}"):
        bad.update(params, bad.init(params), params, buffers=buffers, batch=data())
