"""Frozen dataclasses as nodes of trees: torch's pytrees and optree's alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import optree
import torch.utils._pytree as torch_pytree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE

from fisherfn.core.errors import OptionError

T = TypeVar("T")


def register_dataclass_node(
    cls: type[T], data_fields: Sequence[str], static_fields: Sequence[str] = ()
) -> type[T]:
    """Make a frozen dataclass a node of torch's pytrees and of optree's (every namespace).

    A data field that is None is left out of the children (`torch.vmap` would meet it as a leaf) and
    restored as None. Unflattening sets the fields directly, without `__init__` and its validation,
    since transformations put other things than tensors in the place of leaves.

    Args:
        cls: The dataclass.
        data_fields: Fields that hold trees, in the order of the leaves.
        static_fields: Fields that belong to the structure; hashable, compared by `==`.

    Returns:
        `cls`.

    Raises:
        OptionError: `cls` is no frozen dataclass, or the fields are not exactly its fields.

    >>> import fisherfn as ff
    >>> @dataclasses.dataclass(frozen=True)
    ... class Weighted:
    ...     value: Any
    ...     weight: Tensor | None = None
    ...     unit: str = "example"
    >>> _ = register_dataclass_node(Weighted, ["value", "weight"], ["unit"])
    >>> ff.tree.map(lambda x: 2 * x, Weighted({"b": 1, "a": 2}))
    Weighted(value={'b': 2, 'a': 4}, weight=None, unit='example')
    """
    data, static = tuple(data_fields), tuple(static_fields)
    if not (dataclasses.is_dataclass(cls) and getattr(cls, "__dataclass_params__").frozen):  # noqa: B009
        raise OptionError(
            f"tree.register_dataclass_node: expected a frozen dataclass, got {cls!r}. "
            "Decorate it with @dataclass(frozen=True)."
        )
    fields = [field.name for field in dataclasses.fields(cls)]
    if sorted(data + static) != sorted(fields):
        raise OptionError(
            f"tree.register_dataclass_node: expected data_fields and static_fields to name each of "
            f"{fields} once, got {list(data)} and {list(static)}. Name every field once."
        )

    def flat(node: T) -> tuple[list[Any], Any, tuple[str, ...]]:
        present = tuple([name for name in data if getattr(node, name) is not None])
        context = present, tuple([getattr(node, name) for name in static])
        return [getattr(node, name) for name in present], context, present

    def flat_with_keys(node: T) -> tuple[list[tuple[Any, Any]], Any]:
        children, context, present = flat(node)
        keys = [torch_pytree.GetAttrKey(name) for name in present]
        return list(zip(keys, children, strict=True)), context

    def build(children: Iterable[Any], context: Any) -> T:
        present, constants = context
        node = object.__new__(cls)
        for name in data:
            object.__setattr__(node, name, None)
        for name, value in zip(present + static, (*children, *constants), strict=True):
            object.__setattr__(node, name, value)
        return node

    torch_pytree.register_pytree_node(
        cls,
        lambda node: flat(node)[:2],
        build,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flat_with_keys,
    )
    optree.register_pytree_node(
        cls,  # type: ignore[arg-type]
        flat,  # type: ignore[arg-type]
        lambda context, children: build(children, context),  # type: ignore[arg-type]
        path_entry_type=optree.GetAttrEntry,
        namespace=GLOBAL_NAMESPACE,
    )
    return cls
