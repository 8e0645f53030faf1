"""Every estimator as the laws see it: the table that a new estimator joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fisherfn import groups
from fisherfn.core import random, trees
from fisherfn.estimators.dense import block_diagonal, dense
from fisherfn.estimators.diagonal import diagonal
from fisherfn.estimators.grouped import grouped
from fisherfn.estimators.low_rank import low_rank
from fisherfn.estimators.moments import gradient_moments
from fisherfn.estimators.per_sample import per_sample_gradients, score_gram, score_norms
from fisherfn.estimators.together import statistics
from fisherfn.testing.problem import Problem

FISHERS = ("exact", "mc", "curvature_prop", "empirical")
UNITS = ("example", "position")


@dataclass(frozen=True)
class Member:
    """An estimator as the laws see it.

    Attributes:
        name: Shown in test ids.
        transformation: `(model, likelihood, **options) -> estimator`.
        options: Options that belong to this entry, such as `fisher=`.
        keyed: Whether a call needs a key.
        unit: The unit of the result: what the batch's weights have to be shaped for.
        result: "joined" results merge, "rows" have one entry an example, "pairs" one a pair.
        arguments: What the transformation wants after model and likelihood, for a given problem.
    """

    name: str
    transformation: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    keyed: bool = False
    unit: str = "example"
    result: Literal["joined", "rows", "pairs"] = "joined"
    arguments: Callable[[Problem], tuple[Any, ...]] = lambda problem: ()

    def __str__(self) -> str:
        """Give the name, as a test id."""
        return self.name

    def build(self, problem: Problem, **options: Any) -> Any:
        """Return the estimator for a problem's model and likelihood."""
        given = problem.model, problem.likelihood, *self.arguments(problem)
        return self.transformation(*given, **self.options, **options)

    def run(self, problem: Problem, key: Tensor | None = None, **options: Any) -> Any:
        """Build and call it; without a key of its own, a keyed one gets `random.key(0)`."""
        return self.call(self.build(problem, **options), problem, key)

    def call(self, estimator: Any, problem: Problem, key: Tensor | None = None) -> Any:
        """Call an estimator that `build` returned."""
        if not self.keyed:
            return estimator(*problem.args)
        return estimator(*problem.args, key=random.key(0) if key is None else key)


def _several(model: Any, likelihood: Any, **options: Any) -> Any:
    """Everything at once, one kind of labels each."""
    return statistics(
        diagonal=diagonal(model, likelihood, fisher="mc", **options),
        moments=gradient_moments(model, likelihood, **options),
        blocks=block_diagonal(model, likelihood, fisher="exact", **options),
    )


def _groups(problem: Problem) -> tuple[dict[str, groups.GroupSpec]]:
    """Channels of outputs, channels of inputs, whole tensors and buckets by turns; elements."""
    makers = (
        groups.channels,
        lambda shape: groups.channels(shape, axis=1),
        groups.whole,
        lambda shape: groups.rows(shape, bucket=2),
    )
    specs = {}
    for i, (path, leaf) in enumerate(
        zip(trees.paths(problem.params), trees.leaves(problem.params), strict=True)
    ):
        shape = tuple(leaf.shape)
        make = makers[i % len(makers)] if len(shape) > 1 else groups.elements
        specs[path] = make(shape)
    return (specs,)


def _members() -> dict[str, Member]:
    found = [
        Member("per_sample_gradients", per_sample_gradients, result="rows"),
        Member("score_norms", score_norms, result="rows"),
        Member("score_gram", score_gram, result="pairs"),
        Member("gradient_moments", gradient_moments),
        Member("statistics", _several, keyed=True),
    ]
    for transformation in (diagonal, dense, block_diagonal, low_rank):
        for fisher in FISHERS:
            for unit in UNITS:
                name = f"{transformation.__name__}-{fisher}-{unit}"
                options = {"fisher": fisher, "unit": unit}
                keyed = fisher in ("mc", "curvature_prop")
                found.append(Member(name, transformation, options, keyed, unit))
    for fisher in FISHERS:
        for unit in UNITS:
            options = {"fisher": fisher, "unit": unit}
            keyed = fisher in ("mc", "curvature_prop")
            name = f"grouped-{fisher}-{unit}"
            found.append(Member(name, grouped, options, keyed, unit, arguments=_groups))
    many = {"fisher": "mc", "num_samples": 3}
    found.append(Member("diagonal-mc-three_samples", diagonal, many, keyed=True))
    found.append(Member("grouped-mc-three_samples", grouped, many, keyed=True, arguments=_groups))
    return {member.name: member for member in found}


#: Every estimator, under every kind of labels and every unit.
ESTIMATORS: dict[str, Member] = _members()
