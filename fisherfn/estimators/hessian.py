"""The Hessian of the mean negative log-likelihood, and derivatives of outputs: matrix-free.

    L = -(1/N) Σ_n w_n log p(y_n | x_n),      H = ∇² L

for the observed targets y_n; N, masks and weights are those of the estimators. The Fisher
information is the part of H that is left where the model is linear, or fits the targets in the
mean; H itself may be indefinite.

Each function of a library of second-order methods that one may come from has its counterpart:

| one may know                      | here |
|-----------------------------------|------|
| `empirical_fisher_trace`, `generalized_fisher_trace` | the same names, `trace` |
| `empirical_fisher_diagonal`, `generalized_fisher_diagonal` | `diagonal(fisher=...)` |
| `gauss_newton_matrix_approximation` | `diagonal(model, likelihoods.gaussian(scale))` |
| `exact_hvp`, `model_hvp`          | `hvp`; `linearized(matrix="hessian")` for many |
| `approximate_hvp`                 | `finite_difference_vp` |
| `gauss_newton_product`            | `ggn_vp`, the same as `fisher_vp` |
| `jvp`, `model_jvp`, `batch_jvp`   | `output_jvp` |
| `vjp`, `model_vjp`, `batch_vjp`   | `output_vjp` |
| `full_jacobian`                   | `output_jacobian` |
| `hessian_diagonal`, `model_hessian_diagonal` | `hessian_diagonal`; `linalg.xdiag` |
| `hessian_trace`, `model_hessian_trace` | `hessian_trace`, exact or with an error |
| `per_layer_hessian_diagonal`, `per_layer_fisher_diagonal` | `by_layer` of a diagonal |
| `get_layer_curvature_stats`       | `layer_statistics` of a diagonal |
| `flatten_params`, `unflatten_params` | `tree.ravel` and what it returns |
| `get_params_by_module_type`, `get_params_by_name_pattern` | `functional(select=...)` |
| `power_iteration`, `lanczos`, `model_eigenvalues` | `linalg.lanczos` on any product |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfn import linalg
from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.estimators.products.fisher import Product, make_hessian
from fisherfn.estimators.products.linearized import Linearized, Linearizer

#: Products that an exact diagonal may need before it is refused.
EXACT_BUDGET = 16_384
_BLOCK = 128  # unit vectors multiplied together
_METHODS: dict[str, Callable[..., linalg.Estimate]] = {
    "hutchinson": linalg.hutchinson,
    "hutchpp": linalg.hutchpp,
    "xtrace": linalg.xtrace,
}


def hvp(
    model: Any,
    likelihood: Any,
    *,
    unit: str = "example",
    select: Any = None,
    chunk_size: int | None = None,
) -> Product:
    """Multiply the Hessian of the mean negative log-likelihood by a vector: forward over reverse.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        unit: What N counts.
        select: Which parameters; see `fisher_vp`.
        chunk_size: Examples processed together.

    Returns:
        A transformation: called with `(params, buffers, batch, tangents)` it gives H v.

    Raises:
        OptionError: an option does not exist.

    Cost: a gradient on dual numbers, about 2 to 3 gradients.

    Reference: Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation
    6(1).

    Example:
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x * params["w"] ** 2
        >>> lik, batch = ff.likelihoods.gaussian(1.0), ff.Batch(torch.ones(1, 1), torch.zeros(1, 1))
        >>> w, v = {"w": torch.tensor(2.0)}, {"w": torch.tensor(1.0)}  # L = w⁴ / 2
        >>> ff.hvp(model, lik)(w, {}, batch, v)
        {'w': tensor(24.)}
    """
    return make_hessian("hvp", model, likelihood, unit, select, chunk_size)


@dataclass(frozen=True, eq=False)
class HessianQuestion:
    """A question about the Hessian: called with `(params, buffers, batch, *, key=None)`."""

    name: str
    matrix: Linearizer
    answer: Callable[[Linearized, Any, Tensor | None], Any]

    @property
    def model(self) -> Any:
        """The function `(params, buffers, inputs) -> outputs`."""
        return self.matrix.model

    @property
    def likelihood(self) -> Any:
        """What turns outputs into a distribution."""
        return self.matrix.likelihood

    @property
    def options(self) -> Any:
        """The keyword arguments it was made with."""
        return self.matrix.options

    def __call__(
        self, params: Any, buffers: Any, batch: Batch, *, key: Tensor | None = None
    ) -> Any:
        """Answer for one batch, or for the joined data of several."""
        return self.answer(self.matrix(params, buffers, batch), params, key)


def hessian_diagonal(
    model: Any,
    likelihood: Any,
    *,
    unit: str = "example",
    select: Any = None,
    chunk_size: int | None = None,
) -> HessianQuestion:
    """Give the exact diagonal of the Hessian of the mean negative log-likelihood.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        unit: What N counts.
        select: Which parameters; see `fisher_vp`. The result is then a dict by path.
        chunk_size: Examples processed together.

    Returns:
        A transformation: called with `(params, buffers, batch)` it gives a tree like `params`.

    Raises:
        OptionError: an option does not exist, or, when called, there are too many parameters.

    Cost: P products, in blocks. For large models `linalg.xdiag` estimates it, with an error.

    Example:
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x * params["w"] ** 2
        >>> lik, batch = ff.likelihoods.gaussian(1.0), ff.Batch(torch.ones(1, 1), torch.zeros(1, 1))
        >>> ff.hessian_diagonal(model, lik)({"w": torch.tensor(2.0)}, {}, batch)
        {'w': tensor(24.)}
    """
    name = "hessian_diagonal"
    product = make_hessian(name, model, likelihood, unit, select, chunk_size)
    return HessianQuestion(name, Linearizer(product), lambda h, p, key: _diagonal(name, h))


def hessian_trace(
    model: Any,
    likelihood: Any,
    *,
    method: str = "hutchinson",
    num_matvecs: int = 30,
    unit: str = "example",
    select: Any = None,
    chunk_size: int | None = None,
) -> HessianQuestion:
    """Give the trace of the Hessian of the mean negative log-likelihood, with its standard error.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        method: "hutchinson", "hutchpp" or "xtrace", which need a key, or "exact" (P products).
        num_matvecs: Products that an estimate may take.
        unit: What N counts.
        select: Which parameters; see `fisher_vp`. The trace is that of their block.
        chunk_size: Examples processed together.

    Returns:
        A transformation: called with `(params, buffers, batch, *, key=None)` it gives a
        `linalg.Estimate(value, stderr)`.

    Raises:
        OptionError: an option does not exist, or no key is given where one is needed.

    Cost: `num_matvecs` products that share their forward pass.

    Reference: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix,
    Communications in Statistics 19(2); see `linalg` for the others.

    Example:
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x * params["w"] ** 2
        >>> lik, batch = ff.likelihoods.gaussian(1.0), ff.Batch(torch.ones(1, 1), torch.zeros(1, 1))
        >>> ff.hessian_trace(model, lik, method="exact")({"w": torch.tensor(2.0)}, {}, batch).value
        tensor(24.)
    """
    name = "hessian_trace"
    if method != "exact" and method not in _METHODS:
        raise OptionError(
            f"{name}: expected method= to be one of 'exact', "
            f"{', '.join(map(repr, _METHODS))}, got {method!r}. 'exact' takes a product for each "
            "parameter."
        )
    product = make_hessian(name, model, likelihood, unit, select, chunk_size)

    def answer(matrix: Linearized, params: Any, key: Tensor | None) -> linalg.Estimate:
        if method == "exact":
            value = torch.stack([t.sum() for t in trees.leaves(_diagonal(name, matrix))]).sum()
            return linalg.Estimate(value, torch.zeros_like(value), matrix.count, unit=unit)
        if key is None:
            raise OptionError(
                f"{name}: expected key= for method={method!r}, got None. Pass "
                "key=random.key(seed); the same key draws the same probes."
            )
        return _METHODS[method](matrix, matrix.template, num_matvecs=num_matvecs, key=key)

    return HessianQuestion(name, Linearizer(product), answer)


def _diagonal(caller: str, matrix: Linearized) -> Any:
    """Return the diagonal of a matrix from its products with all unit vectors, in blocks."""
    vector, unravel = trees.ravel(matrix.template)
    size = len(vector)
    if size > EXACT_BUDGET:
        raise OptionError(
            f"{caller}: expected at most {EXACT_BUDGET} parameters, got {size}: the exact answer "
            "takes a product for each. Estimate it with linalg.xdiag or linalg.hutchinson on "
            "linearized(matrix='hessian'), or choose fewer parameters with select=."
        )
    parts = []
    for first in range(0, size, _BLOCK):
        index = torch.arange(first, min(size, first + _BLOCK), device=vector.device)
        units = torch.zeros(len(index), size, dtype=vector.dtype, device=vector.device)
        units = units.scatter(1, index.unsqueeze(1), 1.0)
        found = matrix.block(torch.func.vmap(unravel)(units))
        flat = torch.cat([t.reshape(len(index), -1) for t in trees.leaves(found)], dim=1)
        parts.append(flat.gather(1, index.unsqueeze(1)).squeeze(1))
    return unravel(torch.cat(parts))
