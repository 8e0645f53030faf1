"""What a unit is, what counts, and how often: against the loops of the definition."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import fisherfn as ff
import oracles
from cases import Case, normal
from fisherfn.testing import assert_close

B, T = 4, 3

MASKS = {
    "none": None,
    "full": torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1]]).bool(),
    "an_example_out": torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]]).bool(),
    "per_example": torch.tensor([[1], [0], [1], [1]]).bool(),
    "per_position": torch.tensor([[1, 0, 1]]).bool(),
    "one_axis": torch.tensor([1, 0, 1]).bool(),
    "one_left": torch.tensor([[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool(),
}
WEIGHTS = {
    "none": None,
    "plain": torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64),
    "zero": torch.tensor([0.0, 2.0, 0.5, 0.0], dtype=torch.float64),
}
POSITION_WEIGHTS = {
    "none": None,
    "plain": 0.5 + torch.arange(B * T, dtype=torch.float64).reshape(B, T),
    "zero": torch.arange(B * T, dtype=torch.float64).reshape(B, T) % 4,
}


def _attentive() -> cases.Built:
    """Positions see each other; every kind of site: embedding, norm, linear, scale, unknown."""

    def forward(m: Any, t: Tensor) -> Tensor:
        h = m.embed(t) + m.place
        h = m.norm(h + torch.softmax(h @ h.mT, -1) @ h) * m.scale
        return m.head(torch.tanh(torch.einsum("bti,io->bto", h, m.mix)))

    net = cases.Net(
        forward,
        embed=nn.Embedding(5, 3),
        place=normal(T, 3),
        norm=nn.LayerNorm(3),
        scale=normal(3, seed=1),
        mix=normal(3, 3, seed=2),
        head=nn.Linear(3, 3),
    )
    return cases.Built(net.double(), cases.tokens(B, T, high=5))


CASE = Case("attentive", _attentive)


@functools.cache
def base() -> cases.Setup:
    return CASE.setup()


def variant(mask: Tensor | None, weights: Tensor | None) -> tuple[ff.Batch, oracles.Problem]:
    s = base()
    problem = dataclasses.replace(s.problem, mask=mask, weights=weights)
    batch = dataclasses.replace(s.batch, mask=mask, weights=weights)
    return batch, problem


def tree(vector: Tensor) -> dict[str, Tensor]:
    return oracles.unravel(vector, base().problem.params)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_examples(fisher: str, mask: str, weights: str) -> None:
    batch, problem = variant(MASKS[mask], WEIGHTS[weights])
    if problem.unit_weights("example").sum() == 0:
        with pytest.raises(ff.DataError):
            ff.diagonal(base().model, base().likelihood, fisher=fisher)(
                base().params, base().buffers, batch
            )
        return
    want = oracles.rows(problem, fisher)
    matrix = (want.weights.unsqueeze(1) * want.scores).T @ want.scores / want.count
    s = base()
    diagonal = ff.diagonal(s.model, s.likelihood, fisher=fisher)(s.params, s.buffers, batch)
    dense = ff.dense(s.model, s.likelihood, fisher=fisher)(s.params, s.buffers, batch)
    assert_close(diagonal.values, tree(matrix.diagonal()), what="diagonal")
    assert_close(dense.to_dense(), matrix, what="dense")
    assert diagonal.count.item() == pytest.approx(want.count)
    assert dense.count.item() == pytest.approx(want.count)


@pytest.mark.parametrize("weights", POSITION_WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_positions(fisher: str, mask: str, weights: str) -> None:
    batch, problem = variant(MASKS[mask], POSITION_WEIGHTS[weights])
    s = base()
    want = oracles.rows(problem, fisher, "position")
    options: dict[str, Any] = {"fisher": fisher, "unit": "position"}
    diagonal = ff.diagonal(s.model, s.likelihood, **options)(s.params, s.buffers, batch)
    blocks = ff.block_diagonal(s.model, s.likelihood, **options)(s.params, s.buffers, batch)
    matrix = (want.weights.unsqueeze(1) * want.scores).T @ want.scores / want.count
    assert_close(diagonal.values, tree(matrix.diagonal()), what="diagonal")
    separate = torch.block_diag(*oracles.blocks(matrix, problem.params).values())
    assert_close(blocks.to_dense(), separate, what="blocks")
    assert diagonal.count.item() == pytest.approx(want.count)
    assert diagonal.unit == "position"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fisher", ["exact", "mc", "curvature_prop"])
def test_position_fisher_is_example_fisher_times_the_ratio_of_counts(
    fisher: str, mask: str
) -> None:
    batch, problem = variant(MASKS[mask], None)
    s = base()
    key = None if fisher == "exact" else ff.random.key(4)
    one, two = (
        ff.diagonal(s.model, s.likelihood, fisher=fisher, unit=unit)(
            s.params, s.buffers, batch, key=key
        )
        for unit in ("example", "position")
    )
    assert one.count.item() == problem.unit_weights("example").sum()
    assert two.count.item() == problem.unit_weights("position").sum()
    ratio = (one.count / two.count).item()
    assert_close(two.values, {k: v * ratio for k, v in one.values.items()})


@pytest.mark.parametrize("mask", MASKS)
def test_scores_are_unweighted_and_zero_where_masked(mask: str) -> None:
    batch, problem = variant(MASKS[mask], WEIGHTS["plain"])
    s = base()
    scores = oracles.scores(problem)
    got = ff.per_sample_gradients(s.model, s.likelihood)(s.params, s.buffers, batch)
    assert_close(got, tree(scores))
    norms = ff.score_norms(s.model, s.likelihood)(s.params, s.buffers, batch)
    gram = ff.score_gram(s.model, s.likelihood)(s.params, s.buffers, batch)
    assert_close(norms, scores.square().sum(1))
    assert_close(gram, scores @ scores.T)
    out = ~problem.full_mask().any(1)
    assert (norms[out] == 0).all()


@pytest.mark.parametrize("mask", MASKS)
def test_moments_under_mask_and_weights(mask: str) -> None:
    batch, problem = variant(MASKS[mask], WEIGHTS["plain"])
    s = base()
    count, mean, square = oracles.moments(problem)
    got = ff.gradient_moments(s.model, s.likelihood)(s.params, s.buffers, batch)
    assert got.count.item() == pytest.approx(count)
    assert_close(got.mean, tree(mean))
    assert_close(got.square, tree(square))


@pytest.mark.parametrize("fisher", ["exact", "mc", "curvature_prop", "empirical"])
@pytest.mark.parametrize("unit", ["example", "position"])
def test_masked_targets_are_not_looked_at(fisher: str, unit: str) -> None:
    s = base()
    mask = MASKS["an_example_out"]
    assert mask is not None
    targets = s.batch.targets
    key = ff.random.key(0) if fisher in ("mc", "curvature_prop") else None
    results = []
    for nonsense in (0, -100, 10**6):
        spoiled = torch.where(mask, targets, nonsense)
        batch = dataclasses.replace(s.batch, targets=spoiled, mask=mask)
        estimator = ff.diagonal(s.model, s.likelihood, fisher=fisher, unit=unit)
        results.append(estimator(s.params, s.buffers, batch, key=key).values)
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_masked_targets_that_are_nan_are_not_looked_at() -> None:
    case = Case(
        "masked_nan",
        lambda: cases.Built(nn.Linear(3, 2).double(), normal(3, 2, 3)),
        oracles.Gaussian(0.5),
    )
    s = case.setup()
    mask = torch.tensor([[1, 0], [0, 0], [1, 1]]).bool()
    clean = dataclasses.replace(s.batch, mask=mask)
    spoiled = torch.where(mask.unsqueeze(-1), s.batch.targets, float("nan"))
    for estimator in (
        ff.per_sample_gradients(s.model, s.likelihood),
        ff.diagonal(s.model, s.likelihood, fisher="empirical"),
        ff.diagonal(s.model, s.likelihood, fisher="empirical", unit="position"),
    ):
        got = estimator(s.params, s.buffers, dataclasses.replace(clean, targets=spoiled))
        want = estimator(s.params, s.buffers, clean)
        assert_close(ff.tree.leaves(got), ff.tree.leaves(want))


@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc", "curvature_prop"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("waits", [False, True])
def test_masked_inputs_that_are_nan_do_not_spread(
    fisher: str, chunk_size: int | None, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padded example may hold anything: zero times infinity would be NaN."""
    # where reading a value waits for a device, examples are looked at when all is done
    monkeypatch.setattr("fisherfn.estimators.driver._reading_waits", lambda outputs: waits)
    s = Case(
        "masked_inputs",
        lambda: cases.Built(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(3, 3)
        ),
    ).setup()
    mask = torch.tensor([True, False, True])
    inputs = s.batch.inputs.clone()
    inputs[1] = float("inf")
    clean = dataclasses.replace(s.batch, mask=mask)
    dirty = dataclasses.replace(clean, inputs=inputs)
    key = ff.random.key(0) if fisher in ("mc", "curvature_prop") else None
    estimator = ff.diagonal(s.model, s.likelihood, fisher=fisher, chunk_size=chunk_size)
    got = estimator(s.params, s.buffers, dirty, key=key)
    assert_close(got.values, estimator(s.params, s.buffers, clean, key=key).values)


def test_ignore_makes_the_mask() -> None:
    s = base()
    full: Any = MASKS["full"]
    targets = torch.where(full, s.batch.targets, -100)
    mask = ff.Batch.ignore(targets, -100)
    assert torch.equal(mask, full)
    batch = ff.Batch(s.batch.inputs, targets=targets, mask=mask)
    got = ff.diagonal(s.model, s.likelihood, fisher="empirical")(s.params, s.buffers, batch)
    _, problem = variant(MASKS["full"], None)
    assert_close(got.values, tree(oracles.diagonal(problem, "empirical")))


@pytest.mark.parametrize("size", [1e-38, 1e38])
def test_only_ratios_of_weights_count(size: float) -> None:
    """Also where their sum is beyond the range of their dtype."""
    s = Case("scales", lambda: cases.Built(nn.Linear(3, 2), normal(6, 3).float())).setup()
    fim = ff.diagonal(s.model, s.likelihood)
    got = fim(s.params, s.buffers, dataclasses.replace(s.batch, weights=torch.full((6,), size)))
    want = fim(s.params, s.buffers, s.batch)
    torch.testing.assert_close(got.values, want.values)


def test_class_weights_are_weights_of_targets() -> None:
    s = Case("class_weights", lambda: cases.Built(nn.Linear(3, 3).double(), normal(5, 3))).setup()
    class_weight = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    weights = class_weight[s.batch.targets]
    problem = dataclasses.replace(s.problem, weights=weights)
    batch = dataclasses.replace(s.batch, weights=weights)
    got = ff.diagonal(s.model, s.likelihood, fisher="empirical")(s.params, s.buffers, batch)
    want = oracles.diagonal(problem, "empirical")
    assert_close(got.values, oracles.unravel(want, s.problem.params))


def test_two_position_axes() -> None:
    s = Case("two_axes", lambda: cases.Built(nn.Linear(3, 3).double(), normal(2, 2, 3, 3))).setup()
    mask = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 0], [1, 1, 1]]]).bool()
    weights = 1.0 + torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)
    for unit, multiplicity in (("example", weights[:, 0, 0]), ("position", weights)):
        problem = dataclasses.replace(s.problem, mask=mask, weights=multiplicity)
        batch = dataclasses.replace(s.batch, mask=mask, weights=multiplicity)
        for fisher in ("exact", "empirical"):
            got = ff.diagonal(s.model, s.likelihood, fisher=fisher, unit=unit)(
                s.params, s.buffers, batch
            )
            want = oracles.diagonal(problem, fisher, unit)
            assert_close(got.values, oracles.unravel(want, s.problem.params), what=fisher + unit)


def test_without_positions_both_units_are_one() -> None:
    s = Case("no_positions", lambda: cases.Built(nn.Linear(3, 3).double(), normal(4, 3))).setup()
    for fisher in ("exact", "mc", "curvature_prop", "empirical"):
        key = ff.random.key(0) if fisher in ("mc", "curvature_prop") else None
        one, two = (
            ff.diagonal(s.model, s.likelihood, fisher=fisher, unit=unit)(*s.args, key=key)
            for unit in ("example", "position")
        )
        assert_close(one.values, two.values)
        assert one.count == two.count


def test_integer_weights_are_floats_or_refused() -> None:
    """Multiplicities given as integers mean what they say, or are refused."""
    s = base()
    batch = dataclasses.replace(s.batch, weights=torch.tensor([1, 2, 1, 3]))
    estimator = ff.diagonal(s.model, s.likelihood, fisher="empirical")
    try:
        got = estimator(s.params, s.buffers, batch)
    except ff.FisherError:
        return
    exact = dataclasses.replace(batch, weights=torch.tensor([1.0, 2, 1, 3], dtype=torch.float64))
    assert_close(got.values, estimator(s.params, s.buffers, exact).values)


def test_merge_is_the_fisher_of_joined_data() -> None:
    s = base()
    weights: Any = WEIGHTS["plain"]
    for fisher in ("exact", "empirical"):
        estimator = ff.diagonal(s.model, s.likelihood, fisher=fisher)
        parts = [
            dataclasses.replace(
                s.batch,
                inputs=s.batch.inputs[rows],
                targets=s.batch.targets[rows],
                weights=weights[rows],
            )
            for rows in (slice(0, 1), slice(1, 4))
        ]
        first, second = (estimator(s.params, s.buffers, part) for part in parts)
        whole = estimator(
            s.params, s.buffers, dataclasses.replace(s.batch, weights=WEIGHTS["plain"])
        )
        merged = ff.merge(first, second)
        assert_close(merged.values, whole.values)
        assert merged.count == whole.count
        assert_close(ff.merge(ff.empty_like(first), first).values, first.values)


def test_a_weight_of_an_example_is_one_of_each_of_its_positions() -> None:
    s = base()
    weights = WEIGHTS["plain"]
    assert weights is not None
    estimator = ff.diagonal(s.model, s.likelihood, fisher="empirical", unit="position")
    short, long = (
        estimator(s.params, s.buffers, dataclasses.replace(s.batch, weights=w))
        for w in (weights, weights.unsqueeze(1).expand(B, T).contiguous())
    )
    assert_close(short.values, long.values)
    assert short.count == long.count
