"""One batch under a product: what is checked, cut into chunks, counted and multiplied.

A kind says which matrix: the Fisher information of some labels, or the Hessian of the mean negative
log-likelihood. Both are sums over examples once they carry `w/N`, so chunks add up.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.capture.check import check_examples_apart, coarsest
from fisherfn.capture.plan import examples
from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.errors import DataError
from fisherfn.core.modes import concrete
from fisherfn.estimators import checks
from fisherfn.estimators.observe import Labels, Observed
from fisherfn.estimators.observer import Observer, part_of
from fisherfn.estimators.products import linear
from fisherfn.estimators.products.linear import Linear, Map, Ready
from fisherfn.estimators.products.output import OutputFisher
from fisherfn.estimators.products.plain import Chosen, Flat, Plain
from fisherfn.estimators.products.second import Loss, gradient
from fisherfn.likelihoods.base import Likelihood

_COUNTS = (2, 3)
_APART: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


class Kind(Protocol):
    """Which matrix is multiplied."""

    @property
    def labels(self) -> Labels:
        """Whose labels, and what is counted."""
        ...

    def once(
        self,
        problem: Problem,
        inputs: Any,
        span: tuple[int, int],
        vector: list[Tensor],
        compose: bool,
    ) -> list[Tensor]:
        """Return the product of one chunk with one vector."""
        ...

    def ready(self, problem: Problem, inputs: Any, span: tuple[int, int], compose: bool) -> Ready:
        """Return the matrix of one chunk, for many vectors."""
        ...


class Dead(Exception):
    """Examples that do not count have no finite outputs; `inputs` are better ones."""

    def __init__(self, inputs: Any) -> None:
        """Carry the repaired inputs."""
        super().__init__("examples that do not count are not finite")
        self.inputs = inputs


class Problem:
    """A model, its parameters and a batch."""

    def __init__(
        self,
        caller: str,
        model: Any,
        likelihood: Likelihood,
        chosen: Chosen,
        buffers: Any,
        batch: Batch,
        key: Tensor | None,
        labels: Labels,
    ) -> None:
        """Check the batch, the key and whether the model treats examples apart."""
        self.caller, self.model, self.likelihood = caller, model, likelihood
        self.chosen, self.buffers, self.batch, self.key = chosen, buffers, batch, key
        self.labels = labels
        self.size = checks.check_batch(caller, batch)
        checks.check_key(caller, labels, key)
        self.observer = Observer(caller, likelihood, batch, key, self.size, normalised=True)
        self._repaired = False
        if concrete(*trees.leaves((chosen.params, buffers, batch.inputs))):
            _check_apart(model, chosen.params, buffers, batch.inputs)

    def spans(self, chunk_size: int | None) -> Iterator[tuple[int, int]]:
        """Give the first and last example (exclusive) of each chunk."""
        step = self.size if chunk_size is None else min(chunk_size, self.size)
        for start in range(0, self.size, step):
            yield start, min(self.size, start + step)

    def multiply(
        self, kind: Kind, vector: list[Tensor], chunk_size: int | None, *, compose: bool
    ) -> list[Tensor]:
        """Return the product with one vector."""
        total: list[Tensor] | None = None
        for span in self.spans(chunk_size):
            found = self._alive(
                span, lambda inputs, s=span: kind.once(self, inputs, s, vector, compose)
            )
            total = added(total, found)
        assert total is not None
        return total

    def ready(self, kind: Kind, chunk_size: int | None, *, compose: bool) -> list[Ready]:
        """Return the matrix of each chunk, for many vectors."""
        return [
            self._alive(span, lambda inputs, s=span: kind.ready(self, inputs, s, compose))
            for span in self.spans(chunk_size)
        ]

    def gradient(self, chunk_size: int | None, *, compose: bool) -> list[Tensor]:
        """Return the gradient of the mean negative log-likelihood of the targets."""
        total: list[Tensor] | None = None
        for span in self.spans(chunk_size):

            def run(inputs: Any, span: tuple[int, int] = span) -> list[Tensor]:
                return gradient(Loss(self, inputs, span, compose), self.chosen.leaves)

            total = added(total, self._alive(span, run))
        assert total is not None
        return total

    def _alive(self, span: tuple[int, int], run: Callable[[Any], Any]) -> Any:
        inputs = self.batch.inputs
        if span != (0, self.size):
            inputs = part_of(inputs, *span)
        try:
            return run(inputs)
        except Dead as dead:
            self._repaired = True
            try:
                return run(dead.inputs)
            finally:
                self._repaired = False

    def observe(self, inputs: Any, outputs: Any, span: tuple[int, int]) -> Observed:
        """Check and count outputs; raises `Dead` if examples that do not count are in the way."""
        labels = self.labels
        empirical = labels.fisher == "empirical"
        observed = self.observer.observe(outputs, (labels.unit,), *span, targets_count=empirical)
        found = observed[labels.unit]
        plain = trees.map(lambda t: t.detach(), outputs)
        if not self._repaired:
            repaired = self.observer.without_dead(inputs, plain, found.counted)
            if repaired is not None:
                raise Dead(repaired)
        return found

    def counted(self) -> Tensor:
        """Return N, from the shape of the outputs for one example."""
        inputs = part_of(self.batch.inputs, 0, 1)
        function = self.function(inputs, compose=False)
        with torch.no_grad():
            outputs = function.restore(function([t.detach() for t in self.chosen.leaves]))
        units = (self.labels.unit,)
        self.observer.observe(outputs, units, 0, 1, targets_count=False)
        return self.total

    def function(self, inputs: Any, *, compose: bool) -> Flat:
        """Return the outputs as a function of the chosen parameters."""

        def check(outputs: Any) -> None:
            self.likelihood.check_outputs(self.caller, outputs)

        return Flat(self.model, self.chosen, self.buffers, inputs, check, compose=compose)

    @property
    def total(self) -> Tensor:
        """N, known once something was observed."""
        return self.observer.counted[self.labels.unit].total


@dataclass(frozen=True)
class FisherKind:
    """The Fisher information of some labels: Jᵀ H J."""

    labels: Labels

    def once(
        self,
        problem: Problem,
        inputs: Any,
        span: tuple[int, int],
        vector: list[Tensor],
        compose: bool,
    ) -> list[Tensor]:
        """Push, multiply by the Fisher information of the outputs, pull."""
        function = problem.function(inputs, compose=compose)
        run, pushed = linear.once(function, problem.chosen.leaves, vector, compose=compose)
        middle = self._middle(problem, inputs, span, function, run)
        cotangents = middle(pushed)
        del pushed
        return run.pull(cotangents)

    def ready(self, problem: Problem, inputs: Any, span: tuple[int, int], compose: bool) -> Ready:
        """Keep what push, the Fisher information of the outputs, and pull need."""
        function = problem.function(inputs, compose=compose)
        run = linear.at(function, problem.chosen.leaves, compose=compose, reuse=True)
        middle = self._middle(problem, inputs, span, function, run)
        middle_many = torch.func.vmap(middle) if compose else linear.loop(middle)
        return Ready(
            lambda t: run.pull(middle(run.push(t))),
            lambda t: run.pull_many(middle_many(run.push_many(t))),
            run.engine,
            run.reason,
        )

    def _middle(
        self, problem: Problem, inputs: Any, span: tuple[int, int], function: Flat, run: Linear
    ) -> Map:
        observed = problem.observe(inputs, function.restore(run.outputs), span)
        fisher = OutputFisher(observed, self.labels)

        def middle(tangents: list[Tensor]) -> list[Tensor]:
            return trees.leaves(fisher(function.restore(tangents)))

        return middle


def added(total: list[Tensor] | None, more: Sequence[Tensor]) -> list[Tensor]:
    """Add up leaf by leaf, in float32 or wider."""
    terms = [wide(t) for t in more]
    return terms if total is None else [a + b for a, b in zip(total, terms, strict=True)]


def numbered(caller: str, batches: Any) -> Iterator[Batch]:
    """Give the batches of an iterable, with the running numbers of examples that have no ids.

    Yields:
        Each batch, with ids.

    Raises:
        DataError: there is no batch, or something else than a batch.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, dict, str)):
        raise DataError(
            f"{caller}: expected a Batch or an iterable of batches, got "
            f"{type(batches).__name__}. Wrap the data: Batch(inputs, targets=...)."
        )
    seen, number = 0, -1
    for number, batch in enumerate(batches):
        if not isinstance(batch, Batch):
            raise DataError(
                f"{caller}: expected batches, got {type(batch).__name__} as number {number}. Wrap "
                "it: Batch(inputs, targets=...)."
            )
        size = checks.check_batch(caller, batch)
        if batch.ids is None:
            first = next(t for t in trees.leaves(batch.inputs) if isinstance(t, Tensor))
            ids = torch.arange(seen, seen + size, device=first.device)
            batch = dataclasses.replace(batch, ids=ids)
        seen += size
        yield batch
    if number < 0:
        raise DataError(
            f"{caller}: expected at least one batch, got none. A generator is empty when it has "
            "been used before; give a list, or build it anew."
        )


def joined(caller: str, batches: Any, one: Callable[[Batch], tuple[Any, Tensor]]) -> Any:
    """Return the average over batches of `(result, N)`, each weighted by its N."""
    total: Any = None
    count: Any = 0.0
    for batch in numbered(caller, batches):
        result, n = one(batch)
        share = trees.map(lambda t, n=n: t * n.to(t.dtype), result)
        total = share if total is None else trees.add(total, share)
        count = count + n
    return trees.map(lambda t: t / count.to(t.dtype), total)


def _check_apart(model: Any, params: Any, buffers: Any, inputs: Any) -> None:
    """Refuse models whose examples influence each other; asked once for each kind of inputs."""
    tensors = [t for t in trees.leaves(inputs) if isinstance(t, Tensor)]
    key = str((trees.structure(inputs), [(t.shape[1:], t.dtype, t.device) for t in tensors]))
    try:
        known = _APART.setdefault(model, set())
    except TypeError:  # cannot be hashed or referenced weakly
        known = set()
    if key in known:
        return
    with torch.no_grad(), Plain():
        first, second = (model(params, buffers, examples(inputs, n)) for n in _COUNTS)
    check_examples_apart((first, second), _COUNTS, coarsest(*trees.leaves((params, first))))
    known.add(key)
