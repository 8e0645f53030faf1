"""Bad input: a clear error of one family that says what, got, where and what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import cases
import fisherfn as ff
from cases import normal
from cases.small import MEMBERS, OBSERVING, B, C, T, changed, diagonal, problem
from fisherfn import testing


@pytest.fixture(autouse=True)
def seeded_layers() -> Iterator[None]:
    """Layers are initialised in the tests themselves."""
    with cases.seeded(0):
        yield


# ---- data: the same for every estimator ----------------------------------------------------------

BAD_BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "float_mask": ({"mask": torch.ones(B, T)}, r"mask.*bool"),
    "integer_mask": ({"mask": torch.ones(B, T, dtype=torch.int64)}, r"mask.*bool"),
    "mask_shape": ({"mask": torch.ones(B, T + 1, dtype=torch.bool)}, r"mask.*\(3, 3\)"),
    "mask_of_examples_without_axes": ({"mask": torch.ones(B, dtype=torch.bool)}, r"mask.*\(3,\)"),
    "everything_masked": ({"mask": torch.zeros(B, T, dtype=torch.bool)}, r"mask"),
    "negative_weights": ({"weights": torch.tensor([1.0, -1.0, 1.0])}, r"weights.*-1"),
    "nan_weights": ({"weights": torch.tensor([1.0, float("nan"), 1.0])}, r"weights.*nan"),
    "infinite_weights": ({"weights": torch.tensor([1.0, float("inf"), 1.0])}, r"weights.*inf"),
    "zero_weights": ({"weights": torch.zeros(B)}, r"weight"),
    "weights_shape": ({"weights": torch.ones(B + 1)}, r"weights.*\(4,\)"),
    "weights_of_positions": (
        {"weights": torch.ones(B, T)},
        r"weights.*'example'.*\(3, 2\)",
    ),
    "ids_float": ({"ids": torch.arange(B).float()}, r"ids.*int64"),
    "ids_shape": ({"ids": torch.arange(B + 1)}, r"ids.*\(4,\)"),
    "positions_float": ({"positions": torch.ones(B, T)}, r"positions.*bool"),
    "empty": (
        {"inputs": torch.zeros(0, T, 4), "targets": torch.zeros(0, T, dtype=torch.int64)},
        r"(?i)example",
    ),
    "ragged": (
        {"inputs": (normal(B, T, 4), normal(B + 1, T, 4)), "targets": None},
        r"(?i)(leading|examples).*4|4.*(leading|examples)",
    ),
    "inputs_without_values": (
        {"inputs": torch.empty(B, T, 4, device="meta")},
        r"meta .* at inputs",
    ),
    "mask_elsewhere": (
        {"mask": torch.ones(B, T, dtype=torch.bool, device="meta")},
        r"on cpu.* on meta at mask",
    ),
    "weights_elsewhere": (
        {"weights": torch.ones(B, device="meta")},
        r"on cpu.* on meta at weights",
    ),
    "list_of_numbers": ({"inputs": [[0.0] * 4] * B}, r"inputs"),
    "no_inputs": ({"inputs": None}, r"inputs"),
}


NOTHING_COUNTS = ("everything_masked", "zero_weights")


@pytest.mark.parametrize(
    ("member", "bad"),
    [
        (member, bad)
        for member in MEMBERS
        for bad in BAD_BATCHES
        # a result of each example's own divides by no count
        if member.result not in ("rows", "pairs") or bad not in NOTHING_COUNTS
    ],
    ids=str,
)
def test_bad_batch(member: testing.Member, bad: str) -> None:
    fields, message = BAD_BATCHES[bad]
    with pytest.raises(ff.FisherError, match=message) as caught:
        member.run(changed(**fields))
    assert_helpful(caught.value, member)


@pytest.mark.parametrize("name", ["per_sample_gradients", "score_norms", "score_gram"])
def test_scores_of_what_is_all_masked_are_zero(name: str) -> None:
    got = testing.ESTIMATORS[name].run(changed(mask=torch.zeros(B, T, dtype=torch.bool)))
    assert all((leaf == 0).all() for leaf in ff.tree.leaves(got))


BAD_TARGETS: dict[str, tuple[Any, str]] = {
    "out_of_range": (torch.full((B, T), C), r"targets.*\b3\b|\b3\b.*targets"),
    "negative": (torch.full((B, T), -100), r"-100"),
    "float": (torch.zeros(B, T), r"targets.*float|float.*targets"),
    "shape": (torch.zeros(B, T + 1, dtype=torch.int64), r"targets.*\(3, 3\)"),
    "one_hot": (torch.zeros(B, T, C, dtype=torch.int64), r"targets.*\(3, 2, 3\)"),
    "missing": (None, r"targets"),
    "elsewhere": (
        torch.zeros(B, T, dtype=torch.int64, device="meta"),
        r"on cpu.* on meta at targets",
    ),
}


@pytest.mark.parametrize("bad", BAD_TARGETS)
@pytest.mark.parametrize("member", OBSERVING, ids=str)
def test_bad_targets(member: testing.Member, bad: str) -> None:
    targets, message = BAD_TARGETS[bad]
    with pytest.raises(ff.FisherError, match=message) as caught:
        member.run(changed(targets=targets))
    assert_helpful(caught.value, member)


def test_ignored_targets_are_refused_with_the_way_to_mask_them() -> None:
    targets = problem().batch.targets.clone()
    targets[0, 1] = -100
    with pytest.raises(ff.DataError, match=r"-100.*\[0, 1\].*ignore"):
        diagonal(changed(targets=targets))
    mask = ff.Batch.ignore(targets, -100)
    diagonal(changed(targets=targets, mask=mask))


@pytest.mark.parametrize("fisher", ["exact", "mc", "curvature_prop"])
def test_targets_need_not_exist_where_they_are_not_observed(fisher: str) -> None:
    p = changed(targets=None)
    key = None if fisher == "exact" else ff.random.key(0)
    got = ff.diagonal(p.model, p.likelihood, fisher=fisher)(*p.args, key=key)
    assert got.trace() > 0


@pytest.mark.parametrize("where", ["params", "inputs"])
def test_nan_never_gives_a_plausible_number(where: str) -> None:
    p = problem()
    if where == "inputs":
        inputs = p.batch.inputs.clone()
        inputs[1, 0, 0] = float("nan")
        p = changed(inputs=inputs)
    else:
        params = dict(p.params)
        name = next(iter(params))
        params[name] = params[name].clone()
        params[name][0, 0] = float("nan")
        p = dataclasses.replace(p, params=params)
    for fisher in ("exact", "empirical", "mc", "curvature_prop"):
        key = ff.random.key(0) if fisher in ("mc", "curvature_prop") else None
        estimator = ff.diagonal(p.model, p.likelihood, fisher=fisher)
        try:
            got = estimator(*p.args, key=key)
        except ff.FisherError:
            continue
        assert got.trace().isnan()


def assert_helpful(error: Exception, member: testing.Member) -> None:
    """What was called, what was expected, what came, and a second sentence with what to do."""
    text = str(error)
    function = getattr(member.transformation, "__name__", "")
    # what a member calls speaks for itself: `statistics` of others, bases, matrices of products
    names = [function, "diagonal", "gradient_moments", "block_diagonal", "statistics", "Batch"]
    names += ["kfac", "implicit"]
    assert any(text.startswith(name) for name in names if not name.startswith("_")), text
    assert "expected" in text, text
    assert "got" in text, text
    assert text.rstrip().endswith("."), text
    assert text.count(". ") >= 1, text


def test_names_that_the_module_does_not_have() -> None:
    """Nothing would read such a parameter, and its Fisher information would look like zero."""
    base = problem()
    prefixed = {f"module.{name}": p for name, p in base.params.items()}
    estimator = ff.diagonal(base.model, base.likelihood)
    with pytest.raises(ff.TreeMismatchError, match=r"'module\.0\.weight'.*look like '0\.weight'"):
        estimator(prefixed, base.buffers, base.batch)
    with pytest.raises(ff.TreeMismatchError, match=r"buffers to be a mapping.*got NoneType"):
        estimator(base.params, None, base.batch)
    with pytest.raises(ff.TreeMismatchError, match=r"params to be a mapping.*got list"):
        estimator(list(base.params.values()), base.buffers, base.batch)


def test_parameters_that_are_missing_or_of_another_shape() -> None:
    """What is missing is not read from the module, and nothing is broadcast to fit."""
    base = problem()
    estimator = ff.diagonal(base.model, base.likelihood)
    first = next(iter(base.params))
    some = {name: p for name, p in base.params.items() if name != first}
    with pytest.raises(ff.TreeMismatchError, match=rf"got none at '{first}'.*select="):
        estimator(some, base.buffers, base.batch)
    other = {**base.params, first: base.params[first][:1]}
    with pytest.raises(ff.TreeMismatchError, match=rf"shape \(\d+, \d+\), got .* at '{first}'"):
        estimator(other, base.buffers, base.batch)


def test_a_module_that_has_grown_knows_its_new_names() -> None:
    base = problem()
    module: Any = getattr(base.model, "module")  # noqa: B009
    module.append(nn.Linear(C, C, dtype=torch.float64))
    grown = {**base.params, **{f"3.{n}": p for n, p in module[3].named_parameters()}}
    assert base.model(grown, base.buffers, base.batch.inputs).shape == (B, T, C)
