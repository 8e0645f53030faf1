"""What a state is: three pure functions and a tuple of tensors.

A `Transform` remembers something of a stream x_1, x_2, ... of trees or results. Its state is a
NamedTuple of tensors (and of trees of them), so it can be saved, sent, merged and compiled; keys,
options and functions are not in it.

The members of a stream are trees whose **cells** are tensors, or results such as `Diagonal`, which
know by themselves what an average of them is (`fisherfn.core.merging`). A cell has one clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from fisherfn.core import merging, trees
from fisherfn.core.errors import (
    DataError,
    OptionError,
    ShapeError,
    TreeMismatchError,
    UnsupportedError,
    at,
)
from fisherfn.core.modes import concrete
from fisherfn.core.trees import Tree, TreeDef

Weight: TypeAlias = "float | Tensor | None"


class Transform(NamedTuple):
    """A way to remember a stream, in the manner of optax: pure functions, nothing hidden.

    Attributes:
        init: `init(like) -> state`, the state before the first member; `like` is a member, or
            anything of its structure, shapes and dtypes (its values are not looked at).
        update: `update(new, state, weight=None) -> (reading, state)`.
        read: `read(state) -> reading`; NaN where there has been nothing to read.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    read: Callable[[Any], Any]


def is_cell(x: Any) -> bool:
    """Return whether a node of a tree is averaged as a whole, by its own rule."""
    return hasattr(type(x), "__fisher_toward__")


def flatten(caller: str, tree: Tree) -> tuple[list[Any], TreeDef]:
    """Return the cells of a tree and its structure above them.

    Raises:
        ShapeError: A cell is neither a result nor a floating-point tensor, or there is none.
    """
    cells, treedef = optree.tree_flatten(tree, is_leaf=is_cell, namespace=trees.NAMESPACE)
    for i, cell in enumerate(cells):
        if is_cell(cell) or (isinstance(cell, Tensor) and cell.is_floating_point()):
            continue
        got = cell.dtype if isinstance(cell, Tensor) else type(cell).__name__
        raise ShapeError(
            f"{caller}: expected floating-point tensors and results, got {got}"
            f"{at(_paths(tree)[i])}. Convert it with .float(), or leave it out."
        )
    if not cells:
        raise ShapeError(
            f"{caller}: expected a tree with at least one tensor or result, got none. "
            "Pass what is to be averaged, for instance params."
        )
    return cells, treedef


def align(caller: str, like: Tree, new: Tree, *, absent: bool) -> list[Any | None]:
    """Return the cells of `new` in the order of `like`, None where it has none.

    Args:
        caller: The public function on whose behalf this is checked.
        like: A tree in the state.
        new: The next member of the stream; a missing entry or a None is an absent cell.
        absent: Whether cells may be absent.

    Raises:
        TreeMismatchError: `new` has another structure or other shapes; the message has the path.
    """
    ours, treedef = flatten(caller, like)
    theirs, other = flatten(caller, new)
    if treedef == other:
        cells: list[Any | None] = list(theirs)
    else:
        where, there = _places(like), dict(zip(_places(new), theirs, strict=True))
        extra = [path for path in there if path not in set(where)]
        missing = [path for path in where if path not in there]
        if extra or (missing and not absent):
            what = f"one{at(_path(extra[0]))}" if extra else f"none{at(_path(missing[0]))}"
            raise TreeMismatchError(
                f"{caller}: expected the leaves that the state began with, got {what}. Begin with "
                "init(like) of a tree that has every leaf."
            )
        cells = [there.get(path) for path in where]
    for i, (cell, mine) in enumerate(zip(cells, ours, strict=True)):
        if cell is None:
            continue
        problem = _misfit(cell, mine)
        if problem:
            raise TreeMismatchError(
                f"{caller}: expected new values like the state, got {problem}"
                f"{at(_paths(like)[i])}. Keep one state for each model and kind of result."
            )
    return cells


def empty(tree: Tree, dtype: torch.dtype | None) -> Tree:
    """Return nothing for every cell, float32 or wider unless a dtype is given."""

    def one(cell: Any) -> Any:
        if is_cell(cell):
            return cast(nothing(cell), dtype)
        wide = dtype or torch.promote_types(cell.dtype, torch.float32)
        return torch.zeros_like(cell, dtype=wide)

    return optree.tree_map(one, tree, is_leaf=is_cell, namespace=trees.NAMESPACE)


def nothing(tree: Tree) -> Tree:
    """Return the average over nothing for every cell; a result keeps its bases."""

    def one(cell: Any) -> Any:
        if not is_cell(cell):
            return torch.zeros_like(cell)
        try:
            return merging.empty_like(cell)
        except UnsupportedError:  # of what is no average over data
            return trees.zeros_like(cell)

    return optree.tree_map(one, tree, is_leaf=is_cell, namespace=trees.NAMESPACE)


def check_state(caller: str, state: Any, kind: type[Any]) -> None:
    """Raise unless a state is of the kind that a transform keeps."""
    if not isinstance(state, kind):
        raise TreeMismatchError(
            f"{caller}: expected a {kind.__name__}, got {type(state).__name__}. Begin with "
            "init(like), and pass on the state that update returned."
        )


def cast(cell: Any, dtype: torch.dtype | None) -> Any:
    """Return a cell with its entries in another dtype; counts and other 0-d tensors stay."""
    if dtype is None:
        return cell
    if not is_cell(cell):
        return cell.to(dtype)

    def one(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.ndim else x

    return trees.map(one, cell)


def tensors(cell: Any) -> Tree:
    """Return the tensors of a cell whose entries are averages: itself, or what a result names."""
    return cell.__fisher_tensors__() if is_cell(cell) else cell


def toward(cell: Any, new: Any, share: Tensor) -> Any:
    """Return cell + share·(new − cell), by the meaning of the cell."""
    if not is_cell(cell):
        return merging.toward(cell, new.to(cell.dtype), share)
    return cell.__fisher_toward__(new, share)


def unknown_where(nothing: Tensor, cell: Any) -> Any:
    """Return a cell with NaN in every floating-point entry if `nothing` is True."""

    def one(x: Tensor) -> Tensor:
        return torch.where(nothing, torch.nan, x) if x.is_floating_point() else x

    return trees.map(one, cell)


def place(cells: Sequence[Any]) -> torch.device:
    """Return the device of the first tensor of these cells, where the scalars of a state live."""
    return trees.leaves(cells[0])[0].device


def check_weight(caller: str, weight: Weight, default: Any, like: Tensor) -> Tensor:
    """Return a weight, checked, as a 0-d tensor of the dtype and on the device of `like`.

    Args:
        caller: The public function on whose behalf this is checked.
        weight: A finite number >= 0, a 0-d tensor, or None for the default.
        default: What None stands for.
        like: A tensor of the state.

    Returns:
        The weight; NaN where its value is bad and cannot be looked at without waiting for a GPU.

    Raises:
        OptionError: Not a real number.
        DataError: Negative or not finite.
    """
    given = default if weight is None else weight
    if isinstance(given, bool) or not isinstance(given, int | float | Tensor):
        raise OptionError(
            f"{caller}: expected weight to be a number or a 0-d tensor, got "
            f"{type(given).__name__}. Pass the number of units that the new values stand for."
        )
    if isinstance(given, Tensor) and (given.ndim != 0 or given.is_complex()):
        raise OptionError(
            f"{caller}: expected weight to be a number or a 0-d tensor, got {given.dtype} of shape "
            f"{tuple(given.shape)}. Use torch.vmap for a batch of streams."
        )
    if isinstance(given, Tensor) and (given.device.type != "cpu" or not concrete(given)):
        given = given.to(like.device, like.dtype)
        return torch.where((given >= 0) & torch.isfinite(given), given, torch.nan)
    value = given.item() if isinstance(given, Tensor) else given
    if not 0 <= value < float("inf"):
        raise DataError(
            f"{caller}: expected a finite weight >= 0, got {value:g}. Weights count units."
        )
    if isinstance(given, Tensor):
        return given.to(like.device, like.dtype)
    # a tensor: torch divides a number by a tensor through the reciprocal, and w / w is not 1 then
    return torch.full((), float(given), dtype=like.dtype, device=like.device)


def check_dtype(caller: str, dtype: Any) -> None:
    """Check an option `dtype`.

    Raises:
        OptionError: Neither None nor a floating-point dtype.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise OptionError(
        f"{caller}: expected dtype to be a floating-point torch.dtype or None, got {dtype!r}. "
        "None keeps that of the values, float32 or wider."
    )


def _misfit(new: Any, mine: Any) -> str | None:
    """Return what keeps a new cell from being folded into one of the state, or None."""
    if is_cell(new) or is_cell(mine):
        if type(new) is not type(mine):
            return f"{type(new).__name__} where the state has {type(mine).__name__}"
        return None  # results check each other
    if new.shape != mine.shape:
        return f"shape {tuple(new.shape)} where the state has {tuple(mine.shape)}"
    return None


def _places(tree: Tree) -> list[tuple[Any, ...]]:
    """Return where each cell is, key by key."""
    return optree.tree_flatten_with_path(tree, is_leaf=is_cell, namespace=trees.NAMESPACE)[0]


def _paths(tree: Tree) -> list[str]:
    """Return the readable path of each cell."""
    return [_path(place) for place in _places(tree)]


def _path(place: tuple[Any, ...]) -> str:
    return "/".join([str(entry) for entry in place])
