"""Traps that are not a matter of one value: refusals, plans that no longer fit, and what is said.

The traps that have one right answer are cases of `test_rules.py` (tables in `cases/traps.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cases
import fisherfn as ff
import oracles
from cases import Net, normal
from cases.single import case, diagonal, part, right_or_refused, two, want, x
from fisherfn.testing import assert_close

# ---- refusals ------------------------------------------------------------------------------------


def _checkpointed(reentrant: bool) -> cases.Setup:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.sin(m.a(x))
        return m.b(checkpoint(lambda h: torch.tanh(m.c(h)), h, use_reentrant=reentrant))

    return case(forward, x(), c=part(nn.Linear, 4, 4), **two())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_with_the_way_out() -> None:
    s = _checkpointed(reentrant=True)
    for fisher in ("empirical", "exact"):
        with pytest.raises(ff.UnsupportedError, match=r"checkpoint.*disable"):
            diagonal(s, fisher)(*s.args)


def test_checkpointing_is_followed_or_refused() -> None:
    s = _checkpointed(reentrant=False)
    for fisher in ("empirical", "exact"):
        right_or_refused(lambda f=fisher: diagonal(s, f)(*s.args), want(s, fisher), "checkpoint")


def _mutated_activation(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(x)
    o = m.a(h)
    h.mul_(2.0)
    return m.b(torch.tanh(o + h))


def _mutated_after_scale(m: Any, x: Tensor) -> Tensor:
    h = torch.sin(x)
    o = h * m.s
    h.zero_()
    return m.b(torch.tanh(m.a(o)))


def _mutated_norm_input(m: Any, x: Tensor) -> Tensor:
    h = torch.sin(x)
    o = m.norm(h)
    h += 1.0
    return m.b(torch.tanh(m.a(o)))


@pytest.mark.parametrize(
    "forward", [_mutated_activation, _mutated_after_scale, _mutated_norm_input]
)
def test_an_input_changed_after_its_layer_is_refused_as_autograd_does(
    forward: Callable[..., Any],
) -> None:
    s = case(forward, x(), s=normal(4), norm=nn.LayerNorm(4), **two())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        oracles.scores(s.problem)
    with pytest.raises((ff.FisherError, RuntimeError), match=r"in.?place"):
        diagonal(s)(*s.args)


def _centred(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.tanh(h - h.mean(0)))


def _standardised(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.norm(m.a(x))))


def _attention_over_examples(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.softmax(h @ h.T, -1) @ h)


@pytest.mark.parametrize("forward", [_centred, _standardised, _attention_over_examples])
def test_examples_that_see_each_other_are_refused_or_taken_one_at_a_time(
    forward: Callable[..., Any],
) -> None:
    """No score of example n exists; at most that of a batch of one, as the oracle has it."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    if forward is _standardised:
        s = None
        with contextlib.suppress(ValueError):  # a batch of one has no variance
            s = case(forward, x(), norm=norm, **two())
        module = Net(forward, norm=norm, **two()).double().eval()
        model, params, buffers = ff.functional(module)
        batch = ff.Batch(x(), targets=torch.tensor([0, 1, 2, 0]))
        assert s is None
        with pytest.raises(ff.FisherError):
            ff.diagonal(model, ff.likelihoods.categorical(), fisher="empirical")(
                params, buffers, batch
            )
        return
    s = case(forward, x(), **two())
    for fisher in ("empirical", "exact"):
        right_or_refused(lambda f=fisher: diagonal(s, f)(*s.args), want(s, fisher))


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    """Functional dropout is not seen by looking at modules."""
    module = Net(lambda m, x: m.b(F.dropout(torch.tanh(m.a(x)), 0.5, training=True)), **two())
    model, params, buffers = ff.functional(module.double())
    batch = ff.Batch(x(), targets=torch.tensor([0, 1, 2, 0]))
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(ff.FisherError, match="deterministic"),
    ):
        ff.diagonal(model, ff.likelihoods.categorical(), fisher="empirical")(params, buffers, batch)


def test_buffers_that_the_model_changes_are_noticed() -> None:
    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a: Any = part(nn.Linear, 4, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1.0)
            return self.a(x) * (1.0 + self.seen)

    model, params, buffers = ff.functional(Counting().double())
    batch = ff.Batch(x(), targets=torch.tensor([0, 1, 2, 0]))
    before = {k: v.clone() for k, v in buffers.items()}
    estimator = ff.diagonal(model, ff.likelihoods.categorical(), fisher="empirical")
    with pytest.raises(ff.FisherError, match="seen"):
        estimator(params, buffers, batch)
    assert all(torch.equal(v, before[k]) for k, v in buffers.items())


def test_parameters_that_the_model_changes_are_noticed() -> None:
    model = lambda params, buffers, x: x @ params["w"].mul_(1.0)  # noqa: E731
    estimator = ff.diagonal(model, ff.likelihoods.categorical())
    for inference in (False, True):
        with torch.inference_mode(inference):
            args = {"w": normal(4, 3)}, {}, ff.Batch(x())
            with pytest.raises(
                ff.UnsupportedError, match=r"only reads its params, .*params\['w'\]"
            ):
                estimator(*args)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_that_are_rescaled_as_they_are_read(kind: type[nn.Module]) -> None:
    with cases.seeded(0):
        module = kind(5, 3, max_norm=0.1).double()
    model, params, buffers = ff.functional(module)
    before = params["weight"].clone()
    batch = ff.Batch(cases.tokens(4, 2, high=5))
    estimator = ff.diagonal(model, ff.likelihoods.gaussian(1.0))
    with pytest.raises(ff.UnsupportedError, match=r"max_norm=0\.1 at .* set max_norm to None"):
        estimator(params, buffers, batch)
    assert torch.equal(params["weight"], before)
    vars(module)["max_norm"] = None
    assert estimator(params, buffers, batch).trace() > 0


def test_inputs_that_the_model_changes_are_left_alone() -> None:
    module = Net(lambda m, x: m.b(torch.tanh(m.a(x.mul_(2.0)))), **two()).double()
    model, params, buffers = ff.functional(module)
    inputs = x()
    before = inputs.clone()
    estimator = ff.diagonal(model, ff.likelihoods.categorical())
    with contextlib.suppress(ff.FisherError, RuntimeError):
        estimator(params, buffers, ff.Batch(inputs))
    assert torch.equal(inputs, before)


def test_training_mode_switched_on_later_is_noticed() -> None:
    module = nn.Sequential(two()["a"], nn.Dropout(0.5), two()["b"]).double().eval()
    model, params, buffers = ff.functional(module)
    estimator = ff.diagonal(model, ff.likelihoods.categorical())
    estimator(params, buffers, ff.Batch(x()))
    module.train()
    with pytest.raises(ff.UnsupportedError, match=r"training mode"):
        estimator(params, buffers, ff.Batch(x()))


def test_functional_dropout_switched_on_later_is_noticed() -> None:
    """A module of one's own that reads its training flag, long after the plan was made."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = two()["a"], two()["b"]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(torch.tanh(self.a(x)), 0.5, training=self.training))

    module = Noisy().double().eval()
    model, params, buffers = ff.functional(module)
    estimator = ff.diagonal(model, ff.likelihoods.categorical())
    estimator(params, buffers, ff.Batch(x()))
    module.train()
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(ff.FisherError, match=r"dropout|eval"),
    ):
        estimator(params, buffers, ff.Batch(x()))


# ---- selection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["^a", r"weight$", lambda name, p: name.startswith("b")])
def test_selected_parameters_are_those_of_the_whole(select: Any) -> None:
    module = Net(lambda m, x: m.b(torch.tanh(m.a(x))), **two()).double()
    batch = ff.Batch(x(), targets=torch.tensor([0, 1, 2, 0]))
    likelihood = ff.likelihoods.categorical()
    model, params, buffers = ff.functional(module)
    whole = ff.dense(model, likelihood)(params, buffers, batch).to_dense()
    part_model, part, rest = ff.functional(module, select=select)
    assert 0 < len(part) < len(params)
    got = ff.dense(part_model, likelihood)(part, rest, batch).to_dense()
    keep = torch.cat([torch.full((p.numel(),), name in part) for name, p in params.items()])
    assert_close(got, whole[keep][:, keep])


def test_frozen_parameters_are_constants() -> None:
    module = Net(lambda m, x: m.b(torch.tanh(m.a(x))), **two()).double()
    module.a.requires_grad_(False)
    model, params, buffers = ff.functional(module)
    assert set(params) == {"b.weight", "b.bias"}
    batch = ff.Batch(x(), targets=torch.tensor([0, 1, 2, 0]))
    got = ff.diagonal(model, ff.likelihoods.categorical())(params, buffers, batch)
    assert set(got.values) == {"b.weight", "b.bias"}


def test_tied_parameters_come_once() -> None:
    s = cases.ALL["tied_embedding_and_head"].setup()
    assert list(s.params) == ["embed.weight", "mix.weight", "mix.bias"]


class _Unbatchable(torch.autograd.Function):
    """Doubles its input; its backward looks at a value, which no batched backward can."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        assert grads[0].sum().item() == grads[0].sum().item()
        return 2.0 * grads[0]


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_columns_that_cannot_go_together(fisher: str) -> None:
    """All columns of all parameters meet again, for statistics that join them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = torch.nn.Linear(2, 3).double(), torch.nn.Linear(3, 4).double()
        x = torch.randn(5, 2, dtype=torch.float64)
    params = {**{f"a.{n}": p.detach() for n, p in first.named_parameters()}}
    params |= {f"b.{n}": p.detach() for n, p in second.named_parameters()}

    def model(middle: Any) -> Any:
        linear = torch.nn.functional.linear
        return lambda p, b, x: linear(
            middle(linear(x, p["a.weight"], p["a.bias"])), p["b.weight"], p["b.bias"]
        )

    args, lik = (params, {}, ff.Batch(x)), ff.likelihoods.categorical()
    key = ff.random.key(0)
    got = ff.dense(model(_Unbatchable.apply), lik, fisher=fisher)(*args, key=key)
    want = ff.dense(model(lambda h: 2.0 * h), lik, fisher=fisher)(*args, key=key)
    torch.testing.assert_close(got.to_dense(), want.to_dense())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batching_rule_that_is_wrong_for_several_columns_is_not_used() -> None:
    """torch's rule for the backward of cdist mixes the columns up."""
    s = case(lambda m, x: -torch.cdist(m.a(x), m.centres), x(), a=two()["a"], centres=normal(3, 4))
    for fisher in ("exact", "empirical"):
        assert_close(diagonal(s, fisher)(*s.args).values, want(s, fisher), rtol=1e-8)
