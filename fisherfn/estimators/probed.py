"""The trace of the Fisher information from its products with random vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fisherfn import linalg
from fisherfn.batch import Batch
from fisherfn.core import random
from fisherfn.core.errors import OptionError
from fisherfn.core.options import check_count
from fisherfn.estimators import opaque
from fisherfn.estimators.products.linearized import Linearizer, make
from fisherfn.likelihoods.base import Likelihood
from fisherfn.linalg.hutchinson import stopper
from fisherfn.linalg.probes import check_probes
from fisherfn.linalg.results import Estimate
from fisherfn.linalg.space import check_key

METHODS = {"hutchinson": linalg.hutchinson, "hutchpp": linalg.hutchpp, "xtrace": linalg.xtrace}
_FEWEST = {"hutchinson": 1, "hutchpp": 3, "xtrace": 4}
_PRODUCTS = 30


@dataclass(frozen=True, eq=False)
class ProbedTrace:
    """An estimator of the trace: called with `(params, buffers, batch, *, key)`.

    Attributes:
        name: The function that made it.
        model: The function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        options: The keyword options.
        slot: The name that compiled code calls it by.
    """

    name: str
    model: Any
    likelihood: Likelihood
    options: Mapping[str, Any]
    slot: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        """Check the options, make them read-only, and take a name for compiled code."""
        name, options = self.name, dict(self.options)
        method = options["method"]
        if method not in METHODS:
            known = ", ".join(map(repr, ("exact", *METHODS)))
            raise OptionError(
                f"{name}: expected method= to be one of {known}, got {method!r}. 'exact' adds up "
                "the squared norms of single scores."
            )
        if options["num_matvecs"] is not None:
            advice = "It is the number of products with random vectors."
            check_count(name, "num_matvecs", options["num_matvecs"], _FEWEST[method], advice)
        if options["probes"] is not None:
            check_probes(name, options["probes"], 1.0)
        stopper(name, options["target_stderr"], options["relative"])
        object.__setattr__(self, "options", MappingProxyType(options))
        object.__setattr__(self, "slot", opaque.register(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by making it again."""
        return ProbedTrace, (self.name, self.model, self.likelihood, dict(self.options))

    def __call__(
        self, params: Any, buffers: Any, batch: Batch, *, key: Tensor | None = None
    ) -> Estimate:
        """Estimate on one batch."""
        if torch.compiler.is_dynamo_compiling():
            return opaque.call(self.slot, params, buffers, batch, key)
        return self.traced(params, buffers, batch, key)

    def traced(self, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> Estimate:
        """Multiply random vectors; labels and vectors are drawn from different keys."""
        check_key(self.name, key)
        assert key is not None
        fisher, unit = self.options["fisher"], self.options["unit"]
        samples, chunk_size = self.options["num_samples"], self.options["chunk_size"]
        matrix = Linearizer(
            make(
                self.name,
                self.model,
                self.likelihood,
                "fisher",
                fisher,
                samples,
                unit,
                None,
                chunk_size,
            )
        )
        labels, vectors = random.split(key).unbind(0)
        product = matrix(params, buffers, batch, key=labels)
        options: dict[str, Any] = {
            "num_matvecs": self.options["num_matvecs"] or _PRODUCTS,
            "target_stderr": self.options["target_stderr"],
            "relative": self.options["relative"],
        }
        if self.options["probes"] is not None:
            options["probes"] = self.options["probes"]
        found = METHODS[self.options["method"]](product, params, key=vectors, **options)
        return replace(found, count=product.count, fisher=fisher, unit=unit)
