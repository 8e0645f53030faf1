"""The loss and its quadratic model on a batch, which step lengths and dampings are read from.

h(θ) = -(1/N) Σ_n w_n log p(y_n | x_n, θ) + ½ η |θ|²
M(δ) = gᵀδ + ½ δᵀ (F + (λ + η) I) δ,    g = ∇h(θ)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.dtypes import widest
from fisherfn.core.modes import transformed, unmixed
from fisherfn.core.trees import Tree
from fisherfn.estimators import checks, opaque
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.observe import Labels
from fisherfn.estimators.observer import Observer
from fisherfn.estimators.products.fisher import fisher_vp
from fisherfn.estimators.products.linear import load_forward_mode
from fisherfn.estimators.products.output import OutputFisher
from fisherfn.estimators.products.plain import Chosen, Flat


class Quadratic:
    """The loss and its model, for an estimator; also in code that `torch.compile` is tracing."""

    def __init__(self, caller: str, estimator: Estimator) -> None:
        """Errors are raised on behalf of `caller`."""
        self.caller = caller
        self.estimator = estimator
        self.slot = opaque.register(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by making it again."""
        return Quadratic, (self.caller, self.estimator)

    def loss(self, params: Tree, buffers: Tree, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood of the targets; see `loss`."""
        return self._call({"params": params}, buffers, batch)

    def products(
        self, params: Tree, buffers: Tree, batch: Batch, vectors: Sequence[Tree]
    ) -> Tensor:
        """Return uᵀ F v for all pairs of vectors; see `products`."""
        return self._call({"params": params, "vectors": list(vectors)}, buffers, batch)

    def _call(self, given: dict[str, Any], buffers: Tree, batch: Batch) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return opaque.call(self.slot, given, buffers, batch, None)
        return self.traced(given, buffers, batch, None)

    def traced(self, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> Tensor:
        """Compute either, from the parameters and, if they are there, the vectors."""
        given: dict[str, Any] = params
        at = self.caller, self.estimator, given["params"], buffers, batch
        return products(*at, given["vectors"]) if "vectors" in given else loss(*at)


def loss(caller: str, estimator: Estimator, params: Tree, buffers: Tree, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of the targets, per unit of the estimator; 0-d.

    Raises:
        FisherError: The batch has no targets, or they do not fit.
    """
    size = checks.check_batch(caller, batch)
    unit = estimator.options.get("unit", "example")
    observer = Observer(caller, estimator.likelihood, batch, None, size, normalised=True)
    with torch.no_grad():
        outputs = estimator.model(params, buffers, batch.inputs)
        observed = observer.observe(outputs, (unit,), 0, size, targets_count=True)[unit]
        return -observed.log_likelihood()


def products(
    caller: str,
    estimator: Estimator,
    params: Tree,
    buffers: Tree,
    batch: Batch,
    vectors: Sequence[Tree],
) -> Tensor:
    """Return uᵀ F v for all pairs of vectors, with the exact F of the model on this batch.

    Args:
        caller: The public function on whose behalf the batch is checked.
        estimator: Gives model, likelihood and unit.
        params: The point.
        buffers: As for the model.
        batch: The data.
        vectors: K trees like the parameters.

    Returns:
        [K, K], symmetric.

    Cost: a pass forward with derivatives for each vector, no pass backward; where the model has no
    forward-mode derivative, a product with F for each vector.
    """
    unit = estimator.options.get("unit", "example")
    likelihood, size = estimator.likelihood, checks.check_batch(caller, batch)
    chosen = Chosen.of(caller, params, None)
    function = Flat(
        estimator.model,
        chosen,
        buffers,
        batch.inputs,
        lambda outputs: likelihood.check_outputs(caller, outputs),
        compose=transformed(),
    )
    ready = [chosen.vectors(caller, v, "directions") for v in vectors]
    try:
        pushed = [_pushed(function, chosen.leaves, v) for v in ready]
    except (NotImplementedError, RuntimeError):
        times = fisher_vp(estimator.model, likelihood, unit=unit)
        return inner(vectors, [times(params, buffers, batch, v) for v in vectors])
    outputs = function.restore(pushed[0][0])
    observer = Observer(caller, likelihood, batch, None, size, normalised=True)
    observed = observer.observe(outputs, (unit,), 0, size, targets_count=False)[unit]
    middle = OutputFisher(observed, Labels("exact", 1, unit))
    images = [middle(function.restore(tangents)) for _, tangents in pushed]
    # what is masked counts as zero, also where its tangent is not finite
    kept = [
        [torch.where(c == 0, 0.0, t) for c, t in zip(trees.leaves(image), tangents, strict=True)]
        for image, (_, tangents) in zip(images, pushed, strict=True)
    ]
    return inner(kept, images)


def _pushed(
    function: Flat, leaves: list[Tensor], tangents: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and their derivative along one direction."""
    if transformed():
        outputs, found = torch.func.jvp(function, (leaves,), (tangents,))[:2]
        return outputs, found
    load_forward_mode()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(leaves, tangents, strict=True)]
        pairs = [forward_ad.unpack_dual(out) for out in function(duals)]
    outputs = [pair.primal.detach() for pair in pairs]
    found = [
        z.new_zeros(z.shape) if p.tangent is None else p.tangent.detach()
        for z, p in zip(outputs, pairs, strict=True)
    ]
    return outputs, found


@unmixed
def inner(left: Sequence[Tree], right: Sequence[Tree]) -> Tensor:
    """Return the matrix of inner products of two lists of trees."""
    rows, columns = [torch.stack([_flat(t) for t in side]) for side in (left, right)]
    return rows @ columns.mT


def _flat(tree: Tree) -> Tensor:
    """Return the leaves of a tree as one vector, float32 or wider."""
    leaves = trees.leaves(tree)
    dtype = widest(leaves)
    return torch.cat([x.reshape(-1).to(leaves[0].device, dtype) for x in leaves])


def minimum(matrix: Tensor, slopes: Tensor) -> Tensor:
    """Return the coefficients c that minimise ½ cᵀ A c + bᵀ c, for one or two directions.

    A direction along which A is zero, such as a step that was never made, gets none.

    >>> minimum(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([-4.0, 0.0]))
    tensor([2., 0.])
    """
    diagonal = matrix.diagonal()
    none = diagonal <= 0
    # unit diagonal, so that two directions of very different length are solved for equally well
    scale = torch.where(none, torch.ones_like(diagonal), diagonal).rsqrt()
    scaled = matrix * scale[:, None] * scale
    scaled = torch.where(none[:, None] | none, torch.zeros_like(scaled), scaled)
    # two directions that agree to rounding share their coefficient
    ridge = torch.where(none, 1.0, 1e-9 if matrix.dtype == torch.float64 else 1e-6)
    b = torch.where(none, torch.zeros_like(slopes), slopes * scale)
    return -scale * torch.linalg.solve(scaled + ridge.to(scaled).diag(), b)
