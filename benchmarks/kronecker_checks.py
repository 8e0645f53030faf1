"""Is what another library says about Kronecker blocks right? Its scale may sit in either factor."""

from __future__ import annotations

import torch

from benchmarks import kronecker, oracle
from benchmarks.oracle import Values
from benchmarks.workloads import Workload

WEIGHT, BIAS = ".weight", ".bias"


def comparable(got: Values, wanted: Values) -> tuple[Values, Values]:
    """Return what a peer has and what it should be, both without a choice of scale.

    Args:
        got: Factors, or bases and scales, as in `kronecker_peers`.
        wanted: What `kronecker.factors`, or `kronecker.traces`, says.

    Returns:
        Factors of which the first has norm one; the trace of each block; and diagonals. Blocks that
        the peer does not have are left out.
    """
    have: Values = {k: x for k, x in got.items() if k.startswith("rest/")}
    want: Values = {k: wanted[k] for k in have}
    for name in _blocks(got, "A/"):
        weight = name.removesuffix(BIAS).removesuffix(WEIGHT) + WEIGHT
        A, G = wanted[f"A/{weight}"], wanted[f"G/{weight}"]
        if name != weight:
            A = A[-1:, -1:]
        elif A.dim() == 1 and got[f"A/{name}"].dim() == 2:
            A = A.diag()
        elif f"A/{name.removesuffix(WEIGHT)}{BIAS}" in got:
            A = A[:-1, :-1]
        for values, (a, g) in ((have, (got[f"A/{name}"], got[f"G/{name}"])), (want, (A, G))):
            norm = torch.linalg.vector_norm(a.double())
            values[f"A/{name}"], values[f"G/{name}"] = a / norm, g * norm
    for name in _blocks(got, "S/"):
        trace = f"trace/{name.removesuffix(BIAS).removesuffix(WEIGHT)}{WEIGHT}"
        have[trace] = have.get(trace, 0) + got[f"S/{name}"].sum()
        want[trace] = wanted[trace]
    return have, want


def traces(got: Values) -> dict[str, float]:
    """Return the trace of what a peer has for each layer, weight and bias together."""
    found: dict[str, float] = {}
    for name in _blocks(got, "A/"):
        layer = name.removesuffix(BIAS).removesuffix(WEIGHT)
        trace = float(got[f"A/{name}"].trace() * got[f"G/{name}"].trace())
        found[layer] = found.get(layer, 0.0) + trace
    for name in _blocks(got, "S/"):
        layer = name.removesuffix(BIAS).removesuffix(WEIGHT)
        found[layer] = found.get(layer, 0.0) + float(got[f"S/{name}"].sum())
    return found


def drawn_traces(
    workload: Workload, structure: str, draws: int, seed: int
) -> list[dict[str, float]]:
    """Return what `traces` should say, for labels drawn here."""
    found: list[dict[str, float]] = []
    for targets in oracle.drawn_labels(workload, draws, seed):
        if structure == "kfac":
            found.append(kronecker.factor_traces(workload, targets))
            continue
        known = kronecker.traces(workload, targets).items()
        found.append(
            {
                name.removeprefix("trace/").removesuffix(WEIGHT): float(x)
                for name, x in known
                if name.startswith("trace/")
            }
        )
    return found


def left_out(workload: Workload, got: Values) -> str:
    """Say how much of the model a peer says nothing about; nothing if it is complete."""
    params = dict(workload.module.named_parameters())
    covered = {k.removeprefix("rest/") for k in got if k.startswith("rest/")}
    for name in _blocks(got, "A/") | _blocks(got, "S/"):
        covered.add(name)
        width = got[f"A/{name}"].shape[-1] if f"A/{name}" in got else got[f"S/{name}"].shape[-1]
        if name.endswith(WEIGHT) and name in params and width > params[name][0].numel():
            covered.add(name.removesuffix(WEIGHT) + BIAS)
    missing = [name for name in params if name not in covered]
    entries = sum(params[name].numel() for name in missing)
    if not missing:
        return ""
    share = entries / sum(p.numel() for p in params.values())
    return f"without {len(missing)} of {len(params)} tensors, {share:.0%} of the parameters"


def _blocks(got: Values, prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in got if name.startswith(prefix)}


def is_kronecker(quantity: str) -> bool:
    """Whether a quantity is one of these."""
    return quantity.partition("/")[0] in ("kfac", "ekfac")
