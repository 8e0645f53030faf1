"""`capture`: outputs, sites and the pull-back, for statistics of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisherfn.capture.planning import plan_for
from fisherfn.capture.scores import Captured
from fisherfn.core import trees
from fisherfn.core.errors import TreeMismatchError
from fisherfn.layers.leaf import LeafScores


@dataclass(frozen=True)
class Site:
    """One call of the model at which parameters meet data.

    Attributes:
        rule: The rule that contracts it.
        call: Its number among the calls of functions that have rules.
        params: Path and argument name of each parameter used there.
        inputs: What the rule keeps, as the model passed it: for a linear layer its input.
    """

    rule: str
    call: int
    params: tuple[tuple[str, str], ...]
    inputs: tuple[Tensor, ...]


class Capture:
    """One forward of a model, and the scores that any cotangent of the outputs gives.

    Attributes:
        outputs: What the model returned.
        sites: The calls at which parameters meet data, in order.
        general: Path of each parameter that no rule contracts, and why.
    """

    def __init__(self, captured: Captured, params: Any) -> None:
        """Describe what was captured."""
        self._captured = captured
        self._paths = trees.paths(params)
        self.outputs = captured.outputs
        self.sites = tuple(
            Site(
                tap.rule,
                tap.number,
                tuple((self._paths[use.leaf], use.argument) for use in tap.uses),
                kept,
            )
            for tap, kept in zip(captured.plan.taps, captured.run.kept, strict=True)
        )
        self.general = {self._paths[i]: why for i, why in captured.plan.general.items()}

    def pullback(self, cotangents: Any) -> dict[str, LeafScores]:
        """Return the scores of every parameter, by path, in factored form.

        Args:
            cotangents: Like the outputs: what each example's outputs are multiplied by. The score
                of example b is the gradient of `<cotangents_b, outputs_b>`.

        Returns:
            For each parameter its `LeafScores`: `scores()` `[1, B, *shape]`, `square_sum()`,
            `sum()`, `norms()` `[1, B]`, `gram()` `[B, B]`; `uses` holds the forms, such as
            `Outer(a, g)` with `a` `[B, R, T, I]` and `g` `[1, B, R, T, O]` of a linear layer.

        Raises:
            TreeMismatchError: the cotangents are not like the outputs.
        """
        trees.check_like(
            "capture.pullback", "cotangents", cotangents, self.outputs, like_name="the outputs"
        )
        found: dict[str, LeafScores] = {}

        def keep(leaf: int, scores: LeafScores) -> None:
            found[self._paths[leaf]] = scores

        columns = trees.map(lambda t: t.unsqueeze(0), cotangents)
        self._captured.scores(columns, keep, last=False)
        return {path: found[path] for path in self._paths}


def capture(model: Any) -> Callable[[Any, Any, Any], Capture]:
    """Watch a model run: which inputs meet which parameters, and the cotangents behind them.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.

    Returns:
        A function of `(params, buffers, inputs)` that gives a `Capture`. Under `torch.compile` call
        it inside an estimator or inside your own function that uses its tensors.

    Raises:
        TreeMismatchError: params hold no tensors.

    Example:
        >>> import torch
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> seen = capture(model)({"w": torch.ones(2, 1)}, {}, torch.tensor([[1.0, 2.0]]))
        >>> [(site.rule, site.params) for site in seen.sites]
        [('matmul', (('w', 'other'),))]
        >>> seen.pullback(torch.ones(1, 1))["w"].scores()
        tensor([[[[1.],
                  [2.]]]])
    """

    def run(params: Any, buffers: Any, inputs: Any) -> Capture:
        if not trees.leaves(params):
            raise TreeMismatchError(
                "capture: expected params with at least one tensor, got none. Pass what "
                "functional() returned."
            )
        plan = plan_for(model, params, buffers, inputs)
        captured = Captured(model, params, buffers, inputs, plan, plain=False)
        return Capture(captured, params)

    return run
