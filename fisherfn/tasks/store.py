"""States by task, as one immutable value.

Where other code keeps a collector object that is mutated, looked up by substrings and read through
modes, there are pure functions here, and a `TaskStore` for what belongs to a task. The package says
what each call of such a collector becomes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import merging, trees
from fisherfn.core.errors import OptionError
from fisherfn.core.trees import Tree
from fisherfn.tasks.flat import entries_of, flat_key, parsed, reading_of, rebuilt

_MISSING: Any = object()


@dataclass(frozen=True, eq=False, repr=False)
class TaskStore(Mapping[str, Any]):
    """An immutable mapping from tasks to states, with parameters to remember for some of them.

    Every change gives a new store, which shares what has not changed with the old one. It is a
    pytree, `ff.io.save` saves it, and `ff.merge` merges two.

    Attributes:
        states: By task: a result, a state of `ff.states`, or a tree of tensors.
        anchors: By task: the parameters that the task ended with, for elastic weight consolidation.

    Example:
        >>> from fisherfn.curvature import Diagonal
        >>> F = Diagonal({"w": torch.tensor([1.0, 3.0])}, torch.tensor(8.0))
        >>> store = TaskStore().put("math", F, anchor={"w": torch.zeros(2)})
        >>> store.leaf("math", "w"), list(store), len(TaskStore())
        (tensor([1., 3.]), ['math'], 0)
        >>> store
        TaskStore(math: Diagonal with anchor)
    """

    states: dict[str, Any] = field(default_factory=dict)
    anchors: dict[str, Tree] = field(default_factory=dict)

    def __getitem__(self, task: str) -> Any:
        return self.get(task)

    def __contains__(self, task: object) -> bool:
        return task in self.states

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        parts = [
            f"{task}: {type(state).__name__}{' with anchor' if task in self.anchors else ''}"
            for task, state in self.states.items()
        ]
        return f"TaskStore({', '.join(parts)})"

    def put(self, task: str, state: Any, *, anchor: Tree | None = None) -> TaskStore:
        """Return the store with this state for a task, in place of an earlier one.

        Args:
            task: Its name; no "|" in it.
            state: A result, a state of `ff.states`, or a tree of tensors.
            anchor: Parameters to remember, copied; None keeps those that the task has.

        Returns:
            A new store.

        Raises:
            OptionError: `task` is no name, or something in the trees is no tensor.
        """
        _check_task("put", task)
        _check_tensors("state", state)
        anchors = dict(self.anchors)
        if anchor is not None:
            _check_tensors("anchor", anchor)
            anchors[task] = trees.map(lambda x: x.detach().clone(), anchor)
        return TaskStore({**self.states, task: state}, anchors)

    def get(self, task: str, default: Any = _MISSING) -> Any:
        """Return the state of a task.

        Args:
            task: Its name.
            default: What to return for an unknown task, instead of an error.

        Returns:
            What was put.

        Raises:
            OptionError: There is no such task.
        """
        if task in self.states:
            return self.states[task]
        if default is not _MISSING:
            return default
        raise OptionError(
            f"TaskStore.get: expected one of the tasks {list(self.states)}, got {task!r}. "
            "Put its state first."
        )

    def anchor(self, task: str) -> Tree:
        """Return the parameters that a task is anchored at.

        Args:
            task: Its name.

        Returns:
            A tree like the parameters.

        Raises:
            OptionError: There is no such task, or it has no anchor.
        """
        self.get(task)
        if task not in self.anchors:
            raise OptionError(
                f"TaskStore.anchor: expected a task with an anchor, got {task!r} without. Give it "
                "with put(task, state, anchor=params)."
            )
        return self.anchors[task]

    def clear(self, task: str | None = None) -> TaskStore:
        """Return the store without a task, or without any.

        Args:
            task: Its name; None for all.

        Returns:
            A new store.

        Raises:
            OptionError: There is no such task.
        """
        if task is None:
            return TaskStore()
        self.get(task)
        return TaskStore(
            {name: state for name, state in self.states.items() if name != task},
            {name: tree for name, tree in self.anchors.items() if name != task},
        )

    def merge(self, other: TaskStore) -> TaskStore:
        """Return the store on the joined data of two; tasks that only one knows are kept.

        Args:
            other: A store of the same model.

        Returns:
            A new store.

        Raises:
            OptionError: Kinds or units of a task differ, or its anchors do.
            TreeMismatchError: States of different models.
        """
        if not isinstance(other, TaskStore):
            raise OptionError(
                f"TaskStore.merge: expected a TaskStore, got {type(other).__name__}. Put a single "
                "state with put(task, state)."
            )
        states = dict(self.states)
        for task, state in other.states.items():
            states[task] = merging.merge(states[task], state) if task in states else state
        anchors = dict(self.anchors)
        for task, anchor in other.anchors.items():
            if task in anchors:
                _check_same_anchor(task, anchors[task], anchor)
            anchors[task] = anchor
        return TaskStore(states, anchors)

    def __fisher_merge__(self, other: TaskStore) -> TaskStore:
        return self.merge(other)

    def __fisher_empty__(self) -> TaskStore:
        return replace(self, states={t: merging.empty_like(s) for t, s in self.states.items()})

    def reading(self, task: str) -> Any:
        """Return what the state of a task says: its average, or the result itself.

        Args:
            task: Its name.

        Returns:
            A result or a tree of tensors.

        Raises:
            OptionError: There is no such task.
        """
        return reading_of(self.get(task))

    def leaf(self, task: str, path: str) -> Tensor:
        """Return one tensor of the reading of a task, by its exact path.

        Args:
            task: Its name.
            path: Path of the parameter, or of the group vector, as `ff.tree.paths` writes it.

        Returns:
            The tensor.

        Raises:
            OptionError: There is no such task or path.
        """
        found = {name: x for name, _, x in entries_of("TaskStore.leaf", self.reading(task))}
        if path not in found:
            near = difflib.get_close_matches(str(path), found, n=3) or list(found)[:3]
            raise OptionError(
                f"TaskStore.leaf: expected an exact path, got {path!r}, which task {task!r} does "
                f"not have. It has {len(found)}, such as {', '.join(near)}."
            )
        return found[path]

    def to_flat(self) -> dict[str, Tensor]:
        """Return the readings of all tasks under keys `{task}|{param}|{group}`.

        The group is "param" for what has the shape of a parameter, and for a `Grouped` what its
        spec says: "channel", "head", "token" (rows of an embedding), "vocab_bucket", "row"
        (elements of a weight), "bias", "behavioral_head" (labels) or "tensor".

        Returns:
            The entries alone: counts, kinds and anchors have no place in this schema.

        Raises:
            OptionError: A path has "|" in it, or is empty.
            TreeMismatchError: Two entries have one path.
            UnsupportedError: A representation that has no entry for each parameter or group.
        """
        flat: dict[str, Tensor] = {}
        for task in self.states:
            for path, group, x in entries_of("TaskStore.to_flat", self.reading(task)):
                flat[flat_key(task, path, group)] = x
        return flat

    @staticmethod
    def from_flat(flat: Mapping[str, Tensor], *, like: TaskStore | None = None) -> TaskStore:
        """Return the store of tensors under keys `{task}|{param}|{group}`.

        Args:
            flat: Tensors by key.
            like: A store whose readings have the structure, kinds and counts that the flat schema
                lacks; its results come back with these entries. None gives each task a tree
                `{param: {group: tensor}}` and makes nothing up.

        Returns:
            A store; `to_flat` gives `flat` back.

        Raises:
            DataError: A key of another form, an unknown group, or a value that is no tensor.
            OptionError: `like` lacks a task or an entry, or has others.
            TreeMismatchError: An entry of another shape than in `like`.
        """
        found = parsed(flat)
        if like is None:
            return TaskStore(dict(found))
        if set(like.states) != set(found):
            raise OptionError(
                f"TaskStore.from_flat: expected the tasks of like=, {list(like.states)}, got "
                f"{list(found)}. Clear the others first."
            )
        states = {task: rebuilt(task, like.reading(task), found[task]) for task in like.states}
        return TaskStore(states, dict(like.anchors))


trees.register_dataclass_node(TaskStore, ("states", "anchors"))


def _check_task(method: str, task: Any) -> None:
    if not isinstance(task, str) or not task or "|" in task:
        raise OptionError(
            f"TaskStore.{method}: expected the name of a task without '|', got {task!r}. "
            "Pass a short text."
        )


def _check_tensors(name: str, tree: Any) -> None:
    leaves, paths = trees.leaves(tree), trees.paths(tree)
    for leaf, path in zip(leaves, paths, strict=True):
        if not isinstance(leaf, Tensor):
            raise OptionError(
                f"TaskStore.put: expected {name} to be a result, a state or a tree of tensors, got "
                f"{type(leaf).__name__} at {path or 'the root'}. Leave it out."
            )
    if not leaves:
        raise OptionError(
            f"TaskStore.put: expected {name} to hold at least one tensor, got none. To forget a "
            "task, use clear(task)."
        )


def _check_same_anchor(task: str, a: Tree, b: Tree) -> None:
    trees.check_like("TaskStore.merge", f"the anchor of {task!r}", b, a, like_name="the other")
    for x, y, path in zip(trees.leaves(a), trees.leaves(b), trees.paths(a), strict=True):
        if not torch.equal(x, y.to(x.device)):
            raise OptionError(
                f"TaskStore.merge: expected one anchor for task {task!r}, got two that differ at "
                f"{path}. Both states have to be about the same parameters."
            )
