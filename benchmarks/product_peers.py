"""Products of other libraries with the same matrices of the same batch.

Each function sets up what a user of the library sets up once, and returns what is called for each
vector. Libraries average over all targets where the workload has several positions; `values` puts
that right. What a library has no function for is `NotOffered`; what it fails on is its own
exception, which `attempt` alone catches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.oracle import Values
from benchmarks.peers import NotOffered
from benchmarks.prepared import Library
from benchmarks.workloads import Workload

NOT_OFFERED, FAILED = "not offered", "failed"


@dataclass(frozen=True)
class Products:
    """A matrix of a library.

    Attributes:
        multiply: The product with one vector, as the library returns it.
        values: Reads such a result.
        block: The product with K vectors, each `[K, *shape]`, if there is one.
        block_values: Reads the result of a block as `[K, *shape]`.
        linearise: What holds the work that all products share, if `multiply` does not repeat it.
    """

    multiply: Callable[[Values], Any]
    values: Callable[[Any], Values]
    block: Callable[[Values], Any] | None = None
    block_values: Callable[[Any], Values] = dict
    linearise: Callable[[], Any] | None = None


class Rows(nn.Module):
    """A module with its classes on the axis where `nn.CrossEntropyLoss` looks for them."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap the module; parameters are shared."""
        super().__init__()
        self.module = module

    def forward(self, inputs: Any) -> Tensor:
        """Return logits `[B, C, *positions]`."""
        out = self.module(inputs)
        logits = out if isinstance(out, Tensor) else out.logits
        return logits if logits.dim() == 2 else logits.movedim(-1, 1)


def curvlinops(workload: Workload, matrix: str) -> Products:
    """Prepare a linear operator of curvlinops; it multiplies a matrix of columns at once."""
    library = importlib.import_module("curvlinops")
    kinds = {
        "fisher": library.GGNLinearOperator,
        "hessian": library.HessianLinearOperator,
        "empirical": library.EFLinearOperator,
    }
    if matrix == "empirical" and workload.positions > 1:
        raise NotOffered("scores of positions, not of examples")
    params = dict(workload.module.named_parameters())
    operator = kinds[matrix](
        Rows(workload.module),
        nn.CrossEntropyLoss(),
        list(params.values()),
        [(workload.batch.inputs, workload.batch.targets)],
        check_deterministic=False,
    )
    return Products(
        multiply=lambda v: operator @ [v[name] for name in params],
        values=lambda found: _named(workload, found),
        block=lambda vs: operator @ [vs[name].movedim(0, -1).contiguous() for name in params],
        block_values=lambda found: {
            name: t.movedim(-1, 0) for name, t in _named(workload, found).items()
        },
    )


def eigenthings(workload: Workload, matrix: str) -> Products:
    """Prepare an operator of hessian-eigenthings, on flat vectors."""
    operator = eigenthings_operator(workload, matrix)
    params = dict(workload.module.named_parameters())
    scale = 1 if matrix == "empirical" else workload.positions

    def values(found: Tensor) -> Values:
        parts = found.detach().split([p.numel() for p in params.values()])
        named = zip(params.items(), parts, strict=True)
        return {name: scale * t.reshape(p.shape) for (name, p), t in named}

    return Products(
        multiply=lambda v: operator.matvec(torch.cat([v[name].reshape(-1) for name in params])),
        values=values,
    )


def eigenthings_operator(workload: Workload, matrix: str) -> Any:
    """Return the operator itself, whose losses are means over all targets."""
    library = importlib.import_module("hessian_eigenthings")
    losses = importlib.import_module("hessian_eigenthings.loss_fns.standard")
    module, mean = Rows(workload.module), nn.CrossEntropyLoss()
    data = [(workload.batch.inputs, workload.batch.targets)]
    if matrix == "fisher":
        forward, loss = losses.supervised_forward, losses.supervised_loss_of_output(mean)
        return library.GGNOperator(module, data, forward, loss)
    if matrix == "empirical":
        one = nn.CrossEntropyLoss(reduction="sum")
        score = losses.supervised_per_sample_loss(lambda out, y: one(out[None], y[None]))
        return library.EmpiricalFisherOperator(module, data, score)
    return library.HessianOperator(module, data, losses.supervised_loss(mean))


def pyhessian(workload: Workload, matrix: str) -> Products:
    """Prepare PyHessian: a gradient with its graph, which every product goes back through."""
    utils = importlib.import_module("pyhessian.utils")
    if matrix != "hessian":
        raise NotOffered("the Hessian only")
    held = pyhessian_hessian(workload)
    params = dict(workload.module.named_parameters())

    def multiply(v: Values) -> Any:
        return utils.hessian_vector_product(held.gradsH, held.params, [v[n] for n in params])

    return Products(
        multiply=multiply,
        values=lambda found: _named(workload, found),
        linearise=lambda: pyhessian_hessian(workload),
    )


def pyhessian_hessian(workload: Workload) -> Any:
    """Return the object of PyHessian, for the mean over all targets."""
    library = importlib.import_module("pyhessian")
    workload.module.zero_grad()
    data = (workload.batch.inputs, workload.batch.targets)
    cuda = workload.device.type == "cuda"
    found = library.hessian(Rows(workload.module), nn.CrossEntropyLoss(), data=data, cuda=cuda)
    workload.module.zero_grad()  # it leaves gradients with a graph
    return found


@dataclass(frozen=True)
class ProductPeer(Library):
    """A library to compare with."""

    prepare: Callable[[Workload, str], Products]


PRODUCT_PEERS = {
    "curvlinops": ProductPeer("curvlinops-for-pytorch", curvlinops),
    "hessian-eigenthings": ProductPeer("hessian-eigenthings", eigenthings),
    "PyHessian": ProductPeer("pyhessian", pyhessian),
}


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """Call another library; return its result, or why there is none.

    What another library raises is a result of the comparison, whatever its type, so this is the one
    place that catches everything. Nothing of this library is called here.
    """
    try:
        return call(), ""
    except NotOffered as error:
        return None, f"{NOT_OFFERED}: {error}"
    except Exception as error:
        return None, f"{FAILED}: {type(error).__name__}: {error}".split("\n")[0][:160]


def _named(workload: Workload, found: Any) -> Values:
    """Name a list of tensors, and average over examples instead of targets."""
    names = [name for name, _ in workload.module.named_parameters()]
    scale = workload.positions
    return {name: scale * t.detach() for name, t in zip(names, found, strict=True)}
