"""What products should be: the matrix from its definition in float64, times vectors.

Only torch is used, and no forward mode through the loss: the Fisher information is Jᵀ H J with the
softmax written out, the Hessian the derivative of a gradient, the empirical one a sum over scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import oracle
from benchmarks.oracle import Values
from benchmarks.workloads import Workload

MATRICES = ("fisher", "empirical", "hessian")


def products(
    workload: Workload, matrix: str, vectors: Values, targets: Tensor | None = None
) -> Values:
    """Return the products of a matrix with K vectors, in float64.

    Args:
        workload: The model and the batch.
        matrix: "fisher", "empirical" (scores of the targets) or "hessian" (of the mean over
            examples of the negative log-likelihood, summed over positions).
        vectors: Each `[K, *shape]`, of any dtype.
        targets: Other targets than those of the batch, for "empirical".

    Returns:
        Tensors like `vectors`.
    """
    wide = workload.double()
    tangents = {name: t.double() for name, t in vectors.items()}
    if matrix == "empirical":
        return _empirical(wide, tangents, wide.batch.targets if targets is None else targets)
    multiply = operator(wide, matrix)
    many = len(next(iter(tangents.values())))
    rows = [multiply({name: t[k] for name, t in tangents.items()}) for k in range(many)]
    return {name: torch.stack([row[name] for row in rows]) for name in tangents}


def operator(wide: Workload, matrix: str) -> Callable[[Values], Values]:
    """Return the function v to M v of a workload that is in float64 already."""
    return {"fisher": _fisher, "hessian": _hessian}[matrix](wide)


def dense_fisher(wide: Workload) -> Tensor:
    """Return the Fisher information `[P, P]`: (1/N) Σ_n Jᵀ (diag p − p pᵀ) J at each position.

    One row of J at a time, by an ordinary backward pass.
    """
    params = list(wide.module.parameters())
    size = sum(p.numel() for p in params)
    total = params[0].new_zeros(size, size)
    for n in range(wide.examples):
        logits = wide.logits(wide.module, wide.batch.inputs[n : n + 1])[0]
        for z in logits.reshape(-1, wide.classes):
            rows = [torch.autograd.grad(value, params, retain_graph=True) for value in z]
            jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            p = z.detach().softmax(-1)
            total += jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    return total / wide.examples


def _fisher(wide: Workload) -> Callable[[Values], Values]:
    params = {name: p.detach() for name, p in wide.module.named_parameters()}

    def outputs(params: Values) -> Tensor:
        found = torch.func.functional_call(wide.module, params, (wide.batch.inputs,))
        return found if isinstance(found, Tensor) else found.logits

    def multiply(v: Values) -> Values:
        with plain_attention():
            pushed: Any = torch.func.jvp(outputs, (params,), (v,))
            z, dz = pushed
            p = z.softmax(-1)
            cotangent = p * (dz - (p * dz).sum(-1, keepdim=True)) / wide.examples
            found: Any = torch.func.vjp(outputs, params)
            return found[1](cotangent)[0]

    return multiply


def _hessian(wide: Workload) -> Callable[[Values], Values]:
    named = dict(wide.module.named_parameters())
    leaves = list(named.values())
    with plain_attention():
        logits = wide.logits(wide.module, wide.batch.inputs)
        total = F.cross_entropy(
            logits.flatten(0, -2), wide.batch.targets.flatten(), reduction="sum"
        )
        gradient = torch.autograd.grad(total / wide.examples, leaves, create_graph=True)

    def multiply(v: Values) -> Values:
        with plain_attention():
            slope = torch.autograd.grad(
                gradient,
                leaves,
                [v[name] for name in named],
                retain_graph=True,
                materialize_grads=True,
            )
        return dict(zip(named, slope, strict=True))

    return multiply


def _empirical(wide: Workload, vectors: Values, targets: Tensor) -> Values:
    total = {name: torch.zeros_like(t) for name, t in vectors.items()}
    for score in oracle.scores(wide, targets):
        along = sum(vectors[name].flatten(1) @ g.flatten() for name, g in score.items())
        for name, g in score.items():
            total[name] += torch.as_tensor(along).reshape(-1, *[1] * g.dim()) * g
    return {name: t / wide.examples for name, t in total.items()}


@contextmanager
def plain_attention() -> Iterator[None]:
    """Use the one kernel of attention that every mode of differentiation knows, and be quiet."""
    with warnings.catch_warnings(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        warnings.simplefilter("ignore")
        yield
