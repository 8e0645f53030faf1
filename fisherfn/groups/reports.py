"""Whole layers and components as groups, and sums of finer groups over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.errors import OptionError
from fisherfn.groups.names import places
from fisherfn.groups.pools import Specs, check_reduced, pool_sizes, pools
from fisherfn.groups.spec import GroupSpec, whole

_REPORTS = ("layer", "component", "kind", "leaf")


def totals(reduced: Mapping[str, Tensor], specs: Specs, by: str = "layer") -> dict[str, Tensor]:
    """Return sums of reduced values for a report: by layer, component, kind of group, or leaf.

    Args:
        reduced: Vectors by path or pool, as `reduce` returns them.
        specs: The specs that were used.
        by: "layer", "component", "kind" or "leaf".

    Returns:
        0-d tensors, sums over groups (never means), by name in order of appearance.

    Raises:
        OptionError: Another `by`, or a pool whose parameters belong to different places.
        TreeMismatchError: Values and specs do not fit.

    Example:
        >>> import torch
        >>> from fisherfn.groups import channels
        >>> specs = {"h.0.fc.weight": channels((2, 3)), "h.1.fc.weight": channels((2, 3))}
        >>> totals({path: torch.ones(2) for path in specs}, specs)
        {'layer_0': tensor(2.), 'layer_1': tensor(2.)}
    """
    if by not in _REPORTS:
        raise OptionError(
            f"groups.totals: expected by= to be one of {list(_REPORTS)}, got {by!r}. For other "
            "sums, relabel the specs."
        )
    values = check_reduced("groups.totals", reduced, specs)
    located = places(specs)
    sizes = pool_sizes("groups.totals", specs)
    found: dict[str, Tensor] = {}
    for name, members in pools("groups.totals", specs).items():
        wanted = {_report(by, path, spec, located[path]) for path, spec in members}
        if len(wanted) > 1:
            raise OptionError(
                f"groups.totals: expected the parameters of the pool {name!r} in one {by}, got "
                f"{sorted(wanted)}. Report with specs that are not pooled."
            )
        value = wide(values[name])
        if members[0][1].reduction == "mean":
            value = value * sizes(name, value)
        key = wanted.pop()
        found[key] = found[key] + value.sum() if key in found else value.sum()
    return found


def layers(params: Any, *, by: str = "layer") -> dict[str, GroupSpec]:
    """Return specs with one group for each layer (or component) of a model, over its parameters.

    Args:
        params: Tree of parameters; layers are told by their names.
        by: "layer" (`embeddings`, `layer_0`, ..., `final_norm`, `lm_head`, `other`) or "component"
            (`layer_0.q_proj`, ...).

    Returns:
        Specs of kind "tensor", pooled under the names of the layers.

    Raises:
        OptionError: Another `by`.
        TreeMismatchError: Two parameters have one path.

    Example:
        >>> import torch
        >>> params = {"h.0.a.weight": torch.ones(2, 2), "h.0.b.weight": torch.ones(2, 2)}
        >>> from fisherfn.groups import reduce
        >>> reduce(params, layers(params))
        {'layer_0': tensor([8.])}
    """
    if by not in ("layer", "component"):
        raise OptionError(
            f"groups.layers: expected by= to be 'layer' or 'component', got {by!r}. For one group "
            "a parameter, use groups.whole."
        )
    paths = trees.unique_paths("groups.layers", params)
    located = places(paths)
    return {
        path: whole(tuple(leaf.shape)).renamed(into=getattr(located[path], by), source="its name")
        for path, leaf in zip(paths, trees.leaves(params), strict=True)
    }


def _report(by: str, path: str, spec: GroupSpec, place: Any) -> str:
    if by == "kind":
        return spec.kind
    return path if by == "leaf" else getattr(place, by)
