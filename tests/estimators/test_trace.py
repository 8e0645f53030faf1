"""Traces and spectra of the Fisher information, by every method."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import fisherfn as ff
import oracles
from cases.kinds import KINDS
from fisherfn.testing import assert_close

FISHERS = ("exact", "mc", "curvature_prop", "empirical")
RANDOM = ("hutchinson", "hutchpp", "xtrace")
KEY = ff.random.key(7)
LIK = ff.likelihoods.categorical()


@functools.cache
def setup(name: str) -> cases.Setup:
    return KINDS[name].setup()


@functools.cache
def truth(name: str, fisher: str = "exact", unit: str = "example") -> Tensor:
    return oracles.dense(setup(name).problem, fisher, unit)


# ---- method "exact" ------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "position"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", KINDS)
def test_trace_is_that_of_the_definition(name: str, fisher: str, unit: str) -> None:
    s = setup(name)
    got = ff.trace(s.model, s.likelihood, fisher=fisher, unit=unit)(*s.args)
    assert_close(got.value, truth(name, fisher, unit).trace())
    assert (float(got.stderr), got.fisher, got.unit) == (0.0, fisher, unit)


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
@pytest.mark.parametrize("name", ["categorical_sequence", "bernoulli", "poisson", "gaussian"])
def test_draws_are_those_of_the_diagonal(name: str, fisher: str) -> None:
    if name not in KINDS:
        name = next(n for n in KINDS if n.startswith(name))
    s, many = setup(name), 6
    options: dict[str, Any] = {"fisher": fisher, "num_samples": many}
    got = ff.trace(s.model, s.likelihood, **options)(*s.args, key=KEY)
    diagonal = ff.diagonal(s.model, s.likelihood, **options)(*s.args, key=KEY)
    assert_close(got.value, diagonal.trace())
    chunked = ff.trace(s.model, s.likelihood, chunk_size=1, **options)(*s.args, key=KEY)
    assert_close(chunked.stderr, got.stderr)
    assert 0 <= got.stderr < math.inf
    one = ff.trace(s.model, s.likelihood, fisher=fisher)(*s.args, key=KEY)
    assert one.stderr == math.inf


@pytest.mark.parametrize("num_samples", [20, 200])
@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
def test_draws_are_unbiased(fisher: str, num_samples: int) -> None:
    s = setup("categorical_sequence")
    got = ff.trace(s.model, s.likelihood, fisher=fisher, num_samples=num_samples)(*s.args, key=KEY)
    error = (got.value - truth("categorical_sequence").trace()).abs()
    assert 0 < error < 5 * got.stderr


def test_it_is_not_the_norm_of_the_mean_gradient() -> None:
    # The squared norm of a mean gradient (or N² times it) has been called the trace.
    s = setup("categorical_sequence")
    scores = oracles.scores(s.problem)
    got = ff.trace(s.model, s.likelihood, fisher="empirical")(*s.args).value
    assert_close(got, scores.square().sum() / len(scores))
    mean = scores.mean(0).square().sum()
    assert got > 1.2 * mean
    assert (got / (len(scores) ** 2 * mean) - 1).abs() > 0.2


# ---- random methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", ["categorical", "categorical_sequence"])
def test_random_methods_are_unbiased(name: str, fisher: str, method: str) -> None:
    s = setup(name)
    labels, _ = ff.random.split(KEY).unbind(0)
    exactly = ff.trace(s.model, s.likelihood, fisher=fisher)
    want = exactly(*s.args, key=labels if fisher in ("mc", "curvature_prop") else None).value
    estimator = ff.trace(s.model, s.likelihood, fisher=fisher, method=method, num_matvecs=12)
    got = estimator(*s.args, key=KEY)
    assert (got.value - want).abs() <= 6 * got.stderr + 1e-9
    assert got.count is not None
    assert (got.fisher, got.unit, float(got.count)) == (fisher, "example", s.problem.size)
    assert got.matvecs <= 12


def test_random_methods_by_position_and_by_target() -> None:
    s = setup("categorical_sequence")
    want = truth("categorical_sequence", "exact", "position").trace()
    got = ff.trace(
        s.model,
        s.likelihood,
        method="hutchinson",
        unit="position",
        num_matvecs=200,
        target_stderr=0.1,
        relative=True,
        probes="sphere",
    )(*s.args, key=KEY)
    assert got.stderr <= 0.1 * got.value
    assert got.matvecs < 200
    assert (got.value - want).abs() < 5 * got.stderr


# ---- the two functions that promise Hutchinson's method ------------------------------------------

DOCUMENTED = {
    "empirical": ff.empirical_fisher_trace,
    "exact": ff.generalized_fisher_trace,
}


@pytest.mark.parametrize("num_samples", [25, 400])
@pytest.mark.parametrize("fisher", DOCUMENTED)
@pytest.mark.parametrize("name", ["categorical", "categorical_sequence", "gaussian_scale_each"])
def test_documented_traces_are_unbiased(name: str, fisher: str, num_samples: int) -> None:
    s = setup(name)
    got = DOCUMENTED[fisher](s.model, s.likelihood, num_samples=num_samples)(*s.args, key=KEY)
    assert (got.value - truth(name, fisher).trace()).abs() <= 5 * got.stderr + 1e-9


@pytest.mark.parametrize("fisher", DOCUMENTED)
def test_num_samples_does_what_it_says(fisher: str) -> None:
    # It was ignored; here the error falls with its root.
    s = setup("categorical_sequence")
    made = {m: DOCUMENTED[fisher](s.model, s.likelihood, num_samples=m) for m in (1, 16, 256)}
    found = {m: e(*s.args, key=KEY) for m, e in made.items()}
    assert found[1].stderr == math.inf
    assert 2.0 < float(found[16].stderr / found[256].stderr) < 8.0
    assert len({float(e.value) for e in found.values()}) == 3
    first, second = [made[16](*s.args, key=ff.random.key(i)).value for i in (1, 2)]
    assert first != second
    assert torch.equal(first, made[16](*s.args, key=ff.random.key(1)).value)


@pytest.mark.parametrize("unit", ["example", "position"])
def test_empirical_trace_is_the_mean_quadratic_form(unit: str) -> None:
    s = setup("categorical_sequence")
    matrix = truth("categorical_sequence", "empirical", unit)
    leaves = ff.tree.leaves(s.args[0])
    values = []
    for j in range(5):
        own = ff.random.fold_in(KEY, j)
        parts = [
            ff.random.rademacher(ff.random.fold_in(own, i), leaf.shape, torch.float64)
            for i, leaf in enumerate(leaves)
        ]
        v = torch.cat([part.reshape(-1) for part in parts])
        values.append(v @ matrix @ v)
    estimator = ff.empirical_fisher_trace(s.model, s.likelihood, num_samples=5, unit=unit)
    got = estimator(*s.args, key=KEY)
    assert_close(got.value, torch.stack(values).mean())
    assert_close(got.stderr, torch.stack(values).std() / 5**0.5, rtol=1e-7)


@pytest.mark.parametrize("name", ["conv", "embedding", "tied", "views"])
def test_projections_of_every_form(name: str) -> None:
    """Scores in each factored form, against the scores themselves."""
    model, params, buffers, inputs, classes = network(name)
    batch = ff.Batch(inputs, targets=torch.arange(len(inputs)) % classes)
    rows = ff.per_sample_gradients(model, LIK)(params, buffers, batch)
    estimator = ff.empirical_fisher_trace(model, LIK, num_samples=3)
    got = estimator(params, buffers, batch, key=KEY)
    inner = torch.zeros(3, len(inputs), dtype=torch.float64)
    for j in range(3):
        for i, leaf in enumerate(ff.tree.leaves(rows)):
            own = ff.random.fold_in(ff.random.fold_in(KEY, j), i)
            v = ff.random.rademacher(own, leaf.shape[1:], torch.float64)
            inner[j] += (leaf * v).flatten(1).sum(1)
    assert_close(got.value, inner.square().mean(1).mean())


def network(name: str) -> tuple[Any, dict[str, Tensor], Any, Tensor, int]:
    """Small models whose parameters are convolutions, tables, tied tables, transposed matrices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "conv":
            module: nn.Module = nn.Sequential(
                nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
            )
            inputs = torch.randn(4, 2, 4, 4).double()
            return (*ff.functional(module.double()), inputs, 3)
        tokens = torch.randint(5, (4, 3))
        table = torch.randn(5, 4).double()
        mix = torch.randn(4, 4).double()
    if name == "views":
        model = lambda p, b, x: torch.tanh(x @ p["mix"].T) @ p["mix"][:2].T  # noqa: E731
        return model, {"mix": mix}, {}, table[:4], 2
    head = {"head": mix[:, :3].clone()} if name == "embedding" else {}

    def language(p: Any, b: Any, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.embedding(x, p["table"]).mean(1) @ p["mix"])
        return h @ (p["head"] if "head" in p else p["table"].T)

    return language, {"table": table, "mix": mix, **head}, {}, tokens, 3 if head else 5


@pytest.mark.parametrize("fisher", DOCUMENTED)
def test_gradient_goes_through(fisher: str) -> None:
    s = setup("categorical")
    params, buffers, batch = s.args
    estimator = DOCUMENTED[fisher](s.model, s.likelihood, num_samples=3)
    direction = ff.tree.random_like(ff.random.key(1), params)

    def at(t: Tensor) -> Tensor:
        moved = ff.tree.map(lambda p, d: p + t * d, params, direction)
        return estimator(moved, buffers, batch, key=KEY).value

    zero, h = torch.zeros((), dtype=torch.float64), 1e-5
    got = torch.func.grad(at)(zero)
    assert_close(got, (at(zero + h) - at(zero - h)) / (2 * h), rtol=1e-6)
    second = torch.func.grad(torch.func.grad(at))(zero)
    slope = [torch.func.grad(at)(zero + step) for step in (h, -h)]
    assert_close(second, (slope[0] - slope[1]) / (2 * h), rtol=1e-5)


# ---- the spectrum --------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "position"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", KINDS)
def test_spectrum_is_that_of_the_dense_matrix(name: str, fisher: str, unit: str) -> None:
    # The diagonal, sorted, has been called the spectrum.
    s = setup(name)
    got = ff.gram_spectrum(s.model, s.likelihood, fisher=fisher, unit=unit)(*s.args)
    want = torch.linalg.eigvalsh(truth(name, fisher, unit)).flip(0)
    top = want[0].item()
    torch.testing.assert_close(got, want[: len(got)].clamp_min(0.0), rtol=1e-9, atol=1e-12 * top)
    assert (want[len(got) :].abs() <= 1e-12 * top).all()


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_spectrum_of_draws(fisher: str, chunk_size: int | None) -> None:
    s = setup("categorical_sequence")
    options: dict[str, Any] = {"fisher": fisher, "num_samples": 3}
    estimator = ff.gram_spectrum(s.model, s.likelihood, k=4, chunk_size=chunk_size, **options)
    dense = ff.dense(s.model, s.likelihood, **options)(*s.args, key=KEY)
    assert_close(estimator(*s.args, key=KEY), dense.eigenvalues()[:4])


@pytest.mark.parametrize("name", ["conv", "embedding", "tied", "views"])
def test_spectrum_of_every_form(name: str) -> None:
    model, params, buffers, inputs, _ = network(name)
    batch = ff.Batch(inputs)
    want = ff.dense(model, LIK)(params, buffers, batch).eigenvalues()
    got = ff.gram_spectrum(model, LIK)(params, buffers, batch)
    torch.testing.assert_close(got, want[: len(got)], rtol=1e-9, atol=1e-12)


def test_spectrum_is_padded_with_zeros() -> None:
    model = lambda p, b, x: x @ p["w"]  # noqa: E731
    params = {"w": torch.zeros(3, 2, dtype=torch.float64)}
    batch = ff.Batch(torch.ones(1, 3, dtype=torch.float64))
    got = ff.gram_spectrum(model, LIK, k=5)(params, {}, batch)
    assert_close(got, torch.tensor([1.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))


def test_lanczos_agrees_with_the_gram_spectrum() -> None:
    """No ghosts on a matrix of low rank: one eigenvalue came as often as there were steps."""
    s = setup("categorical")
    F = ff.linearized(s.model, s.likelihood)(*s.args)
    want = ff.gram_spectrum(s.model, s.likelihood, k=6)(*s.args)
    got = ff.linalg.lanczos(F, s.args[0], k=6, key=KEY, tolerance=1e-9)
    assert got.converged
    torch.testing.assert_close(got.eigenvalues, want, rtol=1e-8, atol=1e-10)


def test_log_determinant_and_solve_agree_with_the_dense_matrix() -> None:
    s, damping = setup("categorical_sequence"), 0.1
    dense = ff.dense(s.model, s.likelihood)(*s.args)
    F = ff.linearized(s.model, s.likelihood)(*s.args)
    got = ff.linalg.slq(
        F, s.args[0], num_probes=40, num_steps=15, key=KEY, damping=damping, lower=0.0
    )
    assert (got.value - dense.logdet(damping=damping)).abs() < 5 * got.stderr + 1e-6
    b = ff.tree.random_like(KEY, s.args[0])
    diagonal = ff.diagonal(s.model, s.likelihood)(*s.args)
    solved = ff.linalg.cg(
        F,
        b,
        damping=damping,
        tolerance=1e-11,
        preconditioner=lambda v: diagonal.solve(v, damping=damping),
    )
    assert solved.converged
    assert_close(solved.value, dense.solve(b, damping=damping), rtol=1e-7)


# ---- bad input -----------------------------------------------------------------------------------


def affine(params: Any, buffers: Any, x: Tensor) -> Tensor:
    return x @ params["w"]


ARGS: Any = ({"w": torch.zeros(3, 2)}, {}, ff.Batch(torch.ones(2, 3), torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ff.trace, {"method": "lanczos"}, "trace: expected method= to be one of 'exact', 'hutch"),
        (ff.trace, {"num_matvecs": 9}, "trace: expected no num_matvecs= for method='exact', got 9"),
        (ff.trace, {"probes": "sphere"}, "trace: expected no probes= for method='exact'"),
        (ff.trace, {"target_stderr": 0.1}, "trace: expected no target_stderr= for method='exact'"),
        (ff.trace, {"fisher": "true"}, "trace: expected fisher= to be one of"),
        (ff.trace, {"num_samples": 0, "fisher": "mc"}, "trace: expected num_samples= to be an int"),
        (
            ff.trace,
            {"method": "xtrace", "num_matvecs": 3},
            "trace: expected num_matvecs= to be an integer of at least 4",
        ),
        (
            ff.trace,
            {"method": "hutchinson", "probes": "signs"},
            "trace: expected probes= to be one of",
        ),
        (
            ff.trace,
            {"method": "hutchinson", "target_stderr": -1.0},
            "trace: expected target_stderr= to be a positive number",
        ),
        (
            ff.empirical_fisher_trace,
            {"num_samples": 0},
            "empirical_fisher_trace: expected num_samples= to be an integer of at least 1, got 0",
        ),
        (
            ff.generalized_fisher_trace,
            {"num_samples": 0},
            "generalized_fisher_trace: expected num_samples= to be an integer of at least 1, got 0",
        ),
        (ff.gram_spectrum, {"k": 0}, "gram_spectrum: expected k= to be an integer of at least 1"),
    ],
)
def test_bad_options(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ff.OptionError, match=message):
        make(affine, LIK, **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ff.trace, {"method": "hutchinson"}),
        (ff.empirical_fisher_trace, {}),
    ],
)
def test_random_vectors_need_a_key(make: Any, options: dict[str, Any]) -> None:
    estimator = make(affine, LIK, **options)
    with pytest.raises(ff.OptionError, match=f"{make.__name__}: expected key= for random vectors"):
        estimator(*ARGS)


def test_integer_params_are_refused() -> None:
    params = {"w": torch.zeros(3, 2, dtype=torch.int64)}
    with pytest.raises(ff.ShapeError, match="trace: expected floating-point params"):
        ff.trace(affine, LIK, method="hutchinson")(params, *ARGS[1:], key=KEY)


def test_spectra_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ff.OptionError, match="gram_spectrum: expected k= of at most 6, the number"):
        ff.gram_spectrum(affine, LIK, k=7)(*ARGS)
    monkeypatch.setattr("fisherfn.estimators.gram.COLUMNS_BUDGET", 1)
    with pytest.raises(ff.OptionError, match="gram_spectrum: expected at most 1 columns"):
        ff.gram_spectrum(affine, LIK)(*ARGS)
