"""Curvature over many steps: averaged by meaning, and inverted when it is due."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherfn as ff
from fisherfn import optim
from fisherfn.core import random, trees
from fisherfn.core.errors import NotPositiveDefiniteError, OptionError, UnsupportedError
from fisherfn.curvature import EKFAC, KFAC, LowRank
from fisherfn.curvature.kronecker_factors import full_of
from fisherfn.optim.stream import bounded

LIK = ff.likelihoods.categorical()


def network() -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return ff.functional(module)


def data(seed: int) -> ff.Batch:
    return ff.Batch(random.normal(random.key(seed), (8, 4), torch.float64), torch.arange(8) % 3)


def states(
    make: Any, steps: int, *, labels: str = "empirical", start: int = 0, **options: Any
) -> list[Any]:
    """The states after each of some steps, at fixed parameters."""
    model, params, buffers = network()
    opt = optim.scale_by_fisher(make(model, LIK, fisher=labels), damping=0.1, **options)
    grads, state, found = trees.map(torch.ones_like, params), opt.init(params), []
    for number in range(start, start + steps):
        _, state = opt.update(grads, state, params, buffers=buffers, batch=data(number))
        found.append(state.curvature)
    return found


def results(make: Any, steps: int) -> list[Any]:
    model, params, buffers = network()
    est = make(model, LIK, fisher="empirical")
    return [est(params, buffers, data(number)) for number in range(steps)]


def mean(values: list[Tensor], decay: float) -> Tensor:
    """The debiased average, as a loop."""
    total, weight = torch.zeros_like(values[0]), 0.0
    for x in values:
        total, weight = decay * total + x, decay * weight + 1.0
    return total / weight


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("make", [ff.diagonal, ff.dense, ff.block_diagonal])
def test_matrices_are_averaged(make: Any) -> None:
    found = states(make, 4, decay=0.7)[-1].inverse.matrix.to_dense()
    close(found, mean([F.to_dense() for F in results(make, 4)], 0.7))


def test_kronecker_factors_are_averaged_and_not_their_products() -> None:
    parts = results(ff.kfac, 4)
    average = states(ff.kfac, 4, decay=0.7)[-1].average.mean
    assert isinstance(average, KFAC)
    for name in average.inputs:
        close(average.inputs[name], mean([F.inputs[name] for F in parts], 0.7))
        close(average.outputs[name], mean([F.outputs[name] for F in parts], 0.7))
    inverse = states(ff.kfac, 4, decay=0.7)[-1].inverse.matrix
    assert isinstance(inverse, EKFAC)
    close(inverse.to_dense(), average.to_dense())


def test_scales_are_averaged_in_the_basis_of_the_averaged_factors() -> None:
    model, params, buffers = network()
    found = states(ff.ekfac, 4, decay=0.7, invert_every=2)[-1]
    # the last refresh was at step 2: the basis is that of the factors of steps 0, 1 and 2
    basis = states(ff.kfac, 3, decay=0.7)[-1].average.mean.eigh()
    for name, Q in basis.output_basis.items():
        close(
            (Q.mT @ found.inverse.matrix.output_basis[name]).abs(),
            torch.eye(Q.shape[-1])[None].double(),
            1e-6,
        )
    scales = []
    for number in (2, 3):
        est = ff.ekfac(model, LIK, basis=found.inverse.matrix, fisher="empirical")
        scales.append(est(params, buffers, data(number)).scales)
    for name, s in found.inverse.matrix.scales.items():
        close(s, mean([x[name] for x in scales], 0.7))
    close(
        found.average[0].mean.to_dense(), states(ff.kfac, 4, decay=0.7)[-1].average.mean.to_dense()
    )


def test_joined_rows_are_as_many_as_one_batch_has() -> None:
    whole = [F.to_dense() for F in results(ff.low_rank, 2)]
    state = states(ff.low_rank, 2, decay=0.5)[-1]
    found = state.average.mean
    assert isinstance(found, LowRank)
    assert len(found.weights) == 8
    values, vectors = torch.linalg.eigh(mean(whole, 0.5))
    want = vectors[:, -8:] @ values[-8:].diag() @ vectors[:, -8:].T
    close(found.to_dense(), want)


def test_wide_factors_that_are_rows_are_as_many_as_one_batch_has() -> None:
    model, params, buffers = network()
    est = ff.kfac(model, LIK, fisher="empirical", widest=4)
    a, b = est(params, buffers, data(0)), est(params, buffers, data(1))
    both = ff.merge(a, b)
    found = bounded(both, b)
    for block in both.blocks:
        for side, form in (("inputs", block.input_form), ("outputs", block.output_form)):
            x, y = getattr(both, side)[block.name], getattr(found, side)[block.name]
            if form != "rows":
                assert x is y
                continue
            assert y.shape == getattr(b, side)[block.name].shape
            values, vectors = torch.linalg.eigh(full_of(x, form))
            n = min(y.shape[-2], x.shape[-1])
            kept = vectors[..., -n:] * values[..., None, -n:]
            close(full_of(y, form), kept @ vectors[..., -n:].mT)
    assert any(block.input_form == "rows" for block in both.blocks)


def test_estimates_and_inverses_come_when_they_are_due() -> None:
    found = states(ff.dense, 7, decay=0.5, update_every=2, invert_every=4)
    averages = [s.average.mean.matrix for s in found]
    for i in range(1, 7):
        assert torch.equal(averages[i], averages[i - 1]) == (i % 2 == 1)
        same = torch.equal(found[i].inverse.matrix.matrix, found[i - 1].inverse.matrix.matrix)
        assert same == (i % 4 != 0)
    close(found[5].inverse.matrix.matrix, averages[4])
    parts = [F.matrix for F in results(ff.dense, 7)]
    close(averages[6], mean(parts[::2], 0.5))


def test_without_an_average_the_latest_is_inverted() -> None:
    found = states(ff.diagonal, 5, decay=0.0, invert_every=3)
    parts = results(ff.diagonal, 5)
    for i, j in enumerate((0, 0, 0, 3, 3)):
        assert found[i].average is None
        close(found[i].inverse.matrix.to_dense(), parts[j].to_dense())


@pytest.mark.parametrize(
    ("decay", "update", "invert", "estimates", "inverses"),
    [
        (0.0, 3, 1, [0, 3, 6], [0, 3, 6]),
        (0.0, 3, 2, [0, 3, 6], [0, 3, 6]),
        (0.0, 1, 3, [0, 3, 6], [0, 3, 6]),
        (0.5, 3, 1, [0, 3, 6], [0, 3, 6]),  # what has not changed is not inverted again
        (0.5, 3, 2, [0, 3, 6], [0, 2, 4, 6]),
        (0.5, 1, 3, list(range(7)), [0, 3, 6]),
    ],
)
def test_nothing_is_computed_before_it_is_due(
    decay: float, update: int, invert: int, estimates: list[int], inverses: list[int]
) -> None:
    model, params, buffers = network()
    fim = ff.kfac(model, LIK)
    seen: dict[str, list[int]] = {"estimates": [], "inverses": []}

    def estimator(*args: Any, **data: Any) -> Any:
        seen["estimates"].append(number)
        return fim(*args, **data)

    def inverter(matrix: Any) -> optim.Inverse:
        seen["inverses"].append(number)
        return optim.invert(matrix)

    options: Any = {"update_every": update, "invert_every": invert, "invert": inverter}
    opt = optim.scale_by_fisher(estimator, damping=0.1, decay=decay, **options)
    grads, state = trees.map(torch.ones_like, params), opt.init(params)
    for number in range(7):
        _, state = opt.update(grads, state, params, buffers=buffers, batch=data(number))
    assert seen == {"estimates": estimates, "inverses": inverses}


def test_without_a_batch_the_curvature_stays() -> None:
    model, params, buffers = network()
    opt = optim.scale_by_fisher(ff.kfac(model, LIK), damping=0.1, decay=0.9)
    grads = trees.map(torch.ones_like, params)
    first, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=data(0))
    again, after = opt.update(grads, state)
    assert after.curvature is state.curvature
    for name, x in first.items():
        close(x, again[name])


def test_any_inverter_will_do() -> None:
    calls: list[Any] = []

    def inverter(matrix: Any) -> optim.Inverse:
        calls.append(matrix)
        return optim.invert(matrix)

    states(ff.kfac, 5, decay=0.5, invert_every=2, invert=inverter)
    assert len(calls) == 3


def test_a_cached_inverse_is_refused_where_it_does_not_exist() -> None:
    model, params, buffers = network()
    grads = trees.map(torch.ones_like, params)
    for make in (ff.dense, ff.low_rank):
        opt = optim.natural_gradient(make(model, LIK), damping=0.0, invert_every=2)
        with pytest.raises(NotPositiveDefiniteError, match=r"natural_gradient.* at [02]\."):
            opt.update(grads, opt.init(params), params, buffers=buffers, batch=data(0))


def test_periods_of_ekfac_need_steps_with_values() -> None:
    model, params, buffers = network()
    opt = optim.scale_by_fisher(ff.ekfac(model, LIK), decay=0.5, invert_every=2, damping=0.1)
    grads = trees.map(torch.ones_like, params)
    _, state = opt.update(grads, opt.init(params), params, buffers=buffers, batch=data(0))

    def step(params: Any) -> Any:
        return opt.update(grads, state, params, buffers=buffers, batch=data(1))[0]

    with pytest.raises(UnsupportedError, match="expected refresh=True or False for ekfac where"):
        torch.vmap(step)(trees.map(lambda p: p[None], params))


@pytest.mark.parametrize("make", [ff.kfac, ff.ekfac, ff.diagonal])
def test_what_is_due_can_be_said(make: Any) -> None:
    model, params, buffers = network()
    opt = optim.scale_by_fisher(make(model, LIK), decay=0.5, invert_every=3, damping=0.1)
    grads, state = trees.map(torch.ones_like, params), opt.init(params)
    given: Any = {"buffers": buffers}
    _, state = opt.update(grads, state, params, batch=data(0), refresh=False, **given)
    assert state.curvature.inverse is not None  # the first step has nothing else to go by
    _, kept = opt.update(grads, state, params, batch=data(1), refresh=False, **given)
    assert kept.curvature is state.curvature or all(
        torch.equal(a, b)
        for a, b in zip(trees.leaves(kept.curvature), trees.leaves(state.curvature), strict=True)
    )
    _, new = opt.update(grads, state, params, batch=data(1), refresh=True, **given)
    both = states(make, 2, labels="exact", decay=0.5)[-1]
    close(new.curvature.inverse.matrix.to_dense(), both.inverse.matrix.to_dense())
    with pytest.raises(OptionError, match=r"update: expected refresh to be True, False or None, g"):
        opt.update(grads, state, params, batch=data(1), refresh=1, **given)
