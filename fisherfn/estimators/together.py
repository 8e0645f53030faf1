"""Several quantities from one forward, and one backward for each distinct kind of labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.estimators import checks, opaque
from fisherfn.estimators.driver import Task, evaluate
from fisherfn.estimators.estimator import Estimator, strip
from fisherfn.estimators.observe import Labels, Observed
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.numerics import accumulate
from fisherfn.likelihoods.base import Likelihood

_EMPIRICAL = Labels("empirical", 1, "example")


class Gradient(Statistic):
    """The gradient of the mean negative log-likelihood."""

    def __init__(self) -> None:
        """Start empty."""
        self._sum: dict[int, Tensor] = {}

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Subtract this parameter's scores; they come with `√(w/N)` once already."""
        self._sum[leaf] = accumulate(self._sum.get(leaf), scores.scaled(-root_weights).sum())

    def result(self, frame: Frame) -> Any:
        """Return a tree like the parameters."""
        found = [self._sum[i] for i in range(len(frame.leaves))]
        return trees.unflatten(trees.structure(frame.params), found)


class Loss(Statistic):
    """The mean negative log-likelihood of the observed targets."""

    needs_scores = False

    def __init__(self) -> None:
        """Start empty."""
        self._sum: Tensor | None = None

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Nothing: the loss is read off the outputs."""

    def observe(self, observed: Observed) -> None:
        """Add the weighted log-probabilities of a chunk."""
        term = -observed.log_likelihood()
        self._sum = term if self._sum is None else self._sum + term

    def result(self, frame: Frame) -> Tensor:
        """Return a 0-d tensor, in nats per unit."""
        assert self._sum is not None
        return self._sum


@dataclass(frozen=True, eq=False)
class Statistics:
    """Several estimators as one; see `statistics`.

    Attributes:
        model: The function that all of them share.
        likelihood: The likelihood that all of them share.
        estimators: The estimators, by name.
        options: The keyword options.
        slot: The name that compiled code calls it by.
    """

    model: Any
    likelihood: Likelihood
    estimators: Mapping[str, Estimator]
    options: Mapping[str, Any]
    slot: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        """Make the mappings read-only and take a name that compiled code can call by."""
        object.__setattr__(self, "estimators", MappingProxyType(dict(self.estimators)))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "slot", opaque.register(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by making it again."""
        fields = self.model, self.likelihood, dict(self.estimators), dict(self.options)
        return Statistics, fields

    def __call__(
        self, params: Any, buffers: Any, batch: Batch, *, key: Tensor | None = None
    ) -> dict[str, Any]:
        """Estimate everything on one batch; returns a dict by name."""
        if torch.compiler.is_dynamo_compiling():
            found = opaque.call(self.slot, params, buffers, batch, key)
            for name, e in self.estimators.items():
                if e.rebuild is not None:
                    found[name] = e.rebuild(found[name], params)
            return found
        return self.evaluate(params, buffers, batch, key)

    def traced(self, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> dict[str, Any]:
        """Evaluate, without the static parts of results that cannot leave a compiled call."""
        return {k: strip(v) for k, v in self.evaluate(params, buffers, batch, key).items()}

    def evaluate(
        self, params: Any, buffers: Any, batch: Batch, key: Tensor | None
    ) -> dict[str, Any]:
        """Run the loop that all estimators share; see `__call__`."""
        self._check_weights(batch)
        tasks = {name: Task(e.labels, e.make) for name, e in self.estimators.items()}
        wanted: dict[str, Callable[[], Statistic]] = {"loss": Loss, "gradient": Gradient}
        for name, make in wanted.items():
            if self.options[name]:
                tasks[name] = Task(_EMPIRICAL, make)
        found = self._pass(tasks, params, buffers, batch, key)
        second = {
            name: Task(e.labels, e.then(found[name]))
            for name, e in self.estimators.items()
            if e.then is not None
        }
        return found | self._pass(second, params, buffers, batch, key) if second else found

    def _check_weights(self, batch: Any) -> None:
        weights = getattr(batch, "weights", None)
        averages = [name for name in ("loss", "gradient") if self.options[name]]
        if averages and isinstance(weights, Tensor) and weights.dim() > 1:
            raise OptionError(
                f"statistics: expected weights of examples, [B], for {' and '.join(averages)}, got "
                f"shape {tuple(weights.shape)}. The loss is a mean over examples; leave it out "
                "where positions have weights."
            )

    def _pass(
        self, tasks: dict[str, Task], params: Any, buffers: Any, batch: Batch, key: Tensor | None
    ) -> dict[str, Any]:
        found = evaluate(
            "statistics",
            self.model,
            self.likelihood,
            list(tasks.values()),
            params,
            buffers,
            batch,
            key,
            self.options["chunk_size"],
        )
        return dict(zip(tasks, found, strict=True))


def statistics(
    *,
    loss: bool = False,
    gradient: bool = False,
    chunk_size: int | None = None,
    **estimators: Estimator,
) -> Statistics:
    """Combine estimators of one model: one forward, one backward for each distinct kind of labels.

    Estimators that ask for the same `fisher`, `num_samples` and `unit` share their backward.

    Args:
        loss: Also give the mean over examples of the negative log-likelihood of the targets, under
            "loss".
        gradient: Also give its gradient, under "gradient".
        chunk_size: Examples processed together; replaces that of the single estimators.
        **estimators: Estimators of the same model and likelihood, by the name of their result.

    Returns:
        A transformation: called with `(params, buffers, batch, *, key=None)` it gives a dict.

    Raises:
        OptionError: nothing to estimate, something that is no estimator, or different models.

    Cost: one forward, one backward for each distinct kind of labels, and the contractions.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model, lik = lambda params, buffers, x: x @ params["w"], ff.likelihoods.categorical()
        >>> both = ff.statistics(diag=ff.diagonal(model, lik, fisher="empirical"), loss=True)
        >>> batch = ff.Batch(torch.tensor([[2.0]]), targets=torch.tensor([1]))
        >>> found = both({"w": torch.zeros(1, 2)}, {}, batch)
        >>> found["diag"].values, found["loss"]
        ({'w': tensor([[1., 1.]])}, tensor(0.6931))
    """
    checks.check_chunk_size("statistics", chunk_size)
    if not estimators and not (loss or gradient):
        raise OptionError(
            "statistics: expected at least one estimator, got none. Name them: "
            "statistics(diag=diagonal(model, likelihood))."
        )
    if not estimators:
        raise OptionError(
            "statistics: expected an estimator beside loss= and gradient=, got none. They are read "
            "off its forward; alone, use torch.func.grad."
        )
    first: Estimator | None = None
    for name, e in estimators.items():
        if not isinstance(e, Estimator):
            raise OptionError(
                f"statistics: expected an estimator, got {type(e).__name__} at {name}=. Make one "
                "with diagonal, dense, per_sample_gradients, ..."
            )
        first = first or e
        if e.model is not first.model or e.likelihood != first.likelihood:
            raise OptionError(
                f"statistics: expected estimators of one model and one likelihood, got others at "
                f"{name}=. Statistics of different models share no forward."
            )
    assert first is not None
    options = {"loss": loss, "gradient": gradient, "chunk_size": chunk_size}
    return Statistics(first.model, first.likelihood, estimators, options)
