"""Arithmetic of two trees checks the shapes of their leaves."""

from __future__ import annotations

import re

import pytest
import torch

from fisherfn.core import trees as tree
from fisherfn.core.errors import TreeMismatchError


@pytest.mark.parametrize("name", ["add", "sub", "mul", "axpy", "dot"])
@pytest.mark.parametrize("shape", [(1,), (3,), (), (2, 2)])
def test_leaves_of_two_trees_are_not_broadcast(name: str, shape: tuple[int, ...]) -> None:
    first = {"a": torch.ones(2), "b": {"c": torch.ones(2)}}
    second = {"a": torch.ones(2), "b": {"c": torch.ones(shape)}}
    given = (2.0,) if name == "axpy" else ()
    with pytest.raises(
        TreeMismatchError,
        match=rf"tree\.{name}: expected a second tree like the first, got shape "
        rf"{re.escape(str(shape))} at b/c, needs \(2,\)\. Build it",
    ):
        getattr(tree, name)(*given, first, second)
