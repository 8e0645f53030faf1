"""Derivatives of a model's outputs, and the Hessian product by finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.errors import OptionError, TreeMismatchError
from fisherfn.curvature import Layout, layer_groups
from fisherfn.estimators import checks
from fisherfn.estimators.products import linear, parts
from fisherfn.estimators.products.fisher import Product, make_hessian
from fisherfn.estimators.products.plain import Chosen, Flat, check_select

_ROWS = 32


def _flat(
    caller: str,
    model: Any,
    select: Any,
    params: Any,
    buffers: Any,
    inputs: Any,
    *,
    compose: bool,
) -> Flat:
    checks.check_params(caller, params)
    chosen = Chosen.of(caller, params, select)
    return Flat(model, chosen, buffers, inputs, lambda outputs: None, compose=compose)


def _check(caller: str, model: Any, select: Any) -> None:
    checks.check_options(caller, model, "exact", 1, "example", None)
    check_select(caller, select)


def output_jvp(model: Any, *, select: Any = None) -> Callable[..., Any]:
    """Push a vector of parameters through the model: J v, the change of the outputs.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        select: Which parameters; see `fisher_vp`.

    Returns:
        A function of `(params, buffers, inputs, tangents)` that gives a tree like the outputs.

    Raises:
        OptionError: an option does not exist.

    Cost: one forward pass on dual numbers, about a gradient.

    Example:
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> w, v = {"w": torch.zeros(1, 2)}, {"w": torch.tensor([[1.0, 0.0]])}
        >>> output_jvp(model)(w, {}, torch.tensor([[3.0]]), v)
        tensor([[3., 0.]])
    """
    _check("output_jvp", model, select)

    def run(params: Any, buffers: Any, inputs: Any, tangents: Any) -> Any:
        compose = linear.composing(params, buffers, inputs, tangents)
        function = _flat("output_jvp", model, select, params, buffers, inputs, compose=compose)
        vector = function.chosen.vectors("output_jvp", tangents)
        _, found = linear.once(function, function.chosen.leaves, vector, compose=compose)
        return function.restore(found)

    return run


def output_vjp(model: Any, *, select: Any = None) -> Callable[..., Any]:
    """Pull cotangents of the outputs back to the parameters: Jᵀ c.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        select: Which parameters; see `fisher_vp`.

    Returns:
        A function of `(params, buffers, inputs, cotangents)` that gives a tree like `params`.

    Raises:
        OptionError: an option does not exist.

    Cost: one forward and one backward pass.

    Example:
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> w, c = {"w": torch.zeros(1, 2)}, torch.tensor([[1.0, 0.0]])
        >>> output_vjp(model)(w, {}, torch.tensor([[3.0]]), c)
        {'w': tensor([[3., 0.]])}
    """
    _check("output_vjp", model, select)

    def run(params: Any, buffers: Any, inputs: Any, cotangents: Any) -> Any:
        compose = linear.composing(params, buffers, inputs, cotangents)
        function = _flat("output_vjp", model, select, params, buffers, inputs, compose=compose)
        outputs, pull = linear.backward(function, function.chosen.leaves, compose=compose)
        like = function.restore(outputs)
        trees.check_like("output_vjp", "cotangents", cotangents, like, like_name="the outputs")
        found = trees.leaves(trees.map(lambda z, c: c.to(z.device, z.dtype), like, cotangents))
        return function.chosen.restore(pull(found))

    return run


def output_jacobian(model: Any, *, select: Any = None) -> Callable[..., Any]:
    """Give the whole Jacobian of the outputs, for small models and for tests.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`, a tensor.
        select: Which parameters; see `fisher_vp`.

    Returns:
        A function of `(params, buffers, inputs)` that gives a tree like `params`, each leaf
        `[*outputs.shape, *param.shape]`.

    Raises:
        OptionError: an option does not exist.

    Cost: one pull-back for each number of the outputs, in blocks.

    Example:
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> output_jacobian(model)({"w": torch.zeros(1, 1)}, {}, torch.tensor([[3.0]]))["w"].shape
        torch.Size([1, 1, 1, 1])
    """
    _check("output_jacobian", model, select)

    def run(params: Any, buffers: Any, inputs: Any) -> Any:
        compose = linear.composing(params, buffers, inputs)
        function = _flat("output_jacobian", model, select, params, buffers, inputs, compose=compose)
        outputs, pull = linear.backward(function, function.chosen.leaves, compose=compose)
        if len(outputs) != 1:
            raise TreeMismatchError(
                f"output_jacobian: expected a model that returns one tensor, got {len(outputs)}. "
                "Use output_vjp, or pick one of them."
            )
        (z,) = outputs
        many = torch.func.vmap(pull) if compose else linear.batched(pull)
        blocks = []
        for first in range(0, z.numel(), _ROWS):
            index = torch.arange(first, min(z.numel(), first + _ROWS), device=z.device)
            units = torch.zeros(len(index), z.numel(), dtype=z.dtype, device=z.device)
            units = units.scatter(1, index.unsqueeze(1), 1.0)
            blocks.append(many([units.reshape(-1, *z.shape)]))
        rows = [torch.cat(column) for column in zip(*blocks, strict=True)]
        return function.chosen.restore([r.reshape(*z.shape, *r.shape[1:]) for r in rows])

    return run


@dataclass(frozen=True, eq=False)
class FiniteDifference:
    """A Hessian product from two gradients; see `finite_difference_vp`.

    Attributes:
        product: The exact product, whose options it shares.
        step: h, or None for the one that balances truncation and rounding.
    """

    product: Product = field(repr=False)
    step: float | None

    def __call__(
        self, params: Any, buffers: Any, batch: Batch | Iterable[Batch], tangents: Any
    ) -> Any:
        """Return (∇L(θ + h v) − ∇L(θ − h v)) / 2h."""
        name, product = self.product.name, self.product
        chosen = Chosen.of(name, params, product.options["select"])
        vector = chosen.vectors(name, tangents)
        size = trees.norm(vector)
        if self.step is None:
            # truncation grows with h², rounding with 1/h: the best h is the cube root of ε
            narrow = max(torch.finfo(p.dtype).eps for p in chosen.leaves)
            reach = (1.0 + trees.norm(chosen.leaves)) * narrow ** (1 / 3)
            h = reach / torch.where(size == 0, torch.ones_like(size), size)
        else:
            h = torch.as_tensor(self.step, dtype=size.dtype, device=size.device)

        def gradient(sign: float) -> Any:
            moved = [
                p + (sign * h).to(p.dtype) * v for p, v in zip(chosen.leaves, vector, strict=True)
            ]
            return self._gradient(chosen.filled(moved), buffers, batch)

        ahead, behind = gradient(1.0), gradient(-1.0)
        return trees.map(lambda a, b: (a - b) / (2.0 * h).to(a.dtype), ahead, behind)

    def _gradient(self, params: Any, buffers: Any, batch: Batch | Iterable[Batch]) -> Any:
        def one(b: Batch) -> tuple[Any, Tensor]:
            return self.product.gradient(params, buffers, b)

        if isinstance(batch, Batch):
            return one(batch)[0]
        return parts.joined(self.product.name, batch, one)


def finite_difference_vp(
    model: Any,
    likelihood: Any,
    *,
    step: float | None = None,
    unit: str = "example",
    select: Any = None,
    chunk_size: int | None = None,
) -> FiniteDifference:
    """Multiply the Hessian by a vector through two gradients: for models without second derivative.

    (∇L(θ + h v) − ∇L(θ − h v)) / 2h = H v + O(h²‖v‖³), with h = ε^(1/3) (1 + ‖θ‖) / ‖v‖ for the
    rounding error ε of the parameters' dtype. In float32 expect three digits; `hvp` is exact and
    costs the same.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        step: h, if it should be another.
        unit: What N counts.
        select: Which parameters; see `fisher_vp`.
        chunk_size: Examples processed together.

    Returns:
        A transformation: called with `(params, buffers, batch, tangents)` it gives about H v; a
        batch may be a list of batches.

    Raises:
        OptionError: an option does not exist, or the step is not positive.

    Cost: two gradients.

    Reference: Nocedal & Wright (2006), Numerical optimization, section 8.1.

    Example:
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x * params["w"] ** 2
        >>> lik = ff.likelihoods.gaussian(1.0)
        >>> batch = ff.Batch(torch.ones(1, 1).double(), torch.zeros(1, 1).double())
        >>> w, v = {"w": torch.tensor(2.0).double()}, {"w": torch.tensor(1.0).double()}
        >>> ff.finite_difference_vp(model, lik)(w, {}, batch, v)["w"].round(decimals=6)
        tensor(24., dtype=torch.float64)
    """
    name = "finite_difference_vp"
    if step is not None and (
        isinstance(step, bool) or not isinstance(step, (int, float)) or not step > 0
    ):
        raise OptionError(
            f"{name}: expected step= to be a positive number or None, got {step!r}. None takes the "
            "one that balances truncation and rounding."
        )
    product = make_hessian(name, model, likelihood, unit, select, chunk_size)
    return FiniteDifference(product, step)


@dataclass(frozen=True)
class LayerStatistics:
    """What the numbers of one layer are like; 0-d tensors.

    Attributes:
        size: How many there are.
        sum: Their sum; of a diagonal, the trace of the layer's block.
        mean: Their mean.
        std: Their standard deviation (divided by the size).
        min: The smallest.
        max: The largest.
    """

    size: int
    sum: Tensor
    mean: Tensor
    std: Tensor
    min: Tensor
    max: Tensor


def by_layer(values: Any) -> dict[str, Tensor]:
    """Return the numbers of each layer as one vector: the leaves of a module, in order.

    Args:
        values: Tree like params, such as `ff.diagonal(...)(...).values` or a Hessian diagonal.

    Returns:
        Vectors by the name of the layer.

    Example:
        >>> by_layer({"0.weight": torch.ones(1, 2), "0.bias": torch.zeros(1)})
        {'0': tensor([1., 1., 0.])}
    """
    found = dict(zip(trees.paths(values), trees.leaves(values), strict=True))
    groups = layer_groups(Layout.of(values))
    return {name: torch.cat([found[p].reshape(-1) for p in paths]) for name, paths in groups}


def layer_statistics(values: Any) -> dict[str, LayerStatistics]:
    """Return sum, mean, standard deviation, minimum and maximum of the numbers of each layer.

    Args:
        values: Tree like params, such as a diagonal.

    Returns:
        Statistics by the name of the layer; layers without numbers are left out.

    Example:
        >>> found = layer_statistics({"0.weight": torch.tensor([1.0, 3.0])})["0"]
        >>> found.mean, found.std, found.max
        (tensor(2.), tensor(1.), tensor(3.))
    """
    return {
        name: LayerStatistics(v.numel(), v.sum(), v.mean(), v.std(correction=0), v.min(), v.max())
        for name, v in by_layer(values).items()
        if v.numel()
    }
