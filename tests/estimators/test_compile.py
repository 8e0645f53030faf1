"""`torch.compile(fullgraph=True)` gives what eager gives, for every estimator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cases
import fisherfn as ff
from cases import Net, normal
from fisherfn import testing
from fisherfn.testing import Problem

# torch's own compiler still imports parts of TorchScript
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Token and place embedding, one pre-norm attention block, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.place = nn.Embedding(6, 4)
        self.first = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 4)
        self.second = nn.RMSNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, t: Tensor) -> Tensor:
        h = self.embed(t) + self.place(torch.arange(t.shape[1]))
        q, k, v = (
            part.unflatten(-1, (2, 2)).transpose(1, 2)
            for part in self.qkv(self.first(h)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        h = h + self.mlp(self.second(h))
        return F.linear(h, self.embed.weight)


def _module(kind: str) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    if kind == "mlp":
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        return net, normal(3, 4), ()
    if kind == "cnn":
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.GroupNorm(1, 3),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
        return net, normal(3, 2, 4, 4), ()
    if kind == "general":
        net = Net(
            lambda m, x: m.head(F.linear(x, torch.cat([m.a, m.b]))).tanh(),
            a=normal(2, 4),
            b=normal(2, 4, seed=1),
            head=nn.Linear(4, 3),
        )
        return net, normal(3, 4), ()
    return Block(), cases.tokens(2, 3, high=5), (3,)


def problem(kind: str, unit: str = "example") -> Problem:
    with cases.seeded(4):
        module, inputs, positions = _module(kind)
    module = module.double().eval()
    for number, param in enumerate(module.parameters()):
        param.data.add_(0.2 * normal(*param.shape, seed=number))
    model, params, buffers = ff.functional(module)
    shape = (inputs.shape[0], *positions)
    targets = torch.arange(inputs.shape[0] * max(1, sum(positions))).reshape(shape) % 3
    mask = torch.ones(shape, dtype=torch.bool)
    mask.reshape(-1)[1] = False
    weights = 0.5 + torch.arange(inputs.shape[0], dtype=torch.float64)
    if unit == "position":
        weights = weights.reshape(-1, *[1] * len(positions)).expand(shape).contiguous()
    return Problem(
        kind,
        model,
        ff.likelihoods.categorical(),
        params,
        buffers,
        ff.Batch(inputs, targets=targets, mask=mask, weights=weights),
        positions,
        False,
        unit,
    )


def of_examples() -> list[Any]:
    """The members that count examples; those with Kronecker blocks take ten seconds each."""
    found = []
    for name, m in testing.ESTIMATORS.items():
        slow = "kfac" in name and name not in ("kfac-mc-example", "ekfac-mc-example")
        if m.unit == "example":
            found.append(pytest.param(m, marks=pytest.mark.slow) if slow else m)
    return found


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
@pytest.mark.parametrize("member", of_examples(), ids=str)
def test_compiled_is_eager(member: testing.Member, kind: str) -> None:
    testing.compiled(member, problem(kind))


@pytest.mark.parametrize("fisher", ["exact", "mc", "curvature_prop", "empirical"])
def test_compiled_is_eager_for_positions(fisher: str) -> None:
    member = testing.ESTIMATORS[f"diagonal-{fisher}-position"]
    testing.compiled(member, problem("transformer", "position"))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_compiled_is_eager_on_the_general_path(fisher: str) -> None:
    member = testing.ESTIMATORS[f"diagonal-{fisher}-example"]
    testing.compiled(member, problem("general"))


@pytest.mark.slow  # needs a C++ compiler, and seconds of its time
@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_inductor(kind: str) -> None:
    testing.compiled(testing.ESTIMATORS["diagonal-mc-example"], problem(kind), backend="inductor")


def _constants() -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """Estimators that know tensors besides their arguments."""
    factor, scale = torch.linspace(0.5, 2.0, 3).double(), torch.tensor([0.5, 2.0]).double()

    def model(params: dict[str, Tensor], buffers: object, x: Tensor) -> Tensor:
        return (x * factor) @ params["w"]

    params = {"w": torch.linspace(-1.0, 1.0, 6).double().reshape(3, 2)}
    batch = ff.Batch(torch.linspace(0.0, 1.0, 15).double().reshape(5, 3))
    likelihood, plain = ff.likelihoods.gaussian(scale), ff.likelihoods.gaussian(0.5)
    basis = ff.kfac(model, plain)(params, {}, batch)
    based = ff.ekfac(model, plain, basis)
    made = {
        "closure": ff.diagonal(model, plain),
        "scale": ff.diagonal(model, likelihood),
        "basis": based,
        "together": ff.statistics(based=based, diag=ff.diagonal(model, plain)),
    }
    return {name: (e, params) for name, e in made.items()}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["closure", "scale", "basis", "together"])
def test_tensors_that_are_no_arguments_are_constants(name: str, backend: str) -> None:
    estimator: Any
    estimator, params = _constants()[name]
    batch = ff.Batch(torch.linspace(0.0, 2.0, 15).double().reshape(5, 3))
    compiled = torch.compile(estimator, fullgraph=True, backend=backend)
    got, want = compiled(params, {}, batch), estimator(params, {}, batch)
    testing.assert_close(ff.tree.leaves(got), ff.tree.leaves(want))


def test_a_whole_pipeline_compiles() -> None:
    """Estimate, merge, damp, solve and measure in one graph."""
    p = problem("mlp")
    estimator = ff.diagonal(p.model, p.likelihood, fisher="mc")
    gradient = {k: torch.ones_like(v) for k, v in p.params.items()}

    def pipeline(params: object, one: ff.Batch, two: ff.Batch, key: Tensor) -> object:
        merged = ff.merge(
            estimator(params, p.buffers, one, key=key), estimator(params, p.buffers, two, key=key)
        )
        step = merged.solve(gradient, damping=1e-3)
        return step, merged.trace()

    other = dataclasses.replace(p.batch, inputs=p.batch.inputs + 1.0)
    key = ff.random.key(1)
    want = pipeline(p.params, p.batch, other, key)
    got = torch.compile(pipeline, fullgraph=True, backend="aot_eager")(
        p.params, p.batch, other, key
    )
    testing.assert_close(list(got), list(want))  # type: ignore[call-overload]


@pytest.mark.parametrize("bad", ["targets", "weights", "masked"])
def test_bad_values_poison_a_compiled_result(bad: str) -> None:
    """What eager raises for, a compiled graph answers with NaN, never with a plausible number."""
    p = problem("mlp")
    changes = {
        "targets": {"targets": torch.tensor([0, 7, 1]), "mask": None},
        "weights": {"weights": torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64), "mask": None},
        "masked": {"mask": torch.zeros(3, dtype=torch.bool)},
    }
    spoiled = dataclasses.replace(p, batch=dataclasses.replace(p.batch, **changes[bad]))
    member = testing.ESTIMATORS["diagonal-empirical-example"]
    with pytest.raises(ff.FisherError):
        member.run(spoiled)
    fast = torch.compile(member.build(p), fullgraph=True, backend="aot_eager")
    got = member.call(fast, spoiled)
    assert all(v.isnan().all() for v in got.values.values())


def test_new_parameters_and_labels_do_not_recompile() -> None:
    p = problem("mlp")
    member = testing.ESTIMATORS["diagonal-mc-example"]
    fast = torch.compile(member.build(p), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            params = {k: v + 0.1 * seed for k, v in p.params.items()}
            moved = dataclasses.replace(p, params=params)
            got = member.call(fast, moved, ff.random.key(seed))
            testing.assert_close(got, member.run(moved, ff.random.key(seed)))
