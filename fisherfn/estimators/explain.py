"""What an estimator does with each parameter, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.capture.plan import Plan
from fisherfn.capture.planning import plan_for
from fisherfn.capture.scores import Captured
from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.estimators import checks
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.observe import columns_needed
from fisherfn.estimators.together import Statistics
from fisherfn.layers.leaf import LeafScores


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        path: Where it is in the tree.
        shape: Its shape.
        uses: The calls that use it, as "rule #call(argument)".
        rule: How its scores are contracted: rules joined by " + ", "general path" or "unused".
        reason: Why it takes the general path, or "".
        multiplications: Of its contraction, for one pull-back of the whole batch.
        bytes: Of its inputs and cotangents, which are kept until it is contracted.
    """

    path: str
    shape: tuple[int, ...]
    uses: tuple[str, ...]
    rule: str
    reason: str
    multiplications: int
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` it.

    Attributes:
        name: The estimator.
        fisher: Whose labels.
        columns: Pull-backs for one draw of labels.
        num_samples: Draws of labels.
        batch: B.
        rows: One a parameter, in insertion order.
        checked: The captured scores were compared with autograd's.
    """

    name: str
    fisher: str
    columns: int
    num_samples: int
    batch: int
    rows: tuple[Row, ...]
    checked: bool

    @property
    def general(self) -> tuple[str, ...]:
        """Paths of the parameters that take the general path."""
        return tuple(row.path for row in self.rows if row.rule == "general path")

    @property
    def multiplications(self) -> int:
        """Of all contractions, for all pull-backs."""
        return self.columns * self.num_samples * sum(row.multiplications for row in self.rows)

    def __str__(self) -> str:
        """Lay the rows out as a table."""
        head = ("parameter", "shape", "uses", "contracted by", "mult.", "kept")
        table = [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                ", ".join(row.uses[:2]) + (f" (+{len(row.uses) - 2})" if len(row.uses) > 2 else ""),
                row.rule + (f": {row.reason}" if row.reason else ""),
                _short(row.multiplications),
                _short(row.bytes, "B"),
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *table]) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in [head, *table]
        ]
        captured = len(self.rows) - len(self.general)
        lines.append(
            f"{self.name}, fisher={self.fisher!r}: {len(self.rows)} parameters, {captured} "
            f"captured, {len(self.general)} on the general path; batch of {self.batch}, "
            f"{self.columns * self.num_samples} pull-back(s), {_short(self.multiplications)} "
            f"multiplications; {'checked against autograd' if self.checked else 'not checked'}"
        )
        return "\n".join(lines)


def explain(
    estimator: Estimator | Statistics,
) -> Callable[..., Explanation]:
    """Say where each parameter is used, which rule contracts it or why none does, and the cost.

    Args:
        estimator: Any estimator, or several combined by `statistics`.

    Returns:
        A function of `(params, buffers, batch)` that gives an `Explanation`. It runs one forward
        and one backward.

    Raises:
        OptionError: this is no estimator.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> fim = ff.diagonal(model, ff.likelihoods.categorical())
        >>> ff.explain(fim)({"w": torch.zeros(1, 2)}, {}, ff.Batch(torch.ones(4, 1))).rows[0].rule
        'matmul'
    """
    if not isinstance(estimator, (Estimator, Statistics)):
        raise OptionError(
            f"explain: expected an estimator, got {type(estimator).__name__}. Make one with "
            "diagonal, dense, per_sample_gradients, ..."
        )

    def run(params: Any, buffers: Any, batch: Batch) -> Explanation:
        return _explain(estimator, params, buffers, batch)

    return run


def _explain(
    estimator: Estimator | Statistics, params: Any, buffers: Any, batch: Batch
) -> Explanation:
    leaves = checks.check_params("explain", params)
    size = checks.check_batch("explain", batch)
    plan = plan_for(estimator.model, params, buffers, batch.inputs)
    captured = Captured(estimator.model, params, buffers, batch.inputs, plan, plain=False)
    costs: dict[int, int] = {}
    statistic = estimator.make() if isinstance(estimator, Estimator) else None
    if statistic is not None:
        statistic.begin(params)

    def note(leaf: int, scores: LeafScores) -> None:
        if statistic is None:
            costs[leaf] = scores.multiplications()
        else:
            costs[leaf] = statistic.multiplications(leaf, scores)

    # explaining must stay cheap: parameters on the general path are counted, not run
    ones = trees.map(lambda t: torch.ones_like(t).unsqueeze(0), captured.outputs)
    captured.pull_only(ones, note, last=False)
    paths = trees.paths(params)
    rows = tuple(
        _row(i, paths[i], leaves[i], plan, captured, costs.get(i, 0)) for i in range(len(leaves))
    )
    if isinstance(estimator, Estimator):
        labels = [estimator.labels]
    else:
        labels = list(dict.fromkeys(e.labels for e in estimator.estimators.values()))
    name = estimator.name if isinstance(estimator, Estimator) else "statistics"
    columns = sum(
        columns_needed(x, estimator.likelihood, captured.outputs) * x.num_samples for x in labels
    )
    fisher = " + ".join(x.fisher for x in labels)
    return Explanation(name, fisher, columns, 1, size, rows, plan.checked)


def _row(
    index: int, path: str, leaf: Tensor, plan: Plan, captured: Captured, multiplications: int
) -> Row:
    uses, rules, kept = [], [], 0
    for number, tap in enumerate(plan.taps):
        for use in tap.uses:
            if use.leaf != index:
                continue
            uses.append(f"{tap.rule} #{tap.number}({use.argument})")
            rules.append(tap.rule if use.argument != "bias" else "shift")
            kept += sum(t.numel() * t.element_size() for t in captured.run.kept[number])
            kept += captured.run.output_bytes(number)
    shape = tuple(leaf.shape)
    if index in plan.unused:
        return Row(path, shape, (), "unused", "", 0, 0)
    if index in plan.general:
        batch = captured.batch
        return Row(
            path,
            shape,
            tuple(uses),
            "general path",
            plan.general[index],
            batch * leaf.numel(),
            batch * leaf.numel() * 4,
        )
    return Row(
        path, shape, tuple(uses), " + ".join(dict.fromkeys(rules)), "", multiplications, kept
    )


def _short(n: float, unit: str = "") -> str:
    if n < 1:
        return f"0{unit}"
    power = min(5, int(math.log(n, 1000) + 1e-9))
    return f"{n / 1000**power:.3g}{['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"
