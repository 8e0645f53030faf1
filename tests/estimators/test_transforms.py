"""Estimators under `torch.vmap` and `torch.func.grad`: ensembles, and derivatives of results."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import cases
import fisherfn as ff
from fisherfn import testing
from fisherfn.testing import Problem, networks

MEMBERS = list(testing.ESTIMATORS.values())


def problem(kind: str, unit: str = "example") -> Problem:
    network = networks.build(kind, 7, 2, 3)
    model, params, buffers = ff.functional(network.module)
    inputs = network.inputs(3, 3)
    targets = networks.tokens(1, 3, *network.positions) % 3
    return Problem(
        kind,
        model,
        ff.likelihoods.categorical(),
        params,
        buffers,
        ff.Batch(inputs, targets=targets),
        network.positions,
        network.causal,
        unit,
    )


@pytest.mark.parametrize("kind", ["mlp", "sequence"])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_vmap_over_parameters_is_a_loop(member: testing.Member, kind: str) -> None:
    testing.ensemble(member, problem(kind, member.unit))


@pytest.mark.parametrize("kind", ["tied", "image", "reuse", "unknown"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "curvature_prop", "empirical"])
def test_vmap_over_parameters_of_other_layers(fisher: str, kind: str) -> None:
    testing.ensemble(testing.ESTIMATORS[f"diagonal-{fisher}-example"], problem(kind))


@pytest.mark.parametrize("kind", ["mlp", "sequence"])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_derivative_is_a_finite_difference(member: testing.Member, kind: str) -> None:
    testing.derivative(member, problem(kind, member.unit))


@pytest.mark.parametrize("kind", ["tied", "image", "reuse", "unknown"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "curvature_prop", "empirical"])
def test_derivative_through_other_layers(fisher: str, kind: str) -> None:
    testing.derivative(testing.ESTIMATORS[f"diagonal-{fisher}-example"], problem(kind))


def test_derivative_of_the_trace_in_closed_form() -> None:
    """One weight, one Bernoulli answer: F = x^2 p (1 - p)."""

    def model(params: Tensor, buffers: object, inputs: Tensor) -> Tensor:
        return inputs * params

    x = torch.tensor([[1.5]], dtype=torch.float64)
    estimator = ff.diagonal(model, ff.likelihoods.bernoulli())
    w = torch.tensor(0.3, dtype=torch.float64)
    p = torch.sigmoid(1.5 * w)
    batch = ff.Batch(x)
    testing.assert_close(estimator(w, {}, batch).trace(), 1.5**2 * p * (1 - p))
    slope = torch.func.grad(lambda w: estimator(w, {}, batch).trace())(w)
    testing.assert_close(slope, 1.5**3 * p * (1 - p) * (1 - 2 * p))


def test_vmap_over_keys_is_a_loop() -> None:
    plain = problem("sequence")
    estimator = ff.diagonal(plain.model, plain.likelihood, fisher="mc", num_samples=2)
    keys = ff.random.split(ff.random.key(1), 4)
    got = torch.vmap(lambda k: estimator(*plain.args, key=k))(keys)
    loop = [estimator(*plain.args, key=k) for k in keys]
    for name, value in got.values.items():
        testing.assert_close(value, torch.stack([r.values[name] for r in loop]))


def test_vmap_over_batches_is_a_loop() -> None:
    plain = problem("positionwise")
    estimator = ff.diagonal(plain.model, plain.likelihood, fisher="empirical")
    inputs = cases.normal(4, 3, 2, 3)
    targets = cases.tokens(4, 3, 2, high=3)
    got = torch.vmap(
        lambda i, t: estimator(plain.params, plain.buffers, ff.Batch(i, targets=t)).values
    )(inputs, targets)
    for n in range(4):
        want = estimator(plain.params, plain.buffers, ff.Batch(inputs[n], targets=targets[n]))
        testing.assert_close({k: v[n] for k, v in got.items()}, want.values)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own jvp rules
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_jvp_and_reverse_mode_agree(fisher: str) -> None:
    plain = problem("mlp")
    member = testing.ESTIMATORS[f"diagonal-{fisher}-example"]
    estimator = member.build(plain)
    direction = ff.tree.random_like(ff.random.key(1), plain.params)

    def trace(params: object) -> Tensor:
        return member.call(estimator, dataclasses.replace(plain, params=params)).trace()

    forward = torch.func.jvp(trace, (plain.params,), (direction,))[1]
    backward = ff.tree.dot(torch.func.grad(trace)(plain.params), direction)
    testing.assert_close(forward, backward)


def test_values_cannot_be_looked_at_under_a_transformation() -> None:
    """Bad targets under vmap give NaN in the members that have them."""
    plain = problem("mlp")
    estimator = ff.diagonal(plain.model, plain.likelihood, fisher="empirical")
    targets = torch.tensor([[0, 1, 2], [0, 9, 2]])
    got = torch.vmap(
        lambda t: estimator(
            plain.params, plain.buffers, dataclasses.replace(plain.batch, targets=t)
        ).trace()
    )(targets)
    assert got[0].isfinite()
    assert got[1].isnan()
