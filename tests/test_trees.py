"""Trees: order, None, matching by key, algebra, registration of dataclasses."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from fisherfn.core import random
from fisherfn.core import trees as tree
from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError


class Pair(NamedTuple):
    """A node that needs no registration."""

    first: Any
    second: Any


@dataclass(frozen=True)
class Result:
    """A node that has to be registered, and that refuses anything but tensors when built."""

    values: Any
    count: Tensor
    stderr: Any = None
    unit: str = "example"

    def __post_init__(self) -> None:
        if not isinstance(self.count, Tensor):
            raise TypeError(f"count must be a tensor, got {self.count!r}")


tree.register_dataclass_node(Result, ("values", "count", "stderr"), ("unit",))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return random.normal(random.key(seed), shape, dtype)


def params(seed: int = 0) -> dict[str, Tensor]:
    return {"1.weight": draw(3, 4, seed=seed), "0.bias": draw(4, seed=seed + 100)}


def result(seed: int = 0) -> Result:
    return Result(params(seed), torch.tensor(2.0, dtype=torch.float64))


def assert_same(got: Any, want: Any) -> None:
    assert tree.structure(got) == tree.structure(want)
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_dicts_keep_insertion_order_where_optree_alone_sorts() -> None:
    dicts = {"b": 1, "a": {"z": 2, "y": 3}}
    assert tree.leaves(dicts) == [1, 2, 3]
    assert tree.flatten(dicts)[0] == [1, 2, 3]
    assert list(tree.map(lambda x: -x, dicts)["a"].items()) == [("z", -2), ("y", -3)]
    assert optree.tree_leaves(dicts) == [3, 2, 1]  # type: ignore[arg-type]


def test_none_is_no_leaf() -> None:
    assert tree.leaves([1, None, {"a": None}]) == [1]
    assert tree.map(lambda x: x + 1, (1, None)) == (2, None)


def test_flatten_and_unflatten_are_inverse() -> None:
    t = {"b": [draw(2), Pair(draw(1), None)], "a": OrderedDict(z=draw(3), y=result())}
    leaves, treedef = tree.flatten(t)
    assert_same(tree.unflatten(treedef, leaves), t)
    assert treedef == tree.structure(t)


def test_paths_are_readable() -> None:
    t = {"0.weight": 1, "encoder": {"0.bias": 2, 3: [4, Pair(5, None)]}, "r": result()}
    assert tree.paths(t) == [
        "0.weight",
        "encoder/0.bias",
        "encoder/3/0",
        "encoder/3/1/0",
        "r/values/1.weight",
        "r/values/0.bias",
        "r/count",
    ]
    assert tree.paths(torch.ones(2)) == [""]


def test_map_matches_entries_by_key_and_keeps_the_order_of_the_first() -> None:
    got = tree.map(
        lambda a, b, c: a + b + c, {"x": 1, "y": 2}, {"y": 20, "x": 10}, {"y": 3, "x": 4}
    )
    assert got == {"x": 15, "y": 25}
    assert list(got) == ["x", "y"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"a": 1}, "no leaf at b/c"),
        ({"a": 1, "b": {"c": 1}, "d": 2}, "an unexpected leaf at d"),
        ({"a": 1, "e": {"c": 1}}, "a leaf at e/c and none at b/c"),
        ({"a": 1, "b": {"c": [1]}}, "a leaf at b/c/0 and none at b/c"),
        ({"a": 1, "b": 1}, "a leaf at b and none at b/c"),
        ({"a": None, "b": {"c": 1}}, "no leaf at a"),
        (7, "a leaf at the root and none at a"),
    ],
)
def test_map_refuses_other_structures_instead_of_broadcasting(other: Any, says: str) -> None:
    with pytest.raises(TreeMismatchError, match=rf"tree\.map: .* {says} in tree number 2\. Build"):
        tree.map(lambda a, b: a, {"a": 1, "b": {"c": 2}}, other)


def test_map_names_containers_that_differ() -> None:
    with pytest.raises(
        TreeMismatchError, match=r"the containers .*\[\*, \*\].*, needs .*\(\*, \*\)"
    ):
        tree.map(lambda a, b: a, (1, 2), [1, 2])


def test_static_fields_belong_to_the_structure() -> None:
    other = Result(params(), torch.tensor(1.0), unit="position")
    assert tree.structure(result()) != tree.structure(other)
    with pytest.raises(TreeMismatchError, match=r"'position'.*, needs .*'example'"):
        tree.add(result(), other)


@pytest.mark.parametrize(
    ("got", "says"),
    [
        ({"w": torch.ones(3, 4), "b": torch.ones(3)}, "shape (3, 4) at w, needs (4, 3)"),
        ({"b": 1.5, "w": torch.ones(4, 3)}, "a float at b, needs a tensor of shape (3,)"),
        ({"w": torch.ones(4, 3)}, "no leaf at b"),
    ],
)
def test_check_like_says_what_where_and_what_to_do(got: Any, says: str) -> None:
    message = (
        f"fisher_vp: expected tangents like params, got {says}. "
        "Build it with ff.tree.zeros_like(params)."
    )
    with pytest.raises(TreeMismatchError, match=f"^{re.escape(message)}$"):
        tree.check_like("fisher_vp", "tangents", got, {"w": torch.ones(4, 3), "b": torch.ones(3)})


def test_check_like_accepts_what_matches_by_key_and_dtype_on_request() -> None:
    like, got = params(), tree.zeros_like(params(), dtype=torch.float32)
    tree.check_like("f", "v", dict(reversed(list(got.items()))), like)
    with pytest.raises(
        TreeMismatchError,
        match=r"f: expected v like values, got torch.float32 at 1.weight, needs "
        r"torch.float64. Build it with ff.tree.zeros_like\(values\).",
    ):
        tree.check_like("f", "v", got, like, dtype=True, like_name="values")


def test_check_like_of_a_bare_tensor_has_no_path() -> None:
    with pytest.raises(TreeMismatchError, match=r"got shape \(2,\), needs \(3,\)\. "):
        tree.check_like("f", "v", torch.ones(2), torch.ones(3))


def test_algebra_is_leafwise() -> None:
    a, b = result(1), result(2)
    x, y = a.values["1.weight"], b.values["1.weight"]
    assert_same(tree.add(a, b).values["1.weight"], x + y)
    assert_same(tree.sub(a, b).values["1.weight"], x - y)
    assert_same(tree.mul(a, b).values["1.weight"], x * y)
    assert_same(tree.scale(a, 2.5).values["1.weight"], 2.5 * x)
    assert_same(tree.axpy(2.5, a, b).values["1.weight"], 2.5 * x + y)
    assert_same(tree.zeros_like(a).values["1.weight"], torch.zeros(3, 4, dtype=torch.float64))
    assert_same(tree.ones_like(a, torch.float32).values["0.bias"], torch.ones(4))
    assert tree.size(a) == 12 + 4 + 1


def test_a_tensor_factor_keeps_the_dtype_of_the_leaves() -> None:
    scaled = tree.scale({"w": torch.ones(3, dtype=torch.bfloat16)}, torch.tensor(2.0))
    assert scaled["w"].dtype == torch.bfloat16


def test_dot_and_norm_agree_with_the_ravelled_vectors() -> None:
    a, b = result(1), result(2)
    x, y = tree.ravel(a)[0], tree.ravel(b)[0]
    torch.testing.assert_close(tree.dot(a, b), x @ y, rtol=1e-14, atol=0)
    torch.testing.assert_close(tree.norm(a), x.norm(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_reductions_accumulate_in_float32_or_wider(dtype: torch.dtype) -> None:
    ones = {"w": torch.ones(70_000, dtype=dtype)}  # more than float16 holds, more than bf16 counts
    wide = torch.promote_types(dtype, torch.float32)
    assert_same(tree.dot(ones, ones), torch.tensor(70_000.0, dtype=wide))
    assert_same(tree.norm(ones).square().round(), torch.tensor(70_000.0, dtype=wide))


def test_reductions_of_mixed_dtypes_and_of_nothing() -> None:
    mixed = [torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float64)]
    assert_same(tree.dot(mixed, mixed), torch.tensor(5.0, dtype=torch.float64))
    assert_same(tree.norm([]), torch.tensor(0.0))
    assert_same(tree.dot({}, {}), torch.tensor(0.0))


def test_norm_has_a_gradient_at_zero() -> None:
    gradient = torch.func.grad(tree.norm)(tree.zeros_like(params()))
    assert_same(gradient, tree.zeros_like(params()))


def test_ravel_agrees_with_torch_and_goes_back() -> None:
    with torch.random.fork_rng(devices=[]):
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    t = {name: p.detach() for name, p in module.named_parameters()}
    vector, unravel = tree.ravel(t)
    assert_same(vector, nn.utils.parameters_to_vector(t.values()))
    assert_same(unravel(vector), t)


def test_ravel_of_mixed_dtypes_goes_back_to_each() -> None:
    t = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.ones(1, 1)}
    vector, unravel = tree.ravel(t)
    assert vector.dtype == torch.float32
    assert_same(unravel(vector), t)
    assert [x.dtype for x in tree.leaves(unravel(vector.double()))] == [torch.float64] * 2


def test_unravel_keeps_float32_results_about_bfloat16_parameters() -> None:
    _, unravel = tree.ravel({"w": torch.ones(2, dtype=torch.bfloat16)})
    assert unravel(torch.ones(2))["w"].dtype == torch.float32


def test_unravel_refuses_other_sizes_and_batches() -> None:
    vector, unravel = tree.ravel(params())
    with pytest.raises(ShapeError, match=r"shape \(16,\) to unravel, got \(15,\)\. Use torch.vmap"):
        unravel(vector[1:])
    with pytest.raises(ShapeError, match=r"got \(2, 16\)"):
        unravel(torch.stack([vector, vector]))
    assert torch.vmap(unravel)(torch.stack([vector, vector]))["1.weight"].shape == (2, 3, 4)


def test_ravel_of_nothing() -> None:
    vector, unravel = tree.ravel({"a": None})
    assert vector.shape == (0,)
    assert unravel(vector) == {"a": None}


@pytest.mark.parametrize("dist", ["normal", "rademacher", "uniform"])
def test_random_like_draws_leaf_i_from_the_folded_key(dist: Any) -> None:
    key, like = random.key(3), tree.map(torch.Tensor.float, result())
    got = tree.random_like(key, like, dist)
    assert tree.structure(got) == tree.structure(like)
    for i, (x, leaf) in enumerate(zip(tree.leaves(got), tree.leaves(like), strict=True)):
        assert_same(x, getattr(random, dist)(random.fold_in(key, i), leaf.shape, leaf.dtype))


def test_random_like_of_many_keys_is_a_stack() -> None:
    keys = random.split(random.key(0), 3)
    stacked = tree.random_like(keys, params())
    assert_same(stacked, torch.vmap(lambda k: tree.random_like(k, params()))(keys))
    assert_same(tree.map(lambda x: x[2], stacked), tree.random_like(keys[2], params()))


def test_random_like_refuses_unknown_distributions() -> None:
    with pytest.raises(OptionError, match=r"\['normal', 'rademacher', 'uniform'\], got 'cauchy'\."):
        tree.random_like(random.key(0), params(), "cauchy")  # type: ignore[arg-type]


def test_dataclasses_are_nodes_of_both_libraries() -> None:
    r = result()
    assert len(torch_pytree.tree_leaves(r)) == 3
    assert len(optree.tree_leaves(r)) == 3  # type: ignore[arg-type]
    assert len(optree.tree_leaves(r, namespace="torch")) == 3  # type: ignore[arg-type]
    maps: list[Any] = [torch_pytree.tree_map, optree.tree_map, tree.map]
    for tree_map in maps:
        doubled = tree_map(lambda x: 2 * x, r)
        assert type(doubled) is Result
        assert doubled.unit == "example"
        assert_same(doubled.count, 2 * r.count)


def test_dataclasses_have_key_paths_in_both_libraries() -> None:
    paths = [torch_pytree.keystr(p) for p, _ in torch_pytree.tree_flatten_with_path(result())[0]]
    assert paths == [".values['1.weight']", ".values['0.bias']", ".count"]
    accessor = optree.tree_accessors(result(), namespace=tree.NAMESPACE)[0]  # type: ignore[arg-type]
    assert accessor.codify("r") == "r.values['1.weight']"


def test_absent_data_fields_are_no_children_and_stay_absent() -> None:
    batched = Result(torch.ones(5, 2), torch.ones(5))
    got = torch.vmap(lambda r: tree.scale(r, 2.0))(batched)  # a None leaf would make vmap raise
    assert got.stderr is None
    assert_same(got.values, 2 * torch.ones(5, 2))
    full = Result(torch.ones(5), torch.ones(5), torch.ones(5))
    assert tree.structure(full) != tree.structure(batched)


def test_unflatten_does_not_validate() -> None:
    assert tree.map(lambda _: "leaf", result()).count == "leaf"
    assert torch_pytree.tree_map(lambda _: 0, result()).count == 0


def test_registration_refuses_other_classes_and_fields() -> None:
    @dataclass
    class Mutable:
        x: int

    @dataclass(frozen=True)
    class Two:
        x: int
        y: int

    for cls in (Mutable, int):
        with pytest.raises(
            OptionError, match=r"expected a frozen dataclass, got <class .*Decorate"
        ):
            tree.register_dataclass_node(cls, ["x"])
    for data, static in ((["x"], []), (["x", "y"], ["y"]), (["x", "z"], [])):
        with pytest.raises(OptionError, match=r"name each of \['x', 'y'\] once, got "):
            tree.register_dataclass_node(Two, data, static)


def everything(r: Result, key: Tensor) -> Any:
    vector, unravel = tree.ravel(r)
    noisy = tree.axpy(0.5, tree.random_like(key, r), r)
    both = {"sum": tree.add(r, unravel(2 * vector)), "none": None, "paths": tree.paths(r)[0]}
    tree.check_like("f", "noisy", noisy, r)
    return both["sum"], both["paths"], tree.norm(noisy), tree.dot(r, noisy), tree.zeros_like(r)


def stacked(call: Callable[..., Any]) -> Callable[[Result, Tensor], Any]:
    return lambda r, keys: torch.vmap(lambda *a: call(*a)[2:])(r, keys)


def test_everything_compiles_to_one_graph() -> None:
    fast = torch.compile(everything, fullgraph=True, backend="eager")
    got, want = fast(result(), random.key(1)), everything(result(), random.key(1))
    assert got[1] == want[1] == "values/1.weight"
    assert type(got[0]) is Result
    assert list(got[0].values) == ["1.weight", "0.bias"]
    assert_same((got[0], *got[2:]), (want[0], *want[2:]))


def test_everything_runs_under_vmap_and_its_compilation() -> None:
    many = tree.map(lambda *xs: torch.stack(xs), *[result(seed) for seed in range(3)])
    keys = random.split(random.key(1), 3)
    got = stacked(everything)(many, keys)
    for i in range(3):
        want = everything(tree.map(lambda x, i=i: x[i], many), keys[i])[2:]
        for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-14, atol=0)
    fast = torch.compile(stacked(everything), fullgraph=True, backend="eager")
    assert_same(fast(many, keys), got)


def test_gradients_have_the_structure_of_the_tree() -> None:
    r = result()
    gradient = torch.func.grad(lambda r: tree.dot(r, r))(r)
    assert_same(gradient, tree.scale(r, 2.0))


def test_a_mismatch_is_raised_while_compiling() -> None:
    def wrong(a: Any) -> Any:
        return tree.add(a, {"x": a["x"]})

    with pytest.raises(Exception, match="no leaf at y"):
        torch.compile(wrong, fullgraph=True, backend="eager")({"x": draw(2), "y": draw(2)})


# --- the permanent insertion order

SCRIPT = """
import atexit, gc, importlib, sys
from fisherfn.core import trees
atexit.register(lambda: print(trees.leaves({"b": 1, "a": 2})))
if "again" in sys.argv:
    for name in [name for name in sys.modules if name.startswith("fisherfn")]:
        del sys.modules[name]
    import fisherfn.core.trees as trees
    importlib.reload(trees)
    gc.collect()
    assert trees.leaves({"b": 1, "a": 2}) == [1, 2]
"""


@pytest.mark.parametrize("mode", ["once", "again"])
def test_the_order_lasts_until_exit_and_through_new_imports_in_silence(mode: str) -> None:
    # As a global, the open context made "Exception ignored in ... dict_insertion_ordered" at exit.
    command = [sys.executable, "-X", "dev", "-W", "error::UserWarning", "-c", SCRIPT, mode]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1, 2]\n", "")
