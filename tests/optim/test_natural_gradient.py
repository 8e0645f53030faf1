"""Steps of the natural gradient against their definition, written with dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherfn as ff
from fisherfn import optim
from fisherfn.core import random, trees

ESTIMATORS = {
    "dense": ff.dense,
    "block_diagonal": ff.block_diagonal,
    "diagonal": ff.diagonal,
    "low_rank": ff.low_rank,
    "kfac": ff.kfac,
    "ekfac": ff.ekfac,
}
KEY = random.key(0)


def linear(params: Any, buffers: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, params["w"], params["b"])


def network() -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return ff.functional(module)


def data(seed: int = 0, n: int = 12) -> ff.Batch:
    x = random.normal(random.key(seed), (n, 4), torch.float64)
    return ff.Batch(x, torch.arange(n) % 3)


LIK = ff.likelihoods.categorical()


def gradient(model: Any, params: Any, buffers: Any, batch: ff.Batch) -> Any:
    def loss(p: Any) -> Tensor:
        return nn.functional.cross_entropy(model(p, buffers, batch.inputs), batch.targets)

    return torch.func.grad(loss)(params)


def flat(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)])


def close(a: Tensor, b: Tensor, tol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---- what a step is ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("invert_every", [1, 3])
def test_a_step_solves_with_the_curvature(name: str, invert_every: int) -> None:
    model, params, buffers = network()
    batch, est = data(), ESTIMATORS[name](model, LIK)
    grads = gradient(model, params, buffers, batch)
    opt = optim.natural_gradient(
        est, learning_rate=0.3, damping=0.05, decay=0.0, invert_every=invert_every
    )
    step, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)
    matrix = est(params, buffers, batch).to_dense()
    eye = torch.eye(len(matrix), dtype=torch.float64)
    want = -0.3 * torch.linalg.solve(matrix + 0.05 * eye, flat(grads))
    close(flat(step), want)
    assert (state.step, state.damping) == (1, 0.05)
    assert list(step) == list(params)


@pytest.mark.parametrize("name", ["dense", "low_rank", "diagonal", "kfac"])
@pytest.mark.parametrize("invert_every", [1, 2])
def test_scaling_is_a_power_of_the_damped_matrix(name: str, invert_every: int) -> None:
    model, params, buffers = network()
    batch, est = data(), ESTIMATORS[name](model, LIK)
    grads = gradient(model, params, buffers, batch)
    values, vectors = torch.linalg.eigh(est(params, buffers, batch).to_dense())
    for power in (0.5, 1.0, 0.25):
        scale = optim.scale_by_fisher(est, power, damping=0.1, invert_every=invert_every)
        got, state = scale.update(grads, scale.init(params), params, buffers=buffers, batch=batch)
        want = vectors @ ((values + 0.1) ** -power * (vectors.T @ flat(grads)))
        close(flat(got), want)
        assert state.step == 1


def test_one_step_solves_linear_gaussian_regression() -> None:
    x = random.normal(random.key(1), (20, 3), torch.float64)
    y = random.normal(random.key(2), (20, 2), torch.float64)
    params = {"w": torch.ones(2, 3).double(), "b": torch.zeros(2).double()}
    lik, batch = ff.likelihoods.gaussian(0.5), ff.Batch(x, y)
    ones = torch.cat([x, torch.ones(20, 1).double()], 1)
    want = torch.linalg.lstsq(ones, y).solution.T

    def loss(p: Any) -> Tensor:
        return 0.5 * ((linear(p, {}, x) - y) / 0.5).square().sum(1).mean()

    for make in (ff.dense, ff.kfac, ff.ekfac):
        both: list[Any] = [{}, {"learning_rate": None}]
        for options in both:
            opt = optim.natural_gradient(make(linear, lik), damping=0.0, **options)
            grads = torch.func.grad(loss)(params)
            step, _ = opt.update(grads, opt.init(params), params, buffers={}, batch=batch)
            new = optim.apply_updates(params, step)
            close(torch.cat([new["w"], new["b"][:, None]], 1), want)


def test_large_damping_is_gradient_descent() -> None:
    model, params, buffers = network()
    batch = data()
    grads = gradient(model, params, buffers, batch)
    for make in ESTIMATORS.values():
        opt = optim.natural_gradient(make(model, LIK), learning_rate=1e8, damping=1e8)
        step, _ = opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)
        close(flat(step), -flat(grads), 1e-6)


@pytest.mark.parametrize("make", [ff.dense, ff.kfac])
def test_the_step_does_not_depend_on_an_affine_reparameterisation(make: Any) -> None:
    # Inputs and hidden units are mapped by x -> M x + c, which weights and biases can undo.
    x = random.normal(random.key(3), (40, 3), torch.float64)
    batch = ff.Batch(x, torch.arange(40) % 3)
    M = torch.eye(3).double() + 0.4 * random.normal(random.key(4), (3, 3), torch.float64)
    c = random.normal(random.key(5), (3,), torch.float64)
    H = torch.eye(4).double() + 0.3 * random.normal(random.key(6), (4, 4), torch.float64)

    def model(params: Any, buffers: Any, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(x, params["w"], params["b"]))
        return nn.functional.linear(h, params["v"], params["a"])

    def mapped(params: Any, buffers: Any, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(x @ M.T + c, params["w"], params["b"])) @ H.T
        return nn.functional.linear(h, params["v"], params["a"])

    names = {"w": (4, 3), "b": (4,), "v": (3, 4), "a": (3,)}
    like = {name: torch.zeros(shape).double() for name, shape in names.items()}
    params = trees.random_like(random.key(7), like)
    invM, invH = torch.linalg.inv(M), torch.linalg.inv(H)
    twin = {
        "w": params["w"] @ invM,
        "b": params["b"] - params["w"] @ invM @ c,
        "v": params["v"] @ invH,
        "a": params["a"],
    }
    outputs = []
    for function, p in ((model, params), (mapped, twin)):
        grads = gradient(function, p, {}, batch)
        opt = optim.natural_gradient(
            make(function, LIK, fisher="empirical"), damping=1e-11, learning_rate=0.5
        )
        step, _ = opt.update(grads, opt.init(p), p, buffers={}, batch=batch)
        z = function(optim.apply_updates(p, step), {}, x)
        outputs.append(torch.log_softmax(z, -1))
    close(model(params, {}, x), mapped(twin, {}, x), 1e-10)
    close(outputs[0], outputs[1], 1e-4)


def test_exact_length_and_momentum_minimise_the_model() -> None:
    model, params, buffers = network()
    batch, eta, damping = data(), 0.02, 0.1
    opt = optim.natural_gradient(
        ff.kfac(model, LIK),
        learning_rate=None,
        momentum="exact",
        damping=damping,
        decay=0.0,
        weight_decay=eta,
    )
    state, last = opt.init(params), None
    for _ in range(3):
        exact = ff.dense(model, LIK)(params, buffers, batch).to_dense()
        shifted = exact + (damping + eta) * torch.eye(len(exact), dtype=torch.float64)
        slope = flat(gradient(model, params, buffers, batch)) + eta * flat(params)
        F = ff.kfac(model, LIK)(params, buffers, batch)
        layout = trees.ravel(params)[1]
        directions = [-flat(F.solve(layout(slope), damping=damping + eta))]
        directions += [] if last is None else [last]
        D = torch.stack(directions, 1)
        want = -D @ torch.linalg.solve(D.T @ shifted @ D, D.T @ slope)
        grads = gradient(model, params, buffers, batch)
        step, state = opt.update(grads, state, params, buffers=buffers, batch=batch)
        close(flat(step), want, 1e-6)
        params, last = optim.apply_updates(params, step), flat(step)


def test_momentum_clipping_weight_decay_and_schedules() -> None:
    model, params, buffers = network()
    batch, est = data(), ff.dense(model, LIK)
    opt = optim.natural_gradient(
        est,
        learning_rate=lambda step: 0.5 / (1 + step),
        damping=0.1,
        decay=0.0,
        momentum=0.8,
        kl_clip=1e-3,
        weight_decay=0.01,
    )
    state, velocity = opt.init(params), torch.zeros(43).double()
    for number in range(3):
        rate = 0.5 / (1 + number)
        matrix = est(params, buffers, batch).to_dense() + 0.11 * torch.eye(43).double()
        slope = flat(gradient(model, params, buffers, batch)) + 0.01 * flat(params)
        direction = torch.linalg.solve(matrix, slope)
        size = rate**2 * slope @ direction
        assert size > 1e-3
        velocity = 0.8 * velocity + direction * (1e-3 / size).sqrt()
        grads = gradient(model, params, buffers, batch)
        step, state = opt.update(grads, state, params, buffers=buffers, batch=batch)
        close(flat(step), -rate * velocity)
        params = optim.apply_updates(params, step)
    assert state.step == 3


def test_nothing_is_clipped_below_the_bound() -> None:
    model, params, buffers = network()
    batch = data()
    grads = gradient(model, params, buffers, batch)
    steps = []
    for clip in (None, 1e6):
        opt = optim.natural_gradient(ff.diagonal(model, LIK), kl_clip=clip)
        steps.append(opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)[0])
    close(flat(steps[0]), flat(steps[1]), 1e-14)


@pytest.mark.parametrize("name", [*ESTIMATORS, "implicit"])
def test_every_curvature_trains(name: str) -> None:
    model, params, buffers = network()
    batch = data()
    free = name == "implicit"
    opt = optim.natural_gradient(
        (ff.implicit if free else ESTIMATORS[name])(model, LIK),
        learning_rate=0.5,
        momentum=0.5,
        damping=0.05,
        decay=0.0 if free else 0.8,
        update_every=2,
        invert_every=1 if free else 4,
        kl_clip=0.5,
    )
    state, losses = opt.init(params), []
    for _ in range(25):
        z = model(params, buffers, batch.inputs)
        losses.append(nn.functional.cross_entropy(z, batch.targets).item())
        grads = gradient(model, params, buffers, batch)
        step, state = opt.update(grads, state, params, buffers=buffers, batch=batch)
        params = optim.apply_updates(params, step)
    assert losses[-1] < 0.25 * losses[0]


# ---- purity --------------------------------------------------------------------------------------


def test_nothing_that_goes_in_is_changed_and_equal_keys_give_equal_steps() -> None:
    model, params, buffers = network()
    batch = data()
    opt = optim.natural_gradient(
        ff.kfac(model, LIK, fisher="mc"), momentum=0.9, invert_every=2, damping=0.1
    )
    grads = gradient(model, params, buffers, batch)
    _, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch, key=KEY)
    given = [*trees.leaves(state), *trees.leaves(grads), *trees.leaves(params), KEY]
    before = [x.clone() for x in given]
    one = opt.update(grads, state, params, buffers=buffers, batch=batch, key=KEY, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    two = opt.update(grads, state, params, buffers=buffers, batch=batch, key=KEY)
    for a, b in zip(trees.leaves(one), trees.leaves(two), strict=True):
        assert torch.equal(a, b)


def test_the_step_is_folded_into_the_key() -> None:
    model, params, buffers = network()
    batch = data()
    opt = optim.scale_by_fisher(ff.diagonal(model, LIK, fisher="mc"))
    grads = gradient(model, params, buffers, batch)
    first, state = opt.update(
        grads, opt.init(params), params, buffers=buffers, batch=batch, key=KEY
    )
    second, _ = opt.update(grads, state, params, buffers=buffers, batch=batch, key=KEY)
    assert not torch.equal(flat(first), flat(second))
    key = random.fold_in(KEY, 1)
    want = ff.diagonal(model, LIK, fisher="mc")(params, buffers, batch, key=key)
    close(flat(second), flat(want.solve(grads, damping=1e-3)))


def test_states_are_tensors_that_files_bring_back(tmp_path: Any) -> None:
    model, params, buffers = network()
    batch = data()
    for name in ("kfac", "low_rank"):
        opt = optim.natural_gradient(ESTIMATORS[name](model, LIK), momentum=0.9, invert_every=2)
        grads = gradient(model, params, buffers, batch)
        _, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)
        assert all(isinstance(x, Tensor) for x in trees.leaves(state))
        ff.io.save(tmp_path / name, state)
        again = ff.io.load(tmp_path / name)
        a, _ = opt.update(grads, state, params, buffers=buffers, batch=batch)
        b, _ = opt.update(grads, again, params, buffers=buffers, batch=batch)
        close(flat(a), flat(b), 1e-10)


def test_float32_parameters_and_parameters_that_require_gradients() -> None:
    model, params, buffers = network()
    params = trees.map(lambda p: p.float(), params)
    batch = data()
    batch = ff.Batch(batch.inputs.float(), batch.targets)
    opt = optim.natural_gradient(ff.kfac(model, LIK), momentum=0.9, damping=0.1)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    loss = nn.functional.cross_entropy(model(leaves, buffers, batch.inputs), batch.targets)
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    step, state = opt.update(grads, opt.init(leaves), leaves, buffers=buffers, batch=batch)
    assert {x.dtype for x in step.values()} == {torch.float32}
    assert not any(x.requires_grad for x in trees.leaves((step, state)))


def test_a_scaling_compiles() -> None:
    model, params, buffers = network()
    batch, opt = data(), optim.scale_by_fisher(ff.diagonal(model, LIK, fisher="empirical"))

    def step(grads: Any, state: Any, params: Any) -> Any:
        return opt.update(grads, state, params, buffers=buffers, batch=batch)

    grads = gradient(model, params, buffers, batch)
    _, state = step(grads, opt.init(params), params)
    want = step(grads, state, params)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(grads, state, params)
    for a, b in zip(trees.leaves(got), trees.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diagonal", "kfac", "low_rank"])
def test_a_step_compiles(name: str) -> None:
    model, params, buffers = network()
    batch = data()
    opt = optim.natural_gradient(
        ESTIMATORS[name](model, LIK), momentum=0.9, damping=0.1, kl_clip=0.1
    )

    def step(grads: Any, state: Any, params: Any) -> Any:
        return opt.update(grads, state, params, buffers=buffers, batch=batch)

    grads = gradient(model, params, buffers, batch)
    _, state = step(grads, opt.init(params), params)
    want = step(grads, state, params)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(grads, state, params)
    for a, b in zip(trees.leaves(got), trees.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()


@pytest.mark.slow
def test_periods_in_compiled_code_choose_what_was_computed() -> None:
    model, params, buffers = network()
    opt = optim.natural_gradient(
        ff.diagonal(model, LIK), damping=0.1, update_every=2, invert_every=4
    )

    def step(grads: Any, state: Any, params: Any, batch: ff.Batch) -> Any:
        return opt.update(grads, state, params, buffers=buffers, batch=batch)

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    _, state = step(gradient(model, params, buffers, data()), opt.init(params), params, data())
    other = state
    for number in range(1, 6):
        batch = data(number)
        grads = gradient(model, params, buffers, batch)
        want, state = step(grads, state, params, batch)
        got, other = fast(grads, other, params, batch)
        close(flat(got), flat(want))
    torch._dynamo.reset()


def test_a_step_can_be_differentiated_by_its_gradients() -> None:
    model, params, buffers = network()
    batch = data()
    opt = optim.natural_gradient(ff.low_rank(model, LIK), damping=0.1, learning_rate=0.5)
    grads = gradient(model, params, buffers, batch)

    def total(grads: Any) -> Tensor:
        step, _ = opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)
        return flat(step).sum()

    ones = trees.map(torch.ones_like, params)
    want = ff.low_rank(model, LIK)(params, buffers, batch).solve(ones, damping=0.1)
    close(flat(torch.func.grad(total)(grads)), -0.5 * flat(want))
