"""Hypothesis strategies: keys, tensors, trees, logits, masks, weights, models, batches, problems.

Values shrink towards small sizes and plain options. Tensors are float64 unless told otherwise, and
come from a drawn seed, never from torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fisherfn import likelihoods as families
from fisherfn.batch import Batch
from fisherfn.core import random
from fisherfn.core import trees as algebra
from fisherfn.models import functional
from fisherfn.testing import networks
from fisherfn.testing.problem import Problem

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fisherfn.testing: expected the package hypothesis, got none. "
        "Install it with: pip install 'fisherfn[testing]'",
        name="hypothesis",
    ) from error

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[T]], T]

SEEDS = st.integers(0, 2**16)


def keys() -> st.SearchStrategy[Tensor]:
    """Keys of `fisherfn.random`: int64 `[2]`.

    Returns:
        A strategy of keys.
    """
    return st.integers(-(2**63), 2**63 - 1).map(random.key)


def tensors(
    *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> st.SearchStrategy[Tensor]:
    """Normal tensors from a drawn seed.

    Args:
        *shape: Their sizes.
        dtype: Their data type.
        scale: Their standard deviation.

    Returns:
        A strategy of tensors `[*shape]`.
    """
    return SEEDS.map(lambda seed: (scale * networks.normal(seed, *shape)).to(dtype))


def shapes(max_ndim: int = 3, max_size: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes without empty axes.

    Args:
        max_ndim: The most axes.
        max_size: The largest axis.

    Returns:
        A strategy of shapes.
    """
    return st.lists(st.integers(1, max_size), max_size=max_ndim).map(tuple)


@st.composite
def params(draw: Any, max_leaves: int = 4) -> dict[str, Tensor]:
    """Draw a flat dict of tensors, as `functional` makes them; keys out of alphabetical order.

    Args:
        draw: Given by Hypothesis.
        max_leaves: The most tensors.

    Returns:
        A dict of tensors.
    """
    count = draw(st.integers(1, max_leaves))
    names = draw(st.permutations([f"{9 - i}.weight" for i in range(count)]))
    return {name: draw(tensors(*draw(shapes()))) for name in names}


def trees(max_leaves: int = 6) -> st.SearchStrategy[Any]:
    """Nested dicts, lists and tuples of tensors, with a None here and there.

    Args:
        max_leaves: About the most leaves.

    Returns:
        A strategy of trees with at least one tensor.
    """
    leaf = shapes().flatmap(lambda shape: tensors(*shape)) | st.none()

    def nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return (
            st.lists(inner, min_size=1, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from("zyx"), inner, min_size=1, max_size=3)
        )

    return st.recursive(leaf, nest, max_leaves=max_leaves).filter(lambda t: bool(algebra.leaves(t)))


@st.composite
def logits(draw: Any, *shape: int, extreme: bool = True) -> Tensor:
    """Draw logits, ordinary ones or (if `extreme`) ones at which a softmax saturates.

    Args:
        draw: Given by Hypothesis.
        *shape: Their sizes.
        extreme: Whether to scale some of them up to a hundred.

    Returns:
        Tensor `[*shape]`, finite.
    """
    value = draw(tensors(*shape))
    scale = draw(st.sampled_from((1.0, 0.0, 3.0, 30.0, 100.0))) if extreme else 1.0
    return value * scale


@st.composite
def masks(draw: Any, *shape: int) -> Tensor:
    """Draw a mask that leaves something: `[*shape]`, or that with axes of one to broadcast.

    Args:
        draw: Given by Hypothesis.
        *shape: Shape of the log-probabilities, `(B, *positions)`.

    Returns:
        bool tensor, not all False.
    """
    sizes = [1 if axis and draw(st.booleans()) else size for axis, size in enumerate(shape)]
    count = math.prod(sizes)
    values = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    values[draw(st.integers(0, count - 1))] = True
    return torch.tensor(values).reshape(sizes)


@st.composite
def weights(draw: Any, *shape: int) -> Tensor:
    """Draw multiplicities: float64 `[*shape]`, some zero, the first one positive.

    Args:
        draw: Given by Hypothesis.
        *shape: Their sizes.

    Returns:
        float64 tensor.
    """
    values = st.sampled_from((1.0, 2.0, 0.5, 0.0, 3.0))
    count = math.prod(shape)
    chosen = draw(st.lists(values, min_size=count, max_size=count))
    return torch.tensor(chosen, dtype=torch.float64).reshape(shape)


@dataclass(frozen=True)
class DrawnModel:
    """A module, ready to be called, and what it takes and gives.

    Attributes:
        name: What it is.
        module: In evaluation mode, float64.
        inputs: From a batch size and a seed to inputs.
        positions: Shape of one example's positions.
        width: Size of the last axis of the outputs.
        causal: As in `Problem`.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int, int], Any]
    positions: tuple[int, ...]
    width: int
    causal: bool

    def __repr__(self) -> str:
        """Name it."""
        return f"DrawnModel({self.name}, positions={self.positions}, width={self.width})"


@st.composite
def models(draw: Any, kinds: tuple[str, ...] = tuple(networks.BUILDERS)) -> DrawnModel:
    """Draw a small model with random weights.

    Args:
        draw: Given by Hypothesis.
        kinds: Which of `networks.BUILDERS` to choose from.

    Returns:
        The model with what a caller has to know of it.
    """
    kind = draw(st.sampled_from(kinds))
    length = draw(st.integers(1, 3))
    width = draw(st.integers(2, 4))
    seed = draw(SEEDS)
    network = networks.build(kind, seed, length, width)
    return DrawnModel(
        f"{kind}(seed={seed})",
        network.module,
        network.inputs,
        network.positions,
        width,
        network.causal,
    )


@st.composite
def likelihoods(draw: Any, width: int) -> Any:
    """Draw a likelihood for outputs whose last axis has `width` entries.

    Args:
        draw: Given by Hypothesis.
        width: Size of the last axis.

    Returns:
        A likelihood whose event is the last axis.
    """
    kind = draw(st.sampled_from(("categorical", "gaussian", "bernoulli", "poisson")))
    if kind == "categorical":
        return families.categorical(temperature=draw(st.sampled_from((1.0, 0.5, 2.0))))
    if kind == "gaussian":
        spread = 0.5 + torch.arange(width, dtype=torch.float64)
        return families.gaussian(draw(st.sampled_from((1.0, 0.25, spread))))
    return families.bernoulli() if kind == "bernoulli" else families.poisson()


def _targets(likelihood: Any, outputs: Tensor, seed: int) -> Tensor:
    """Targets that the likelihood accepts, unrelated to the outputs' values."""
    rng = torch.Generator().manual_seed(seed)
    name = likelihood.name
    if name == "categorical":
        return torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=rng)
    if name == "gaussian":
        return torch.randn(outputs.shape, generator=rng, dtype=outputs.dtype)
    high = 2 if name == "bernoulli" else 4
    return torch.randint(high, outputs.shape, generator=rng).to(outputs.dtype)


@st.composite
def batches(
    draw: Any, model: DrawnModel, likelihood: Any, *, unit: str = "example", max_size: int = 4
) -> Batch:
    """Draw a batch: every field but inputs and targets may be left at its default.

    Args:
        draw: Given by Hypothesis.
        model: What it is for.
        likelihood: What the targets are for.
        unit: "example" or "position": the shape of the weights.
        max_size: The most examples.

    Returns:
        A batch in which at least one unit counts.
    """
    size = draw(st.integers(1, max_size))
    seed = draw(SEEDS)
    inputs = model.inputs(size, seed)
    with torch.no_grad():
        outputs = networks.call(model.module, inputs)
    shape = (size, *model.positions)
    mask = draw(st.none() | masks(*shape))
    counts = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    multiplicity = None
    if draw(st.booleans()):
        unit_shape = shape if unit == "position" else (size,)
        multiplicity = draw(weights(*unit_shape))
        units = counts if unit == "position" else counts.reshape(size, -1).any(1)
        if not bool((multiplicity * units).sum() > 0):
            multiplicity = multiplicity + units.to(multiplicity.dtype)
    ids = None
    if draw(st.booleans()):
        ids = torch.randperm(50, generator=torch.Generator().manual_seed(seed))[:size]
    return Batch(inputs, _targets(likelihood, outputs, seed + 1), mask, multiplicity, ids)


@st.composite
def problems(
    draw: Any,
    *,
    unit: str = "example",
    kinds: tuple[str, ...] = tuple(networks.BUILDERS),
    max_size: int = 4,
) -> Problem:
    """Draw a model, a likelihood that fits it, and a batch.

    Args:
        draw: Given by Hypothesis.
        unit: "example" or "position": the shape of the batch's weights.
        kinds: Which of `networks.BUILDERS` to choose from.
        max_size: The most examples.

    Returns:
        A problem on which every law must hold.
    """
    drawn = draw(models(kinds))
    likelihood = draw(likelihoods(drawn.width))
    batch = draw(batches(drawn, likelihood, unit=unit, max_size=max_size))
    model, params, buffers = functional(drawn.module)
    return Problem(
        drawn.name, model, likelihood, params, buffers, batch, drawn.positions, drawn.causal, unit
    )
