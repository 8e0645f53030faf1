"""From parameters to groups and back: `reduce` and `expand`.

Reduced values are a dict of vectors `[num_groups]`, under the path of the parameter, or under the
name of a pool (`into`) to whose groups several parameters add theirs. With t_g the sum over group g
and |g| its scalars, "sum" keeps t_g and "mean" t_g/|g|; `expand` gives every scalar t_g/|g| in both
cases, so that the trace is conserved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.groups.pools import Specs, check_leaves, check_reduced, pool_sizes, pools


def reduce(tree: Any, specs: Specs) -> dict[str, Tensor]:
    """Return the sum (or the mean, if the spec says so) over each group.

    Args:
        tree: Tree like the parameters, or a `Diagonal`.
        specs: A `GroupSpec` for the path of every leaf.

    Returns:
        Vectors `[num_groups]`, float32 or wider, by path or by name of the pool.

    Raises:
        TreeMismatchError: A leaf has no spec or another shape, or a spec has no leaf.
        OptionError: Specs that share a pool do not have the same groups.

    Cost: one pass over the tree.

    Example:
        >>> import torch
        >>> from fisherfn.groups import channels
        >>> tree = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        >>> reduce(tree, {"w": channels((2, 2))})
        {'w': tensor([3., 7.])}
    """
    values = getattr(tree, "values", None)
    if isinstance(values, Mapping):  # of a Diagonal; those of a dict are a method
        tree = values
    leaves = check_leaves("groups.reduce", tree, specs)
    found: dict[str, Tensor] = {}
    for path, leaf in leaves.items():
        spec = specs[path]
        name = spec.into or path
        part = spec.fold(wide(leaf)).clone()  # elements are the tensor itself
        found[name] = found[name] + part.to(found[name].device) if name in found else part
    sizes = pool_sizes("groups.reduce", specs)
    for name, members in pools("groups.reduce", specs).items():
        if members[0][1].reduction == "mean":
            size = sizes(name, found[name])
            found[name] = found[name] / size.clamp_min(1)
    return found


def expand(reduced: Mapping[str, Tensor], specs: Specs, *, like: Any = None) -> Any:
    """Return every scalar's share of its group: what `reduce` summed or averaged, spread evenly.

    The trace is conserved: the expanded tree has the sums over groups that `reduce` started from.

    Args:
        reduced: Vectors by path or pool, as `reduce` returns them.
        specs: The specs that were used.
        like: A tree like the parameters whose structure the result gets; by default it is a flat
            dict by path.

    Returns:
        Tree of tensors of the parameters' shapes.

    Raises:
        TreeMismatchError: A vector is missing, has another length, or belongs to no spec.
        OptionError: Specs that share a pool do not have the same groups.

    Cost: writes P scalars.

    Example:
        >>> import torch
        >>> from fisherfn.groups import channels
        >>> expand({"w": torch.tensor([3.0, 7.0])}, {"w": channels((2, 2))})["w"]
        tensor([[1.5000, 1.5000],
                [3.5000, 3.5000]])
    """
    values = check_reduced("groups.expand", reduced, specs)
    sizes = pool_sizes("groups.expand", specs)
    density: dict[str, Tensor] = {}
    for name, members in pools("groups.expand", specs).items():
        value = wide(values[name])
        if members[0][1].reduction == "sum":
            value = value / sizes(name, value).clamp_min(1)
        density[name] = value
    found = {
        path: spec.spread(density[spec.into or path]).expand(spec.shape).clone()
        for path, spec in specs.items()
    }
    if like is None:
        return found
    check_leaves("groups.expand", like, specs)
    return trees.unflatten(trees.structure(like), [found[path] for path in trees.paths(like)])
