"""Products of the Fisher information with vectors, without forming it.

    F v = (1/N) Σ_n w_n E_y[ s_n <s_n, v> ],    s_n = ∇ log p(y | x_n)

by three linear maps: J v forward through the model, the Fisher information of the outputs in closed
form, and Jᵀ backward. N, masks, weights, ids and the draws are those of the estimators, so that the
product is `ff.dense(...)(...).mv(v)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.estimators import checks, opaque
from fisherfn.estimators.observer import outside_inference
from fisherfn.estimators.products import linear, parts
from fisherfn.estimators.products.plain import Chosen, check_select
from fisherfn.estimators.products.second import HessianKind
from fisherfn.likelihoods import resolve
from fisherfn.likelihoods.base import Likelihood


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix-vector product: called with `(params, buffers, batch, tangents, *, key=None)`.

    Pure, and safe under `torch.compile(fullgraph=True)`, `torch.vmap` over tangents or parameters
    and `torch.func.grad`. The options are read-only.

    Attributes:
        name: The function that made it.
        model: The function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        options: The keyword arguments it was made with.
        kind: Which matrix it is.
        slot: The name that compiled code calls it by.
    """

    name: str
    model: Any
    likelihood: Likelihood
    options: Mapping[str, Any]
    kind: parts.Kind = field(repr=False)
    slot: str = field(init=False, repr=False, default="")
    _stack: _Stack = field(init=False, repr=False)
    _counter: _Counter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Make the options read-only and take a name that compiled code can call by."""
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "slot", opaque.register(self))
        object.__setattr__(self, "_stack", _Stack(self))
        object.__setattr__(self, "_counter", _Counter(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by making it again."""
        return Product, (self.name, self.model, self.likelihood, dict(self.options), self.kind)

    def __call__(
        self,
        params: Any,
        buffers: Any,
        batch: Batch | Iterable[Batch],
        tangents: Any,
        *,
        key: Tensor | None = None,
    ) -> Any:
        """Multiply by one vector.

        Args:
            params: Tree of P scalars in total.
            buffers: What else the model reads.
            batch: The data; an iterable of batches gives the product on their joined data.
            tangents: The vector, like `params`; with `select=`, a dict of the selected paths.
            key: Random key, needed where labels are drawn.

        Returns:
            A tree like `tangents`, float32 or wider.

        Raises:
            FisherError: the arguments do not fit; the message says which and what to do.
        """
        if isinstance(batch, Batch):
            return self._one(params, buffers, batch, tangents, key)[0]
        return parts.joined(
            self.name,
            batch,
            lambda one: self._one(params, buffers, one, tangents, key),
        )

    def stacked(
        self,
        params: Any,
        buffers: Any,
        batch: Batch | Iterable[Batch],
        tangents: Any,
        *,
        key: Tensor | None = None,
    ) -> Any:
        """Multiply by many vectors, stacked along a leading axis, in compiled code."""
        slot = self._stack.slot

        def one(b: Batch) -> tuple[Any, Tensor]:
            return opaque.call(slot, (params, tangents), buffers, b, key)

        return one(batch)[0] if isinstance(batch, Batch) else parts.joined(self.name, batch, one)

    def _one(
        self, params: Any, buffers: Any, batch: Batch, tangents: Any, key: Tensor | None
    ) -> tuple[Any, Tensor]:
        """Return the product on one batch, and its N."""
        if torch.compiler.is_dynamo_compiling():
            return opaque.call(self.slot, (params, tangents), buffers, batch, key)
        return self.evaluate(params, buffers, batch, tangents, key)

    def traced(
        self, params: Any, buffers: Any, batch: Batch, key: Tensor | None
    ) -> tuple[Any, Tensor]:
        """Evaluate inside compiled code, where tangents come along with the parameters."""
        return self.evaluate(params[0], buffers, batch, params[1], key)

    def evaluate(
        self, params: Any, buffers: Any, batch: Batch, tangents: Any, key: Tensor | None
    ) -> tuple[Any, Tensor]:
        """Multiply on one batch; see `__call__`. Returns the product and N."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                given = (params, buffers, batch, tangents, key)
                return self.evaluate(*trees.map(outside_inference, given))
        problem, compose = self._problem(params, buffers, batch, key, tangents)
        vector = problem.chosen.vectors(self.name, tangents)
        found = problem.multiply(self.kind, vector, self.options["chunk_size"], compose=compose)
        return problem.chosen.restore(found), problem.total

    def ready(
        self, params: Any, buffers: Any, batch: Batch, key: Tensor | None
    ) -> tuple[list[linear.Ready], Tensor]:
        """Return the matrix of each chunk of a batch, for many vectors, and N."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                given = trees.map(outside_inference, (params, buffers, batch, key))
                return self.ready(*given)
        problem, compose = self._problem(params, buffers, batch, key)
        found = problem.ready(self.kind, self.options["chunk_size"], compose=compose)
        return found, problem.total

    def count(
        self, params: Any, buffers: Any, batch: Batch | list[Batch], key: Tensor | None
    ) -> Tensor:
        """Return N of a batch, or of several, from a forward pass on their first examples."""
        batches = [batch] if isinstance(batch, Batch) else batch
        if torch.compiler.is_dynamo_compiling():
            slot = self._counter.slot
            found = [opaque.call(slot, params, buffers, one, key) for one in batches]
        else:
            found = [self._problem(params, buffers, one, key)[0].counted() for one in batches]
        return torch.stack(found).sum()

    def gradient(self, params: Any, buffers: Any, batch: Batch) -> tuple[Any, Tensor]:
        """Return the gradient of the mean negative log-likelihood of one batch, and N."""
        problem, compose = self._problem(params, buffers, batch, None)
        found = problem.gradient(self.options["chunk_size"], compose=compose)
        return problem.chosen.restore(found), problem.total

    def _problem(
        self, params: Any, buffers: Any, batch: Batch, key: Tensor | None, tangents: Any = None
    ) -> tuple[parts.Problem, bool]:
        """Check the arguments; return them together, and whether results have to compose."""
        checks.check_params(self.name, params)
        chosen = Chosen.of(self.name, params, self.options["select"])
        problem = parts.Problem(
            self.name,
            self.model,
            self.likelihood,
            chosen,
            buffers,
            batch,
            key,
            self.kind.labels,
        )
        return problem, linear.composing(params, buffers, batch.inputs, tangents)


class _Stack:
    """How compiled code multiplies many vectors at once."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self.slot = opaque.register(self)

    def traced(
        self, params: Any, buffers: Any, batch: Batch, key: Tensor | None
    ) -> tuple[Any, Tensor]:
        """Multiply every vector of the stack that comes along with the parameters."""
        point, tangents = params
        product = self._product
        ready, total = product.ready(point, buffers, batch, key)
        chosen = Chosen.of(product.name, point, product.options["select"])
        lead = (len(trees.leaves(tangents)[0]),)
        vectors = chosen.vectors(product.name, tangents, lead=lead)
        found: list[Tensor] | None = None
        for part in ready:
            found = parts.added(found, part.multiply_many(vectors))
        assert found is not None
        return chosen.restore(found), total


class _Counter:
    """How compiled code counts the units of a batch."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self.slot = opaque.register(self)

    def traced(self, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> Tensor:
        """Return N."""
        return self._product.count(params, buffers, batch, key)


def fisher_vp(
    model: Any,
    likelihood: Any,
    *,
    fisher: str = "exact",
    num_samples: int = 1,
    unit: str = "example",
    select: Any = None,
    chunk_size: int | None = None,
) -> Product:
    """Multiply the Fisher information matrix by a vector, without forming it.

    F = (1/N) Σ w_n E_y[s_n s_nᵀ] with the scores s_n of the sum of an example's log-probabilities.
    For the likelihoods of this library whose outputs are natural parameters (categorical,
    Bernoulli, Poisson, Gaussian) it is the generalised Gauss-Newton matrix of the mean negative
    log-likelihood, so `ggn_vp` is the same function.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution, such as `likelihoods.categorical()`.
        fisher: Whose labels: "exact" (the expectation, in closed form), "mc" (drawn from the
            model), "curvature_prop" (random signs times the square root) or "empirical" (targets).
        num_samples: Draws of labels for each example; needs "mc" or "curvature_prop".
        unit: What N counts: "example" or "position".
        select: Which parameters: a regular expression searched in the path, or a predicate
            `(path, tensor) -> bool`. The product is then that of their diagonal block, and tangents
            and results are dicts by path. All, by default.
        chunk_size: Examples processed together; all by default.

    Returns:
        A transformation: called with `(params, buffers, batch, tangents, *, key=None)` it gives
        F v, a tree like the tangents. Equal keys draw equal labels, so that it is one linear map.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: one forward pass on dual numbers and one backward pass, about 1.5 to 2 gradients; the
    number of draws and of classes hardly matters. `linearized` makes further products cheaper.

    Reference: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
    descent, Neural Computation 14(7); Martens (2020), New insights and perspectives on the natural
    gradient method, JMLR 21(146), sections 8 and 9.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> product = ff.fisher_vp(model, ff.likelihoods.categorical())
        >>> batch, v = ff.Batch(torch.tensor([[2.0]])), {"w": torch.tensor([[1.0, 0.0]])}
        >>> product({"w": torch.zeros(1, 2)}, {}, batch, v)
        {'w': tensor([[ 1., -1.]])}
    """
    return make("fisher_vp", model, likelihood, fisher, num_samples, unit, select, chunk_size)


ggn_vp = fisher_vp


def empirical_vp(
    model: Any,
    likelihood: Any,
    *,
    unit: str = "example",
    select: Any = None,
    chunk_size: int | None = None,
) -> Product:
    """Multiply the empirical Fisher information matrix by a vector: scores of observed targets.

    The same as `fisher_vp(..., fisher="empirical")`. It is not the Fisher information: the targets
    are not drawn from the model.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        unit: What N counts; by position, the scores of positions are squared one by one.
        select: Which parameters; see `fisher_vp`.
        chunk_size: Examples processed together.

    Returns:
        A transformation; see `fisher_vp`.

    Raises:
        OptionError: an option does not exist.

    Cost: as `fisher_vp`.

    Reference: Kunstner, Balles & Hennig (2019), Limitations of the empirical Fisher approximation,
    NeurIPS, section 2.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> batch = ff.Batch(torch.tensor([[2.0]]), targets=torch.tensor([1]))
        >>> v = {"w": torch.tensor([[1.0, 0.0]])}
        >>> product = ff.empirical_vp(model, ff.likelihoods.categorical())
        >>> product({"w": torch.zeros(1, 2)}, {}, batch, v)
        {'w': tensor([[ 1., -1.]])}
    """
    return make("empirical_vp", model, likelihood, "empirical", 1, unit, select, chunk_size)


def make(
    name: str,
    model: Any,
    likelihood: Any,
    fisher: str,
    num_samples: int,
    unit: str,
    select: Any,
    chunk_size: int | None,
) -> Product:
    """Return the product with the Fisher information of these labels."""
    labels = checks.check_options(name, model, fisher, num_samples, unit, chunk_size)
    check_select(name, select)
    options = {
        "fisher": fisher,
        "num_samples": num_samples,
        "unit": unit,
        "select": select,
        "chunk_size": chunk_size,
    }
    return Product(name, model, resolve(name, likelihood), options, parts.FisherKind(labels))


def make_hessian(
    name: str, model: Any, likelihood: Any, unit: str, select: Any, chunk_size: int | None
) -> Product:
    """Return the product with the Hessian of the mean negative log-likelihood."""
    labels = checks.check_options(name, model, "empirical", 1, unit, chunk_size)
    check_select(name, select)
    options = {"unit": unit, "select": select, "chunk_size": chunk_size}
    return Product(name, model, resolve(name, likelihood), options, HessianKind(labels))
