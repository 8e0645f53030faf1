"""The store of tasks: immutable, exact, and the flat schema both ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from states.streams import STREAMS, count, tree
from states.test_ema import close, folded
from torch import Tensor, nn

import fisherfn as ff
from fisherfn import tasks
from fisherfn.core import trees
from fisherfn.core.errors import (
    DataError,
    FisherError,
    OptionError,
    TreeMismatchError,
    UnsupportedError,
)
from fisherfn.states import ema, every, welford, window
from fisherfn.tasks import TaskStore

PARAMS = tree(3)
F = ff.Diagonal(tree(0), count(0))


def grouped(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3)).double()
    model, params, buffers = ff.functional(net)
    fim = ff.grouped(model, ff.likelihoods.categorical(), ff.groups.infer(params, net))
    return fim(params, buffers, ff.Batch(torch.tensor([1, 5, seed])))


def test_every_change_gives_a_new_store() -> None:
    empty = TaskStore()
    one = empty.put("math", F, anchor=PARAMS)
    two = one.put("code", folded(welford(), [F, F])[1])
    assert (len(empty), list(one), list(two)) == (0, ["math"], ["math", "code"])
    assert two["math"] is F
    assert two.get("none", None) is None
    assert "math" in two
    assert "none" not in two
    assert list(two.clear("math")) == ["code"]
    assert "math" not in two.clear("math").anchors
    assert len(two.clear()) == 0
    assert list(two) == ["math", "code"]
    other = two.put("math", folded(ema(0.5), [F])[1])
    close(other.anchor("math"), PARAMS, 0.0)
    assert two["math"] is F


def test_an_anchor_does_not_move_with_the_parameters() -> None:
    params = {"w": torch.ones(2, requires_grad=True)}
    store = TaskStore().put("a", F, anchor=params)
    with torch.no_grad():
        params["w"].add_(1)
    assert torch.equal(store.anchor("a")["w"], torch.ones(2))
    assert not store.anchor("a")["w"].requires_grad


@pytest.mark.parametrize("transform", [ema(0.5), welford(), window(3), None])
def test_readings_and_leaves(transform: Any) -> None:
    members = [STREAMS["diagonal"](i) for i in range(3)]
    state = F if transform is None else folded(transform, members)[1]
    store = TaskStore().put("a", state)
    want = F if transform is None else transform.read(state)
    close(store.reading("a"), want, 0.0)
    assert torch.equal(store.leaf("a", "0.bias"), want.values["0.bias"])
    with pytest.raises(OptionError, match=r"TaskStore.leaf: .* got '0.bia', .* such as 0.bias"):
        store.leaf("a", "0.bia")


def test_readings_of_a_fold() -> None:
    def estimator(params: Any, buffers: Any, batch: ff.Batch, *, key: Any = None) -> Any:
        return F

    _, state = ff.states.accumulate(estimator, PARAMS, {}, [ff.Batch(torch.ones(1, 1))] * 2)
    close(TaskStore().put("a", state).reading("a").values, F.values, 1e-15)


def test_stores_merge() -> None:
    states = [folded(welford(), [STREAMS["diagonal"](i)])[1] for i in range(3)]
    a = TaskStore().put("x", states[0], anchor=PARAMS).put("y", states[1])
    b = TaskStore().put("x", states[2], anchor=PARAMS).put("z", states[1])
    for joined in (a.merge(b), ff.merge(a, b)):
        assert list(joined) == ["x", "y", "z"]
        close(joined["x"], ff.merge(states[0], states[2]), 0.0)
        close(joined.anchor("x"), PARAMS, 0.0)
    close(ff.merge(a, ff.empty_like(a)), a, 0.0)
    with pytest.raises(OptionError, match=r"one anchor for task 'x', got two .* at 0.weight"):
        a.merge(b.put("x", states[2], anchor=tree(9)))
    with pytest.raises(OptionError, match="expected a TaskStore, got dict"):
        a.merge({})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="expected two results of one class"):
        a.merge(TaskStore().put("x", F))


def test_stores_are_trees_and_files(tmp_path: Path) -> None:
    store = TaskStore().put("a", folded(ema(0.5), [F])[1], anchor=PARAMS).put("b", grouped())
    doubled = trees.map(lambda x: 2 * x, store)
    assert isinstance(doubled, TaskStore)
    close(doubled.anchor("a"), trees.scale(PARAMS, 2.0), 0.0)
    ff.io.save(tmp_path / "store", store)
    loaded = ff.io.load(tmp_path / "store")
    assert isinstance(loaded, TaskStore)
    close(loaded, store, 0.0)
    assert ff.io.describe(tmp_path / "store")["class"].endswith("TaskStore")


def test_flat_keys_of_diagonals_and_groups() -> None:
    store = TaskStore().put("math", F).put("code", grouped())
    flat = store.to_flat()
    assert set(flat) == {
        "math|0.weight|param",
        "math|0.bias|param",
        "code|0.weight|token",
        "code|1.weight|channel",
        "code|1.bias|bias",
        "code|2.weight|row",
        "code|2.bias|bias",
    }
    again = TaskStore.from_flat(flat, like=store)
    assert isinstance(again["code"], ff.Grouped)
    close(again, store, 0.0)
    other = TaskStore.from_flat({key: 2 * x for key, x in flat.items()}, like=store)
    close(other["math"].values, trees.scale(F.values, 2.0), 0.0)
    assert other["math"].count == F.count


def test_flat_keys_without_a_model_make_nothing_up() -> None:
    flat = TaskStore().put("math", F).put("code", grouped()).to_flat()
    store = TaskStore.from_flat(flat)
    assert isinstance(store["math"], dict)
    assert torch.equal(store["code"]["1.weight"]["channel"], flat["code|1.weight|channel"])
    assert torch.equal(store.leaf("code", "1.weight"), flat["code|1.weight|channel"])
    again = store.to_flat()
    assert list(again) == list(flat)
    assert all(torch.equal(again[key], x) for key, x in flat.items())


def test_plain_trees_are_flat_too() -> None:
    nested: dict[str, Any] = {"layer": {"w": torch.ones(2), "b": torch.zeros(1)}}
    store = TaskStore().put("a", nested)
    assert set(store.to_flat()) == {"a|layer/w|param", "a|layer/b|param"}
    close(TaskStore.from_flat(store.to_flat(), like=store), store, 0.0)


LEGACY = ("channel", "head", "head_row", "head_col", "head_fused", "token", "vocab_bucket")


@pytest.mark.parametrize("group", [*LEGACY, "row", "bias", "param", "behavioral_head", "tensor"])
def test_every_group_of_older_collections_is_read(group: str) -> None:
    flat = {f"math|0.weight|{group}": torch.arange(3.0), "math|0.bias|bias": torch.ones(2)}
    store = TaskStore.from_flat(flat)
    assert torch.equal(store.leaf("math", "0.weight"), flat[f"math|0.weight|{group}"])
    again = store.to_flat()
    assert list(again) == list(flat)
    assert all(torch.equal(again[key], x) for key, x in flat.items())


X = torch.ones(2)
STORE = TaskStore().put("a", {"w": X})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: STORE.get("b"), OptionError, r"get: expected one of the tasks \['a'\], got 'b'"),
        (lambda: STORE["b"], OptionError, "get: expected one of the tasks"),
        (lambda: STORE.clear("b"), OptionError, "get: expected one of the tasks"),
        (lambda: STORE.anchor("a"), OptionError, "anchor: expected a task with an anchor, got 'a'"),
        (lambda: STORE.put("a|b", F), OptionError, "put: expected the name of a task without '|'"),
        (lambda: STORE.put("", F), OptionError, "put: expected the name of a task"),
        (lambda: STORE.put("b", {"w": 1.0}), OptionError, "put: expected state .* got float at w"),
        (lambda: STORE.put("b", {}), OptionError, "put: expected state to hold at least one"),
        (lambda: STORE.put("b", F, anchor=[3]), OptionError, "expected anchor .* got int at 0"),
        (
            lambda: STORE.put("b", {"a|b": X}).to_flat(),
            OptionError,
            r"to_flat: expected names without '\|', .* got 'a\|b'",
        ),
        (
            lambda: STORE.put("b", STREAMS["dense"](0)).to_flat(),
            UnsupportedError,
            "to_flat: .* got Dense, which has no entry",
        ),
        (
            lambda: STORE.put("b", folded(every(2, ema(0.5), otherwise=ema(0.5)), [F])[1]).reading(
                "b"
            ),
            UnsupportedError,
            "expected a state of one average",
        ),
        (lambda: TaskStore.from_flat({"a_w": X}), DataError, "form .* got 'a_w'. Older keys"),
        (lambda: TaskStore.from_flat({"a||c": X}), DataError, r"form .* got 'a\|\|c'"),
        (lambda: TaskStore.from_flat({"a|w|rows": X}), DataError, r"groups .* got 'a\|w\|rows'"),
        (lambda: STORE.put("b", X).to_flat(), OptionError, "to_flat: .* got ''. Rename it"),
        (lambda: TaskStore.from_flat({"a|w|param": 1}), DataError, r"tensors, got int at 'a\|w"),  # type: ignore[arg-type]
        (
            lambda: TaskStore.from_flat({"b|w|param": X}, like=STORE),
            OptionError,
            r"expected the tasks of like=, \['a'\], got \['b'\]",
        ),
        (
            lambda: TaskStore.from_flat({"a|v|param": X}, like=STORE),
            OptionError,
            r"got some that has in addition 'a\|v\|param'",
        ),
        (
            lambda: TaskStore.from_flat({"a|w|param": torch.ones(3)}, like=STORE),
            TreeMismatchError,
            r"got \(3,\) at 'a\|w\|param', needs \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[FisherError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_everything_that_the_table_names_exists() -> None:
    assert tasks.__doc__ is not None
    for name in re.findall(r"\bff\.([a-z_.]+[a-z])", tasks.__doc__):
        thing: Any = ff
        for part in name.split("."):
            thing = getattr(thing, part)
    for name in re.findall(r"\b(?:store|TaskStore)\.([a-z_]+)", tasks.__doc__):
        assert hasattr(TaskStore, name)


def test_a_store_shows_its_tasks() -> None:
    store = TaskStore().put("a", F, anchor=PARAMS).put("b", {"w": X})
    assert repr(store) == "TaskStore(a: Diagonal with anchor, b: dict)"
    assert all(isinstance(x, Tensor) for x in trees.leaves(store))
