"""Largest eigenvalues and traces beside hessian-eigenthings and PyHessian.

Two problems are matrices with known spectra that some implementations of Lanczos get wrong: of rank
one, where one eigenvalue is returned several times, and two eigenvalues above a cluster, likewise.
They are the Hessians of a quadratic form, so that every library can be asked. Elsewhere the truth
is that of the products in float64 of `benchmarks/definitions.py`, by ARPACK, and traces are exact:
those of the Fisher information by a loop over labels, and those of the Hessian of a piecewise
linear network are the same, since no layer's block has a second term. Other traces come from all
unit vectors, or from many random ones, with a standard error. Models are as they are initialised:
where they fit their data, the Hessian of the cross entropy in float32 has lost its digits, whatever
the method.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fisherfn as ff
from benchmarks import definitions, oracle, product_peers
from benchmarks.timing import seconds
from benchmarks.workloads import Workload, build

PROBLEMS = ("rank one", "cluster", "mlp", "cnn", "gpt")
SIZE, TOP, BUDGET, LONG_BUDGET = 200, 5, 30, 40
TRUTH_PRODUCTS, UNIT_VECTORS = 100, 3000
SPECTRA = {
    "rank one": [5.0] + [0.0] * (SIZE - 1),
    "cluster": [10.0, 9.0] + [1.0] * (SIZE - 2),
}
Row = dict[str, Any]


class Quadratic(nn.Module):
    """½ wᵀ A w, whose Hessian is A."""

    def __init__(self, matrix: Tensor) -> None:
        """Take A; w is random."""
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.w = nn.Parameter(ff.random.normal(ff.random.key(5), (len(matrix),), matrix.dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the value; inputs do not matter."""
        del inputs
        return self.w @ self.get_buffer("matrix") @ self.w / 2


@dataclass(frozen=True)
class Case:
    """One matrix: the truth, and how each library gets to products with it.

    Attributes:
        matrix: Its name.
        eigenvalues: The largest ones, descending.
        trace: The trace.
        stderr: The standard error of that.
        ours: Returns our operator and a tree like its vectors.
        eigenthings: Returns the operator of hessian-eigenthings.
        pyhessian: Returns the object of PyHessian, or None where it has no such matrix.
        scale: What the others' values are multiplied by: they average over targets.
        plain: Whether attention must use its plain kernel for the others to run.
    """

    matrix: str
    eigenvalues: Tensor
    trace: float
    stderr: float
    ours: Callable[[], tuple[Any, Any]]
    eigenthings: Callable[[], Any]
    pyhessian: Callable[[], Any] | None
    scale: float = 1.0
    plain: bool = False


def beside_peers(problem: str, device: str, seed: int) -> list[Row]:
    """Return what each method of each library gives, what it claims and what it costs.

    Args:
        problem: One of `SPECTRA`, or a workload.
        device: Where.
        seed: Of random vectors.

    Returns:
        Rows of `matrix`, `by`, `method`; `values` and their truth; `error`, relative, the largest
        of several; `claim`, the relative residual or standard error that is reported with them;
        `products`; `seconds`; or the `message` of an exception.
    """
    rows: list[Row] = []
    for case in _cases(problem, device):
        rows += [_row(case, *method) for method in _ours(case, seed)]
        with _fit_for_others(case):
            rows += [_row(case, *method) for method in _others(case, seed)]
    return rows


def _row(case: Case, by: str, method: str, run: Callable[[], Found]) -> Row:
    """Call a method and compare; of other libraries, what is raised is the result."""
    head = {"matrix": case.matrix, "by": by, "method": method}
    kept: list[Found] = []

    def timed() -> float:
        return seconds(lambda: kept.append(run()), case.eigenvalues.device)

    taken, message = (timed(), "") if by == "fisherfn" else product_peers.attempt(timed)
    if message:
        return {**head, "message": message}
    found = kept[0]
    truth = case.eigenvalues if len(found.values) > 1 else case.eigenvalues.new_tensor([case.trace])
    got = torch.tensor(found.values, dtype=torch.float64)
    largest = truth.abs().max()
    errors = (got - truth[: len(got)]).abs() / largest
    row = {**head, "values": found.values, "truth": truth.tolist(), "error": float(errors.max())}
    if found.claim is not None:
        row["claim"] = found.claim / float(largest)
    if len(found.values) == 1 and case.stderr > 0:
        row["stderr of truth"] = case.stderr / case.trace
    return {**row, "products": found.products, "seconds": taken}


@dataclass(frozen=True)
class Found:
    """What a method gives: values, its own claim about their error, and products."""

    values: list[float]
    claim: float | None
    products: int | None


# ---- methods -------------------------------------------------------------------------------------

Method = tuple[str, str, Callable[[], Found]]


def _ours(case: Case, seed: int) -> Iterator[Method]:
    key = ff.random.key(seed)

    def pairs(steps: int | None) -> Found:
        mv, like = case.ours()
        found = ff.linalg.lanczos(mv, like, k=TOP, key=key, max_steps=steps)
        return Found(found.eigenvalues.tolist(), float(found.residuals.max()), int(found.steps))

    def trace(method: str) -> Found:
        mv, like = case.ours()
        value, stderr = (e := getattr(ff.linalg, method)(mv, like, num_matvecs=BUDGET, key=key))
        return Found([float(value)], float(stderr), e.matvecs)

    yield "fisherfn", "eigenvalues, lanczos to 1e-5", lambda: pairs(None)
    yield "fisherfn", f"eigenvalues, lanczos, {LONG_BUDGET}", lambda: pairs(LONG_BUDGET)
    for method in ("hutchinson", "hutchpp", "xtrace"):
        yield "fisherfn", f"trace, {method}, {BUDGET}", lambda method=method: trace(method)


def _others(case: Case, seed: int) -> Iterator[Method]:
    if installed("hessian-eigenthings"):
        yield from _eigenthings(case, seed)
    if installed("pyhessian") and case.pyhessian is not None:
        yield from _pyhessian(case, case.pyhessian, seed)


def installed(distribution: str) -> bool:
    """Say whether a library is there."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _eigenthings(case: Case, seed: int) -> Iterator[Method]:
    library = importlib.import_module("hessian_eigenthings")

    def counted() -> tuple[Any, list[int]]:
        operator, calls = case.eigenthings(), []

        def multiply(v: Tensor) -> Tensor:
            calls.append(1)
            return operator.matvec(v).detach()

        place = {"device": operator.device, "dtype": operator.dtype}
        return library.LambdaOperator(multiply, size=operator.size, **place), calls

    def pairs(run: Callable[[Any], Any]) -> Found:
        operator, calls = counted()
        found = run(operator)
        values = [case.scale * float(v) for v in found.eigenvalues]
        return Found(values, case.scale * float(found.residuals.max()), len(calls))

    def trace(method: str) -> Found:
        operator, calls = counted()
        found = library.trace(operator, num_matvecs=BUDGET, method=method, seed=seed)
        return Found([case.scale * found.estimate], case.scale * found.stderr, len(calls))

    def lanczos(steps: int | None) -> Found:
        which = {"k": TOP, "which": "LA", "seed": seed}
        return pairs(lambda operator: library.lanczos(operator, max_iter=steps, **which))

    def power() -> Found:
        return pairs(lambda o: library.deflated_power_iteration(o, k=TOP, seed=seed))

    name = "hessian-eigenthings"
    yield name, "eigenvalues, lanczos, default", lambda: lanczos(None)
    yield name, f"eigenvalues, lanczos, {LONG_BUDGET}", lambda: lanczos(LONG_BUDGET)
    yield name, "eigenvalues, power iteration", power
    for method in ("hutchinson", "hutch++"):
        yield name, f"trace, {method}, {BUDGET}", lambda method=method: trace(method)


def _pyhessian(case: Case, make: Callable[[], Any], seed: int) -> Iterator[Method]:
    def run(call: Callable[[Any], tuple[list[float], float | None]]) -> Found:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # it draws from the global state
            held, calls = make(), []
            held.gradsH[0].register_hook(lambda grad: calls.append(1))
            values, claim = call(held)
        return Found([case.scale * v for v in values], claim, len(calls))

    def pairs(held: Any) -> tuple[list[float], None]:
        return sorted(held.eigenvalues(top_n=TOP)[0], reverse=True), None

    def trace(held: Any) -> tuple[list[float], None]:
        values = held.trace(maxIter=BUDGET)
        return [sum(values) / len(values)], None

    yield "PyHessian", "eigenvalues, power iteration", lambda: run(pairs)
    yield "PyHessian", f"trace, hutchinson, {BUDGET}", lambda: run(trace)


@contextmanager
def _fit_for_others(case: Case) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with definitions.plain_attention() if case.plain else nullcontext():
            yield


# ---- matrices ------------------------------------------------------------------------------------


def _cases(problem: str, device: str) -> Iterator[Case]:
    if problem in SPECTRA:
        yield _known(problem, SPECTRA[problem])
        return
    workload = build(problem, device)
    wide = workload.double()
    fisher_trace = None
    for matrix in ("fisher", "hessian"):
        multiply = definitions.operator(wide, matrix)
        top, size = _by_arpack(wide, multiply)
        if workload.positions == 1 and fisher_trace is None:
            fisher_trace = oracle.trace(oracle.exact_diagonal(wide, wide.batch.targets))
        linear = not workload.smooth or matrix == "fisher"
        if fisher_trace is not None and linear:
            trace, stderr = fisher_trace, 0.0
        else:
            trace, stderr = _trace(wide, multiply, size)
        yield Case(
            matrix,
            top,
            trace,
            stderr,
            ours=lambda matrix=matrix: _linearised(workload, matrix),
            eigenthings=lambda m=matrix: product_peers.eigenthings_operator(workload, m),
            pyhessian=(lambda: product_peers.pyhessian_hessian(workload))
            if matrix == "hessian"
            else None,
            scale=workload.positions,
            plain=workload.positions > 1,
        )


def _linearised(workload: Workload, matrix: str) -> tuple[Any, Any]:
    model, params, buffers = ff.functional(workload.module)
    make = ff.linearized(model, ff.likelihoods.categorical(), matrix=matrix)
    return make(params, buffers, workload.batch), params


def _by_arpack(wide: Workload, multiply: Callable[[Any], Any]) -> tuple[Tensor, int]:
    """Return the largest eigenvalues of a float64 product, and the dimensions."""
    sparse: Any = importlib.import_module("scipy.sparse.linalg")
    params = {name: p.detach() for name, p in wide.module.named_parameters()}
    vector, restore = ff.tree.ravel(params)

    def product(x: Any) -> Any:
        found = multiply(restore(torch.as_tensor(x.reshape(-1)).to(vector.device)))
        return ff.tree.ravel(found)[0].detach().cpu().numpy()

    size = len(vector)
    operator = sparse.LinearOperator((size, size), matvec=product, dtype="float64")
    values = sparse.eigsh(operator, k=TOP, which="LA", tol=1e-8, return_eigenvectors=False)
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64), size


def _trace(wide: Workload, multiply: Callable[[Any], Any], size: int) -> tuple[float, float]:
    """Return the trace of a float64 product: by unit vectors where these are few."""
    like = {name: p.detach() for name, p in wide.module.named_parameters()}
    if size > UNIT_VECTORS:
        found = ff.linalg.xtrace(multiply, like, num_matvecs=TRUTH_PRODUCTS, key=ff.random.key(11))
        return float(found.value), float(found.stderr)
    restore, total = ff.tree.ravel(like)[1], 0.0
    for unit in torch.eye(size, dtype=torch.float64, device=wide.device):
        total += float(unit @ ff.tree.ravel(multiply(restore(unit)))[0])
    return total, 0.0


def _known(name: str, spectrum: Sequence[float]) -> Case:
    """Return a matrix with these eigenvalues and random eigenvectors, in float32."""
    noise = ff.random.normal(ff.random.key(0), (SIZE, SIZE), torch.float64)
    q = torch.linalg.qr(noise)[0]
    matrix = ((q * torch.tensor(spectrum, dtype=torch.float64)) @ q.T).float()
    module, data = Quadratic((matrix + matrix.T) / 2), (torch.zeros(1), torch.zeros(1))

    def eigenthings() -> Any:
        library = importlib.import_module("hessian_eigenthings")
        return library.HessianOperator(module, [data], lambda model, batch: model(batch[0]))

    def pyhessian() -> Any:
        library = importlib.import_module("pyhessian")
        module.zero_grad()
        found = library.hessian(module, lambda value, _: value, data=data, cuda=False)
        module.zero_grad()
        return found

    return Case(
        name,
        torch.tensor(sorted(spectrum, reverse=True)[:TOP], dtype=torch.float64),
        float(sum(spectrum)),
        0.0,
        ours=lambda: (lambda v: module.get_buffer("matrix") @ v, module.w.detach()),
        eigenthings=eigenthings,
        pyhessian=pyhessian,
    )
