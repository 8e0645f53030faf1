"""From parameters to groups and back: `reduce`, `expand`, labelled regrouping, sums for reports.

Reduced values are a dict of vectors `[num_groups]`, under the path of the parameter, or under the
name of a pool (`into`) to whose groups several parameters add theirs. With t_g the sum over group g
and |g| its scalars, "sum" keeps t_g and "mean" t_g/|g|; `expand` gives every scalar t_g/|g| in both
cases, so that the trace is conserved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError
from fisherfn.groups.names import places
from fisherfn.groups.spec import GroupSpec, whole

Specs: TypeAlias = Mapping[str, GroupSpec]
_REPORTS = ("layer", "component", "kind", "leaf")


def reduce(tree: Any, specs: Specs) -> dict[str, Tensor]:
    """Return the sum (or the mean, if the spec says so) over each group.

    Args:
        tree: Tree like the parameters, such as the values of a `Diagonal`.
        specs: A `GroupSpec` for the path of every leaf.

    Returns:
        Vectors `[num_groups]`, float32 or wider, by path or by name of the pool.

    Raises:
        TreeMismatchError: A leaf has no spec or another shape, or a spec has no leaf.
        OptionError: Specs that share a pool do not have the same groups.

    Cost: one pass over the tree.

    Example:
        >>> from fisherfn.groups import channels
        >>> tree = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        >>> reduce(tree, {"w": channels((2, 2))})
        {'w': tensor([3., 7.])}
    """
    leaves = check_leaves("groups.reduce", tree, specs)
    found: dict[str, Tensor] = {}
    for path, leaf in leaves.items():
        spec = specs[path]
        name = spec.into or path
        part = spec.fold(_wide(leaf))
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
        >>> from fisherfn.groups import channels
        >>> expand({"w": torch.tensor([3.0, 7.0])}, {"w": channels((2, 2))})["w"]
        tensor([[1.5000, 1.5000],
                [3.5000, 3.5000]])
    """
    values = check_reduced("groups.expand", reduced, specs)
    sizes = pool_sizes("groups.expand", specs)
    density: dict[str, Tensor] = {}
    for name, members in pools("groups.expand", specs).items():
        value = _wide(values[name])
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


def relabel(
    specs: Specs,
    labels: Mapping[str, Sequence[Hashable]],
    *,
    into: str | None = None,
) -> dict[str, GroupSpec]:
    """Return specs whose groups are joined by label, such as heads by what they do.

    Args:
        specs: Specs by path.
        labels: For some paths, the label of each group. Groups of one label become one group; the
            labels are numbered in the order of their first appearance.
        into: A name under which all labelled parameters are added up, label by label. By default
            each keeps a vector of its own, over all labels.

    Returns:
        Specs by path, those of kind "label" with the labels as `names`.

    Raises:
        TreeMismatchError: There is no spec at a labelled path.
        ShapeError: There are more or fewer labels than groups.
        OptionError: Nothing is labelled, or `into` is the path of a parameter.

    Example:
        >>> from fisherfn.groups import heads
        >>> specs = {"q": heads((6, 4), 3)}
        >>> relabel(specs, {"q": ["induction", "other", "induction"]})["q"].sizes
        (16, 8)
    """
    if not labels:
        raise OptionError(
            "groups.relabel: expected labels for at least one path, got none. Give a sequence of "
            "labels, one a group, for a path of the specs."
        )
    for path, given in labels.items():
        if path not in specs:
            raise TreeMismatchError(
                f"groups.relabel: expected paths of {len(specs)} specs, got labels at '{path}', "
                "which has none. Use the paths that groups.infer returned."
            )
        if len(given) != specs[path].num_groups:
            raise ShapeError(
                f"groups.relabel: expected {specs[path].num_groups} labels, one a group, got "
                f"{len(given)} at '{path}'. Label every group."
            )
    if into is not None and into in specs:
        raise OptionError(
            f"groups.relabel: expected into= to be a new name, got the path {into!r}. Choose "
            "another name for the pool."
        )
    number = _numbers(labels)
    names = tuple([str(label) for label in number])
    found = dict(specs)
    for path, given in labels.items():
        spec = specs[path]
        classes = [number[label] for label in given]
        base = range(spec.base_groups) if spec.order is None else spec.order
        found[path] = spec.renamed(
            kind="label",
            order=tuple([classes[g] for g in base]),
            num_groups=len(number),
            names=names,
            parts=(),
            into=spec.into if into is None else into,
        )
    return found


def regroup(
    reduced: Mapping[str, Tensor],
    specs: Specs,
    labels: Mapping[str, Sequence[Hashable]],
    *,
    into: str | None = None,
) -> dict[str, Tensor]:
    """Return reduced values joined by label: what `reduce` gives for the relabelled specs.

    Args:
        reduced: Vectors by path, as `reduce` returns them.
        specs: The specs that were used, none of them pooled.
        labels: As for `relabel`.
        into: As for `relabel`.

    Returns:
        Vectors by path or pool, to go with `relabel(specs, labels, into=into)`.

    Raises:
        TreeMismatchError: Values and specs do not fit, or there is no spec at a labelled path.
        ShapeError: There are more or fewer labels than groups.
        OptionError: Nothing is labelled, or a labelled parameter is in a pool already.

    Example:
        >>> from fisherfn.groups import heads
        >>> specs = {"q": heads((6, 4), 3)}
        >>> regroup({"q": torch.tensor([1.0, 2.0, 4.0])}, specs, {"q": [0, 1, 0]})
        {'q': tensor([5., 2.])}
    """
    values = check_reduced("groups.regroup", reduced, specs)
    relabelled = relabel(specs, labels, into=into)
    for path in labels:
        if specs[path].into is not None:
            raise OptionError(
                f"groups.regroup: expected labelled parameters of their own, got '{path}' in the "
                f"pool {specs[path].into!r}. Relabel the specs and reduce anew."
            )
    number, found = _numbers(labels), dict[str, Tensor]()
    for name, value in values.items():
        if name not in labels:
            found[name] = value
            continue
        old, new = specs[name], relabelled[name]
        value = _wide(value)
        if old.reduction == "mean":
            value = value * old.counts(value.device)
        index = torch.tensor([number[label] for label in labels[name]], device=value.device)
        joined = value.new_zeros(new.num_groups).index_add(0, index, value)
        key = new.into or name
        found[key] = found[key] + joined if key in found else joined
    sizes = pool_sizes("groups.regroup", relabelled)
    for key, new in {relabelled[path].into or path: relabelled[path] for path in labels}.items():
        if new.reduction == "mean":
            found[key] = found[key] / sizes(key, found[key]).clamp_min(1)
    return found


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
        value = _wide(values[name])
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

    Example:
        >>> params = {"h.0.a.weight": torch.ones(2, 2), "h.0.b.weight": torch.ones(2, 2)}
        >>> reduce(params, layers(params))
        {'layer_0': tensor([8.])}
    """
    if by not in ("layer", "component"):
        raise OptionError(
            f"groups.layers: expected by= to be 'layer' or 'component', got {by!r}. For one group "
            "a parameter, use groups.whole."
        )
    paths = trees.paths(params)
    located = places(paths)
    return {
        path: whole(tuple(leaf.shape)).renamed(into=getattr(located[path], by), source="its name")
        for path, leaf in zip(paths, trees.leaves(params), strict=True)
    }


# ---- checks --------------------------------------------------------------------------------------


def check_leaves(caller: str, tree: Any, specs: Specs) -> dict[str, Tensor]:
    """Return the leaves of a tree by path, checked against the specs.

    Raises:
        TreeMismatchError: A leaf has no spec or another shape, or a spec has no leaf.
    """
    leaves = dict(zip(trees.paths(tree), trees.leaves(tree), strict=True))
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


def _numbers(labels: Mapping[str, Sequence[Hashable]]) -> dict[Hashable, int]:
    """Number the labels in the order of their first appearance."""
    number: dict[Hashable, int] = {}
    for given in labels.values():
        for label in given:
            number.setdefault(label, len(number))
    return number


def _report(by: str, path: str, spec: GroupSpec, place: Any) -> str:
    if by == "kind":
        return spec.kind
    return path if by == "leaf" else getattr(place, by)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
