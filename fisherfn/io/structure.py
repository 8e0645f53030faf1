"""How the tensors of a file make up an object, in JSON.

A node is one of

    {"tensor": name}   {"none": true}   {"value": number or text}   {"dtype": name}   {"type": name}
    {"dict": [[key, node], ...]}   {"ordered": [[key, node], ...]}   {"list": [node, ...]}
    {"tuple": [node, ...]}   {"class": name, "fields": {field: node, ...}}

Nothing is ever executed on reading: classes are looked up by name, and their fields are set without
calling them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from fisherfn.core.errors import OptionError, UnsupportedError, at
from fisherfn.core.modes import concrete, is_dtensor
from fisherfn.io.registry import class_named, fields_of, is_namedtuple, name_of

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}


class Writer:
    """Collects the tensors of an object while its structure is written down."""

    def __init__(self, shared: bool = False) -> None:
        """Start empty; `shared` tensors may overlap in memory, which files do not allow."""
        self.shared = shared
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def node(self, obj: Any, path: str) -> dict[str, Any]:
        """Return the JSON node of an object and keep its tensors."""
        if obj is None:
            return {"none": True}
        if isinstance(obj, Tensor):
            return {"tensor": self._keep(obj, path)}
        if isinstance(obj, str | int | float):
            return {"value": obj}
        if isinstance(obj, torch.dtype):
            return {"dtype": str(obj).removeprefix("torch.")}
        if isinstance(obj, type):
            return self._class(obj, path)
        name = name_of(type(obj))
        if name is not None:
            return {
                "class": name,
                "fields": {
                    field: self.node(getattr(obj, field), _join(path, field))
                    for field in fields_of(type(obj))
                },
            }
        if type(obj) in (dict, OrderedDict):
            for key in obj:
                if not isinstance(key, str | int):
                    raise OptionError(
                        f"io.save: expected dict keys of type str, int or bool, got {key!r}"
                        f"{at(path)}. Rename the entry."
                    )
            kind = "dict" if type(obj) is dict else "ordered"
            return {kind: [[key, self.node(x, _join(path, key))] for key, x in obj.items()]}
        if type(obj) in (list, tuple, torch.Size):
            parts = [self.node(x, _join(path, i)) for i, x in enumerate(obj)]
            return {"list" if type(obj) is list else "tuple": parts}
        _refuse(obj, path)

    def _class(self, cls: type, path: str) -> dict[str, Any]:
        name = name_of(cls)
        return {"type": name} if name is not None else _refuse(cls, path)

    def _keep(self, x: Tensor, path: str) -> str:
        """Return the name under which a tensor is kept, its path if that is free."""
        if not concrete(x):
            raise UnsupportedError(
                f"io.save: expected tensors with values, got one on {x.device} inside a "
                f"transformation or without memory{at(path)}. Save outside of torch.compile, "
                "torch.func and torch.device('meta')."
            )
        if is_dtensor(x):
            raise UnsupportedError(
                f"io.save: expected tensors of this process, got a DTensor{at(path)}. Take "
                ".full_tensor() on all ranks, or .to_local() for a file of each rank's part."
            )
        if str(x.dtype).removeprefix("torch.") not in _DTYPES or x.layout != torch.strided:
            raise UnsupportedError(
                f"io.save: expected dense tensors of one of {list(_DTYPES)}, got {x.dtype} of "
                f"{x.layout}{at(path)}. Convert it first."
            )
        name, n = path or "value", 2
        while name in self.tensors or name == "__metadata__":
            name, n = f"{path or 'value'}#{n}", n + 1
        x = x.detach().contiguous()
        if self.shared:
            self.tensors[name] = x
            return name
        storage = x.untyped_storage().data_ptr()
        if storage in self._storages:
            x = x.clone()  # safetensors refuses tensors that share memory
        self._storages.add(storage)
        self.tensors[name] = x
        return name


def _refuse(obj: Any, path: str) -> NoReturn:
    raise UnsupportedError(
        f"io.save: expected tensors, results, states, dicts, lists and tuples, got "
        f"{type(obj).__name__}{at(path)}. Convert it, or register its class with io.register."
    )


def dtype_named(name: str) -> torch.dtype:
    """Return a dtype by its name in files, such as "float32"."""
    return _DTYPES[name]


def read(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the object of a JSON node."""
    if "class" in node:
        name = node["class"]
        cls = class_named(name)
        values = {field: read(child, tensors) for field, child in node["fields"].items()}
        if set(values) != set(fields_of(cls)):
            raise ValueError(f"{name} with the fields {sorted(values)}")
        if is_namedtuple(cls):
            return cls(**values)
        # Not through __init__: a batch of results, as torch.vmap returns it, is loaded as it was.
        made = object.__new__(cls)
        for field, value in values.items():
            object.__setattr__(made, field, value)
        return made
    (kind, content), *rest = node.items()
    if rest:
        raise ValueError(f"a node with the keys {sorted(node)}")
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "none":
        return None
    if kind == "dtype":
        return _DTYPES[content]
    if kind == "type":
        return class_named(content)
    if kind in ("list", "tuple"):
        parts = [read(child, tensors) for child in content]
        return parts if kind == "list" else tuple(parts)
    makers = {"dict": dict, "ordered": OrderedDict}
    return makers[kind]((key, read(child, tensors)) for key, child in content)


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)
