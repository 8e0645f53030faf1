"""Other libraries, asked for the same quantity of the same batch.

Each preparation does what its users would do once, and returns what they would call for each batch.
What a library has no function for is `NotOffered`; what it fails on is its own exception.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import diagonal_peers, kronecker_peers, kronfluence_peer
from benchmarks.prepared import NOT_THERE, Library, NotOffered, Prepared
from benchmarks.workloads import Workload

__all__ = ["PEERS", "NotOffered", "Peer", "Prepared"]

NO_DIAGONAL = "no deterministic diagonal; Hutchinson and XDiag estimate it, with error"

Prepare = Callable[[Workload, str], Prepared]


@dataclass(frozen=True)
class Peer(Library):
    """A library to compare with.

    Attributes:
        diagonals: Prepares diagonals and scores.
        kronecker: Prepares Kronecker factors and what is built from them.
    """

    diagonals: Prepare
    kronecker: Prepare

    def prepare(self, workload: Workload, quantity: str) -> Prepared:
        """Return the call that is timed, or raise `NotOffered`."""
        structure = quantity.partition("/")[0]
        return (self.kronecker if structure in ("kfac", "ekfac") else self.diagonals)(
            workload, quantity
        )


def _missing(workload: Workload, quantity: str) -> Prepared:
    raise NotOffered(NOT_THERE)


def _no_diagonal(workload: Workload, quantity: str) -> Prepared:
    importlib.import_module("curvlinops")
    raise NotOffered(NO_DIAGONAL if quantity.startswith("diagonal/") else NOT_THERE)


PEERS = {
    "vmap(grad)": Peer("torch", diagonal_peers.vmap_grad, _missing),
    "BackPACK": Peer("backpack-for-pytorch", diagonal_peers.backpack, kronecker_peers.backpack),
    "ASDL": Peer("asdfghjkl", diagonal_peers.asdl, kronecker_peers.asdl),
    "NNGeometry": Peer("nngeometry", diagonal_peers.nngeometry, kronecker_peers.nngeometry),
    "curvlinops": Peer("curvlinops-for-pytorch", _no_diagonal, kronecker_peers.curvlinops),
    "kronfluence": Peer("kronfluence", _missing, kronfluence_peer.kronfluence),
}
