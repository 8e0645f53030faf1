"""A plan made on one batch never answers for another that it does not fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cases
import fisherfn as ff
import oracles
from cases import normal
from cases.single import case, diagonal, part, right_or_refused, two, want, x
from fisherfn.capture.planning import plan_for
from fisherfn.testing import assert_close

# ---- the general path ----------------------------------------------------------------------------


def test_attention_on_the_general_path_is_batched() -> None:
    """Fused attention has no batching rule: torch would warn, and go example by example."""
    s = cases.ATTENTION["query_by_einsum"].setup()
    plan = plan_for(s.model, s.params, s.buffers, s.batch.inputs, afresh=True)
    assert list(plan.general) == [list(s.params).index("q")]
    assert not plan.looped


# ---- plans that do not fit -----------------------------------------------------------------------


def _branch_on_data(m: Any, x: Tensor) -> Tensor:
    h = m.a(x) if x[0, 0] > 0 else m.c(x)
    return m.b(torch.tanh(h))


def _branch_on_size(m: Any, x: Tensor) -> Tensor:
    h = m.a(x) if x.shape[0] % 2 else m.c(x)
    return m.b(torch.tanh(h))


def _swapped_on_size(m: Any, x: Tensor) -> Tensor:
    h = m.c(torch.tanh(m.a(x))) if x.shape[0] % 2 else m.a(torch.tanh(m.c(x)))
    return m.b(torch.tanh(h))


def _twice_on_size(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.b(torch.tanh(m.a(h)) if x.shape[0] > 3 else h)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "forward", [_branch_on_data, _branch_on_size, _swapped_on_size, _twice_on_size]
)
def test_sites_that_change_between_calls(
    forward: Callable[..., Any], order: tuple[int, int]
) -> None:
    """A plan made on one batch never answers for another whose sites are others."""
    signs = (1.0, -1.0)
    s = case(forward, x(), c=part(nn.Linear, 4, 4), **two())
    estimator = diagonal(s)
    for which in order:
        inputs = x(5 - which) * 1.0
        inputs[0, 0] = signs[which]
        inputs[:, 0] = signs[which] * inputs[:, 0].abs()
        targets = torch.arange(5 - which) % 3
        problem = oracles.Problem(
            s.problem.forward, s.problem.params, inputs, s.problem.family, targets
        )
        if forward in (_branch_on_size, _swapped_on_size, _twice_on_size):
            problem = _whole_batch_forward(problem)
        truth = oracles.unravel(oracles.diagonal(problem, "empirical"), problem.params)
        batch = ff.Batch(inputs, targets=targets)
        right_or_refused(lambda b=batch: estimator(s.params, s.buffers, b), truth)


def _whole_batch_forward(problem: oracles.Problem) -> oracles.Problem:
    """For models that look at the batch's size: example n as it is within the whole batch."""
    outputs = problem.forward(problem.inputs)

    class Rows(oracles.Problem):
        def outputs(self, n: int) -> Tensor:
            return outputs[n : n + 1]

    return Rows(problem.forward, problem.params, problem.inputs, problem.family, problem.targets)


def test_experts_that_are_routed_otherwise_later() -> None:
    """The plan is made on a batch in which every example takes the first expert."""
    s = cases.ALL["experts"].setup()
    gate = s.params["gate.weight"][0] - s.params["gate.weight"][1]
    away = gate / gate.norm()
    first = s.batch.inputs + 10.0 * away
    estimator = ff.per_sample_gradients(s.model, s.likelihood)
    mixed = s.batch.inputs * torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64).unsqueeze(1)
    for inputs in (first, s.batch.inputs, mixed, -first):
        problem = oracles.Problem(
            s.problem.forward, s.problem.params, inputs, s.problem.family, s.problem.targets
        )
        scores = oracles.unravel(oracles.scores(problem), s.problem.params)
        try:
            got = estimator(s.params, s.buffers, ff.Batch(inputs, targets=s.batch.targets))
        except ff.FisherError:
            continue
        assert_close(got, scores)


def test_rows_sorted_by_data_after_a_plan_on_sorted_data() -> None:
    s = cases.ALL["sorted_rows"].setup()
    ordered = s.batch.inputs[s.batch.inputs[:, 0].argsort()]
    estimator = ff.per_sample_gradients(s.model, s.likelihood)
    for inputs in (ordered, ordered.flip(0)):
        problem = oracles.Problem(
            s.problem.forward, s.problem.params, inputs, s.problem.family, s.problem.targets
        )
        scores = oracles.unravel(oracles.scores(problem), s.problem.params)
        try:
            got = estimator(s.params, s.buffers, ff.Batch(inputs, targets=s.batch.targets))
        except ff.FisherError:
            continue
        assert_close(got, scores)


def test_constant_padding_rows_do_not_fool_the_plan_check() -> None:
    """All-zero examples make every plan look right; the parameters are no less in use."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(F.linear(x, torch.cat([m.w, m.v]))))

    s = case(forward, x(6), w=normal(2, 4), v=normal(2, 4, seed=1), b=part(nn.Linear, 4, 3))
    zeros = ff.Batch(torch.zeros_like(s.batch.inputs), targets=s.batch.targets)
    estimator = diagonal(s)
    assert (estimator(s.params, s.buffers, zeros).values["w"] == 0).all()
    assert_close(estimator(*s.args).values, want(s))


def test_zero_weights_do_not_fool_the_plan_check() -> None:
    """At zero parameters downstream nothing reaches the first layer; later it does."""
    s = case(_time_first, normal(3, 3, 4, seed=1), **two())
    estimator = diagonal(s)
    zero = {k: torch.zeros_like(p) for k, p in s.params.items()}
    got = estimator(zero, s.buffers, s.batch)
    assert (got.values["a.weight"] == 0).all()
    assert_close(estimator(*s.args).values, want(s))


def _time_first(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x.transpose(0, 1)))).transpose(0, 1)


@pytest.mark.parametrize("where", ["params", "inputs", "masked inputs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_does_not_send_layers_to_the_general_path(
    where: str, bad: float
) -> None:
    module = nn.Sequential(part(nn.Linear, 4, 5), nn.Tanh(), part(nn.Linear, 5, 3)).double()
    model, params, buffers = ff.functional(module)
    estimator = ff.kfac(model, ff.likelihoods.categorical())
    inputs, mask = x(6), torch.tensor([False, False, True, True, True, True])
    broken = torch.where(mask[:, None], inputs, bad)
    if where == "params":
        other = {**params, "2.weight": torch.full_like(params["2.weight"], bad)}
        estimator(other, buffers, ff.Batch(inputs))
    elif where == "inputs":
        estimator(params, buffers, ff.Batch(broken))
    else:
        found = estimator(params, buffers, ff.Batch(broken, mask=mask))
        assert_close(found.to_dense(), estimator(params, buffers, ff.Batch(inputs[2:])).to_dense())
    assert [b.name for b in estimator(params, buffers, ff.Batch(inputs)).blocks] == [
        "0.weight",
        "2.weight",
    ]


def test_masks_of_minus_infinity_are_no_broken_inputs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scores = m.q(x) @ m.k(x).mT + torch.full((3, 3), -math.inf).triu(1).to(x)
        return m.b(scores.softmax(-1) @ x)

    layers = {"q": part(nn.Linear, 4, 2), "k": part(nn.Linear, 4, 2), "b": part(nn.Linear, 4, 3)}
    s = case(forward, normal(4, 3, 4), **layers)
    assert plan_for(s.model, s.params, s.buffers, s.batch.inputs).checked
    assert_close(diagonal(s)(*s.args).values, want(s))


def test_a_plan_that_could_not_be_checked_is_not_kept() -> None:
    """With these parameters every gradient overflows; with others none does."""
    estimator = ff.kfac(lambda p, b, x: F.linear(x, p["w"]) * p["c"], ff.likelihoods.categorical())
    params = {"w": normal(3, 4), "c": torch.full((), 1e308, dtype=torch.float64)}
    estimator(params, {}, ff.Batch(1e6 * x(6)))
    params["c"] = torch.ones((), dtype=torch.float64)
    assert len(estimator(params, {}, ff.Batch(x(6))).blocks) == 1


def test_symmetric_examples_do_not_fool_the_plan_check() -> None:
    """Equal first examples hide a swap of examples and time."""
    s = case(_time_first, normal(4, 4, 4, seed=1), **two())
    equal = normal(1, 1, 4, seed=2).expand(4, 4, 4).contiguous()
    estimator = ff.per_sample_gradients(s.model, s.likelihood)
    same = torch.zeros(4, 4, dtype=torch.int64)
    estimator(s.params, s.buffers, ff.Batch(equal, targets=same))
    got = estimator(*s.args)
    assert_close(got, oracles.unravel(oracles.scores(s.problem), s.problem.params))


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (1, 2, 3), (2, 5)])
def test_batches_of_other_sizes(sizes: tuple[int, ...]) -> None:
    """A plan made on one example, where layouts look alike, is not trusted later."""
    s = case(_time_first, normal(5, 3, 4, seed=1), **two())
    estimator = diagonal(s)
    for size in sizes:
        problem = oracles.Problem(
            s.problem.forward,
            s.problem.params,
            s.problem.inputs[:size],
            s.problem.family,
            s.batch.targets[:size],
        )
        truth = oracles.unravel(oracles.diagonal(problem, "empirical"), problem.params)
        batch = ff.Batch(s.batch.inputs[:size], targets=s.batch.targets[:size])
        assert_close(estimator(s.params, s.buffers, batch).values, truth, what=f"B={size}")


@pytest.mark.parametrize("name", ["sorted_rows", "rolled_rows", "experts"])
@pytest.mark.parametrize("start", ["one_example", "equal_examples"])
def test_rows_in_another_order_after_a_plan_that_could_not_see_it(name: str, start: str) -> None:
    """A single example, or equal ones, look the same in every order."""
    s = cases.ALL[name].setup()
    estimator = ff.per_sample_gradients(s.model, s.likelihood)
    rows = slice(0, 1) if start == "one_example" else [0] * 4
    estimator(s.params, s.buffers, ff.Batch(s.batch.inputs[rows], targets=s.batch.targets[rows]))
    try:
        got = estimator(*s.args)
    except ff.FisherError:
        return
    assert_close(got, oracles.unravel(oracles.scores(s.problem), s.problem.params))


def test_a_parameter_that_the_first_batch_does_not_use() -> None:
    """An unused parameter has zero Fisher only as long as it is unused."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(torch.tanh(h + F.linear(x, m.extra) if bool((x < 0).any()) else h))

    s = case(forward, x(), extra=normal(4, 4), **two())
    estimator = diagonal(s)
    positive = s.batch.inputs.abs()
    estimator(s.params, s.buffers, ff.Batch(positive, targets=s.batch.targets))
    problem = oracles.Problem(
        s.problem.forward, s.problem.params, -positive, s.problem.family, s.problem.targets
    )
    truth = oracles.unravel(oracles.diagonal(problem, "empirical"), problem.params)
    batch = ff.Batch(-positive, targets=s.batch.targets)
    right_or_refused(lambda: estimator(s.params, s.buffers, batch), truth)


@pytest.mark.parametrize("lengths", [(1, 3), (3, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize(
    "name",
    [
        "linear_3d",
        "linear_4d",
        "embedding",
        "embedding_pooled",
        "layer_norm",
        "scale_vector",
        "chunked",
        "flattened_batch",
        "flattened_batch_time_first",
        "time_first",
        "positional_embedding",
        "positional_parameter_sliced",
        "recurrent_reuse",
        "tied_embedding_and_head",
        "class_token",
        "mha",
        "mha_time_first",
        "mha_bias_kv",
        "mha_learned_query",
        "encoder_layer",
        "encoder_layer_time_first",
        "grouped_query_attention",
        "lstm",
        "mask_token",
    ],
)
def test_sequences_of_other_lengths(name: str, lengths: tuple[int, int]) -> None:
    """A plan made for one length of the inputs, one above all, answers for every other."""
    s = cases.ALL[name].setup()
    estimator = ff.per_sample_gradients(s.model, s.likelihood)
    for length in lengths:
        inputs = s.batch.inputs[:, :length]
        plain = oracles.Problem(s.problem.forward, s.problem.params, inputs, s.problem.family)
        shape = (inputs.shape[0], *plain.positions())
        targets = torch.arange(math.prod(shape)).reshape(shape) % 3
        problem = dataclasses.replace(plain, targets=targets)
        got = estimator(s.params, s.buffers, ff.Batch(inputs, targets=targets))
        assert_close(got, oracles.unravel(oracles.scores(problem), s.problem.params))


@pytest.mark.parametrize(
    ("name", "size"), [("conv1d_stride_padding", 7), ("conv2d_same", 5), ("conv3d", 4)]
)
def test_images_of_other_sizes(name: str, size: int) -> None:
    s = cases.ALL[name].setup()
    estimator = ff.per_sample_gradients(s.model, s.likelihood)
    for width in (size, size - 1, size):
        inputs = s.batch.inputs[..., :width]
        problem = oracles.Problem(
            s.problem.forward, s.problem.params, inputs, s.problem.family, s.problem.targets
        )
        got = estimator(s.params, s.buffers, ff.Batch(inputs, targets=s.batch.targets))
        assert_close(got, oracles.unravel(oracles.scores(problem), s.problem.params))
