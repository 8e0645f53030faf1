"""Groups joined by label: heads by what they do, channels by cluster, anything by anything."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from fisherfn.core.dtypes import wide
from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError
from fisherfn.groups.pools import Specs, check_reduced, pool_sizes
from fisherfn.groups.spec import GroupSpec


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
        value = wide(value)
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


def _numbers(labels: Mapping[str, Sequence[Hashable]]) -> dict[Hashable, int]:
    """Number the labels in the order of their first appearance."""
    number: dict[Hashable, int] = {}
    for given in labels.values():
        for label in given:
            number.setdefault(label, len(number))
    return number
