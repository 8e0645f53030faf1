"""Every estimator as the laws see it: the table that a new estimator joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fisherfn import groups
from fisherfn.core import random, trees
from fisherfn.curvature import EKFAC, Dense
from fisherfn.estimators.dense import block_diagonal, dense
from fisherfn.estimators.diagonal import diagonal
from fisherfn.estimators.ekfac import ekfac
from fisherfn.estimators.gram import gram_spectrum
from fisherfn.estimators.grouped import grouped
from fisherfn.estimators.kfac import kfac
from fisherfn.estimators.low_rank import low_rank
from fisherfn.estimators.moments import gradient_moments
from fisherfn.estimators.per_sample import per_sample_gradients, score_gram, score_norms
from fisherfn.estimators.products.implicit import implicit
from fisherfn.estimators.together import statistics
from fisherfn.estimators.trace import (
    empirical_fisher_trace,
    generalized_fisher_trace,
    trace,
)
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
        result: "joined" results merge, "rows" have one entry an example, "pairs" one a pair,
            "whole" ones are about the whole batch and do not merge.
        arguments: What the transformation wants after model and likelihood, for a given problem.
        kinds: The networks that show what is special about it; empty for any.
    """

    name: str
    transformation: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    keyed: bool = False
    unit: str = "example"
    result: Literal["joined", "rows", "pairs", "whole"] = "joined"
    arguments: Callable[[Problem], tuple[Any, ...]] = lambda problem: ()
    kinds: tuple[str, ...] = ()

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


def _traces() -> list[Member]:
    """Traces by every method, and the spectrum that they are the sum of."""
    return [
        Member("trace-exact-example", trace),
        Member("trace-exact-position", trace, {"unit": "position"}, unit="position"),
        Member(
            "trace-empirical-position",
            trace,
            {"fisher": "empirical", "unit": "position"},
            unit="position",
        ),
        Member("trace-mc-three_samples", trace, {"fisher": "mc", "num_samples": 3}, keyed=True),
        Member("trace-hutchinson", trace, {"method": "hutchinson", "num_matvecs": 3}, keyed=True),
        Member(
            "trace-xtrace",
            trace,
            {"method": "xtrace", "num_matvecs": 4},
            keyed=True,
            result="whole",
        ),
        Member("empirical_fisher_trace", empirical_fisher_trace, {"num_samples": 3}, keyed=True),
        Member(
            "generalized_fisher_trace", generalized_fisher_trace, {"num_samples": 3}, keyed=True
        ),
        Member("gram_spectrum", gram_spectrum, {"k": 2}, result="whole"),
    ]


def _products(model: Any, likelihood: Any, **options: Any) -> Any:
    """The matrix that an `Implicit` stands for, from its products with unit vectors."""
    bind = implicit(model, likelihood, **options)

    def run(params: Any, buffers: Any, batch: Any, *, key: Any = None) -> Dense:
        F = bind(params, buffers, batch, key=key)
        return Dense(F.to_dense(), F.count, F.layout, fisher=F.fisher, unit=F.unit)

    return run


def _from_products() -> list[Member]:
    """Matrices of products: each kind of labels once, both units, and the Hessian."""
    by_position = {"fisher": "empirical", "unit": "position"}
    return [
        Member("products-exact-example", _products),
        Member("products-mc-example", _products, {"fisher": "mc"}, keyed=True),
        Member("products-empirical-position", _products, by_position, unit="position"),
        Member("products-hessian", _products, {"matrix": "hessian"}),
    ]


def _sharing(problem: Problem) -> tuple[list[tuple[str, ...]]]:
    """The weights of layers that read one input, those with the later paths first."""
    options: dict[str, Any] = {"fisher": "forward_only", "bias": "diagonal", "unit": problem.unit}
    like = kfac(problem.model, problem.likelihood, **options)(*problem.args)
    groups: dict[tuple[int, int], list[str]] = {}
    for b in like.blocks:
        if b.input_form == "matrix":
            groups.setdefault((id(like.inputs[b.name]), b.groups), []).insert(0, b.name)
    return ([tuple(names) for names in groups.values()],)


def _joint_kfac(model: Any, likelihood: Any, groups: Any, **options: Any) -> Any:
    """K-FAC with one block for all layers that read one input."""
    return kfac(model, likelihood, joint=groups, **options)


def _joint_ekfac(model: Any, likelihood: Any, groups: Any, basis: EKFAC, **options: Any) -> Any:
    """EKFAC with one block for all layers that read one input."""
    return ekfac(model, likelihood, basis, joint=groups, **options)


def _joint() -> list[Member]:
    """Layers with a common block, under both approximations and every treatment of biases."""
    by_position = {"unit": "position", "approx": "reduce", "bias": "separate"}
    drawn = {"fisher": "mc", "num_samples": 3, "bias": "diagonal"}
    table: list[tuple[str, Any, dict[str, Any]]] = [
        ("kfac-joint-exact", _joint_kfac, {}),
        ("kfac-joint-empirical-position", _joint_kfac, {"fisher": "empirical", **by_position}),
        ("kfac-joint-mc-three_samples", _joint_kfac, drawn),
        ("kfac-joint-forward_only", _joint_kfac, {"fisher": "forward_only"}),
        ("ekfac-joint-exact", _joint_ekfac, {"bias": "separate"}),
    ]
    found = []
    for name, make, options in table:
        keyed, unit = options.get("fisher") == "mc", options.get("unit", "example")
        given = _joint_basis if make is _joint_ekfac else _sharing
        found.append(Member(name, make, options, keyed, unit, arguments=given, kinds=("gated",)))
    return found


def _joint_basis(problem: Problem) -> tuple[list[tuple[str, ...]], EKFAC]:
    (groups,) = _sharing(problem)
    return groups, *_basis(problem, groups)


def _basis(problem: Problem, joint: Sequence[tuple[str, ...]] = ()) -> tuple[EKFAC]:
    """Eigenbases for the model's blocks that do not depend on the data."""
    given = problem.model, problem.likelihood
    options: dict[str, Any] = {"bias": "separate", "unit": problem.unit, "joint": joint}
    like = kfac(*given, fisher="forward_only", **options)(*problem.args)

    def factor(x: Tensor) -> Tensor:
        if x.dim() < 3:
            return torch.ones_like(x)
        shape = (*x.shape[:-2], 20, x.shape[-1])
        rows = random.normal(random.key(x.shape[-1]), shape, torch.float64)
        return rows.mT @ rows

    inputs, outputs = (trees.map(factor, x) for x in (like.inputs, like.outputs))
    found = replace(like, inputs=inputs, outputs=outputs).eigh()
    dtype = torch.promote_types(trees.leaves(problem.params)[0].dtype, torch.float32)
    left, right = (
        trees.map(lambda x: x.to(dtype), x) for x in (found.output_basis, found.input_basis)
    )
    return (replace(found, output_basis=left, input_basis=right),)


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
    for fisher in FISHERS:
        for unit in UNITS:
            options = {"fisher": fisher, "unit": unit}
            keyed = fisher in ("mc", "curvature_prop")
            name = f"kfac-{fisher}-{unit}"
            found.append(Member(name, kfac, options, keyed, unit))
            name, options = f"ekfac-{fisher}-{unit}", {**options, "bias": "separate"}
            found.append(Member(name, ekfac, options, keyed, unit, arguments=_basis))
    for unit, bias in zip(UNITS, ("separate", "diagonal"), strict=True):
        options = {"approx": "reduce", "unit": unit, "bias": bias}
        found.append(Member(f"kfac-reduce-{unit}", kfac, options, unit=unit))
        options = {"fisher": "forward_only", "unit": unit, "bias": bias}
        found.append(Member(f"kfac-forward_only-{unit}", kfac, options, unit=unit))
    many = {"fisher": "mc", "num_samples": 3}
    found.append(Member("kfac-mc-three_samples", kfac, many, keyed=True))
    found.append(Member("diagonal-mc-three_samples", diagonal, many, keyed=True))
    found += _joint()
    found += _traces()
    found.append(Member("grouped-mc-three_samples", grouped, many, keyed=True, arguments=_groups))
    found += _from_products()
    return {member.name: member for member in found}


#: Every estimator, under every kind of labels and every unit.
ESTIMATORS: dict[str, Member] = _members()
