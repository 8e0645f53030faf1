"""Measure matrix-vector products against an ordinary gradient of the same batch.

    python benchmarks/products.py                              MLP, CNN and GPT on the CPU
    python benchmarks/products.py --problem gpt --compile
    python benchmarks/products.py --output products.json

Each product, ours and those of other libraries that are installed (curvlinops, hessian-eigenthings,
PyHessian), is compared with the matrix's definition in float64 before it is timed. What another
library raises is reported in place of a time. The unit of every number is one eager
`loss.backward()`. A row without the name of a matrix is about the Fisher information.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import fisherfn as ff
from benchmarks import definitions, oracle
from benchmarks.product_peers import NOT_OFFERED, PRODUCT_PEERS, ProductPeer, attempt
from benchmarks.quantities import labels_used
from benchmarks.timing import interleaved, seconds
from benchmarks.workloads import Workload, build, train

BLOCK = 8
CHECKED = 2  # vectors of a block that are compared with the definition
GOALS = {"single": 2.5, "linearised": 1.3, "block of 8, a vector": 1.3, "compiled": 1.7}
Values = dict[str, Tensor]
Run = Callable[..., Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return 1 if a product of this library is wrong."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    found, wrong = {}, 0
    for problem in asked.problem:
        workload = build(problem, asked.device)
        train(workload, asked.training)
        rows = Measured(workload, asked).rows()
        found[problem] = rows
        print(f"{problem}: one gradient takes {1e3 * rows['gradient']['seconds']:.1f} ms")
        for name, row in rows.items():
            goal = f"  goal {GOALS[name]}" if name in GOALS else ""
            text = row.get("message") or f"{row['gradients']:6.2f} gradients"
            error = f"  error {row['error']:.1e}" if "error" in row else ""
            bad = row.get("error", 0.0) > asked.tolerance
            print(f"  {name:48} {text}{error}{'  WRONG' if bad else ''}{goal}", flush=True)
            wrong += bad and row["by"] == "fisherfn"
    if asked.output is not None:
        asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(wrong > 0)


class Measured:
    """The products of one workload: checked one by one, then timed round by round."""

    def __init__(self, workload: Workload, asked: argparse.Namespace) -> None:
        """Draw the vectors."""
        self.workload, self.asked = workload, asked
        self.params = {n: p.detach() for n, p in workload.module.named_parameters()}
        self.vectors = ff.tree.random_like(ff.random.split(ff.random.key(1), BLOCK), self.params)
        self.v = {name: t[0].clone() for name, t in self.vectors.items()}
        self.wanted: dict[str, Values] = {}
        self.runs: dict[str, Run] = {"gradient": workload.gradient()}
        self.found: dict[str, dict[str, Any]] = {"gradient": {"by": "torch"}}

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return errors and times of everything."""
        self._ours()
        if self.asked.peers:
            self._theirs()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the library were seen in its first call
            timings = interleaved(self.runs, self.workload.device, self.asked.repeats)
        unit = timings["gradient"].median
        for name, timing in timings.items():
            shared = BLOCK if f"block of {BLOCK}" in name else 1
            self.found[name]["seconds"] = timing.median / shared
            self.found[name]["gradients"] = timing.median / unit / shared
        return self.found

    def add(self, name: str, run: Run, error: Callable[[Any], float] | None = None) -> None:
        """Call a product of this library once, note its error, and keep it to be timed."""
        self.keep(name, "fisherfn", run, *self.first_call(run), error)

    def keep(
        self,
        name: str,
        by: str,
        run: Run,
        result: Any,
        first: float,
        error: Callable[[Any], float] | None,
    ) -> None:
        """Note the error of a result, and keep the call to be timed."""
        row = {"by": by, "first call": first}
        if error is not None:
            row["error"] = error(result)
        self.found[name], self.runs[name] = row, run

    def first_call(self, run: Run) -> tuple[Any, float]:
        """Return what a call gives and the seconds that it takes."""
        kept: list[Any] = []
        taken = seconds(lambda: kept.append(run()), self.workload.device)
        return kept[0], taken

    def want(self, matrix: str) -> Values:
        """Return the products with the first vectors by definition."""
        if matrix not in self.wanted:
            drawn = labels_used(self.workload, "diagonal/mc") if matrix == "mc" else None
            kind = "empirical" if matrix == "mc" else matrix
            first = {name: t[:CHECKED] for name, t in self.vectors.items()}
            self.wanted[matrix] = definitions.products(self.workload, kind, first, drawn)
        return self.wanted[matrix]

    def error(self, matrix: str) -> Callable[[Values], float]:
        """Return the function that gives the error of one product."""
        want = {name: t[0] for name, t in self.want(matrix).items()}
        return lambda got: oracle.distance(got, want)

    def block_error(self, matrix: str) -> Callable[[Values], float]:
        """Return the function that gives the error of a block of products."""
        want = self.want(matrix)
        return lambda got: oracle.distance({name: t[:CHECKED] for name, t in got.items()}, want)

    def _ours(self) -> None:
        model, params, buffers = ff.functional(self.workload.module)
        lik, batch, v = ff.likelihoods.categorical(), self.workload.batch, self.v
        key, add = ff.random.key(0, device=self.workload.device), self.add
        product = ff.fisher_vp(model, lik)
        add("single", lambda: product(params, buffers, batch, v), self.error("fisher"))
        sampled = ff.fisher_vp(model, lik, fisher="mc")
        add("single, mc", lambda: sampled(params, buffers, batch, v, key=key), self.error("mc"))
        observed = ff.empirical_vp(model, lik)
        add(
            "single, empirical",
            lambda: observed(params, buffers, batch, v),
            self.error("empirical"),
        )
        hessian = ff.hvp(model, lik)
        add("single, hessian", lambda: hessian(params, buffers, batch, v), self.error("hessian"))
        for matrix, of in (("fisher", ""), ("hessian", ", hessian")):
            bind = ff.linearized(model, lik, matrix=matrix)
            add(f"linearising{of}", lambda bind=bind: bind(params, buffers, batch))
            bound = bind(params, buffers, batch)
            add(f"linearised{of}", lambda bound=bound: bound(v), self.error(matrix))
            add(
                f"block of {BLOCK}{of}, a vector",
                lambda bound=bound: bound.block(self.vectors),
                self.block_error(matrix),
            )
        if self.asked.compile:
            fast = torch.compile(product, fullgraph=True)
            add("compiled", lambda: fast(params, buffers, batch, v), self.error("fisher"))

    def _theirs(self) -> None:
        for name, peer in PRODUCT_PEERS.items():
            for matrix in definitions.MATRICES if peer.version is not None else ():
                if not self._their_products(name, peer, matrix) and self.workload.positions > 1:
                    # what its users could do: take torch's plain kernel everywhere
                    self._their_products(name, peer, matrix, plain=True)

    def _their_products(
        self, by: str, peer: ProductPeer, matrix: str, *, plain: bool = False
    ) -> bool:
        """Check and keep the products with a matrix of another library; say whether all went."""
        of = "" if matrix == "fisher" else f", {matrix}"
        of += ", plain attention" if plain else ""
        prepare = quiet(lambda: peer.prepare(self.workload, matrix), plain)
        made, message = attempt(prepare)
        if made is None:
            self.found[f"{by}, single{of}"] = {"by": by, "message": message}
            return message.startswith(NOT_OFFERED)
        well = True

        def add(name: str, run: Run, values: Run, error: Callable[[Any], float] | None) -> None:
            nonlocal well
            run = quiet(run, plain)

            def call() -> tuple[Any, float]:
                result, taken = self.first_call(run)
                return values(result), taken

            found, message = attempt(call)
            if found is None:
                self.found[f"{by}, {name}"] = {"by": by, "message": message}
                well = False
            else:
                self.keep(f"{by}, {name}", by, run, found[0], found[1], error)

        if made.linearise is not None:
            add(f"linearising{of}", made.linearise, lambda _: None, None)
        kind = "single" if made.linearise is None else "linearised"
        add(f"{kind}{of}", lambda: made.multiply(self.v), made.values, self.error(matrix))
        if made.block is not None:
            block, error = made.block, self.block_error(matrix)
            name = f"block of {BLOCK}{of}, a vector"
            add(name, lambda: block(self.vectors), made.block_values, error)
        return well


def quiet(run: Run, plain: bool) -> Run:
    """Return a call without the warnings of other libraries, by plain attention if asked to."""

    def call() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with definitions.plain_attention() if plain else nullcontext():
                return run()

    return call


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--problem", nargs="+", default=["mlp", "cnn", "gpt"], help="of benchmarks/workloads.py")
    add("--device", default="cpu", help="cpu or cuda")
    add("--compile", action="store_true", help="measure under torch.compile(fullgraph=True) too")
    add("--training", type=int, default=0, help="steps of training before")
    add("--no-peers", dest="peers", action="store_false", help="measure this library only")
    add("--repeats", type=int, default=9, help="rounds of timing")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add("--tolerance", type=float, default=1e-3, help="largest relative error of a product")
    add("--output", type=Path, help="where to write the numbers, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
