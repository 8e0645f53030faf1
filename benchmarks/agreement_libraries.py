"""The libraries whose Kronecker blocks are compared, and how their values are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fisherfn as ff
from benchmarks import kronecker_peers, kronfluence_peer
from benchmarks.kronecker_peers import PLAIN, Options
from benchmarks.oracle import Values
from benchmarks.peers import PEERS
from benchmarks.prepared import Prepared
from benchmarks.workloads import Workload

CONVENTIONS = {
    "fisherfn": "scores are added over positions and averaged over examples",
    "ASDL": "data_size is the number of labels; times labels per example; the bias has its own G",
    "BackPACK": "KFLR; mean loss times labels per example; factors of convolutions divided by the "
    "number of positions; the bias has its own block",
    "NNGeometry": "as it is",
    "curvlinops": "mean loss times labels per example, summed loss over the number of examples; "
    "the bias in the block of its weight",
    "kronfluence": "loss summed; K-FAC averages over labels: times labels per example",
}


def own(workload: Workload, quantity: str, options: Options = PLAIN) -> Prepared:
    """Prepare this package, for the same values as the other libraries."""
    structure, _, fisher = quantity.partition("/")
    make = {"kfac": ff.kfac, "ekfac": ff.ekfac}[structure]
    model, params, buffers = ff.functional(workload.module)
    likelihood = ff.likelihoods.categorical()
    estimator = make(model, likelihood, fisher=fisher, num_samples=options.draws)
    seeds = itertools.count()

    def run() -> Any:
        key = ff.random.key(next(seeds)) if fisher == "mc" else None
        return estimator(params, buffers, workload.batch, key=key)

    def values(result: Any) -> Values:
        found: Values = {f"rest/{name}": x for name, x in result.rest.items()}
        for b in result.blocks:
            if structure == "kfac":
                found[f"A/{b.name}"] = _matrix(result.inputs[b.name])
                found[f"G/{b.name}"] = _matrix(result.outputs[b.name])
                continue
            scales = result.scales[b.name]
            eye = torch.eye(b.inputs, dtype=scales.dtype).unsqueeze(0)
            found[f"S/{b.name}"] = _matrix(scales)
            found[f"QG/{b.name}"] = _matrix(result.output_basis[b.name])
            found[f"QA/{b.name}"] = _matrix(result.input_basis.get(b.name, eye))
        return found

    return Prepared(run, values)


LIBRARIES: dict[str, Callable[[Workload, str, Options], Prepared]] = {
    "fisherfn": own,
    "ASDL": kronecker_peers.asdl,
    "BackPACK": kronecker_peers.backpack,
    "NNGeometry": kronecker_peers.nngeometry,
    "curvlinops": kronecker_peers.curvlinops,
    "kronfluence": kronfluence_peer.kronfluence,
}


def installed() -> list[str]:
    """Return the libraries that can be asked."""
    return [n for n in LIBRARIES if n == "fisherfn" or PEERS[n].version is not None]


def _matrix(x: Tensor) -> Tensor:
    """Return a factor `[groups, n, n]`, or `[n, n]` where there is one group."""
    full = x if x.dim() == 3 else x.diag_embed()
    return full[0] if len(full) == 1 else full
