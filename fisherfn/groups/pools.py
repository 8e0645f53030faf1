"""Which parameters add to which vector, and whether trees, values and specs fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, TreeMismatchError
from fisherfn.groups.spec import GroupSpec

Specs: TypeAlias = Mapping[str, GroupSpec]


def check_leaves(caller: str, tree: Any, specs: Specs) -> dict[str, Tensor]:
    """Return the leaves of a tree by path, checked against the specs.

    Raises:
        TreeMismatchError: A leaf has no spec or another shape, or a spec has no leaf, or two leaves
            have one path.
    """
    leaves = dict(zip(trees.unique_paths(caller, tree), trees.leaves(tree), strict=True))
    for path, leaf in leaves.items():
        if path not in specs:
            raise TreeMismatchError(
                f"{caller}: expected a spec for every leaf, got none at '{path}'. Make them with "
                "groups.infer(params, module)."
            )
        shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else None
        if shape != specs[path].shape:
            got = type(leaf).__name__ if shape is None else f"shape {shape}"
            raise TreeMismatchError(
                f"{caller}: expected a tensor of the spec's shape {specs[path].shape}, got {got} "
                f"at '{path}'. The specs belong to another model; make them with groups.infer."
            )
    for path in specs:
        if path not in leaves:
            raise TreeMismatchError(
                f"{caller}: expected a leaf for every spec, got none at '{path}'. The specs belong "
                "to another model; make them with groups.infer."
            )
    return leaves


def check_reduced(caller: str, reduced: Mapping[str, Tensor], specs: Specs) -> dict[str, Tensor]:
    """Return reduced values by name, checked against the specs.

    Raises:
        TreeMismatchError: A vector is missing, has another length, or belongs to no spec.
    """
    wanted = {name: members[0][1].num_groups for name, members in pools(caller, specs).items()}
    for name, groups in wanted.items():
        value = reduced.get(name) if isinstance(reduced, Mapping) else None
        if not isinstance(value, Tensor) or tuple(value.shape) != (groups,):
            got = (
                f"shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else ("nothing" if value is None else type(value).__name__)
            )
            raise TreeMismatchError(
                f"{caller}: expected a vector of {groups} groups, got {got} at '{name}'. Make it "
                "with groups.reduce and the same specs."
            )
    extra = [name for name in reduced if name not in wanted]
    if extra:
        raise TreeMismatchError(
            f"{caller}: expected values of {len(wanted)} specs or pools, got one more at "
            f"'{extra[0]}'. Make them with groups.reduce and the same specs."
        )
    return {name: reduced[name] for name in wanted}


def pools(caller: str, specs: Specs) -> dict[str, list[tuple[str, GroupSpec]]]:
    """Return the parameters that add to each vector, by the name of the vector.

    Raises:
        OptionError: Specs that share a pool do not have the same groups, or a pool has the name of
            a parameter outside of it.
    """
    found: dict[str, list[tuple[str, GroupSpec]]] = {}
    for path, spec in specs.items():
        if not isinstance(spec, GroupSpec):
            raise OptionError(
                f"{caller}: expected a GroupSpec, got {type(spec).__name__} at '{path}'. Make "
                "specs with groups.infer, channels, heads, rows, elements or whole."
            )
        members = found.setdefault(spec.into or path, [])
        if members:
            first = members[0][1]
            same = (first.num_groups, first.reduction, first.into, first.names) == (
                spec.num_groups,
                spec.reduction,
                spec.into,
                spec.names,
            )
            if not same:
                raise OptionError(
                    f"{caller}: expected the same groups in the pool '{spec.into or path}', got "
                    f"{first.num_groups} ({first.reduction}) at '{members[0][0]}' and "
                    f"{spec.num_groups} ({spec.reduction}) at '{path}'. Give them the same groups, "
                    "or another into=."
                )
        members.append((path, spec))
    return found


def pool_sizes(caller: str, specs: Specs) -> Callable[[str, Tensor], Tensor]:
    """Return a function of (name, like): the number of scalars in each group, like a tensor."""
    members = pools(caller, specs)

    def sizes(name: str, like: Tensor) -> Tensor:
        total = members[name][0][1].counts(like.device)
        for _, spec in members[name][1:]:
            total = total + spec.counts(like.device)
        return total.to(like.dtype)

    return sizes
