"""Traces of the Fisher information over groups of parameters, straight from the scores.

t_g = (1/N) Σ_n E_y[ Σ_{i in g} s_ni² ]. The sum over a group is taken where inputs and cotangents
of a layer meet, and the diagonal is formed only where that is cheaper: see
`fisherfn.layers.grouping`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fisherfn.core.errors import OptionError
from fisherfn.curvature import Grouped, Layout
from fisherfn.curvature.grouped import in_order, summing
from fisherfn.estimators import checks
from fisherfn.estimators.diagonal import SquareSum
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.statistic import Frame
from fisherfn.groups import GroupSpec
from fisherfn.groups.pools import check_leaves, pools
from fisherfn.layers.grouping import group_sum, multiplications
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.numerics import accumulate
from fisherfn.likelihoods import resolve


class GroupSum(SquareSum):
    """Sums of squared scores over groups; with several draws also their spread."""

    def __init__(self, specs: Mapping[str, GroupSpec], num_samples: int) -> None:
        """Expect `num_samples` draws, and the parameters that the specs are about."""
        super().__init__(num_samples)
        self._specs = specs
        self._leaves: list[tuple[GroupSpec, int]] = []
        self._names: dict[str, int] = {}

    def begin(self, params: Any) -> None:
        """Find the spec of every parameter, and the vector that its groups are added to."""
        for path in check_leaves("grouped", params, self._specs):
            spec = self._specs[path]
            number = self._names.setdefault(spec.into or path, len(self._names))
            self._leaves.append((spec, number))

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Add the squares of this parameter's scores to its groups."""
        spec, number = self._leaves[leaf]
        self._now[number] = accumulate(self._now.get(number), group_sum(scores, spec))

    def multiplications(self, leaf: int, scores: LeafScores) -> int:
        """Return the multiplications of the groups, which may be fewer than those of entries."""
        return multiplications(scores, self._leaves[leaf][0])

    def result(self, frame: Frame) -> Grouped:  # type: ignore[override]
        """Return the traces, with the standard error of the mean over draws."""
        values, errors = self.draws()
        layout = Layout.of(frame.params)
        return Grouped(
            {name: values[i] for name, i in self._names.items()},
            frame.total,
            layout,
            in_order(self._specs, layout),
            None if errors is None else {name: errors[i] for name, i in self._names.items()},
            fisher=frame.fisher,
            unit=frame.unit,
        )


def grouped(
    model: Any,
    likelihood: Any,
    groups: Mapping[str, GroupSpec],
    *,
    fisher: str = "exact",
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
) -> Estimator:
    """Estimate traces of the Fisher information over groups of parameters: channels, heads, rows.

    t_g = Σ_{i in g} F_ii, with F_ii as in `diagonal`: what `groups.reduce(diagonal.values, groups)`
    gives, without the diagonal where the sum over a group is cheaper than its entries.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution, from `fisherfn.likelihoods`.
        groups: A `GroupSpec` for the path of every parameter, from `ff.groups.infer`; their
            `reduction` plays no part, `values` are sums.
        fisher: Whose labels: "exact", "mc", "curvature_prop" or "empirical"; see `diagonal`.
        num_samples: Draws of labels for each example, for "mc" and "curvature_prop"; with more than
            one, the result has a standard error.
        unit: What N counts: "example" or "position".
        chunk_size: Examples processed together; None takes all that memory allows.

    Returns:
        An estimator: called with `(params, buffers, batch, *, key=None)` it gives a `Grouped`.

    Raises:
        OptionError: an option does not exist, the combination makes no sense, or groups are none.

    Cost: one forward and one backward for each draw, without weight gradients; for a linear layer
    `[out, in]` and T positions, T min(T (in + out), in·out) multiplications an example, in + out
    for T = 1. Memory of the result: one number a group.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method,
    section 5.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"].T
        >>> params = {"w": torch.zeros(2, 3, dtype=torch.float64)}
        >>> batch = ff.Batch(torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64))
        >>> groups = {"w": ff.groups.channels((2, 3))}
        >>> fim = ff.grouped(model, ff.likelihoods.categorical(), groups)
        >>> fim(params, {}, batch).values
        {'w': tensor([1.2500, 1.2500], dtype=torch.float64)}
    """
    labels = checks.check_options("grouped", model, fisher, num_samples, unit, chunk_size)
    if not isinstance(groups, Mapping):
        raise OptionError(
            f"grouped: expected groups to be a mapping from paths to GroupSpec, got "
            f"{type(groups).__name__}. Make it with groups.infer(params, module)."
        )
    pools("grouped", groups)
    specs = summing(groups)
    options = {
        "groups": specs,
        "fisher": fisher,
        "num_samples": num_samples,
        "unit": unit,
        "chunk_size": chunk_size,
    }

    def rebuild(found: Any, params: Any) -> Grouped:
        layout = Layout.of(params)
        return Grouped(
            found["values"],
            found["count"],
            layout,
            in_order(specs, layout),
            found.get("stderr"),
            fisher=fisher,
            unit=unit,
        )

    lik = resolve("grouped", likelihood)
    return Estimator(
        "grouped", model, lik, options, labels, lambda: GroupSum(specs, num_samples), rebuild
    )
