"""Rules for the damping, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherfn as ff
from fisherfn import optim
from fisherfn.core import random, trees
from fisherfn.core.errors import OptionError

LIK = ff.likelihoods.categorical()


def network() -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return ff.functional(module)


def data() -> ff.Batch:
    return ff.Batch(random.normal(random.key(0), (9, 4), torch.float64), torch.arange(9) % 3)


def flat(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)])


def loss(model: Any, params: Any, buffers: Any, batch: ff.Batch, eta: float = 0.0) -> Tensor:
    found = nn.functional.cross_entropy(model(params, buffers, batch.inputs), batch.targets)
    return found + 0.5 * eta * flat(params).square().sum()


@pytest.mark.parametrize("exact", [False, True])
def test_levenberg_marquardt_follows_the_reduction_ratio(exact: bool) -> None:
    model, params, buffers = network()
    batch, eta = data(), 0.01
    rule = optim.levenberg_marquardt(0.5, every=2, factor=0.8)
    rate: dict[str, Any] = {"learning_rate": None} if exact else {"learning_rate": 40.0}
    est = ff.dense(model, LIK)
    opt = optim.natural_gradient(est, damping=rule, decay=0.0, weight_decay=eta, **rate)
    state, damping = opt.init(params), 0.5
    assert state.damping == 0.5
    seen = set()
    for number in range(1, 9):
        grads = torch.func.grad(lambda p: loss(model, p, buffers, batch))(params)
        step, state = opt.update(grads, state, params, buffers=buffers, batch=batch)
        new = optim.apply_updates(params, step)
        slope = flat(grads) + eta * flat(params)
        shifted = est(params, buffers, batch).to_dense() + (damping + eta) * torch.eye(43).double()
        promised = slope @ flat(step) + 0.5 * flat(step) @ shifted @ flat(step)
        got = loss(model, new, buffers, batch, eta) - loss(model, params, buffers, batch, eta)
        if number % 2 == 0:
            rho = got / promised
            power = 1 if rho > 0.75 else (-1 if not rho >= 0.25 else 0)
            seen.add(power)
            damping *= 0.8 ** (2 * power)
        torch.testing.assert_close(state.damping.item(), damping, rtol=1e-12, atol=0)
        params = new
    assert seen == ({1} if exact else {-1})


def test_levenberg_marquardt_stays_in_its_range_and_takes_nan_for_a_bad_step() -> None:
    rule = optim.levenberg_marquardt(1.0, every=1, factor=0.5, lower=0.75, upper=1.5)
    one = torch.tensor(1.0, dtype=torch.float64)
    for rho, want in ((0.9, 0.75), (0.1, 1.5), (0.5, 1.0), (float("nan"), 1.5), (-3.0, 1.5)):
        assert rule.adapted(one, torch.tensor(rho)).item() == want


def test_without_a_batch_the_damping_stays() -> None:
    model, params, buffers = network()
    opt = optim.natural_gradient(
        ff.kfac(model, LIK), damping=optim.levenberg_marquardt(0.5, every=1)
    )
    grads = torch.func.grad(lambda p: loss(model, p, buffers, data()))(params)
    _, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=data())
    assert state.damping != 0.5
    _, after = opt.update(grads, state, params)
    assert torch.equal(after.damping, state.damping)


@pytest.mark.parametrize("make", [ff.diagonal, ff.kfac, ff.dense, ff.low_rank])
@pytest.mark.parametrize("invert_every", [1, 2])
def test_jeffreys_is_the_geometric_mean_of_the_eigenvalues(make: Any, invert_every: int) -> None:
    model, params, buffers = network()
    batch, est = data(), make(model, LIK)
    rule = optim.jeffreys(0.3, floor=1e-3)
    opt = optim.natural_gradient(est, damping=rule, invert_every=invert_every)
    grads = torch.func.grad(lambda p: loss(model, p, buffers, batch))(params)
    step, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)
    matrix = est(params, buffers, batch).to_dense()
    log_density = 0.5 * torch.logdet(matrix + 1e-3 * torch.eye(43).double())
    want = 0.3 * torch.exp(2 * log_density / 43)
    torch.testing.assert_close(state.damping, want, rtol=1e-8, atol=0)
    solved = torch.linalg.solve(matrix + want * torch.eye(43).double(), flat(grads))
    torch.testing.assert_close(flat(step), -solved, rtol=1e-7, atol=1e-7)


def test_jeffreys_follows_the_scale_of_the_curvature() -> None:
    F = ff.Diagonal({"w": torch.tensor([1.0, 4.0, 0.5]).double()}, torch.tensor(1.0))
    rule = optim.jeffreys(0.1, floor=1e-12)
    torch.testing.assert_close(rule.of(7 * F, 3), 7 * rule.of(F, 3), rtol=1e-9, atol=0)


def test_a_function_of_the_state() -> None:
    model, params, buffers = network()
    batch = data()
    grads = torch.func.grad(lambda p: loss(model, p, buffers, batch))(params)

    def rule(state: Any) -> Any:
        trace = state.curvature.inverse.matrix.trace()
        return 0.1 * trace / 43 / (1 + state.step)

    est = ff.dense(model, LIK)
    trace = est(params, buffers, batch).trace()
    for make in (optim.natural_gradient, optim.scale_by_fisher):
        opt = make(est, damping=rule)
        step, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)
        want = est(params, buffers, batch).solve(grads, damping=0.1 * trace / 43)
        sign = -1.0 if make is optim.natural_gradient else 1.0
        torch.testing.assert_close(flat(step), sign * flat(want))
        assert state.step == 1


@pytest.mark.parametrize(
    "damping", [-1e-3, float("nan"), float("inf"), 1j, "1", None, True], ids=str
)
def test_bad_damping_is_refused_at_once(damping: Any) -> None:
    model, _, _ = network()
    for make in (optim.natural_gradient, optim.scale_by_fisher):
        with pytest.raises(OptionError, match=r"expected damping (>= 0|to be a real number), got"):
            make(ff.diagonal(model, LIK), damping=damping)


def test_bad_damping_of_a_function_is_refused_at_the_step() -> None:
    model, params, buffers = network()
    opt = optim.natural_gradient(ff.diagonal(model, LIK), damping=lambda state: -1.0)
    with pytest.raises(
        OptionError, match=r"natural_gradient\.update: expected damping >= 0, got -1"
    ):
        opt.update(params, opt.init(params), params, buffers=buffers, batch=data())


@pytest.mark.parametrize("options", [
    {"initial": 0.0}, {"initial": -1.0}, {"lower": 0.0}, {"upper": float("inf")}, {"initial": "1"},
], ids=str)  # fmt: skip
def test_levenberg_marquardt_refuses_what_is_not_positive(options: Any) -> None:
    (name,) = options
    message = rf"optim\.levenberg_marquardt: expected {name} to be a positive number, got"
    with pytest.raises(OptionError, match=message):
        optim.levenberg_marquardt(**options)


def test_levenberg_marquardt_refuses_other_bad_options() -> None:
    for factor in (0.0, 1.0, 2.0, "a"):
        with pytest.raises(OptionError, match=r"levenberg_marquardt: expected factor in \(0, 1\)"):
            optim.levenberg_marquardt(factor=factor)  # type: ignore[arg-type]
    for every in (0, 1.5, True):
        with pytest.raises(OptionError, match="expected every to be an integer of at least 1, got"):
            optim.levenberg_marquardt(every=every)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="expected lower <= initial <= upper, got"):
        optim.levenberg_marquardt(1.0, lower=2.0)
    model, _, _ = network()
    with pytest.raises(OptionError, match="scale_by_fisher: expected damping that needs no step"):
        optim.scale_by_fisher(ff.diagonal(model, LIK), damping=optim.levenberg_marquardt())


def test_jeffreys_refuses_what_is_not_positive() -> None:
    with pytest.raises(OptionError, match=r"optim\.jeffreys: expected scale to be a positive num"):
        optim.jeffreys(-1.0)
    with pytest.raises(OptionError, match=r"optim\.jeffreys: expected floor to be a positive num"):
        optim.jeffreys(floor=0.0)
