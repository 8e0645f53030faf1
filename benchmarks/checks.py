"""Is the value right? Checked before anything is timed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.oracle import Values
from benchmarks.peers import Prepared
from benchmarks.quantities import QUANTITIES, Case, labels_used, prepare
from benchmarks.report import MAX_ERROR, MAX_ROUNDING, MAX_Z, Row
from benchmarks.workloads import Workload

DRAWS = 30
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
        """Compare the mean trace of several draws, and the same method on the observed labels.

        The labels that a peer draws are not known. The mean trace finds wrong scales, but a wrong
        contraction can leave it right; the observed labels show that.
        """
        if self._traces is None:
            self._traces = oracle.drawn_traces(self.double, DRAWS, seed=1)
        got = [oracle.trace(prepared.values(prepared.run())) for _ in range(DRAWS)]
        spread = statistics.variance(got) / DRAWS + statistics.variance(self._traces) / DRAWS
        difference = statistics.mean(got) - statistics.mean(self._traces)
        row.z = z = difference / spread**0.5
        values = self._in_double(Case(case.source, OBSERVED))
        row.error = oracle.worst_error(values, self._oracle(OBSERVED, self.workload.batch.targets))
        row.agrees = abs(z) < MAX_Z and row.error <= MAX_ERROR

    def _in_double(self, case: Case) -> Values:
        with _default_dtype(torch.float64):  # some peers build constants of the default dtype
            prepared = prepare(self.double, case)
            return prepared.values(prepared.run())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
