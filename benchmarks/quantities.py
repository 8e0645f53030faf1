"""What is measured of a workload: its own gradient, and the quantities of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fisherfn as ff
from benchmarks import kronecker, oracle
from benchmarks.oracle import Values
from benchmarks.peers import PEERS, Prepared
from benchmarks.workloads import Workload

MAX_RESULT_BYTES = 3 * 2**30  # larger results are reported as skipped
MAX_EXACT_COLUMNS = 100


@dataclass(frozen=True)
class Quantity:
    """One estimator and the definition that it must agree with.

    Attributes:
        make: Builds the estimator from model and likelihood.
        oracle: The definition, for given targets.
        values: Reads a result as values that can be compared.
        random: Whether it draws labels, and so needs a key.
        based: Whether it is timed in the basis of an earlier result of its own.
    """

    make: Callable[..., Any]
    oracle: Callable[[Workload, Tensor], Values]
    values: Callable[[Any], Values]
    random: bool = False
    based: bool = False

    def reason_to_skip(self, workload: Workload) -> str | None:
        """Say why this workload is not asked for the quantity, if it is not."""
        columns = workload.positions * (workload.classes - 1)
        if self.oracle is oracle.exact_diagonal and columns > MAX_EXACT_COLUMNS:
            return f"{columns} columns for each example"
        size = 4 * workload.examples * workload.sizes["parameters"]
        if self.oracle is oracle.per_sample_gradients and size > MAX_RESULT_BYTES:
            return f"the result takes {size / 2**30:.1f} GiB"
        return None


def _diagonal(fisher: str) -> Callable[..., Any]:
    return lambda model, likelihood: ff.diagonal(model, likelihood, fisher=fisher)


def _kronecker(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, likelihood, **options: make(model, likelihood, fisher="mc", **options)


def _moments(result: Any) -> Values:
    return {
        **{f"mean/{name}": t for name, t in result.mean.items()},
        **{f"square/{name}": t for name, t in result.square.items()},
    }


def groups(module: torch.nn.Module) -> dict[str, ff.groups.GroupSpec]:
    """Return channels, heads, rows and elements of a workload's model."""
    rules = [  # of `models.GPT`, whose attention is no module of torch's
        (r"blocks\.\d+\.qkv\.weight$", lambda t: ff.groups.heads(t.shape, 4, layout="qkv")),
        (r"blocks\.\d+\.out\.weight$", lambda t: ff.groups.heads(t.shape, 4, axis=1)),
    ]
    return dict(ff.groups.infer(dict(module.named_parameters()), module, rules=rules))


def _grouped(fisher: str) -> Callable[..., Any]:
    return lambda model, likelihood: ff.grouped(
        model, likelihood, groups(model.module), fisher=fisher
    )


def _group_sums(workload: Workload, targets: Tensor) -> Values:
    """Add up the oracle's diagonal over each group, by the group of each entry."""
    found = {}
    for name, values in oracle.diagonal(workload, targets).items():
        spec = groups(workload.module)[name]
        index = torch.as_tensor(spec.index(), device=values.device).expand(values.shape)
        total = values.new_zeros(spec.num_groups)
        found[name] = total.index_add(0, index.reshape(-1), values.reshape(-1))
    return found


QUANTITIES = {
    "diagonal/mc": Quantity(_diagonal("mc"), oracle.diagonal, lambda r: r.values, random=True),
    "diagonal/empirical": Quantity(_diagonal("empirical"), oracle.diagonal, lambda r: r.values),
    "grouped/mc": Quantity(_grouped("mc"), _group_sums, lambda r: r.values, random=True),
    "grouped/empirical": Quantity(_grouped("empirical"), _group_sums, lambda r: r.values),
    "diagonal/exact": Quantity(_diagonal("exact"), oracle.exact_diagonal, lambda r: r.values),
    "per_sample_gradients": Quantity(
        ff.per_sample_gradients, oracle.per_sample_gradients, lambda r: r
    ),
    "score_norms": Quantity(ff.score_norms, oracle.norms, lambda r: {"norms": r}),
    "score_gram": Quantity(ff.score_gram, oracle.gram, lambda r: {"gram": r}),
    "gradient_moments": Quantity(ff.gradient_moments, oracle.moments, _moments),
    "kfac/mc": Quantity(_kronecker(ff.kfac), kronecker.factors, kronecker.factor_values, True),
    "ekfac/mc": Quantity(_kronecker(ff.ekfac), kronecker.traces, kronecker.trace_values, True),
    "ekfac scales/mc": Quantity(
        _kronecker(ff.ekfac), kronecker.traces, kronecker.trace_values, True, based=True
    ),
}


@dataclass(frozen=True)
class Case:
    """Who computes what: one row of a table."""

    source: str  # "gradient", "fisherfn" or a peer
    quantity: str
    compiled: bool = False


GRADIENT = Case("gradient", "gradient")


def prepare(workload: Workload, case: Case) -> Prepared:
    """Return the call that a case times, ready to be run."""
    if case.source == "gradient":
        run = _gradient(workload, case.compiled)
        return Prepared(run, lambda _: {}, workload.module.zero_grad)
    if case.source != "fisherfn":
        return PEERS[case.source].prepare(workload, case.quantity)
    quantity = QUANTITIES[case.quantity]
    return Prepared(_estimate(workload, quantity, case.compiled), quantity.values)


def labels_used(workload: Workload, quantity: str) -> Tensor:
    """Return the labels that the library scores: those of the batch, or those that it draws."""
    if not QUANTITIES[quantity].random:
        return workload.batch.targets
    with torch.no_grad():
        outputs = workload.logits(workload.module, workload.batch.inputs)
    ids = torch.arange(workload.examples, device=workload.device)
    keys = ff.random.fold_in(ff.random.fold_in(_key(workload), ids), 0)  # example, then draw
    return ff.likelihoods.categorical().sample(outputs, keys)


def _estimate(workload: Workload, quantity: Quantity, compiled: bool) -> Callable[[], Any]:
    model, params, buffers = ff.functional(workload.module)
    keywords = {"key": _key(workload)} if quantity.random else {}
    estimator = quantity.make(model, ff.likelihoods.categorical())
    if quantity.based:
        first = estimator(params, buffers, workload.batch, **keywords)
        estimator = quantity.make(model, ff.likelihoods.categorical(), basis=first)
    if compiled:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 64  # all callable objects count as one function
        estimator = torch.compile(estimator, fullgraph=True)
    return lambda: estimator(params, buffers, workload.batch, **keywords)


def _key(workload: Workload) -> Tensor:
    return ff.random.key(0, device=workload.device)


def _gradient(workload: Workload, compiled: bool) -> Callable[[], None]:
    if not compiled:
        return workload.gradient()
    module = torch.compile(workload.module)
    params = list(workload.module.parameters())

    def run() -> None:
        for p in params:
            p.grad = None
        workload.loss(module).backward()

    return run
