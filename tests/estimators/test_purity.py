"""Estimators change nothing, keep nothing and look at nothing but their arguments."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import fisherfn as ff
from fisherfn import testing
from fisherfn.testing import networks

MEMBERS = list(testing.ESTIMATORS.values())


def problem(kind: str, unit: str = "example", size: int = 3) -> testing.Problem:
    network = networks.build(kind, 5, 2, 3)
    model, params, buffers = ff.functional(network.module)
    inputs = network.inputs(size, 3)
    targets = torch.randint(
        3, (size, *network.positions), generator=torch.Generator().manual_seed(0)
    )
    return testing.Problem(
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


@pytest.mark.parametrize("kind", ["sequence", "unknown"])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_purity(member: testing.Member, kind: str) -> None:
    testing.purity(member, problem(kind, member.unit))


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_no_grad_and_parameters_that_require_grad(member: testing.Member) -> None:
    plain = problem("tied", member.unit)
    want = member.run(plain)
    wanting = dataclasses.replace(
        plain, params={k: v.clone().requires_grad_() for k, v in plain.params.items()}
    )
    testing.assert_close(member.run(wanting), want)
    with torch.no_grad():
        testing.assert_close(member.run(wanting), want)
    assert all(p.grad is None for p in wanting.params.values())


def test_inference_mode() -> None:
    plain = problem("mlp")
    member = testing.ESTIMATORS["diagonal-exact-example"]
    want = member.run(plain)
    with torch.inference_mode():
        testing.assert_close(member.run(plain), want)


def test_module_is_not_touched() -> None:
    """No hooks, no gradients, no new attributes, and its parameters need not be those passed in."""
    with cases.seeded(0):
        module = cases.ALL["classifier_3c3d"].build().model.eval()
    before = copy.deepcopy(module.state_dict())
    names = {n: set(vars(m)) for n, m in module.named_modules()}
    model, params, buffers = ff.functional(module)
    inputs = cases.normal(3, 2, 6, 6)
    batch = ff.Batch(inputs, targets=torch.tensor([0, 1, 2]))
    doubled = {k: 2 * v for k, v in params.items()}
    estimator = ff.diagonal(model, ff.likelihoods.categorical())
    one = estimator(params, buffers, batch)
    two = estimator(doubled, buffers, batch)
    assert not torch.equal(one.trace(), two.trace())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    for name, inner in module.named_modules():
        assert set(vars(inner)) == names[name]
        assert not inner._forward_hooks
        assert not inner._backward_hooks
        assert not inner._forward_pre_hooks
    assert all(p.grad is None for p in module.parameters())


def test_results_do_not_depend_on_earlier_calls() -> None:
    """A plan made for one batch is not used on another that it does not fit."""
    network = networks.build("sequence", 5, 4, 3)
    model, params, buffers = ff.functional(network.module)
    shared = ff.diagonal(model, ff.likelihoods.categorical(), fisher="empirical")
    for size, length in ((3, 2), (1, 2), (5, 2), (2, 4), (3, 2), (4, 4), (1, 1)):
        inputs = networks.tokens(size + length, size, length)
        targets = networks.tokens(size * length, size, length) % 3
        batch = ff.Batch(inputs, targets=targets)
        fresh_model, *_ = ff.functional(copy.deepcopy(network.module))
        fresh = ff.diagonal(fresh_model, ff.likelihoods.categorical(), fisher="empirical")
        testing.assert_close(
            shared(params, buffers, batch).values, fresh(params, buffers, batch).values
        )


def test_one_estimator_with_trees_of_other_shapes() -> None:
    def model(params: dict[str, Tensor], buffers: object, inputs: Tensor) -> Tensor:
        return inputs @ params["w"]

    estimator = ff.diagonal(model, ff.likelihoods.gaussian(1.0))
    for width in (2, 3, 2):
        inputs = cases.normal(4, width)
        got = estimator({"w": cases.normal(width, 2)}, {}, ff.Batch(inputs))
        want = inputs.square().mean(0).unsqueeze(1).expand(-1, 2)
        testing.assert_close(got.values["w"], want)


def test_estimator_is_frozen_and_says_what_it_is() -> None:
    plain = problem("mlp")
    estimator = ff.diagonal(plain.model, plain.likelihood, fisher="mc", num_samples=2)
    assert estimator.model is plain.model
    assert estimator.likelihood == plain.likelihood
    assert estimator.options["fisher"] == "mc"
    assert estimator.options["num_samples"] == 2
    with pytest.raises((AttributeError, TypeError)):
        estimator.model = None  # type: ignore[misc]


def counted(plain: testing.Problem) -> tuple[testing.Problem, list[int]]:
    calls = [0]

    def model(params: object, buffers: object, inputs: object) -> Tensor:
        calls[0] += 1
        return plain.model(params, buffers, inputs)

    return dataclasses.replace(plain, model=model), calls


@pytest.mark.parametrize("name", [m.name for m in MEMBERS if "position" not in m.name])
def test_one_forward_pass_once_the_plan_is_known(name: str) -> None:
    member = testing.ESTIMATORS[name]
    watched, calls = counted(problem("sequence"))
    estimator = member.build(watched)
    member.call(estimator, watched)
    calls[0] = 0
    member.call(estimator, watched)
    assert calls[0] == 1


def test_statistics_equals_the_separate_estimators_with_one_forward_pass() -> None:
    watched, calls = counted(problem("sequence"))
    model, likelihood = watched.model, watched.likelihood
    parts: dict[str, Any] = {
        "mc": ff.diagonal(model, likelihood, fisher="mc", num_samples=2),
        "exact": ff.diagonal(model, likelihood, fisher="exact"),
        "blocks": ff.block_diagonal(model, likelihood, fisher="empirical"),
        "matrix": ff.dense(model, likelihood, fisher="curvature_prop"),
        "positions": ff.diagonal(model, likelihood, fisher="empirical", unit="position"),
        "moments": ff.gradient_moments(model, likelihood),
        "scores": ff.per_sample_gradients(model, likelihood),
        "norms": ff.score_norms(model, likelihood),
        "gram": ff.score_gram(model, likelihood),
    }
    together = ff.statistics(**parts)
    key = ff.random.key(9)
    got = together(*watched.args, key=key)
    calls[0] = 0
    again = together(*watched.args, key=key)
    assert calls[0] == 1
    assert list(got) == list(parts)
    keyed = ("mc", "matrix")
    for name, estimator in parts.items():
        want = estimator(*watched.args, key=key if name in keyed else None)
        testing.assert_close(got[name], want, what=name)
        testing.assert_close(again[name], want, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_narrow_models_give_wide_results(member: testing.Member, dtype: torch.dtype) -> None:
    plain = problem("sequence", member.unit)
    narrow = dataclasses.replace(plain, params={k: v.to(dtype) for k, v in plain.params.items()})
    exact = dataclasses.replace(plain, params={k: v.double() for k, v in narrow.params.items()})
    got, want = member.run(narrow), member.run(exact)
    bound = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    if member.keyed and dtype != torch.float32:
        return _only_wide(got)  # a label may fall on the other side of a rounded probability
    for path, a, b in zip(
        ff.tree.paths(got), ff.tree.leaves(got), ff.tree.leaves(want), strict=True
    ):
        assert a.dtype == _wide_dtype(path, a)
        assert (a.double() - b).norm() <= bound * b.norm() + 1e-12
    return None


def _only_wide(result: object) -> None:
    for path, leaf in zip(ff.tree.paths(result), ff.tree.leaves(result), strict=True):
        assert leaf.dtype == _wide_dtype(path, leaf)
        assert leaf.isfinite().all()


def _wide_dtype(path: str, leaf: Tensor) -> torch.dtype:
    """Entries are float32, counts float64: float32 cannot count beyond 2**24."""
    fields = path.split("/")
    count = leaf.ndim == 0 and ("rows" in fields[:-1] or fields[-1] == "count")
    return torch.float64 if count else torch.float32


def test_half_precision_does_not_underflow() -> None:
    """Squares of 1e-4 are zero in float16; the contraction is done in float32."""

    def model(params: dict[str, Tensor], buffers: object, inputs: Tensor) -> Tensor:
        return torch.nn.functional.linear(inputs, params["w"])

    inputs = 1e-4 * torch.ones(2, 3)
    batch = ff.Batch(inputs.half())
    got = ff.diagonal(model, ff.likelihoods.gaussian(1.0))(
        {"w": torch.zeros(2, 3, dtype=torch.float16)}, {}, batch
    )
    assert got.values["w"].dtype == torch.float32
    torch.testing.assert_close(got.values["w"], torch.full((2, 3), 1e-8), rtol=1e-2, atol=0.0)


def test_autocast_does_not_leak_into_contractions() -> None:
    """Under autocast the model computes in bfloat16; sums over examples are done in float32."""
    with cases.seeded(0):
        module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    for number, param in enumerate(module.parameters()):
        param.data = 0.5 * cases.normal(*param.shape, seed=number, dtype=torch.float32)
    model, params, buffers = ff.functional(module)
    size = 64
    batch = ff.Batch(cases.normal(size, 8, dtype=torch.float32), targets=cases.tokens(size, high=3))
    likelihood = ff.likelihoods.categorical()

    def loop() -> dict[str, Tensor]:
        """Squares of scores of single examples, each computed under autocast, summed exactly."""
        total = {k: torch.zeros(p.shape, dtype=torch.float64) for k, p in params.items()}
        for n in range(size):
            leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
            with torch.autocast("cpu", torch.bfloat16):
                logits = torch.func.functional_call(module, leaves, batch.inputs[n : n + 1])
            log_p = torch.log_softmax(logits.float(), -1)[0, batch.targets[n]]
            for k, g in zip(leaves, torch.autograd.grad(log_p, list(leaves.values())), strict=True):
                total[k] += g.double().square() / size
        return total

    want = loop()
    for estimator in (
        ff.diagonal(model, likelihood, fisher="empirical"),
        ff.diagonal(model, likelihood, fisher="empirical", chunk_size=7),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            got = estimator(params, buffers, batch).values
        for name, value in got.items():
            assert value.dtype == torch.float32
            # a sum that autocast had taken would have 8 bits
            assert (value.bfloat16().float() != value).float().mean() > 0.9
            # each score is rounded to 8 bits by the oracle's own backward pass; 64 of them average
            assert (value.double() - want[name]).norm() < 5e-3 * want[name].norm()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_copies_estimate_the_same_from_their_own_model(member: testing.Member, way: str) -> None:
    network = networks.build("mlp", 5, 2, 3)
    given = problem("mlp", member.unit)
    model = ff.functional(network.module)[0]
    estimator = member.build(dataclasses.replace(given, model=model))
    if not hasattr(estimator, "options"):
        estimator = ff.implicit(model, given.likelihood)  # the member is a function around it
    twin = copy.deepcopy(estimator) if way == "deepcopy" else pickle.loads(pickle.dumps(estimator))
    key = ff.random.key(0) if member.keyed else None
    assert dict(twin.options).keys() == dict(estimator.options).keys()
    assert twin.model is not estimator.model
    got, want = (e(*given.args, key=key) for e in (twin, estimator))
    if isinstance(want, ff.Implicit):
        copied = copy.deepcopy(want) if way == "deepcopy" else pickle.loads(pickle.dumps(want))
        got, want = copied.to_dense() + got.to_dense(), 2.0 * want.to_dense()
    testing.assert_close(got, want)
