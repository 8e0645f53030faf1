"""Llama, GPT-2, BERT and T5 as Hugging Face builds them, tiny and randomly initialised."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import cases
import fisherfn as ff
import oracles
from cases import language
from fisherfn.testing import assert_close

NAMES = list(cases.LANGUAGE)


@functools.cache
def setup(name: str) -> cases.Setup:
    return cases.LANGUAGE[name].setup()


@functools.cache
def rows(name: str, fisher: str) -> oracles.Rows:
    return oracles.rows(setup(name).problem, fisher)


@pytest.mark.parametrize("name", NAMES)
def test_scores_norms_and_inner_products(name: str) -> None:
    s = setup(name)
    scores = rows(name, "empirical").scores
    rtol = cases.LANGUAGE[name].rtol
    got = ff.per_sample_gradients(s.model, s.likelihood)(*s.args)
    assert_close(got, oracles.unravel(scores, s.problem.params), rtol)
    assert_close(ff.score_norms(s.model, s.likelihood)(*s.args), scores.square().sum(1), rtol)
    assert_close(ff.score_gram(s.model, s.likelihood)(*s.args), scores @ scores.T, rtol)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_diagonal(name: str, fisher: str) -> None:
    s = setup(name)
    found = rows(name, fisher)
    want = (found.weights.unsqueeze(1) * found.scores.square()).sum(0) / found.count
    got = ff.diagonal(s.model, s.likelihood, fisher=fisher)(*s.args)
    assert_close(got.values, oracles.unravel(want, s.problem.params), cases.LANGUAGE[name].rtol)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_empirical_positions(name: str) -> None:
    s = setup(name)
    got = ff.diagonal(s.model, s.likelihood, fisher="empirical", unit="position")(*s.args)
    want = oracles.diagonal(s.problem, "empirical", "position")
    assert_close(got.values, oracles.unravel(want, s.problem.params))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
def test_random_labels_average_to_exact(name: str, fisher: str) -> None:
    s = setup(name)
    found = rows(name, "exact")
    truth = (found.weights.unsqueeze(1) * found.scores.square()).sum(0) / found.count
    estimator = ff.diagonal(s.model, s.likelihood, fisher=fisher)
    draws = torch.stack(
        [
            torch.cat([v.flatten() for v in estimator(*s.args, key=key).values.values()])
            for key in ff.random.split(ff.random.key(8), 60)
        ]
    )
    # a thousand entries, few draws each: what is compared is sums over parameters
    sizes = [p.numel() for p in s.problem.params.values()]
    sums = torch.stack([part.sum(1) for part in draws.split(sizes, dim=1)], dim=1)
    wanted = torch.stack([part.sum() for part in truth.split(sizes)])
    error = sums.std(0) / len(draws) ** 0.5
    assert ((sums.mean(0) - wanted).abs() < 5 * error).all()
    assert error.sum() < 0.2 * wanted.sum()


@pytest.mark.parametrize(
    "name", ["llama", "llama_untied_biases", "llama_as_it_is", "gpt2", "bert_masked", "t5"]
)
def test_no_parameter_takes_the_general_path(name: str) -> None:
    s = setup(name)
    report = ff.explain(ff.diagonal(s.model, s.likelihood, fisher="mc"))(*s.args)
    assert [row.path for row in report.rows] == list(s.params)
    # a table that is looked up without examples, once for all of them, has no row an example
    allowed = {path for path in s.params if "relative_attention_bias" in path}
    assert set(report.general) <= allowed, str(report)


@pytest.mark.parametrize("make", [language.llama, language.gpt2])
def test_a_causal_batch_scores_each_label_where_it_is_drawn(make: object) -> None:
    """E_y[score] = 0 at each position that counts, and not when labels are shifted once more."""
    with cases.seeded(1):
        module = make().double().eval()  # type: ignore[operator]
    for number, param in enumerate(module.parameters()):
        param.data.add_(0.3 * cases.normal(*param.shape, seed=number))
    model, params, buffers = ff.functional(module)
    ids = cases.tokens(2, 4, high=language.V)
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = ff.causal_batch(ids, attention)
    assert torch.equal(batch.targets[:, :-1], ids[:, 1:])
    expected = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    assert batch.mask is not None
    assert torch.equal(batch.mask, expected)
    probabilities = model(params, buffers, batch.inputs).softmax(-1)
    estimator = ff.per_sample_gradients(model, ff.likelihoods.categorical())
    name = next(iter(params))
    aligned, shifted, largest = 0.0, 0.0, 0.0
    for t in range(3):
        mask = (torch.arange(4) == t) & expected
        total = torch.zeros(2, *params[name].shape, dtype=torch.float64)
        wrong = torch.zeros_like(total)
        for label in range(language.V):
            targets = torch.full((2, 4), label)
            score = estimator(
                params, buffers, dataclasses.replace(batch, targets=targets, mask=mask)
            )[name]
            total += probabilities[:, t, label].reshape(-1, 1, 1) * score
            wrong += probabilities[:, t + 1, label].reshape(-1, 1, 1) * score
            largest = max(largest, score.abs().max().item())
        aligned = max(aligned, total.abs().max().item())
        shifted = max(shifted, wrong.abs().max().item())
    assert aligned < 1e-5 * largest  # Llama and its kin normalise in float32
    assert shifted > 1e-3 * largest


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_does_not_change_the_fisher(name: str) -> None:
    """The second row alone, without its padding, is the second row."""
    s = setup(name)
    ids = s.batch.inputs["input_ids"]
    length = int(language.attention_mask()[1].sum())
    key = ff.random.key(3)
    for fisher in ("exact", "empirical", "mc", "curvature_prop"):
        estimator = ff.diagonal(s.model, s.likelihood, fisher=fisher)
        given = key if fisher in ("mc", "curvature_prop") else None
        short = ff.Batch(
            {
                "input_ids": ids[1:, :length],
                "attention_mask": torch.ones(1, length, dtype=torch.int64),
            },
            targets=s.batch.targets[1:, :length],
            ids=torch.tensor([1]),
        )
        mask = s.batch.mask
        assert mask is not None
        alone = ff.Batch(
            {k: v[1:] for k, v in s.batch.inputs.items()},
            targets=s.batch.targets[1:],
            mask=mask[1:],
            ids=torch.tensor([1]),
        )
        one = estimator(s.params, s.buffers, short, key=given).values
        two = estimator(s.params, s.buffers, alone, key=given).values
        assert_close(two, _padded(one, two), rtol=1e-7, what=fisher)


def _padded(
    short: dict[str, torch.Tensor], long: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    assert short.keys() == long.keys()
    return short


def test_half_precision_language_model() -> None:
    with cases.seeded(3):
        module = language.llama().to(torch.bfloat16).eval()
    model, params, buffers = ff.functional(module)
    batch = ff.causal_batch(cases.tokens(2, 6, high=language.V))
    got = ff.diagonal(model, ff.likelihoods.categorical(), fisher="mc")(
        params, buffers, batch, key=ff.random.key(0)
    )
    wide = ff.diagonal(model, ff.likelihoods.categorical(), fisher="exact")
    low = wide(params, buffers, batch).trace().item()
    double = {k: v.double() for k, v in params.items()}
    high = wide(double, {k: v.double() for k, v in buffers.items()}, batch).trace().item()
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in got.values.values())
    assert abs(low - high) < 0.1 * high
