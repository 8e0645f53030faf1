"""Do all ranks hold the same kind of thing? Asked before anything large is sent.

Each rank describes what it holds: structure, kinds and static parts in JSON, as files do, and the
shapes and dtypes of its tensors. Everybody gets every description, so everybody raises the same
error, and nobody waits for a rank that has given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfn.core.errors import DataError, FisherError, TreeMismatchError
from fisherfn.core.merging import check_mergeable
from fisherfn.distributed.wire import Wire
from fisherfn.io.structure import Writer, dtype_named, read


@dataclass(frozen=True)
class Description:
    """What a rank holds, without the numbers."""

    content: Any
    tensors: dict[str, tuple[tuple[int, ...], str]]


def described(obj: Any) -> tuple[Description, dict[str, Tensor]]:
    """Return the description of an object, and its tensors by the names in it."""
    writer = Writer(shared=True)
    content = writer.node(obj, "")
    about = {
        name: (tuple(x.shape), str(x.dtype).removeprefix("torch."))
        for name, x in writer.tensors.items()
    }
    return Description(content, about), writer.tensors


def exchange(
    caller: str, wire: Wire, obj: Any
) -> tuple[list[Description | None], dict[str, Tensor]]:
    """Return what every rank holds, None where it has no data, and one's own tensors.

    Raises:
        DataError: No rank has data.
        FisherError: What this or another rank holds cannot be described.
    """
    problem: FisherError | None = None
    mine: Description | None = None
    tensors: dict[str, Tensor] = {}
    try:
        if obj is not None:
            check_mergeable(caller, obj)
            mine, tensors = described(obj)
    except FisherError as error:
        problem = type(error)(str(error).replace("io.save:", f"{caller}:", 1))
    found = wire.objects((mine, None if problem is None else str(problem)))
    if problem is not None:
        raise problem
    for rank, (_, message) in enumerate(found):
        if message is not None:
            raise DataError(
                f"{caller}: expected results on every rank, got an error on rank {rank}: {message}"
            )
    descriptions = [description for description, _ in found]
    if all(description is None for description in descriptions):
        raise DataError(
            f"{caller}: expected a result on at least one rank, got None on all {wire.world}. "
            "Only ranks without data pass None."
        )
    return descriptions, tensors


def check_same(caller: str, found: list[Description | None], shapes: bool = True) -> Description:
    """Return the description that all ranks share.

    Raises:
        TreeMismatchError: Two ranks hold different things; the message says which and where.
    """
    first, model = next((i, d) for i, d in enumerate(found) if d is not None)
    for rank, other in enumerate(found):
        if other is None or other == model:
            continue
        difference = _difference(model.content, other.content, "")
        if difference is None and shapes:
            difference = next(
                (
                    (f"{mine[1]} of shape {mine[0]}", f"{theirs[1]} of shape {theirs[0]}", name)
                    for name, mine in model.tensors.items()
                    if (theirs := other.tensors[name]) != mine
                ),
                None,
            )
        if difference is None:
            continue
        ours, theirs, path = difference
        raise TreeMismatchError(
            f"{caller}: expected the same model and estimator on every rank, got {ours} on rank "
            f"{first} and {theirs} on rank {rank} at {path or 'the root'}. Load the same weights "
            "and options everywhere."
        )
    return model


def empty(description: Description, device: torch.device | None) -> Any:
    """Return an object of this description with zeros for tensors."""
    zeros = {
        name: torch.zeros(shape, dtype=dtype_named(dtype), device=device)
        for name, (shape, dtype) in description.tensors.items()
    }
    return read(description.content, zeros)


def _difference(a: Any, b: Any, path: str) -> tuple[str, str, str] | None:
    """Return the first difference of two JSON structures, and where it is."""
    if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
        if "class" in a and a["class"] != b["class"]:
            return a["class"], b["class"], path
        steps = [(key, a[key], b[key], _inside(path, key)) for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        steps = [(i, x, y, _below(path, i, x)) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else (_shown(a), _shown(b), path)
    for _, x, y, where in steps:
        found = _difference(x, y, where)
        if found is not None:
            return found
    return None


_KINDS = ("tensor", "value", "dtype", "type", "dict", "ordered", "list", "tuple", "fields", "class")


def _inside(path: str, key: str) -> str:
    """Return the path of a part of a node; what only says its kind is no step."""
    return path if key in _KINDS else (f"{path}/{key}" if path else key)


def _below(path: str, i: int, entry: Any) -> str:
    named = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
    step = entry[0] if named else str(i)
    return f"{path}/{step}" if path else step


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."
