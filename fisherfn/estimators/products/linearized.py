"""One matrix at fixed arguments, for many products: the forward pass is paid once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.errors import OptionError, TreeMismatchError, UnsupportedError
from fisherfn.core.modes import unmixed, version
from fisherfn.core.options import check_count
from fisherfn.estimators.products import fisher, parts
from fisherfn.estimators.products.linear import Ready
from fisherfn.estimators.products.plain import Chosen


class Linearized:
    """A Fisher information matrix or a Hessian at fixed arguments; called with a vector.

    In eager mode it holds what the forward pass has computed. Under `torch.compile` every product
    is written out with its own forward pass, which the compiler shares.

    Attributes:
        count: N, the number of units averaged over; None inside compiled code.
        engine: "forward mode", or "reverse mode twice" where that does not exist.
        reason: Why the forward mode is not used, or "".
    """

    def __init__(
        self,
        product: fisher.Product,
        params: Any,
        buffers: Any,
        batch: Batch | Iterable[Batch],
        key: Tensor | None,
    ) -> None:
        """Run the model."""
        self._product = product
        self._arguments = (params, buffers, batch, key)
        self.count: Tensor | None = None
        self.engine, self.reason = "", ""
        self._parts: list[tuple[list[Ready], Tensor]] = []
        if torch.compiler.is_dynamo_compiling():
            if not isinstance(batch, Batch):
                self._arguments = (params, buffers, list(batch), key)
            return
        name = product.name
        batches = [batch] if isinstance(batch, Batch) else parts.numbered(name, batch)
        for one in batches:
            ready, n = product.ready(params, buffers, one, key)
            self._parts.append((ready, n))
        self.count = torch.stack([n for _, n in self._parts]).sum()
        engines = [part for ready, _ in self._parts for part in ready]
        chosen = next((e for e in engines if e.reason), engines[0])
        self.engine, self.reason = chosen.engine, chosen.reason
        self._chosen = Chosen.of(name, params, product.options["select"])
        self._versions = [(p, version(p)) for p in self._chosen.leaves]

    @property
    def template(self) -> Any:
        """The tree that vectors are like: the parameters, or a dict of the selected ones."""
        name, select = self._product.name, self._product.options["select"]
        return Chosen.of(name, self._arguments[0], select).template

    @unmixed
    def __call__(self, tangents: Any) -> Any:
        """Multiply by one vector.

        Args:
            tangents: The vector, like the parameters; with `select=`, a dict by path.

        Returns:
            A tree like `tangents`, float32 or wider.

        Raises:
            TreeMismatchError: the vector is not like the parameters.
            UnsupportedError: the parameters have been written to since.
        """
        if not self._parts:
            params, buffers, batch, key = self._arguments
            return self._product(params, buffers, batch, tangents, key=key)
        self._check_versions()
        vector = self._chosen.vectors(self._product.name, tangents)
        return self._chosen.restore(self._sum(lambda r: r.multiply(vector)))

    @unmixed
    def block(self, tangents: Any, *, chunk_size: int | None = None) -> Any:
        """Multiply by K vectors at once.

        Args:
            tangents: Tree like the parameters with a leading axis K in every leaf.
            chunk_size: Vectors multiplied together; all by default. Memory grows with it.

        Returns:
            A tree like `tangents`.

        Raises:
            OptionError: `chunk_size` is no positive integer.
            TreeMismatchError: the vectors are not like the parameters.
        """
        name = self._product.name
        advice = "It is the number of vectors that are multiplied together."
        check_count(name, "chunk_size", chunk_size, 1, advice, optional=True)
        many = _length(name, tangents)
        if not self._parts:
            params, buffers, batch, key = self._arguments
            return self._product.stacked(params, buffers, batch, tangents, key=key)
        self._check_versions()
        vectors = self._chosen.vectors(name, tangents, lead=(many,))
        step = many if chunk_size is None else min(many, chunk_size)
        blocks = []
        for start in range(0, many, step):
            block = [t[start : start + step] for t in vectors]
            blocks.append(self._sum(lambda r, b=block: r.multiply_many(b)))
        joined = (
            blocks[0] if len(blocks) == 1 else [torch.cat(b) for b in zip(*blocks, strict=True)]
        )
        return self._chosen.restore(joined)

    def _sum(self, multiply: Callable[[Ready], list[Tensor]]) -> list[Tensor]:
        """Return the average over batches of the sums over chunks."""
        total: list[Tensor] | None = None
        for ready, n in self._parts:
            found: list[Tensor] | None = None
            for part in ready:
                found = parts.added(found, multiply(part))
            assert found is not None
            if len(self._parts) > 1:
                assert self.count is not None
                share = n / self.count
                found = [t * share.to(t.dtype) for t in found]
            total = parts.added(total, found)
        assert total is not None
        return total

    def _check_versions(self) -> None:
        if any(version(p) != before for p, before in self._versions):
            raise UnsupportedError(
                f"{self._product.name}: expected the parameters that the model was run with, got "
                "ones that have been written to since. Call the transformation again, or update "
                "parameters out of place."
            )


def _length(caller: str, tangents: Any) -> int:
    """Return K, the size of the leading axis of every leaf."""
    leaves = trees.leaves(tangents)
    if not leaves or not all(isinstance(t, Tensor) and t.dim() > 0 for t in leaves):
        raise TreeMismatchError(
            f"{caller}: expected tangents with a leading axis of vectors, got a leaf without axes. "
            "Stack them: torch.stack([...]) leaf by leaf."
        )
    if len(leaves[0]) == 0:
        raise TreeMismatchError(
            f"{caller}: expected at least one vector, got a leading axis of size 0. Stack one or "
            "more: torch.stack([...]) leaf by leaf."
        )
    return len(leaves[0])


@dataclass(frozen=True, eq=False)
class Linearizer:
    """A transformation: called with `(params, buffers, batch, *, key=None)` it runs the model.

    Attributes:
        product: The product whose forward pass is paid once.
    """

    product: fisher.Product = field(repr=False)

    @property
    def model(self) -> Any:
        """The function `(params, buffers, inputs) -> outputs`."""
        return self.product.model

    @property
    def likelihood(self) -> Any:
        """What turns outputs into a distribution."""
        return self.product.likelihood

    @property
    def options(self) -> Mapping[str, Any]:
        """The keyword arguments it was made with."""
        return MappingProxyType(dict(self.product.options))

    def __call__(
        self,
        params: Any,
        buffers: Any,
        batch: Batch | Iterable[Batch],
        *,
        key: Tensor | None = None,
    ) -> Linearized:
        """Run the model on one batch, or on each of several."""
        return Linearized(self.product, params, buffers, batch, key)


def linearized(
    model: Any,
    likelihood: Any,
    *,
    matrix: str = "fisher",
    fisher: str = "exact",
    num_samples: int = 1,
    unit: str = "example",
    select: Any = None,
    chunk_size: int | None = None,
) -> Linearizer:
    """Run the model once for many products with its Fisher information or its Hessian.

    See `fisher_vp` for the definition and the options, `hvp` for the Hessian.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        matrix: "fisher", or "hessian" for that of the mean negative log-likelihood.
        fisher: Whose labels; for the Hessian they are the observed targets.
        num_samples: Draws of labels for each example.
        unit: What N counts.
        select: Which parameters; see `fisher_vp`.
        chunk_size: Examples processed together. All chunks are kept, so that memory does not
            shrink; `Linearized.block` has a `chunk_size` of vectors.

    Returns:
        A transformation: called with `(params, buffers, batch, *, key=None)`, the batch possibly an
        iterable of batches, it gives a `Linearized`. That is a function tree -> tree, as
        `ff.linalg` takes it, and `Linearized.block` multiplies many vectors at once.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: about two gradients, then 0.7 to 1.3 a product, and less a vector in blocks. Memory: the
    activations of one forward pass, as a gradient, and their counterparts on dual numbers while it
    runs.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> batch = ff.Batch(torch.tensor([[2.0]]))
        >>> matrix = ff.linearized(model, ff.likelihoods.categorical())
        >>> F = matrix({"w": torch.zeros(1, 2)}, {}, batch)
        >>> F({"w": torch.tensor([[1.0, 0.0]])})
        {'w': tensor([[ 1., -1.]])}
    """
    return Linearizer(
        make("linearized", model, likelihood, matrix, fisher, num_samples, unit, select, chunk_size)
    )


def make(
    name: str,
    model: Any,
    likelihood: Any,
    matrix: str,
    labels: str,
    num_samples: int,
    unit: str,
    select: Any,
    chunk_size: int | None,
) -> fisher.Product:
    """Return the product with the Fisher information or with the Hessian."""
    if matrix not in ("fisher", "hessian"):
        raise OptionError(
            f"{name}: expected matrix= to be 'fisher' or 'hessian', got {matrix!r}. The Fisher "
            "information is the Gauss-Newton part of the Hessian."
        )
    if matrix == "fisher":
        return fisher.make(name, model, likelihood, labels, num_samples, unit, select, chunk_size)
    if labels not in ("exact", "empirical") or num_samples != 1:
        raise OptionError(
            f"{name}: expected no fisher= or num_samples= for matrix='hessian', got {labels!r} and "
            f"{num_samples!r}. The Hessian is that of the observed targets."
        )
    return fisher.make_hessian(name, model, likelihood, unit, select, chunk_size)
