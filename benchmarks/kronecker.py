"""Kronecker factors from their definition, and what solving with them costs.

    python benchmarks/kronecker.py --problem mlp cnn gpt

prints the seconds of the eigendecompositions beside those of bare `torch.linalg.eigh` calls on the
same factors, and of a solution with damping, in units of one eager gradient of the same batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherfn as ff
from benchmarks import oracle
from benchmarks.oracle import Values
from benchmarks.timing import interleaved
from benchmarks.workloads import BUILDERS, Workload, build

LAYERS = ("Linear", "Conv2d", "Embedding", "Conv1D")  # the last is Hugging Face's transposed linear


def factors(workload: Workload, targets: Tensor | None) -> Values:
    """Return A and G of every layer, and the exact diagonal of everything else.

    One example after the other; inputs and cotangents of a layer come from a hook on its module.
    Without targets, all labels count by their probability.
    """
    total: Values = {}
    rows: dict[str, float] = {}
    for name, a, columns in _rows(workload, targets):
        _add(total, f"A/{name}.weight", a.sum(0) if a.dtype == torch.int64 else a.T @ a)
        _add(total, f"G/{name}.weight", columns.T @ columns / workload.examples)
        rows[name] = rows.get(name, 0.0) + len(a)
    for name, many in rows.items():
        total[f"A/{name}.weight"] = total[f"A/{name}.weight"] / many
    blocked = {f"{name}.{kind}" for name in rows for kind in ("weight", "bias")}
    if targets is None:
        diagonal = oracle.exact_diagonal(workload, workload.batch.targets)
    else:
        diagonal = oracle.diagonal(workload, targets)
    return {**total, **{f"rest/{k}": x for k, x in diagonal.items() if k not in blocked}}


def factor_traces(workload: Workload, targets: Tensor) -> dict[str, float]:
    """Return tr A tr G of every layer, which needs no matrices."""
    inputs: dict[str, float] = {}
    outputs: dict[str, float] = {}
    rows: dict[str, int] = {}
    for name, a, columns in _rows(workload, targets):
        inputs[name] = inputs.get(name, 0.0) + float(a.square().sum())
        outputs[name] = outputs.get(name, 0.0) + float(columns.square().sum())
        rows[name] = rows.get(name, 0) + len(a)
    return {name: inputs[name] / rows[name] * outputs[name] / workload.examples for name in rows}


def factor_values(result: Any) -> Values:
    """Read a `KFAC` as values that can be compared."""
    return {
        **{f"A/{name}": x[0] for name, x in result.inputs.items()},
        **{f"G/{name}": x[0] for name, x in result.outputs.items()},
        **{f"rest/{path}": x for path, x in result.rest.items()},
    }


def traces(workload: Workload, targets: Tensor) -> Values:
    """Return the trace of every block, which no rotation changes, and the diagonal of the rest."""
    layers = _layers(workload.module)
    found = oracle.diagonal(workload, targets)
    values: Values = {}
    for name in layers:
        parts = [found.pop(f"{name}.{kind}", None) for kind in ("weight", "bias")]
        sums = [x.sum() for x in parts if x is not None]
        values[f"trace/{name}.weight"] = torch.stack(sums).sum()
    return {**values, **{f"rest/{k}": x for k, x in found.items()}}


def trace_values(result: Any) -> Values:
    """Read an `EKFAC` as values that can be compared; its scales are sums of squares."""
    parts = {b.name: result._parts(b, result.scales[b.name]) for b in result.blocks}
    traces = {
        f"trace/{name}": torch.stack([x.sum() * many for x, many in found]).sum()
        for name, found in parts.items()
    }
    return {**traces, **{f"rest/{path}": x for path, x in result.rest.items()}}


def _rows(workload: Workload, targets: Tensor | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield inputs and cotangents of every layer at its rows, one example after the other."""
    layers = _layers(workload.module)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [m.register_forward_hook(_remember(seen, name)) for name, m in layers.items()]
    for n in range(workload.examples):
        inputs = workload.batch.inputs[n : n + 1]
        log_p = workload.logits(workload.module, inputs)[0].log_softmax(-1)
        keep = None if workload.batch.mask is None else workload.batch.mask[n]
        g: list[list[Tensor]] = []
        for score, p in _scores(log_p, keep, None if targets is None else targets[n]):
            got = torch.autograd.grad(score, [seen[m][1] for m in layers], retain_graph=True)
            g.append([x * p**0.5 for x in got])
        for i, (name, layer) in enumerate(layers.items()):
            columns = torch.cat([_columns(layer, draw[i]) for draw in g])
            yield name, _inputs(layer, seen[name][0].detach(), keep), columns
    for handle in handles:
        handle.remove()


def _scores(
    log_p: Tensor, keep: Tensor | None, label: Tensor | None
) -> Iterator[tuple[Tensor, float]]:
    """Yield log-probabilities of labels of one example, and the weights that the labels have."""
    if label is None:
        if log_p.dim() > 1:
            raise ValueError("factors: all labels are affordable for one position only")
        yield from ((log_p[c], float(log_p[c].detach().exp())) for c in range(len(log_p)))
        return
    picked = log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    yield (picked if keep is None else picked[keep]).sum(), 1.0


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a weight that no other layer has."""
    found = {name: m for name, m in module.named_modules() if type(m).__name__ in LAYERS}
    weights = [m.weight for m in found.values()]
    return {n: m for n, m in found.items() if sum(m.weight is w for w in weights) == 1}


def _remember(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        seen[name] = args[0], out

    return hook


def _inputs(layer: nn.Module, x: Tensor, keep: Tensor | None) -> Tensor:
    """Return the inputs of one example, a row for each place, with ones for the bias."""
    if isinstance(layer, nn.Embedding):
        rows = F.one_hot(x.reshape(-1), layer.num_embeddings)
    elif isinstance(layer, nn.Conv2d):
        cut = F.unfold(x, layer.kernel_size, layer.dilation, int(layer.padding[0]), layer.stride)
        rows = cut[0].T
    else:
        rows = x.reshape(-1, x.shape[-1])
    if keep is not None and keep.numel() == len(rows):
        rows = rows[keep.reshape(-1)]
    if getattr(layer, "bias", None) is not None:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return rows


def _columns(layer: nn.Module, g: Tensor) -> Tensor:
    return g.flatten(2)[0].T if isinstance(layer, nn.Conv2d) else g.reshape(-1, g.shape[-1])


def _add(total: Values, name: str, term: Tensor) -> None:
    total[name] = total[name] + term if name in total else term


# ---- solving -------------------------------------------------------------------------------------


def measure(workload: Workload, repeats: int) -> dict[str, float]:
    """Return the medians in units of one eager gradient."""
    model, params, buffers = ff.functional(workload.module)
    fim = ff.kfac(model, ff.likelihoods.categorical(), fisher="mc")
    K = fim(params, buffers, workload.batch, key=ff.random.key(0, device=workload.device))
    E = K.eigh()
    unique = {id(x): x for x in (*K.inputs.values(), *K.outputs.values()) if x.dim() == 3}
    v = ff.tree.random_like(ff.random.key(1, device=workload.device), params)
    runs: dict[str, Callable[[], Any]] = {
        "gradient": workload.gradient(),
        "bare eigh": lambda: [torch.linalg.eigh(x) for x in unique.values()],
        "KFAC.eigh": K.eigh,
        "solve, decomposed": lambda: E.solve(v, damping=1e-3),
        "product": lambda: K.mv(v),
    }
    for run in runs.values():
        run()
    timings = interleaved(runs, workload.device, repeats)
    unit = timings["gradient"].median
    return {name: timing.median / unit for name, timing in timings.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of each problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", nargs="+", choices=list(BUILDERS), default=["mlp", "gpt"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args(arguments)
    for problem in asked.problem:
        found = measure(build(problem, asked.device), asked.repeats)
        print(problem, {name: round(x, 2) for name, x in found.items()}, flush=True)


if __name__ == "__main__":
    main()
