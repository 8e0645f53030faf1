"""Is the value right? Checked before anything is timed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import kronecker, kronecker_checks, oracle
from benchmarks.oracle import Values
from benchmarks.prepared import NotOffered, Prepared
from benchmarks.quantities import QUANTITIES, Case, labels_used, prepare
from benchmarks.report import MAX_ERROR, MAX_ROUNDING, MAX_Z, Row
from benchmarks.workloads import Workload

DRAWS = 30
BLOCK_DRAWS = 6  # of a peer, each of which may take many eigendecompositions
OBSERVED = "diagonal/empirical"


class Checks:
    """Comparisons of one workload with its oracles, each of which is computed once.

    The method is compared in float64, where nothing but its mathematics can differ, and the timed
    float32 result with a wider tolerance.
    """

    def __init__(self, workload: Workload) -> None:
        """Start with nothing computed."""
        self.workload = workload
        self.double = workload.double()
        self._traces: list[float] | None = None
        self._block_traces: dict[str, list[dict[str, float]]] = {}
        self._all_labels: Values | None = None
        self._known: tuple[str, dict[bytes, Values]] = ("", {})

    def check(self, case: Case, prepared: Prepared, result: Any, row: Row) -> None:
        """Fill in error, rounding and agreement of a case, given the result that is timed."""
        if case.source != "fisherfn" and QUANTITIES[case.quantity].random:
            self._own_labels(case, prepared, row)
            return
        labels = timed_labels = self.workload.batch.targets
        if case.source == "fisherfn":  # what it draws depends on the dtype where it is close
            labels = labels_used(self.double, case.quantity)
            timed_labels = labels_used(self.workload, case.quantity)
        values = self._in_double(Case(case.source, case.quantity))
        row.error = oracle.worst_error(values, self._oracle(case.quantity, labels))
        wanted = self._oracle(case.quantity, timed_labels)
        row.rounding = oracle.distance(prepared.values(result), wanted)
        most = MAX_ERROR if self.workload.smooth else MAX_ROUNDING
        row.agrees = row.error <= MAX_ERROR and row.rounding <= most

    def _oracle(self, quantity: str, labels: Tensor) -> Values:
        name, known = self._known
        if name != quantity:  # the values are large: those of one quantity are kept at a time
            known = {}
            self._known = (quantity, known)
        content = labels.cpu().numpy().tobytes()
        if content not in known:
            known[content] = QUANTITIES[quantity].oracle(self.double, labels)
        return known[content]

    def _own_labels(self, case: Case, prepared: Prepared, row: Row) -> None:
        """Compare the mean trace of several draws, and the same method on known labels.

        The labels that a peer draws are not known. The mean trace finds wrong scales, but a wrong
        contraction can leave it right; known labels show that.
        """
        if kronecker_checks.is_kronecker(case.quantity):
            self._own_blocks(case, prepared, row)
            return
        if self._traces is None:
            self._traces = oracle.drawn_traces(self.double, DRAWS, seed=1)
        got = [oracle.trace(prepared.values(prepared.run())) for _ in range(DRAWS)]
        row.z = _z(got, self._traces)
        values = self._in_double(Case(case.source, OBSERVED))
        row.error = oracle.worst_error(values, self._oracle(OBSERVED, self.workload.batch.targets))
        row.agrees = abs(row.z) < MAX_Z and row.error <= MAX_ERROR

    def _own_blocks(self, case: Case, prepared: Prepared, row: Row) -> None:
        """Do the same for Kronecker blocks, in as far as the peer has them."""
        structure = case.quantity.partition("/")[0]
        if structure not in self._block_traces:
            drawn = kronecker_checks.drawn_traces(self.double, structure, DRAWS, seed=1)
            self._block_traces[structure] = drawn
        runs = (prepared.run() for _ in range(BLOCK_DRAWS))
        found = [kronecker_checks.traces(prepared.values(run)) for run in runs]
        wanted = [[each[name] for name in found[0]] for each in self._block_traces[structure]]
        row.z = _z([sum(each.values()) for each in found], [sum(each) for each in wanted])
        values, labels = self._known_labels(case.source, structure)
        have, want = kronecker_checks.comparable(values, self._blocks(structure, labels))
        row.error = oracle.worst_error(have, want)
        row.agrees = abs(row.z) < MAX_Z and row.error <= MAX_ERROR
        row.message = kronecker_checks.left_out(self.workload, values)

    def _known_labels(self, source: str, structure: str) -> tuple[Values, Tensor | None]:
        """Return a peer's blocks for labels that are no draws, and these labels: None is all."""
        try:
            return self._in_double(Case(source, f"{structure}/empirical")), self._observed
        except NotOffered:
            return self._in_double(Case(source, f"{structure}/exact")), None

    def _blocks(self, structure: str, labels: Tensor | None) -> Values:
        if structure == "ekfac":
            return self._oracle("ekfac/mc", self._observed)
        if labels is not None:
            return self._oracle("kfac/mc", labels)
        if self._all_labels is None:
            self._all_labels = kronecker.factors(self.double, None)
        return self._all_labels

    @property
    def _observed(self) -> Tensor:
        return self.workload.batch.targets

    def _in_double(self, case: Case) -> Values:
        with _default_dtype(torch.float64):  # some peers build constants of the default dtype
            prepared = prepare(self.double, case)
            return prepared.values(prepared.run())


def _z(got: list[float], wanted: list[float]) -> float:
    """Return the difference of two means in its standard errors."""
    parts = [statistics.variance(x) / len(x) for x in (got, wanted)]
    return (statistics.mean(got) - statistics.mean(wanted)) / sum(parts) ** 0.5


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
