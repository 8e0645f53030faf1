"""Saving and loading: exact round trips, and what has no place in a file."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fisherfn import io
from fisherfn.core import trees
from fisherfn.core.errors import OptionError, UnsupportedError
from fisherfn.curvature import (
    BlockDiagonal,
    Dense,
    Diagonal,
    GradientMoments,
    Layout,
    layer_groups,
)
from fisherfn.io import registry
from fisherfn.states import AccumulateState

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip
PARAMS = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "1/x": {"w": torch.ones(1)}}
LAYOUT = Layout.of(PARAMS)
N = torch.tensor(7.0, dtype=torch.float64)
DIAGONAL = Diagonal(PARAMS, N, trees.scale(PARAMS, 0.1), fisher="mc", unit="position")
RESULTS = [
    DIAGONAL,
    Diagonal(PARAMS, N),
    Dense(torch.eye(7), N, LAYOUT, fisher="empirical"),
    BlockDiagonal(
        {"0": torch.eye(6), "1": torch.ones(1, 1)}, N, LAYOUT,
        (("0", ("0.bias", "0.weight")), ("1", ("1/x/w",))),
    ),
    GradientMoments(N, PARAMS, trees.scale(PARAMS, 2.0)),
    AccumulateState(DIAGONAL, torch.tensor(3), torch.tensor(12)),
    AccumulateState({"a": DIAGONAL, "b": (DIAGONAL, None)}, torch.tensor(3), torch.tensor(12)),
    LAYOUT,
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.safetensors"


def identical(a: Any, b: Any) -> None:
    """Same classes, same containers, same bits."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        bits = [
            x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
            for x in (a, b)
        ]
        assert torch.equal(*bits)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            identical(x, y)
    elif hasattr(a, "__dataclass_fields__"):
        for name in a.__dataclass_fields__:
            identical(getattr(a, name), getattr(b, name))
    else:
        assert a == b or (math.isnan(a) and math.isnan(b))


def roundtrip(path: Path, obj: Any) -> Any:
    io.save(path, obj)
    return io.load(path)


@pytest.mark.parametrize("obj", RESULTS, ids=lambda obj: type(obj).__name__)
def test_results_and_states_come_back_as_they_were(path: Path, obj: Any) -> None:
    loaded = roundtrip(path, obj)
    identical(obj, loaded)
    if not isinstance(obj, Layout):
        assert trees.structure(obj) == trees.structure(loaded)


def test_loaded_results_answer(path: Path) -> None:
    for F in RESULTS[:4]:
        loaded = roundtrip(path, F)
        identical(loaded.solve(PARAMS, damping=0.1), F.solve(PARAMS, damping=0.1))
        identical((loaded + F).count, F.count + F.count)


def test_a_batch_of_results_comes_back(path: Path) -> None:
    many = trees.map(lambda x: torch.stack([x, x]), RESULTS[2])
    identical(roundtrip(path, many), many)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(path: Path, dtype: torch.dtype) -> None:
    tree = {"x": torch.tensor([[0, 1], [1, 0]]).to(dtype), "0-d": torch.tensor(1).to(dtype)}
    identical(roundtrip(path, {**tree, "none": torch.zeros(2, 0, dtype=dtype)})["x"], tree["x"])
    identical(roundtrip(path, tree), tree)


TENSORS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.sampled_from([(), (0,), (3,), (2, 2)]).map(
        lambda shape: torch.ones(shape).to(dtype)
    )
)
KEYS = st.one_of(st.text(max_size=5), st.integers(-3, 3), st.booleans())
VALUES = st.one_of(st.none(), st.text(max_size=3), st.integers(), st.floats(), st.booleans())
TREES = st.recursive(
    st.one_of(TENSORS, VALUES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=8,
)


@given(tree=TREES)
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    identical(roundtrip(tmp_path_factory.mktemp("io") / "tree", tree), tree)


def test_names_that_collide_or_are_reserved(path: Path) -> None:
    a, b, c = torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)
    tree = {"x/y": a, "x": {"y": b, "y#2": c}, "__metadata__": c, "": a, 1: a, "1": b, "über": c}
    identical(roundtrip(path, tree), tree)


def test_other_tools_find_readable_names(path: Path) -> None:
    io.save(path, DIAGONAL)
    found = safetensors.torch.load_file(path)
    assert sorted(found) == sorted(
        [
            "count",
            *[f"{f}/{k}" for f in ("values", "stderr") for k in ("0.weight", "0.bias", "1/x/w")],
        ]
    )
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["version"]) == ("fisherfn", "1")
    assert json.loads(header["content"])["class"] == "Diagonal"


def test_views_shared_memory_and_parameters(path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    tree = {"a": x, "view": x[0], "t": x.T, "expanded": torch.ones(1).expand(3), "again": x}
    identical(roundtrip(path, tree), tree)
    weight = nn.Parameter(torch.ones(2))
    loaded = roundtrip(path, {"w": weight, "y": 2 * weight})
    identical(loaded, {"w": torch.ones(2), "y": 2 * torch.ones(2)})
    assert not loaded["w"].requires_grad


def test_loaded_tensors_are_independent_of_the_file(path: Path) -> None:
    io.save(path, {"w": torch.ones(3)})
    loaded = io.load(path)
    loaded["w"].add_(1)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded["w"], torch.full((3,), 2.0))


def test_device(path: Path) -> None:
    io.save(path, DIAGONAL)
    assert io.load(path, device="cpu").count.device.type == "cpu"
    assert io.load(path, device=torch.device("meta")).count.device.type == "meta"


# --- classes --------------------------------------------------------------------------------------


class Saved(NamedTuple):
    x: Any
    y: Any


def test_registered_classes_are_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    pair = Saved(torch.ones(1), [None])
    with pytest.raises(
        UnsupportedError, match=r"got Saved at a\. Convert it, or register its class"
    ):
        io.save(path, {"a": pair})
    assert io.register(Saved) is Saved
    io.register(Saved)
    identical(roundtrip(path, {"a": pair}), {"a": pair})
    # A layout names the class of the parameters.
    dense = Dense(torch.eye(1), N, Layout.of(pair))
    identical(roundtrip(path, dense), dense)

    class Diagonal(NamedTuple):
        x: Any

    with pytest.raises(OptionError, match="a new class name, got 'Diagonal', which is taken"):
        io.register(Diagonal)
    for thing in (int, 3):
        with pytest.raises(OptionError, match="expected a dataclass or a NamedTuple, got"):
            io.register(thing)  # type: ignore[arg-type]


def test_unknown_classes_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
        io.register(Saved)
        io.save(path, Saved(1, 2))
    with pytest.raises(
        UnsupportedError, match=r"one of the classes \['Acc.*, got 'Saved'\. Import the package"
    ):
        io.load(path)


def test_what_a_file_holds_is_in_its_header(path: Path) -> None:
    io.save(path, AccumulateState(DIAGONAL, torch.tensor(3), torch.tensor(12)))
    found = io.describe(path)
    assert found["class"] == "AccumulateState"
    assert (found["fisher"], found["unit"], found["count"]) == ("mc", "position", 7.0)
    assert found["torch"] == torch.__version__
    io.save(path, PARAMS)
    assert io.describe(path)["class"] == "dict"
    assert "fisher" not in io.describe(path)


class Thing:
    pass


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"a": [Thing()]}, r"got Thing at a/0\."),
        ({"a": 1j}, r"got complex at a\."),
        (Thing(), r"got Thing\."),
        (
            {"a": torch.zeros(1, dtype=torch.complex64)},
            r"got torch\.complex64 of torch\.strided at a",
        ),
        ({"a": torch.eye(2).to_sparse()}, r"got torch\.float32 of torch\.sparse_coo at a\."),
        ({"a": torch.ones(1, device="meta")}, r"tensors with values, got one on meta .* at a\."),
    ],
)
def test_what_has_no_place_in_a_file_is_refused(path: Path, obj: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match="io.save: expected .*" + message):
        io.save(path, obj)
    assert not path.exists()


def test_keys_of_other_types_are_refused(path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"io.save: expected dict keys of type .* got 1\.5 at a\."
    ):
        io.save(path, {"a": {1.5: torch.ones(1)}})


def test_tensors_inside_of_transformations_are_refused(path: Path) -> None:
    def f(x: Tensor) -> Tensor:
        io.save(path, x)
        return x

    with pytest.raises(UnsupportedError, match="inside a transformation"):
        torch.vmap(f)(torch.ones(2))


def test_layer_groups_come_back(path: Path) -> None:
    groups = layer_groups(LAYOUT)
    assert roundtrip(path, list(groups)) == list(groups)
