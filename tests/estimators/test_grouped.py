"""Traces over groups against loops over single examples, for every rule and every kind of group."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cases
import fisherfn as ff
import oracles
from fisherfn.groups import GroupSpec
from fisherfn.testing import assert_close

NAMES = list(cases.ALL)
Shape = tuple[int, ...]


# ---- groups, and independently of the library the number of each entry's group -------------------


def along(axis: int, run: int = 1) -> tuple[Callable[..., GroupSpec], Callable[..., int]]:
    """Runs along an axis; tensors without that axis are one group."""

    def spec(shape: Shape) -> GroupSpec:
        return ff.groups.rows(shape, axis=axis, bucket=run) if axis < len(shape) else whole(shape)

    return spec, lambda index, shape: index[axis] // run if axis < len(shape) else 0


def whole(shape: Shape) -> GroupSpec:
    return ff.groups.whole(shape)


def labelled(shape: Shape) -> GroupSpec:
    """Three classes along the last axis, one of which is empty where the axis is short."""
    if not shape:
        return GroupSpec("label", shape, None, 3, "whole", order=(1,))
    order = tuple((5 * i) % 3 for i in range(shape[-1]))
    return GroupSpec("label", shape, len(shape) - 1, 3, order=order)


def blocked(shape: Shape) -> GroupSpec:
    """Two blocks along the first axis and channels along the second."""
    if len(shape) < 2 or shape[0] % 2:
        return ff.groups.elements(shape)
    return ff.groups.channels(shape, axis=1, blocks=2)


def _number_of_element(index: Shape, shape: Shape) -> int:
    number = 0
    for i, n in zip(index, shape, strict=True):
        number = number * n + i
    return number


def _number_in_blocks(index: Shape, shape: Shape) -> int:
    if len(shape) < 2 or shape[0] % 2:
        return _number_of_element(index, shape)
    return (index[0] // (shape[0] // 2)) * shape[1] + index[1]


GROUPINGS: dict[str, tuple[Callable[[Shape], GroupSpec], Callable[[Shape, Shape], int]]] = {
    "outputs": along(0),
    "inputs": along(1),
    "pairs_of_columns": along(1, 2),
    "whole": (whole, lambda index, shape: 0),
    "labelled": (labelled, lambda index, shape: (5 * index[-1]) % 3 if shape else 1),
    "blocks": (blocked, _number_in_blocks),
    "elements": (ff.groups.elements, _number_of_element),
}


def sums(values: Tensor, spec: GroupSpec, number: Callable[[Shape, Shape], int]) -> Tensor:
    """Add up the entries of each group, one at a time."""
    shape = tuple(values.shape)
    total = [0.0] * spec.num_groups
    places = itertools.product(*(range(n) for n in shape))
    for index, value in zip(places, values.flatten().tolist(), strict=True):
        total[number(index, shape)] += value
    return torch.tensor(total, dtype=torch.float64)


@functools.cache
def setup(name: str) -> cases.Setup:
    return cases.ALL[name].setup()


def truth(name: str, fisher: str) -> dict[str, Tensor]:
    found = oracles.rows(setup(name).problem, fisher)
    diagonal = (found.weights.unsqueeze(1) * found.scores.square()).sum(0) / found.count
    return oracles.unravel(diagonal, setup(name).problem.params)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_every_kind(name: str) -> None:
    s = setup(name)
    want = truth(name, "empirical")
    for kind, (make, number) in GROUPINGS.items():
        specs = {path: make(tuple(p.shape)) for path, p in s.params.items()}
        got = ff.grouped(s.model, s.likelihood, specs, fisher="empirical")(*s.args)
        wanted = {path: sums(want[path], specs[path], number) for path in specs}
        assert_close(got.values, wanted, cases.ALL[name].rtol, kind)
        reduced = ff.groups.reduce(want, specs)
        assert_close(reduced, wanted, 1e-10, f"reduce, {kind}")


@pytest.mark.parametrize("name", [*cases.LAYERS, *cases.ATTENTION])
def test_inferred_groups_of_the_exact_fisher(name: str) -> None:
    s = setup(name)
    module = s.model if hasattr(s.model, "module") else None
    specs = ff.groups.infer(s.params, module)
    got = ff.grouped(s.model, s.likelihood, specs)(*s.args)
    diagonal = ff.diagonal(s.model, s.likelihood)(*s.args)
    want = {path: total(t, specs[path]) for path, t in diagonal.values.items()}
    assert_close(got.values, want, cases.ALL[name].rtol)
    assert got.count == diagonal.count


def total(values: Tensor, spec: GroupSpec) -> Tensor:
    """Add up the entries of each group by the index of the spec, which has tests of its own."""
    index = torch.as_tensor(spec.index()).expand(values.shape)
    zero = torch.zeros(spec.num_groups, dtype=torch.float64)
    return zero.index_add(0, index.reshape(-1), values.reshape(-1))


# ---- language models -----------------------------------------------------------------------------


@functools.cache
def language(name: str) -> cases.Setup:
    return cases.LANGUAGE[name].setup()


@pytest.mark.parametrize("unit", ["example", "position"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_masked", "t5"])
def test_heads_channels_and_rows_of_language_models(name: str, unit: str) -> None:
    s = language(name)
    specs = ff.groups.infer(s.params, s.model)
    assert not specs.unknown
    want = oracles.unravel(oracles.diagonal(s.problem, "empirical", unit), s.problem.params)
    got = ff.grouped(s.model, s.likelihood, specs, fisher="empirical", unit=unit)(*s.args)
    expected = {path: total(t, specs[path]) for path, t in want.items()}
    assert_close(got.values, expected, cases.LANGUAGE[name].rtol)
    by_layer = ff.groups.layers(s.params)
    layers = ff.grouped(s.model, s.likelihood, by_layer, fisher="empirical", unit=unit)(*s.args)
    sums = ff.groups.totals(got.values, specs)
    assert_close(layers.values, {k: t.reshape(1) for k, t in sums.items()}, 1e-6)


# ---- draws, units, batches -----------------------------------------------------------------------


def test_standard_errors_are_those_of_the_draws() -> None:
    s = setup("mlp")
    specs = ff.groups.infer(s.params, s.model)
    key, draws = ff.random.key(4), 6
    got = ff.grouped(s.model, s.likelihood, specs, fisher="mc", num_samples=draws)(*s.args, key=key)
    outputs = s.model(s.params, s.buffers, s.batch.inputs)
    one = ff.grouped(s.model, s.likelihood, specs, fisher="empirical")
    found = []
    for sample in range(draws):
        keys = ff.random.fold_in(ff.random.fold_in(key, torch.arange(len(outputs))), sample)
        batch = ff.Batch(s.batch.inputs, targets=s.likelihood.sample(outputs, keys))
        found.append(one(s.params, s.buffers, batch).values)
    assert got.stderr is not None
    for path in specs:
        values = torch.stack([f[path] for f in found])
        assert_close(got.values[path], values.mean(0))
        assert_close(got.stderr[path], values.std(0) / draws**0.5)


@pytest.mark.parametrize("name", ["mlp", "linear_3d_pooled", "tied_embedding_and_head", "conv2d"])
@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
def test_duplicating_the_batch_changes_nothing(name: str, fisher: str) -> None:
    s = setup(name)
    specs = ff.groups.infer(s.params, s.model if hasattr(s.model, "module") else None)
    ids = torch.arange(len(s.batch.targets))

    def repeated(times: int) -> ff.Batch:
        def again(t: Tensor) -> Tensor:
            return torch.cat([t] * times)

        return ff.Batch(again(s.batch.inputs), targets=again(s.batch.targets), ids=again(ids))

    estimator = ff.grouped(s.model, s.likelihood, specs, fisher=fisher)
    key = ff.random.key(2) if fisher == "mc" else None
    once = estimator(s.params, s.buffers, repeated(1), key=key)
    for times in (2, 5):
        many = estimator(s.params, s.buffers, repeated(times), key=key)
        assert many.count == times * once.count
        for path, value in once.values.items():
            scale = value.abs().max()
            assert ((many.values[path] - value).abs() <= 1e-12 * scale).all(), path


def test_together_with_a_diagonal_from_one_backward() -> None:
    s = setup("linear_3d_pooled")
    specs = ff.groups.infer(s.params, s.model, rules=[("bias", "tensor")])
    key = ff.random.key(1)
    groups = ff.grouped(s.model, s.likelihood, specs, fisher="mc")
    diagonal = ff.diagonal(s.model, s.likelihood, fisher="mc")
    both = ff.statistics(groups=groups, diagonal=diagonal, loss=True)
    found = both(*s.args, key=key)
    assert_close(found["groups"], groups(*s.args, key=key))
    reduced = ff.groups.reduce(found["diagonal"].values, specs)
    assert_close(found["groups"].values, reduced)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*s.args, key=key)
    assert type(compiled["groups"]) is ff.Grouped
    assert compiled["groups"].groups == found["groups"].groups
    assert_close(compiled["groups"], found["groups"])


def test_labelled_pools_across_layers() -> None:
    s = setup("mlp")
    specs = ff.groups.infer(s.params, s.model)
    labels = {
        path: ["even" if g % 2 == 0 else "odd" for g in range(spec.num_groups)]
        for path, spec in specs.items()
        if spec.kind == "channel"
    }
    pooled = ff.groups.relabel(specs, labels, into="parity")
    fine = ff.grouped(s.model, s.likelihood, specs)(*s.args)
    got = ff.grouped(s.model, s.likelihood, pooled)(*s.args)
    want = ff.groups.regroup(fine.values, specs, labels, into="parity")
    assert_close(got.values, {name: want[name] for name in got.values})
    assert_close(got.trace(), fine.trace())
    F = torch.compile(ff.grouped(s.model, s.likelihood, pooled), fullgraph=True, backend="eager")
    assert_close(F(*s.args).values, got.values)


def test_folding_over_batches() -> None:
    s = setup("mlp")
    specs = ff.groups.infer(s.params, s.model)
    estimator = ff.grouped(s.model, s.likelihood, specs, fisher="empirical")
    rows = [ff.Batch(s.batch.inputs[i : i + 1], s.batch.targets[i : i + 1]) for i in range(4)]
    folded, _ = ff.states.accumulate(estimator, s.params, s.buffers, rows)
    assert_close(folded, estimator(*s.args))


# ---- what it costs -------------------------------------------------------------------------------


def costs(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Multiplications of groups and of the diagonal, by parameter."""
    s = setup(name)
    specs = ff.groups.infer(s.params, s.model)
    estimators = (
        ff.grouped(s.model, s.likelihood, specs),
        ff.diagonal(s.model, s.likelihood),
    )
    groups, diagonal = (
        {row.path: row.multiplications for row in ff.explain(e)(*s.args).rows} for e in estimators
    )
    return groups, diagonal


def test_explain_counts_what_groups_cost() -> None:
    # 3 examples, 6 positions, 4 inputs, 5 outputs: through positions it would be 3 * 6² * (4 + 5)
    groups, diagonal = costs("linear_3d_pooled")
    assert groups["layer.weight"] == diagonal["layer.weight"] == 3 * 6 * 4 * 5
    assert (groups["head.weight"], diagonal["head.weight"]) == (3 * (5 + 3), 3 * 5 * 3)
    # 2 positions, 24 inputs, 20 outputs
    groups, diagonal = costs("linear_3d_short_wide")
    assert groups["layer.weight"] == 3 * 2**2 * (24 + 20)
    assert diagonal["layer.weight"] == 3 * 2 * 24 * 20
    # a convolution has its own patches, a tied table no cheaper way than its parts
    groups, diagonal = costs("conv2d")
    assert groups["layer.weight"] == diagonal["layer.weight"]


# ---- bad input -----------------------------------------------------------------------------------


def test_groups_that_do_not_fit() -> None:
    s = setup("mlp")
    specs = dict(ff.groups.infer(s.params, s.model))
    with pytest.raises(ff.OptionError, match=r"grouped: expected groups to be a mapping from path"):
        ff.grouped(s.model, s.likelihood, list(specs))  # type: ignore[arg-type]
    with pytest.raises(ff.OptionError, match=r"grouped: expected a GroupSpec, got str at '0.wei"):
        ff.grouped(s.model, s.likelihood, {**specs, "0.weight": "channel"})  # type: ignore[dict-item]
    fewer = {path: spec for path, spec in specs.items() if path != "2.bias"}
    with pytest.raises(ff.TreeMismatchError, match=r"grouped: expected a spec for every leaf, got"):
        ff.grouped(s.model, s.likelihood, fewer)(*s.args)
    more = {**specs, "9.bias": ff.groups.elements((2,))}
    with pytest.raises(ff.TreeMismatchError, match=r"a leaf for every spec, got none at '9.bias'"):
        ff.grouped(s.model, s.likelihood, more)(*s.args)
    wrong = {**specs, "0.weight": ff.groups.channels((4, 5))}
    with pytest.raises(ff.TreeMismatchError, match=r"shape \(4, 5\), got shape \(5, 4\) at '0.we"):
        ff.grouped(s.model, s.likelihood, wrong)(*s.args)
    with pytest.raises(ff.OptionError, match=r"grouped: expected fisher= to be one of"):
        ff.grouped(s.model, s.likelihood, specs, fisher="true")
