"""Trees of tensors and their algebra (`ff.tree`).

A tree is any nesting of dicts, lists, tuples, NamedTuples and registered dataclasses with tensors
as leaves. Two conventions hold throughout, because torch and optree differ on both:

- dict entries keep their **insertion order** (optree sorts keys unless told otherwise), so that
  `ravel` agrees with `torch.nn.utils.parameters_to_vector`;
- **None is no leaf** (torch's own pytree makes it one).

Trees are matched by key, whatever the order, and the result has the structure of the first; other
structures raise TreeMismatchError (optree would broadcast). Everything here runs under
`torch.compile(fullgraph=True)`, `torch.vmap` and `torch.func.grad`; sums are float32 at least.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import optree
import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError, at
from fisherfn.core.nodes import register_dataclass_node as register_dataclass_node

NAMESPACE = "fisherfn"

Tree: TypeAlias = Any
TreeDef: TypeAlias = optree.PyTreeSpec
Distribution: TypeAlias = Literal["normal", "rademacher", "uniform"]


def _keep_insertion_order() -> None:
    """Enter optree's insertion-ordered mode for good."""
    context = optree.dict_insertion_ordered(True, namespace=NAMESPACE)
    context.__enter__()
    # The context ends when it is collected. This, its only reference, goes after the last exit
    # handler: no key is ever sorted, and nothing fails in a half-dismantled interpreter.
    atexit.register(id, context)


_keep_insertion_order()


def flatten(tree: Tree) -> tuple[list[Any], TreeDef]:
    """Return the leaves, in insertion order, and the structure of a tree.

    >>> flatten({"b": 1, "a": (2, None)})[0]
    [1, 2]
    """
    found, treedef = optree.tree_flatten(tree, namespace=NAMESPACE)
    return found, treedef


def unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Tree:
    """Return the tree with this structure and these leaves; undoes `flatten`.

    >>> unflatten(structure({"b": 0, "a": [0]}), ["x", "y"])
    {'b': 'x', 'a': ['y']}
    """
    return optree.tree_unflatten(treedef, leaves)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves of a tree, in insertion order."""
    return [tree] if isinstance(tree, Tensor) else optree.tree_leaves(tree, namespace=NAMESPACE)


def structure(tree: Tree) -> TreeDef:
    """Return the structure of a tree, which compares by `==`."""
    return optree.tree_structure(tree, namespace=NAMESPACE)


def paths(tree: Tree) -> list[str]:
    """Return a readable path for each leaf: keys, field names and positions joined by "/".

    >>> paths({"0.weight": 1, "encoder": {"0.bias": 2, "more": [3, 4]}})
    ['0.weight', 'encoder/0.bias', 'encoder/more/0', 'encoder/more/1']
    """
    found = optree.tree_flatten_with_path(tree, namespace=NAMESPACE)[0]
    return ["/".join([str(entry) for entry in path]) for path in found]


def unique_paths(caller: str, tree: Tree) -> list[str]:
    """Return `paths(tree)`, for functions that name leaves by them.

    Raises:
        TreeMismatchError: Two leaves have one path, such as those of the keys "a/b" and "a", "b".

    >>> unique_paths("f", {"a": {"b": 1}, "c": 2})
    ['a/b', 'c']
    """
    found = paths(tree)
    if len(set(found)) != len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise TreeMismatchError(
            f"{caller}: expected a path of its own for every leaf, got two leaves at {twice!r}. "
            "Rename one: keys are joined by '/', and 1 reads like '1'."
        )
    return found


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Return the tree of f(leaf of `tree`, corresponding leaf of each tree of `rest`).

    Raises:
        TreeMismatchError: The structures differ; the message has the path.

    >>> map(lambda a, b: a + b, {"x": 1, "y": 2}, {"y": 20, "x": 10})
    {'x': 11, 'y': 22}
    """
    if isinstance(tree, Tensor) and all(isinstance(other, Tensor) for other in rest):
        return f(tree, *rest)
    first, treedef = flatten(tree)
    columns = [first]
    for position, other in enumerate(rest, start=2):
        aligned = _align(treedef, other)
        if aligned is None:
            raise TreeMismatchError(
                f"tree.map: expected trees of one structure, got {_difference(other, tree)} in "
                f"tree number {position}. Build it with ff.tree.zeros_like of the first."
            )
        columns.append(aligned)
    return unflatten(treedef, [f(*xs) for xs in zip(*columns, strict=True)])


def _align(treedef: TreeDef, other: Tree) -> list[Any] | None:
    """Return the leaves of `other` in the order of `treedef`, or None where structures differ."""
    theirs = structure(other)
    # flatten_up_to accepts whole subtrees where a leaf is expected; equal counts rule that out.
    if theirs.num_leaves != treedef.num_leaves or theirs.num_nodes != treedef.num_nodes:
        return None
    try:
        return treedef.flatten_up_to(other)
    except (ValueError, TypeError):
        return None


def _difference(got: Tree, like: Tree) -> str:
    """Say in words where the structures of two trees first differ."""
    ours, theirs = paths(got), paths(like)
    missing = [path or "the root" for path in theirs if path not in set(ours)]
    extra = [path or "the root" for path in ours if path not in set(theirs)]
    if missing and extra:
        return f"a leaf at {extra[0]} and none at {missing[0]}"
    if missing:
        return f"no leaf at {missing[0]}"
    if extra:
        return f"an unexpected leaf at {extra[0]}"
    return f"the containers {structure(got)}, needs {structure(like)}"


def check_like(
    caller: str, name: str, got: Tree, like: Tree, dtype: bool = False, *, like_name: str = "params"
) -> None:
    """Check that one tree has the structure and leaf shapes of another.

    Args:
        caller: The public function on whose behalf this is checked.
        name: What the caller calls the tree.
        got: The tree to check.
        like: The tree it has to match; its leaves are tensors.
        dtype: Whether the data types have to match as well.
        like_name: What the caller calls the tree to match.

    Raises:
        TreeMismatchError: They differ; the message has the path and both shapes.

    >>> check_like("fisher_vp", "tangents", {"w": torch.ones(3, 4)}, {"w": torch.ones(4, 3)})
    Traceback (most recent call last):
    fisherfn.core.errors.TreeMismatchError: fisher_vp: expected tangents like params, got shape \
(3, 4) at w, needs (4, 3). Build it with ff.tree.zeros_like(params).
    """
    wanted, treedef = flatten(like)
    aligned = _align(treedef, got)
    problem: str | None = None
    if aligned is None:
        problem = _difference(got, like)
    else:
        for index, want in enumerate(wanted):
            problem = _leaf_problem(aligned[index], want, dtype)
            if problem is not None:
                path = paths(like)[index]
                problem = problem.format(at=at(path))
                break
    if problem is not None:
        raise TreeMismatchError(
            f"{caller}: expected {name} like {like_name}, got {problem}. "
            f"Build it with ff.tree.zeros_like({like_name})."
        )


def _leaf_problem(leaf: Any, want: Tensor, dtype: bool) -> str | None:
    """Return what is wrong with a leaf, with "{at}" where its place belongs, or None."""
    if not isinstance(leaf, Tensor):
        return f"a {type(leaf).__name__}{{at}}, needs a tensor of shape {tuple(want.shape)}"
    if leaf.shape != want.shape:
        return f"shape {tuple(leaf.shape)}{{at}}, needs {tuple(want.shape)}"
    if dtype and leaf.dtype != want.dtype:
        return f"{leaf.dtype}{{at}}, needs {want.dtype}"
    return None


def _entrywise(caller: str, f: Callable[[Tensor, Tensor], Tensor], a: Tree, b: Tree) -> Tree:
    def one(x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape:
            check_like(f"tree.{caller}", "a second tree", b, a, like_name="the first")
        return f(x, y)

    return map(one, a, b)


def add(a: Tree, b: Tree) -> Tree:
    """Return a + b, leaf by leaf; leaves are not broadcast."""
    return _entrywise("add", torch.add, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """Return a − b, leaf by leaf; leaves are not broadcast."""
    return _entrywise("sub", torch.sub, a, b)


def mul(a: Tree, b: Tree) -> Tree:
    """Return the elementwise product, leaf by leaf; leaves are not broadcast."""
    return _entrywise("mul", torch.mul, a, b)


def scale(tree: Tree, c: float | Tensor) -> Tree:
    """Return c times a tree; `c` is a number or a 0-d tensor.

    >>> scale({"w": torch.ones(2)}, 3.0)
    {'w': tensor([3., 3.])}
    """
    return map(lambda leaf: leaf * c, tree)


def axpy(c: float | Tensor, x: Tree, y: Tree) -> Tree:
    """Return c·x + y, leaf by leaf; `c` is a number or a 0-d tensor.

    >>> axpy(3.0, [torch.ones(2)], [torch.ones(2)])
    [tensor([4., 4.])]
    """
    return _entrywise("axpy", lambda a, b: a * c + b, x, y)


def zeros_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Return zeros of the same structure and shapes, of the leaves' dtypes unless given."""
    return map(lambda leaf: torch.zeros_like(leaf, dtype=dtype), tree)


def ones_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Return ones of the same structure and shapes, of the leaves' dtypes unless given."""
    return map(lambda leaf: torch.ones_like(leaf, dtype=dtype), tree)


def random_like(key: Tensor, tree: Tree, dist: Distribution = "normal") -> Tree:
    """Return independent draws; leaf number i is drawn from `random.fold_in(key, i)`.

    Args:
        key: int64 [*K, 2]; the result is like `tree`, with leaves [*K, *leaf.shape].
        tree: Tree of floating-point tensors; gives structure, shapes, dtypes and devices.
        dist: "normal" (standard), "rademacher" (±1) or "uniform" (in [0, 1)).

    Raises:
        OptionError: No such distribution.

    >>> random_like(random.key(0), {"w": torch.zeros(4)}, "rademacher")["w"].abs()
    tensor([1., 1., 1., 1.])
    """
    draws = {"normal": random.normal, "rademacher": random.rademacher, "uniform": random.uniform}
    if dist not in draws:
        raise OptionError(
            f"tree.random_like: expected dist to be one of {list(draws)}, got {dist!r}. "
            "Choose one of them."
        )
    found, treedef = flatten(tree)
    keys = [random.fold_in(key, i).to(leaf.device) for i, leaf in enumerate(found)]
    drawn = [draws[dist](k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, found, strict=True)]
    return unflatten(treedef, drawn)


def _wide(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which to add up these tensors: float32 or wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _together(parts: list[Tensor]) -> Tensor:
    """Stack 0-d tensors of different dtypes and devices."""
    if not parts:
        return torch.zeros(0)
    return torch.stack([part.to(parts[0].device, _wide(*parts)) for part in parts])


def dot(a: Tree, b: Tree) -> Tensor:
    """Return the inner product Σ a·b of two trees, a 0-d tensor of float32 or wider.

    >>> dot([torch.ones(2), torch.ones(3)], [torch.ones(2), 2 * torch.ones(3)])
    tensor(8.)
    """
    parts = _entrywise("dot", lambda x, y: (x.to(_wide(x, y)) * y.to(_wide(x, y))).sum(), a, b)
    return _together(leaves(parts)).sum()


def norm(tree: Tree) -> Tensor:
    """Return the Euclidean norm of a tree, a 0-d tensor of float32 or wider."""
    parts = [torch.linalg.vector_norm(leaf, dtype=_wide(leaf)) for leaf in leaves(tree)]
    return torch.linalg.vector_norm(_together(parts))


def size(tree: Tree) -> int:
    """Return the number of scalars in a tree."""
    return sum([leaf.numel() for leaf in leaves(tree)])


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Return all scalars of a tree as one vector (insertion order, row-major), and the way back.

    The vector has the leaves' common (promoted) dtype. `unravel` takes a vector of that dtype back
    to the dtypes of the leaves; one of another dtype keeps it, so that float32 results about
    bfloat16 parameters stay float32. It raises ShapeError for any other shape.

    >>> vector, unravel = ravel({"b": torch.zeros(2), "a": torch.ones(1)})
    >>> vector, unravel(vector)
    (tensor([0., 0., 1.]), {'b': tensor([0., 0.]), 'a': tensor([1.])})
    """
    found, treedef = flatten(tree)
    shapes, dtypes = [leaf.shape for leaf in found], [leaf.dtype for leaf in found]
    vector = torch.cat([leaf.reshape(-1) for leaf in found]) if found else torch.zeros(0)
    sizes, common = [leaf.numel() for leaf in found], vector.dtype

    def unravel(flat: Tensor) -> Tree:
        if flat.shape != (sum(sizes),):
            raise ShapeError(
                f"tree.ravel: expected a vector of shape ({sum(sizes)},) to unravel, got "
                f"{tuple(flat.shape)}. Use torch.vmap(unravel) for a batch of vectors."
            )
        parts = zip(flat.split(sizes), shapes, dtypes, strict=True)
        restored = [(p.reshape(s), t if flat.dtype == common else flat.dtype) for p, s, t in parts]
        return unflatten(treedef, [part.to(dtype) for part, dtype in restored])

    return vector, unravel
