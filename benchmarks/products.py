"""Measure matrix-vector products against an ordinary gradient of the same batch.

    python benchmarks/products.py                              MLP, CNN and GPT on the CPU
    python benchmarks/products.py --problem gpt --compile
    python benchmarks/products.py --output products.json

Each product is first compared with one from `torch.func.jvp` and `vjp` in float64, attention by its
plain kernel. The unit of every number is one eager `loss.backward()`. curvlinops stands beside,
where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import fisherfn as ff
from benchmarks.timing import interleaved, seconds
from benchmarks.workloads import Workload, build

BLOCK = 8
GOALS = {"single": 2.5, "linearised": 1.3, "block of 8, a vector": 1.3, "compiled": 1.7}
Run = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return 1 if a product is wrong."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    found, wrong = {}, 0
    for problem in asked.problem:
        rows = measure(build(problem, asked.device), asked)
        found[problem] = rows
        print(f"{problem}: one gradient takes {1e3 * rows['gradient']['seconds']:.1f} ms")
        for name, row in rows.items():
            goal = f"  goal {GOALS[name]}" if name in GOALS else ""
            text = row.get("message") or f"{row['gradients']:6.2f} gradients"
            error = f"  error {row['error']:.1e}" if "error" in row else ""
            print(f"  {name:28} {text}{error}{goal}", flush=True)
            wrong += row.get("error", 0.0) > asked.tolerance
    if asked.output is not None:
        asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(wrong > 0)


def measure(workload: Workload, asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Check and time every way to a product."""
    model, params, buffers = ff.functional(workload.module)
    likelihood, batch = ff.likelihoods.categorical(), workload.batch
    vectors = ff.tree.random_like(ff.random.split(ff.random.key(1), BLOCK), params)
    v = {name: t[0].clone() for name, t in vectors.items()}
    want = reference(workload, v)
    product, key = ff.fisher_vp(model, likelihood), ff.random.key(0)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {"gradient": workload.gradient()}
    start: dict[str, float] = {}

    def add(name: str, run: Run, values: Callable[[Any], Any] | None = None) -> None:
        try:
            start[name] = seconds(run, workload.device)
            result = run()
        except Exception as error:  # what a peer cannot do is a result
            rows[name] = {"message": f"{type(error).__name__}: {error}".split("\n")[0][:90]}
            return
        rows[name] = {} if values is None else {"error": distance(values(result), want)}
        runs[name] = run

    add("single", lambda: product(params, buffers, batch, v), lambda r: r)
    sampled = ff.fisher_vp(model, likelihood, fisher="mc")
    add("single, mc", lambda: sampled(params, buffers, batch, v, key=key))
    hessian = ff.hvp(model, likelihood)
    add("single, hessian", lambda: hessian(params, buffers, batch, v))
    bind = ff.linearized(model, likelihood)
    add("linearising", lambda: bind(params, buffers, batch))
    bound = bind(params, buffers, batch)
    add("linearised", lambda: bound(v), lambda r: r)
    curved = ff.linearized(model, likelihood, matrix="hessian")(params, buffers, batch)
    add("linearised, hessian", lambda: curved(v))
    add(
        "block of 8, a vector",
        lambda: bound.block(vectors),
        lambda r: {name: t[0] for name, t in r.items()},
    )
    if asked.compile:
        fast = torch.compile(product, fullgraph=True)
        add("compiled", lambda: fast(params, buffers, batch, v), lambda r: r)
    peer(workload, v, vectors, add)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timings = interleaved(runs, workload.device, asked.repeats)
    unit = timings["gradient"].median
    for name, timing in timings.items():
        shared = BLOCK if "block of 8" in name else 1
        row = rows.setdefault(name, {})
        row["seconds"] = timing.median / shared
        row["gradients"] = timing.median / unit / shared
        if name in start:
            row["first call"] = start[name]
    return {"gradient": rows.pop("gradient"), **rows}


def peer(
    workload: Workload, v: dict[str, Tensor], vectors: dict[str, Tensor], add: Callable[..., None]
) -> None:
    """Add the products of curvlinops, if it is installed."""
    try:
        library = importlib.import_module("curvlinops")
    except ImportError:
        return
    params = dict(workload.module.named_parameters())
    targets = workload.batch.targets
    data = [(workload.batch.inputs, targets)]

    class Rows(nn.Module):
        """The module with one row of logits for each target."""

        def __init__(self) -> None:
            super().__init__()
            self.module = workload.module

        def forward(self, inputs: Tensor) -> Tensor:
            out = self.module(inputs)
            return out if out.dim() == 2 else out.movedim(-1, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = list(params.values())
        try:
            matrix = library.GGNLinearOperator(
                Rows(), nn.CrossEntropyLoss(), tensors, data, check_deterministic=False
            )
        except Exception:
            named = {f"module.{name}": p for name, p in params.items()}
            matrix = library.GGNLinearOperator(
                Rows(), nn.CrossEntropyLoss(), named, data, check_deterministic=False
            )
    # the loss averages over all targets, the product over examples
    positions = targets[0].numel()
    one = [v[name] for name in params]
    stack = [vectors[name].movedim(0, -1).contiguous() for name in params]

    def values(found: Any) -> dict[str, Tensor]:
        return {n: positions * t.detach() for n, t in zip(params, found, strict=True)}

    add("curvlinops, single", lambda: matrix @ one, values)
    add("curvlinops, block of 8, a vector", lambda: matrix @ stack)


def reference(workload: Workload, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Jᵀ H J v in float64 from plain torch."""
    wide = workload.double()
    params = {name: p.detach() for name, p in wide.module.named_parameters()}
    tangents = {name: t.double() for name, t in v.items()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(wide.module, params, (wide.batch.inputs,))

    with warnings.catch_warnings(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        warnings.simplefilter("ignore")
        pushed: Any = torch.func.jvp(outputs, (params,), (tangents,))
        z, dz = pushed
        p = z.softmax(-1)
        cotangent = p * (dz - (p * dz).sum(-1, keepdim=True)) / workload.examples
        found: Any = torch.func.vjp(outputs, params)
        return found[1](cotangent)[0]


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the relative error of the whole vector."""
    a = torch.cat([got[name].double().reshape(-1) for name in want])
    b = torch.cat([t.reshape(-1) for t in want.values()])
    return float((a - b).norm() / b.norm())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--problem", nargs="+", default=["mlp", "cnn", "gpt"], help="of benchmarks/workloads.py")
    add("--device", default="cpu", help="cpu or cuda")
    add("--compile", action="store_true", help="measure under torch.compile(fullgraph=True) too")
    add("--repeats", type=int, default=9, help="rounds of timing")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add("--tolerance", type=float, default=1e-3, help="largest relative error of a product")
    add("--output", type=Path, help="where to write the numbers, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
