"""Saving results, states and trees of tensors, and loading exactly what was saved.

A file is in the safetensors format, which any tool reads: tensors under readable names, and text in
the header. There, `format` and `version` say that this module wrote it, and `content` says in JSON
how the tensors make up the object. A node of it is one of

    {"tensor": name}   {"none": true}   {"value": number or text}   {"dtype": name}   {"type": name}
    {"dict": [[key, node], ...]}   {"ordered": [[key, node], ...]}   {"list": [node, ...]}
    {"tuple": [node, ...]}   {"class": name, "fields": {field: node, ...}}

Nothing is ever executed on loading: classes are looked up by name among those registered here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fisherfn.core.errors import DataError, FisherError, OptionError, UnsupportedError
from fisherfn.core.modes import concrete
from fisherfn.curvature import (
    BlockDiagonal,
    Dense,
    Diagonal,
    GradientMoments,
    Grouped,
    Layout,
    LowRank,
)
from fisherfn.curvature.common import at
from fisherfn.groups import GroupSpec
from fisherfn.states import AccumulateState

FORMAT = "fisherfn"
VERSION = "1"

_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Diagonal,
        Dense,
        BlockDiagonal,
        LowRank,
        Grouped,
        GradientMoments,
        Layout,
        GroupSpec,
        AccumulateState,
    )
}
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


def save(path: str | os.PathLike[str], obj: Any) -> None:
    """Write a result, a state or a tree of tensors to a file, all or nothing.

    The file appears under its name when it is complete and on the disk, in place of an older one; a
    failure on the way leaves the older one untouched and no other trace.

    Args:
        path: Where to write, `.safetensors` by custom; the directory has to exist.
        obj: Curvature, `GradientMoments`, the state of `ff.states.accumulate`, a tensor, or any
            nesting of dicts (keys of type str, int or bool), lists, tuples and None of these.

    Raises:
        FisherError: The file cannot be written: no such directory, no permission, disk full.
        OptionError: A dict key of another type.
        UnsupportedError: An object or dtype that has no place in a file, or no safetensors package.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/tree.safetensors", {"w": torch.ones(2)})
        ...     load(f"{folder}/tree.safetensors")
        {'w': tensor([1., 1.])}
    """
    package = _safetensors("save")
    writer = _Writer()
    content = writer.node(obj, "")
    header = {"format": FORMAT, "version": VERSION, "content": json.dumps(content)}
    target = _path("save", path)
    try:
        with _replacing(target) as temporary:
            package.torch.save_file(writer.tensors, temporary, metadata=header)
    except (OSError, package.SafetensorError) as error:
        raise FisherError(
            f"io.save: expected to write {str(target)!r}, got {error}. Check that the directory "
            "exists, is writable and has space; nothing was changed."
        ) from error


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Any:
    """Return the object that `save` wrote, with the same classes, structure, dtypes and values.

    Args:
        path: A file written by `save`.
        device: Where the tensors go.

    Returns:
        The object.

    Raises:
        DataError: The file does not exist, is truncated, or was not written by `save`.
        OptionError: There is no such device.
        UnsupportedError: A later version wrote the file, it holds a class that is not known here,
            or there is no safetensors package.
    """
    package = _safetensors("load")
    source, place = _path("load", path), _device(device)
    if not source.is_file():
        raise DataError(
            f"io.load: expected a file, got {str(source)!r}, which is none. Check the path."
        )
    try:
        with package.safe_open(str(source), framework="pt") as file:
            header = file.metadata() or {}
            content = _content(source, header)
            # A copy, since what safetensors returns may be a view of the file.
            tensors = {name: file.get_tensor(name).to(place, copy=True) for name in file.keys()}
    except (OSError, package.SafetensorError) as error:
        raise DataError(
            f"io.load: expected a complete safetensors file, got {str(source)!r} with the error: "
            f"{error}. It is truncated or of another format; save it anew."
        ) from error
    try:
        return _read(content, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"io.load: expected the structure of {str(source)!r} to describe its tensors, got "
            f"{type(error).__name__}: {error}. The file was altered; save it anew."
        ) from error


def register(cls: type) -> type:
    """Let objects of a class be saved and loaded, under the name of the class.

    Args:
        cls: A dataclass or a NamedTuple whose fields can be saved.

    Returns:
        `cls`, so that this can decorate it.

    Raises:
        OptionError: Neither of the two, or its name is taken.

    Example:
        >>> from typing import NamedTuple
        >>> @register
        ... class Pair(NamedTuple):
        ...     left: Tensor
        ...     right: Tensor
    """
    if not (dataclasses.is_dataclass(cls) or _is_namedtuple_class(cls)):
        raise OptionError(
            f"io.register: expected a dataclass or a NamedTuple, got {cls!r}. Make it one of them."
        )
    if _CLASSES.get(cls.__name__, cls) is not cls:
        raise OptionError(
            f"io.register: expected a new class name, got {cls.__name__!r}, which is taken. "
            "Rename the class."
        )
    _CLASSES[cls.__name__] = cls
    return cls


# --- writing --------------------------------------------------------------------------------------


class _Writer:
    """Collects the tensors of an object while its structure is written down."""

    def __init__(self) -> None:
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
        if _is_known_class(obj):
            return {"type": obj.__name__}
        if _CLASSES.get(type(obj).__name__) is type(obj):
            return {
                "class": type(obj).__name__,
                "fields": {
                    name: self.node(getattr(obj, name), _join(path, name))
                    for name in _fields(type(obj))
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
        if type(obj) in (list, tuple):
            parts = [self.node(x, _join(path, i)) for i, x in enumerate(obj)]
            return {type(obj).__name__: parts}
        raise UnsupportedError(
            f"io.save: expected tensors, results, states, dicts, lists and tuples, got "
            f"{type(obj).__name__}{at(path)}. Convert it, or register its class with io.register."
        )

    def _keep(self, x: Tensor, path: str) -> str:
        """Return the name under which a tensor is kept, its path if that is free."""
        if not concrete(x):
            raise UnsupportedError(
                f"io.save: expected tensors with values, got one on {x.device} inside a "
                f"transformation or without memory{at(path)}. Save outside of torch.compile, "
                "torch.func and torch.device('meta')."
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
        storage = x.untyped_storage().data_ptr()
        if storage in self._storages:
            x = x.clone()  # safetensors refuses tensors that share memory
        self._storages.add(storage)
        self.tensors[name] = x
        return name


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[str]:
    """Give a temporary file beside `target`, and put it in its place once it is on the disk."""
    temporary = str(target.with_name(f".{target.name}.{secrets.token_hex(8)}"))
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = os.stat(temporary).st_mode  # what the umask allows; safetensors makes it private
        yield temporary
        os.chmod(temporary, mode)
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The new name is safe once the directory is; where directories cannot be opened, it has to do.
    with contextlib.suppress(OSError):
        _flush(str(target.parent))


def _flush(path: str) -> None:
    """Wait until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading --------------------------------------------------------------------------------------


def _content(source: Path, header: dict[str, str]) -> Any:
    """Return the structure in a file's header."""
    if header.get("format") != FORMAT or "content" not in header:
        raise DataError(
            f"io.load: expected a file written by io.save, got {str(source)!r} without its mark. "
            "Read it with safetensors.torch.load_file."
        )
    if header.get("version") != VERSION:
        raise UnsupportedError(
            f"io.load: expected format version {VERSION}, got {header.get('version')!r} in "
            f"{str(source)!r}. Install the release of fisherfn that wrote it, or a later one."
        )
    try:
        return json.loads(header["content"])
    except ValueError as error:
        raise DataError(
            f"io.load: expected JSON in the header of {str(source)!r}, got {error}. The file was "
            "altered; save it anew."
        ) from error


def _read(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the object of a JSON node."""
    if "class" in node:
        name = node["class"]
        cls = _known(name)
        values = {field: _read(child, tensors) for field, child in node["fields"].items()}
        if set(values) != set(_fields(cls)):
            raise ValueError(f"{name} with the fields {sorted(values)}")
        if _is_namedtuple_class(cls):
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
        return _known(content)
    if kind in ("list", "tuple"):
        parts = [_read(child, tensors) for child in content]
        return parts if kind == "list" else tuple(parts)
    makers = {"dict": dict, "ordered": OrderedDict}
    return makers[kind]((key, _read(child, tensors)) for key, child in content)


def _known(name: str) -> type:
    """Return a registered class."""
    if name not in _CLASSES:
        raise UnsupportedError(
            f"io.load: expected one of the classes {sorted(_CLASSES)}, got {name!r}. Import the "
            "package that registers it with io.register first."
        )
    return _CLASSES[name]


def _is_known_class(obj: Any) -> bool:
    return isinstance(obj, type) and _CLASSES.get(obj.__name__) is obj


# --- small things ---------------------------------------------------------------------------------


def _safetensors(caller: str) -> ModuleType:
    """Return the safetensors package, which only this module needs."""
    try:
        import_module("safetensors.torch")
        return import_module("safetensors")
    except ImportError as error:
        raise UnsupportedError(
            f"io.{caller}: expected the package safetensors, got none. Install it with "
            'pip install "fisherfn[lm]" (or [app]).'
        ) from error


def _path(caller: str, path: Any) -> Path:
    """Return a path with links followed, so that a link to a file stays one when it is replaced."""
    try:
        return Path(os.path.realpath(path))
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"io.{caller}: expected a path, got {path!r}: {error}. Pass a str or pathlib.Path."
        ) from error


def _device(device: torch.device | str) -> torch.device:
    """Return a device that exists."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(
            f"io.load: expected a device, got {device!r}: {str(error).splitlines()[0]} Use 'cpu', "
            "or a device that torch can see."
        ) from error
    return place


def _fields(cls: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return cls._fields


def _is_namedtuple_class(cls: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)
