"""What every estimator is: a frozen callable that knows its model, likelihood and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.curvature import EKFAC, KFAC, BlockDiagonal, Dense, Grouped
from fisherfn.estimators import opaque
from fisherfn.estimators.driver import Task, evaluate
from fisherfn.estimators.observe import Labels
from fisherfn.estimators.recipe import recipe
from fisherfn.estimators.statistic import Statistic
from fisherfn.likelihoods.base import Likelihood


def strip(result: Any) -> Any:
    """Return the tensors of a result that carries a layout; `Estimator.rebuild` puts it back."""
    if isinstance(result, Dense):
        return result.matrix, result.count
    if isinstance(result, BlockDiagonal):
        return result.blocks, result.count
    if isinstance(result, KFAC | EKFAC):
        return result.stripped()
    if isinstance(result, Grouped):
        tensors = {"values": result.values, "count": result.count}
        return tensors if result.stderr is None else {**tensors, "stderr": result.stderr}
    return result


@dataclass(frozen=True, eq=False)
class Estimator:
    """A transformation of a model: called with `(params, buffers, batch, *, key=None)`.

    Pure, and safe under `torch.compile(fullgraph=True)`, `torch.vmap` over parameters and
    `torch.func.grad`. The options are read-only.

    Attributes:
        name: The function that made it.
        model: The function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        options: The keyword arguments it was made with.
        labels: Whose labels are scored, how often they are drawn, and what N counts.
        make: Returns what accumulates the scores of one batch, empty.
        rebuild: From the tensors that left compiled code and the parameters, the result; None where
            the result itself may leave it.
        then: From the result of the first pass, what the second pass over the batch accumulates;
            None where one pass is enough.
        slot: The name that compiled code calls it by.
    """

    name: str
    model: Any
    likelihood: Likelihood
    options: Mapping[str, Any]
    labels: Labels = field(repr=False)
    make: Callable[[], Statistic] = field(repr=False)
    rebuild: Callable[[Any, Any], Any] | None = field(repr=False, default=None)
    then: Callable[[Any], Callable[[], Statistic]] | None = field(repr=False, default=None)
    slot: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        """Make the options read-only and take a name that compiled code can call by."""
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "slot", opaque.register(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by making it again."""
        return recipe(self.name, self.model, self.likelihood, self.options)

    def __call__(
        self, params: Any, buffers: Any, batch: Batch, *, key: Tensor | None = None
    ) -> Any:
        """Estimate on one batch.

        Args:
            params: Tree of P scalars in total.
            buffers: What else the model reads.
            batch: The data.
            key: Random key, needed where labels are drawn.

        Returns:
            What the function that made the estimator says.

        Raises:
            FisherError: the arguments do not fit; the message says which and what to do.
        """
        if torch.compiler.is_dynamo_compiling():
            found = opaque.call(self.slot, params, buffers, batch, key)
            return found if self.rebuild is None else self.rebuild(found, params)
        return self.evaluate(params, buffers, batch, key)

    def traced(self, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> Any:
        """Evaluate, without the static parts of a result that cannot leave a compiled call."""
        return strip(self.evaluate(params, buffers, batch, key))

    def evaluate(self, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> Any:
        """Run the loop that all estimators share; see `__call__`."""
        result = self._pass(self.make, params, buffers, batch, key)
        if self.then is None:
            return result
        return self._pass(self.then(result), params, buffers, batch, key)

    def _pass(
        self,
        make: Callable[[], Statistic],
        params: Any,
        buffers: Any,
        batch: Batch,
        key: Tensor | None,
    ) -> Any:
        (result,) = evaluate(
            self.name,
            self.model,
            self.likelihood,
            [Task(self.labels, make)],
            params,
            buffers,
            batch,
            key,
            self.options.get("chunk_size"),
        )
        return result
