"""Merging what clients have saved, one file at a time: the federated case."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from fisherfn.core.errors import DataError, FisherError
from fisherfn.core.merging import check_mergeable, merge
from fisherfn.io import load


def merge_files(paths: Iterable[str | os.PathLike[str]], *, device: Any = "cpu") -> Any:
    """Return the exact result on the data of all clients, from the files that they saved.

    It is what one process with all the data would have got, as long as each example was with one
    client and had an id of its own. A client sends numbers about its data, not the data; how much
    these reveal is another question, which this does not answer.

    Args:
        paths: Files that `ff.io.save` wrote: results, or states of `ff.states`.
        device: Where the result goes.

    Returns:
        The merged result or state, of the same class. It does not depend on the order of the files
        beyond rounding.

    Raises:
        DataError: There is no file, or one is broken or not of ours.
        FisherError: A file holds something else than the first (another model, kind or unit); the
            message names it.

    Example:
        >>> import tempfile, torch
        >>> import fisherfn as ff
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, (value, n) in {"a": (1.0, 1.0), "b": (5.0, 3.0)}.items():
        ...         F = ff.Diagonal({"w": torch.tensor([value])}, torch.tensor(n))
        ...         ff.io.save(f"{folder}/{name}.safetensors", F)
        ...     merge_files([f"{folder}/a.safetensors", f"{folder}/b.safetensors"]).values
        {'w': tensor([4.])}
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise DataError(
            f"distributed.merge_files: expected several paths, got the one path {paths!r}. Put it "
            "into a list, or read a single file with ff.io.load."
        )
    merged, first = None, None
    for path in paths:
        part = load(path, device=device)
        try:
            if first is None:
                check_mergeable("distributed.merge_files", part)
                merged, first = part, path
            else:
                merged = merge(merged, part)
        except FisherError as error:
            beside = "" if first is None or first is path else f" beside {os.fspath(first)!r}"
            raise type(error)(
                f"distributed.merge_files: expected files that merge, got {os.fspath(path)!r}"
                f"{beside}: {error}"
            ) from error
    if first is None:
        raise DataError(
            "distributed.merge_files: expected at least one file, got none. Check the pattern that "
            "finds them."
        )
    return merged
