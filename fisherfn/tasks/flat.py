"""The flat schema `{task}|{param}|{group}` of older collections, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import DataError, OptionError, TreeMismatchError, UnsupportedError
from fisherfn.curvature import Diagonal, Grouped, Result
from fisherfn.groups import GroupSpec
from fisherfn.states import (
    AccumulateState,
    EmaState,
    EveryState,
    WelfordState,
    WindowState,
    ema,
    welford,
    window,
)

#: What older collections call a kind of groups.
_NAMES = {
    "channel": "channel",
    "head": "head",
    "row": "token",
    "bucket": "vocab_bucket",
    "tensor": "tensor",
    "label": "behavioral_head",
}
#: All that stands for groups in older collections.
_KNOWN = (*_NAMES.values(), "param", "bias", "row", "head_row", "head_col", "head_fused")


def reading_of(state: Any) -> Any:
    """Return what a state says: its average, or the result itself.

    Raises:
        UnsupportedError: A state of two averages.
    """
    if isinstance(state, AccumulateState):
        return reading_of(state.result)
    if isinstance(state, EmaState):
        return ema(0.0).read(state)
    if isinstance(state, WelfordState):
        return welford().read(state)
    if isinstance(state, WindowState):
        return window(1).read(state)
    if isinstance(state, EveryState):
        if state.otherwise is None:
            return reading_of(state.every)
        raise UnsupportedError(
            "TaskStore: expected a state of one average, got one of states.every() with two. Put "
            "them as two tasks."
        )
    return state


def entries_of(caller: str, reading: Any) -> list[tuple[str, str, Tensor]]:
    """Return path, group and tensor of every entry of a reading.

    Raises:
        UnsupportedError: A representation without entries for each parameter or group.
        TreeMismatchError: Two entries have one path.
    """
    if isinstance(reading, Diagonal):
        return _by_path(caller, reading.values)
    if isinstance(reading, Grouped):
        specs: dict[str, tuple[str, GroupSpec]] = {}
        for path, spec in reading.groups:
            specs.setdefault(spec.into or path, (path, spec))
        return [(name, _group(*specs[name]), x) for name, x in reading.values.items()]
    if isinstance(reading, Result):
        raise UnsupportedError(
            f"{caller}: expected a Diagonal, a Grouped or a tree of tensors, got "
            f"{type(reading).__name__}, which has no entry for each parameter. Put a tree of it "
            "instead, such as diagonal()."
        )
    if _is_parsed(reading):
        return [(path, group, x) for path, by in reading.items() for group, x in by.items()]
    return _by_path(caller, reading)


def flat_key(task: str, path: str, group: str) -> str:
    """Return a key of the flat schema.

    Raises:
        OptionError: A part has "|" in it, or there is nothing of it.

    >>> flat_key("math", "layers.0.weight", "channel")
    'math|layers.0.weight|channel'
    """
    for part in (task, path, group):
        if "|" in part or not part:
            raise OptionError(
                f"TaskStore.to_flat: expected names without '|', which separates them, got "
                f"{part!r}. Rename it (a tensor that is the whole tree has no name: put it into a "
                "dict), or save the store with ff.io."
            )
    return f"{task}|{path}|{group}"


def parsed(flat: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return the tensors of the flat schema by task, path and group.

    Raises:
        DataError: A key of another form, an unknown group, or a value that is no tensor.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, x in flat.items():
        parts = key.split("|") if isinstance(key, str) else []
        if len(parts) != 3 or not all(parts):
            raise DataError(
                f"TaskStore.from_flat: expected keys of the form 'task|param|group', got {key!r}. "
                "Older keys 'task_param' do not say where the task ends: rename them."
            )
        if parts[2] not in _KNOWN:
            raise DataError(
                f"TaskStore.from_flat: expected one of the groups {list(_KNOWN)}, got {key!r}. "
                "Rename it to the one that it is."
            )
        if not isinstance(x, Tensor):
            raise DataError(
                f"TaskStore.from_flat: expected tensors, got {type(x).__name__} at {key!r}. "
                "Convert it with torch.as_tensor."
            )
        task, path, group = parts
        found.setdefault(task, {}).setdefault(path, {})[group] = x
    return found


def rebuilt(task: str, like: Any, found: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Return a reading with these entries in the place of its own.

    Raises:
        OptionError: Entries are missing or unknown.
        TreeMismatchError: An entry has another shape.
    """
    wanted = entries_of("TaskStore.from_flat", like)
    known = {(path, group) for path, by in found.items() for group in by}
    need = {(path, group) for path, group, _ in wanted}
    if known != need:
        path, group = sorted(known ^ need)[0]
        what = "lacks" if (path, group) in need else "has in addition"
        raise OptionError(
            f"TaskStore.from_flat: expected the entries of like=, got some that {what} "
            f"{flat_key(task, path, group)!r}. Pass a store of the same model and groups."
        )
    leaves = []
    for path, group, mine in wanted:
        x = found[path][group]
        if x.shape != mine.shape:
            raise TreeMismatchError(
                f"TaskStore.from_flat: expected entries shaped like like=, got {tuple(x.shape)} at "
                f"{flat_key(task, path, group)!r}, needs {tuple(mine.shape)}. Pass a store of the "
                "same model and groups."
            )
        leaves.append(x)
    if isinstance(like, Diagonal | Grouped):
        return replace(like, values=_filled(like.values, leaves), stderr=None)
    return _filled(like, leaves)


def _filled(like: Any, leaves: list[Tensor]) -> Any:
    return trees.unflatten(trees.structure(like), leaves)


def _by_path(caller: str, tree: Any) -> list[tuple[str, str, Tensor]]:
    paths = trees.unique_paths(caller, tree)
    return [(path, "param", x) for path, x in zip(paths, trees.leaves(tree), strict=True)]


def _group(path: str, spec: GroupSpec) -> str:
    """Return what older collections call the groups of a parameter."""
    if spec.kind == "element":
        return "bias" if path.split(".")[-1].endswith("bias") else "row"
    return _NAMES[spec.kind]


def _is_parsed(reading: Any) -> bool:
    """Return whether a tree is what `parsed` makes of a task."""
    return (
        isinstance(reading, dict)
        and bool(reading)
        and all(isinstance(by, dict) and by and set(_KNOWN) >= set(by) for by in reading.values())
    )
