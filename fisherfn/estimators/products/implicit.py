"""The Fisher information, or a Hessian, as an `Implicit`: products bound to their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.modes import concrete
from fisherfn.curvature import Layout
from fisherfn.curvature.implicit import Implicit
from fisherfn.estimators.products.fisher import Product
from fisherfn.estimators.products.linearized import Linearized, make
from fisherfn.estimators.products.parts import numbered
from fisherfn.estimators.products.plain import Chosen


@dataclass(frozen=True, eq=False)
class Bound:
    """The operator of an `Implicit`: a product as a function of its arguments.

    Attributes:
        product: The product.
        reuse_forward: Whether to keep the forward pass for the next vector.
        linear: What was computed ahead, if anything was.
    """

    product: Product
    reuse_forward: bool
    linear: Linearized | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy without what was computed ahead: a graph is neither copied nor sent."""
        return Bound, (self.product, self.reuse_forward)

    def prepare(self, arguments: Any) -> Bound | None:
        """Run the forward pass, for many products."""
        if not self.reuse_forward:
            return None
        return Bound(self.product, True, self._linearized(arguments))

    def multiply(self, arguments: Any, v: Any) -> Any:
        """Return the product with one vector."""
        if self.linear is not None:
            return self.linear(v)
        a = arguments
        return self.product(a["params"], a["buffers"], a["batch"], v, key=a.get("key"))

    def multiply_many(self, arguments: Any, v: Any) -> Any:
        """Return the products with stacked vectors."""
        linear = self._linearized(arguments) if self.linear is None else self.linear
        return linear.block(v)

    def _linearized(self, arguments: Any) -> Linearized:
        a = arguments
        return Linearized(self.product, a["params"], a["buffers"], a["batch"], a.get("key"))


@dataclass(frozen=True, eq=False)
class Binder:
    """A transformation: called with `(params, buffers, batch, *, key=None)` it gives `Implicit`.

    Attributes:
        bound: The operator that results are made of.
        fisher: What the results say they are.
    """

    bound: Bound = field(repr=False)
    fisher: str

    @property
    def model(self) -> Any:
        """The function `(params, buffers, inputs) -> outputs`."""
        return self.bound.product.model

    @property
    def likelihood(self) -> Any:
        """What turns outputs into a distribution."""
        return self.bound.product.likelihood

    @property
    def options(self) -> Mapping[str, Any]:
        """The keyword arguments it was made with."""
        own = {"reuse_forward": self.bound.reuse_forward}
        return MappingProxyType({**self.bound.product.options, **own})

    def __call__(
        self,
        params: Any,
        buffers: Any,
        batch: Batch | Iterable[Batch],
        *,
        key: Tensor | None = None,
    ) -> Implicit:
        """Bind the matrix to one batch, or to the joined data of several."""
        product = self.bound.product
        if not isinstance(batch, Batch):
            batch = list(numbered(product.name, batch))
        arguments = {"params": params, "buffers": buffers, "batch": batch}
        if key is not None:
            arguments["key"] = key
        ready = self.bound.prepare(arguments) if concrete(*trees.leaves(arguments)) else None
        if ready is None or ready.linear is None or ready.linear.count is None:
            count = product.count(params, buffers, batch, key)
        else:
            count = ready.linear.count
        chosen = Chosen.of(product.name, params, product.options["select"])
        found = Implicit(
            (torch.ones_like(count),),
            (arguments,),
            count,
            (self.bound,),
            Layout.of(chosen.template),
            fisher=self.fisher,
            unit=product.options["unit"],
        )
        return found if ready is None else found.prepared(ready)


def implicit(
    model: Any,
    likelihood: Any,
    *,
    matrix: str = "fisher",
    fisher: str = "exact",
    num_samples: int = 1,
    unit: str = "example",
    select: Any = None,
    chunk_size: int | None = None,
    reuse_forward: bool = True,
) -> Binder:
    """Give the Fisher information, or the Hessian, as products bound to their arguments.

    See `fisher_vp` for the definition and the options, `hvp` for the Hessian.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        matrix: "fisher", or "hessian" for that of the mean negative log-likelihood.
        fisher: Whose labels; for the Hessian they are the observed targets.
        num_samples: Draws of labels for each example.
        unit: What N counts.
        select: Which parameters; see `fisher_vp`. Vectors are then dicts by path.
        chunk_size: Examples processed together.
        reuse_forward: Keep the forward pass of the first product for the others; memory then stays
            in use as long as the result.

    Returns:
        A transformation: called with `(params, buffers, batch, *, key=None)`, the batch possibly an
        iterable of batches, it gives an `Implicit`: `mv`, `quadratic`, `solve`, `to_dense`,
        `linear_operator`. `merge` adds terms: the exact result on the joined data.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: as `linearized`; without `reuse_forward`, as `fisher_vp` for each product.

    Example:
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> F = ff.implicit(model, ff.likelihoods.categorical())(
        ...     {"w": torch.zeros(1, 2)}, {}, ff.Batch(torch.tensor([[2.0]])))
        >>> F.solve({"w": torch.tensor([[3.0, 0.0]])}, damping=1.0)
        {'w': tensor([[2., 1.]])}
        >>> F.to_dense()
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    product = make(
        "implicit", model, likelihood, matrix, fisher, num_samples, unit, select, chunk_size
    )
    return Binder(Bound(product, reuse_forward), fisher if matrix == "fisher" else "hessian")
