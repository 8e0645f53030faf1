"""Files: written all at once or not at all, and read only if they are ours and whole.

A file is in the safetensors format, which any tool reads: tensors under readable names, and text in
the header. There `format` and `version` say that this module wrote it, `content` says how the
tensors make up the object (`fisherfn.io.structure`), and `about` what it is: class, kind of labels,
unit, count, and the versions that made it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fisherfn.core.errors import DataError, FisherError, OptionError, UnsupportedError
from fisherfn.core.modes import concrete
from fisherfn.curvature import Result
from fisherfn.io.registry import name_of
from fisherfn.io.structure import Writer, read

FORMAT = "fisherfn"
VERSION = "1"


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
    writer = Writer()
    content = writer.node(obj, "")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "about": json.dumps(about(obj)),
        "content": json.dumps(content),
    }
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
    place = device_of("load", device)
    with _opened("load", path) as (file, source):
        content = _content(source, file.metadata() or {})
        # A copy, since what safetensors returns may be a view of the file.
        tensors = {name: file.get_tensor(name).to(place, copy=True) for name in file.keys()}
    try:
        return read(content, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"io.load: expected the structure of {str(source)!r} to describe its tensors, got "
            f"{type(error).__name__}: {error}. The file was altered; save it anew."
        ) from error


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file holds, from its header alone.

    Args:
        path: A file written by `save`.

    Returns:
        `class`, the versions of `fisherfn` and `torch` that wrote it, and for a result, or a state
        of one, `fisher`, `unit` and `count`.

    Raises:
        DataError: The file does not exist, is truncated, or was not written by `save`.
        UnsupportedError: A later version wrote the file, or there is no safetensors package.

    Example:
        >>> import tempfile
        >>> from fisherfn.curvature import Diagonal
        >>> F = Diagonal({"w": torch.ones(2)}, torch.tensor(8.0), fisher="mc")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/F.safetensors", F)
        ...     found = describe(f"{folder}/F.safetensors")
        >>> found["class"], found["fisher"], found["unit"], found["count"]
        ('Diagonal', 'mc', 'example', 8.0)
    """
    with _opened("describe", path) as (file, source):
        header = file.metadata() or {}
        _content(source, header)
        return _parsed(source, header.get("about", "{}"), dict)


def about(obj: Any) -> dict[str, Any]:
    """Return what the header of a file says about an object."""
    said: dict[str, Any] = {"class": name_of(type(obj)) or type(obj).__name__}
    found = _first_result(obj)
    if found is not None:
        said |= {"fisher": found.fisher, "unit": found.unit}
        if found.count.ndim == 0 and concrete(found.count):
            said["count"] = found.count.item()
    return said | {"fisherfn": _version(), "torch": torch.__version__}


def _first_result(obj: Any) -> Result | None:
    """Return the first result in a nesting of states, dicts, lists and tuples."""
    if isinstance(obj, Result):
        return obj
    parts = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, list | tuple) else ()
    for part in parts:
        found = _first_result(part)
        if found is not None:
            return found
    return None


def _version() -> str:
    from importlib import metadata  # takes a while to load

    try:
        return metadata.version("fisherfn")
    except metadata.PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def _opened(caller: str, path: Any) -> Iterator[tuple[Any, Path]]:
    """Give an open file and its path."""
    package = _safetensors(caller)
    source = _path(caller, path)
    if not source.is_file():
        raise DataError(
            f"io.{caller}: expected a file, got {str(source)!r}, which is none. Check the path."
        )
    try:
        with package.safe_open(str(source), framework="pt") as file:
            yield file, source
    except (OSError, package.SafetensorError) as error:
        raise DataError(
            f"io.{caller}: expected a complete safetensors file, got {str(source)!r} with the "
            f"error: {error}. It is truncated or of another format; save it anew."
        ) from error


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
    return _parsed(source, header["content"], object)


def _parsed(source: Path, text: str, kind: type) -> Any:
    """Return what a text in a file's header says."""
    try:
        found = json.loads(text)
    except ValueError as error:
        found, problem = None, str(error)
    else:
        problem = None if isinstance(found, kind) else type(found).__name__
    if problem is not None:
        raise DataError(
            f"io.load: expected JSON in the header of {str(source)!r}, got {problem}. The file was "
            "altered; save it anew."
        )
    return found


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


def device_of(caller: str, device: torch.device | str) -> torch.device:
    """Return a device that exists.

    Raises:
        OptionError: There is none.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(
            f"io.{caller}: expected a device, got {device!r}: {str(error).splitlines()[0]} Use "
            "'cpu', or a device that torch can see."
        ) from error
    return place
