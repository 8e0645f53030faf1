"""How a vector of length P is cut into a tree like params.

`Dense` and `BlockDiagonal` keep matrices, not trees, so they carry the structure of the parameters
as static data. It consists of nested tuples of plain Python values: unlike a compiled tree
definition, `torch.compile` can both read it and create it, and it can be written to a file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fisherfn.core import random, trees
from fisherfn.core.dtypes import wide
from fisherfn.core.errors import TreeMismatchError, UnsupportedError, at
from fisherfn.core.trees import Tree
from fisherfn.curvature.common import check_floating

# A node is (kind, keys, children); a leaf is its position; None is None. The kind is "dict",
# "OrderedDict", "list", "tuple", or the class of a NamedTuple.
Skeleton: TypeAlias = Any
# One block: its name and the paths of the leaves that it covers, in order.
Group: TypeAlias = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """Static structure of a parameter tree: order, paths, shapes and dtypes of its leaves.

    Attributes:
        skeleton: The containers, as nested tuples.
        paths: Readable path of each leaf, in insertion order.
        shapes: Shape of each leaf.
        dtypes: dtype of each leaf.

    Example:
        >>> layout = Layout.of({"w": torch.zeros(2, 2), "b": torch.zeros(2)})
        >>> layout.paths, layout.sizes
        (('w', 'b'), (4, 2))
    """

    skeleton: Skeleton
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(params: Tree) -> Layout:
        """Return the layout of a parameter tree.

        Args:
            params: Nested dicts, lists, tuples, NamedTuples and None, with tensors as leaves.

        Returns:
            Its layout.

        Raises:
            UnsupportedError: Another container, or a leaf that is no tensor.
        """
        found: list[Tensor] = []
        paths: list[str] = []
        skeleton = _skeleton(params, "", found, paths)
        shapes = tuple([tuple([int(n) for n in leaf.shape]) for leaf in found])
        return Layout(skeleton, tuple(paths), shapes, tuple([leaf.dtype for leaf in found]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of scalars of each leaf."""
        return tuple([prod(shape) for shape in self.shapes])

    @property
    def size(self) -> int:
        """P, the number of scalars."""
        return sum(self.sizes)

    def leaves(self, caller: str, name: str, tree: Tree, like_name: str = "params") -> list[Tensor]:
        """Return the leaves of a tree in this layout's order, checked.

        Args:
            caller: The public function on whose behalf this is checked.
            name: What the caller calls the tree.
            tree: Tree like the parameters; dict entries are matched by key.
            like_name: What the caller calls the tree to match.

        Returns:
            Its leaves.

        Raises:
            TreeMismatchError: Structure or shapes differ.
            ShapeError: A leaf is not floating point.
        """
        found: list[Any] = []
        fits = _collect(self.skeleton, tree, found)
        if fits:
            fits = all(
                [
                    isinstance(leaf, Tensor) and tuple(leaf.shape) == shape
                    for leaf, shape in zip(found, self.shapes, strict=True)
                ]
            )
        if not fits:
            trees.check_like(caller, name, tree, self.template(), like_name=like_name)
            # The two trees differ in a way that optree does not see, such as a dict for a subclass.
            raise TreeMismatchError(
                f"{caller}: expected {name} like {like_name}, got containers "
                f"{trees.structure(tree)}. Build it with ff.tree.zeros_like({like_name})."
            )
        check_floating(caller, name, found, self.paths)
        return found

    def check_same(self, caller: str, like: Layout) -> None:
        """Check that two results are about the same parameters, whatever their dtypes.

        Args:
            caller: The public function on whose behalf this is checked.
            like: The layout to match.

        Raises:
            TreeMismatchError: Structure, order or shapes differ.
        """
        if (self.paths, self.shapes, self.skeleton) == (like.paths, like.shapes, like.skeleton):
            return
        like.leaves(caller, "the second params", self.template(), "the first")
        raise TreeMismatchError(
            f"{caller}: expected parameters in the same order, got {list(self.paths)} and "
            f"{list(like.paths)}. Compute both with the same parameters."
        )

    def ravel(self, caller: str, name: str, tree: Tree) -> Tensor:
        """Return a tree as a vector [P] in this layout's order, float32 or wider.

        Args:
            caller: The public function on whose behalf the tree is checked.
            name: What the caller calls the tree.
            tree: Tree like the parameters.

        Returns:
            Vector [P].
        """
        found = self.leaves(caller, name, tree)
        return wide(torch.cat([leaf.reshape(-1) for leaf in found]) if found else torch.zeros(0))

    def unravel(self, vector: Tensor) -> Tree:
        """Return a vector [P] as a tree like the parameters, in the dtype of the vector."""
        parts = zip(vector.split(self.sizes), self.shapes, strict=True)
        return self.build([part.reshape(shape) for part, shape in parts])

    def build(self, leaves: Sequence[Any]) -> Tree:
        """Return the tree of this structure with these leaves."""
        return _build(self.skeleton, leaves)

    def template(self) -> Tree:
        """Return a tree of tensors without memory (`meta`) that has these shapes and dtypes."""
        return self.build(
            [
                torch.empty(shape, dtype=dtype, device="meta")
                for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
            ]
        )

    def normal(self, key: Tensor, index: int, like: Tensor) -> Tensor:
        """Return standard normal numbers for one leaf, those of `tree.random_like(key, params)`.

        Args:
            key: int64 [2].
            index: Position of the leaf.
            like: Tensor whose dtype (float32 or wider) and device the numbers get.

        Returns:
            Vector, one number for each scalar of the leaf.
        """
        child = random.fold_in(key, index).to(like.device)
        return random.normal(child, (self.sizes[index],), wide(like).dtype)


def leaf_groups(layout: Layout) -> tuple[Group, ...]:
    """Return one block for each leaf, named by its path.

    >>> leaf_groups(Layout.of({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)}))
    (('0.weight', ('0.weight',)), ('0.bias', ('0.bias',)))
    """
    return tuple([(path, (path,)) for path in layout.paths])


def layer_groups(layout: Layout) -> tuple[Group, ...]:
    """Return one block for each layer: the leaves whose paths agree up to the last "." or "/".

    >>> layer_groups(Layout.of({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)}))
    (('0', ('0.weight', '0.bias')),)
    """
    members: dict[str, list[str]] = {}
    for path in layout.paths:
        cut = max(path.rfind("."), path.rfind("/"))
        members.setdefault(path[:cut] if cut > 0 else path, []).append(path)
    return tuple([(name, tuple(paths)) for name, paths in members.items()])


# --- the containers -------------------------------------------------------------------------------


def _is_namedtuple(tree: Any) -> bool:
    return isinstance(tree, tuple) and hasattr(tree, "_fields")


def _entries(tree: Any) -> tuple[Any, tuple[Any, ...], list[Any]] | None:
    """Return kind, keys and children of a container, None for anything else."""
    if isinstance(tree, dict):
        kind = "OrderedDict" if isinstance(tree, OrderedDict) else "dict"
        return kind, tuple(tree.keys()), list(tree.values())
    if _is_namedtuple(tree):
        return type(tree), tuple(range(len(tree))), list(tree)
    if isinstance(tree, list):
        return "list", tuple(range(len(tree))), list(tree)
    if isinstance(tree, tuple):
        return "tuple", tuple(range(len(tree))), list(tree)
    return None


def _skeleton(tree: Tree, path: str, leaves: list[Tensor], paths: list[str]) -> Skeleton:
    """Return the skeleton of a tree and append its leaves and their paths."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        leaves.append(tree)
        paths.append(path)
        return len(leaves) - 1
    entries = _entries(tree)
    if entries is None:
        raise UnsupportedError(
            f"Layout.of: expected nested dicts, lists, tuples and NamedTuples of tensors, got "
            f"{type(tree).__name__}{at(path)}. Convert the parameters to a dict of tensors."
        )
    kind, keys, values = entries
    children = [
        _skeleton(value, f"{path}/{key}" if path else str(key), leaves, paths)
        for key, value in zip(keys, values, strict=True)
    ]
    return kind, keys, tuple(children)


def _collect(skeleton: Skeleton, tree: Tree, found: list[Any]) -> bool:
    """Append the leaves of a tree in the order of a skeleton; return whether the containers fit."""
    if skeleton is None:
        return tree is None
    if isinstance(skeleton, int):
        found.append(tree)
        return True
    kind, keys, children = skeleton
    if kind in ("dict", "OrderedDict"):
        if not isinstance(tree, dict) or len(tree) != len(keys):
            return False
        # Keys may come in another order, so they are looked up; missing ones end the walk.
        return all(
            [
                key in tree and _collect(child, tree[key], found)
                for key, child in zip(keys, children, strict=True)
            ]
        )
    entries = _entries(tree)
    if entries is None or entries[0] != kind or len(entries[2]) != len(keys):
        return False
    return all(
        [_collect(child, value, found) for child, value in zip(children, entries[2], strict=True)]
    )


def _build(skeleton: Skeleton, leaves: Sequence[Any]) -> Tree:
    """Return the tree of a skeleton with these leaves."""
    if skeleton is None:
        return None
    if isinstance(skeleton, int):
        return leaves[skeleton]
    kind, keys, children = skeleton
    parts = [_build(child, leaves) for child in children]
    if kind == "dict":
        return dict(zip(keys, parts, strict=True))
    if kind == "OrderedDict":
        return OrderedDict(zip(keys, parts, strict=True))
    if kind == "list":
        return parts
    return tuple(parts) if kind == "tuple" else kind(*parts)
