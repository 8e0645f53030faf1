"""Inverses over several processes: each decomposes the factors of some layers, and all get all.

Every rank has the same averaged factors (`ff.distributed.all_reduce` makes them so). The blocks are
dealt out by the cost of their decompositions, the most expensive first, each to the rank with the
least to do so far. Then every rank sends what it found to the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfn.core.errors import UnsupportedError
from fisherfn.curvature import EKFAC, KFAC, Curvature
from fisherfn.curvature.kronecker import Block
from fisherfn.optim.inverse import Inverse, invert

_FIELDS = ("scales", "output_basis", "input_basis")


def sharded_inverse(matrix: Curvature, *, group: Any = None) -> Inverse:
    """Factorise a curvature matrix together with the other ranks, layer by layer.

    Pass it as `natural_gradient(..., invert=functools.partial(sharded_inverse, group=group))`; all
    ranks have to call it at the same steps, with equal matrices. An estimator whose results all
    ranks share is `lambda *a, **k: ff.distributed.all_reduce(fim(*a, **k))`.

    Args:
        matrix: A `KFAC`; any other curvature is factorised by every rank for itself.
        group: Process group; None is the default group.

    Returns:
        The same as `optim.invert` gives, to the last bit on all ranks.

    Raises:
        UnsupportedError: There is no process group.

    Cost: about 1/R of the eigendecompositions for R ranks, and one broadcast of each rank's bases.

    Reference: Osawa et al. (2019), Large-scale distributed second-order optimization using
    Kronecker-factored approximate curvature, section 4.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise UnsupportedError(
            "optim.sharded_inverse: expected a process group, got none. Call "
            "torch.distributed.init_process_group first, or use optim.invert."
        )
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if not isinstance(matrix, KFAC) or world == 1:
        return invert(matrix)
    owners = dealt(matrix.blocks, world)
    mine = _part(matrix, [b for b in matrix.blocks if owners[b.name] == rank]).eigh()
    # in the memory layout in which the others get it: products of another one round differently
    found = {
        field: {name: x.contiguous() for name, x in getattr(mine, field).items()}
        for field in _FIELDS
    }
    device = matrix.count.device
    for field, name, tensor in _exchanged(found, rank, world, group, device):
        found[field][name] = tensor
    scales, outputs, inputs = [
        {b.name: found[field][b.name] for b in matrix.blocks if b.name in found[field]}
        for field in _FIELDS
    ]
    whole = EKFAC(
        scales,
        outputs,
        inputs,
        matrix.rest,
        matrix.count,
        matrix.layout,
        matrix.blocks,
        "factors",
        fisher=matrix.fisher,
        unit=matrix.unit,
    )
    return Inverse(whole, None)


def dealt(blocks: tuple[Block, ...], world: int) -> dict[str, int]:
    """Return the rank that decomposes each block; blocks of one tensor stay together."""
    together: list[list[Block]] = []
    for b in blocks:
        paths = set(b.paths())
        joined = [g for g in together if paths & {p for other in g for p in other.paths()}]
        together = [g for g in together if g not in joined]
        together.append([other for g in joined for other in g] + [b])
    costs = [(sum([b.groups * (b.outputs**3 + b.inputs**3) for b in g]), g) for g in together]
    load, owners = [0] * world, {}
    for cost, members in sorted(costs, key=lambda pair: (-pair[0], pair[1][0].name)):
        rank = load.index(min(load))
        load[rank] += cost
        owners.update({b.name: rank for b in members})
    return owners


def _part(matrix: KFAC, blocks: list[Block]) -> KFAC:
    """Return the matrix of some blocks, with a diagonal of zeros in the place of the others."""
    names = {b.name for b in blocks}
    covered = {path for b in blocks for path in b.paths()}
    zero = torch.zeros((), device=matrix.count.device)
    rest = {
        path: matrix.rest.get(path, zero.expand(shape))
        for path, shape in zip(matrix.layout.paths, matrix.layout.shapes, strict=True)
        if path not in covered
    }
    fields: dict[str, Any] = {
        name: {k: x for k, x in getattr(matrix, name).items() if k in names}
        for name in ("inputs", "outputs", "rows")
    }
    return replace(matrix, blocks=tuple(blocks), rest=rest, **fields)


def _exchanged(
    found: dict[str, dict[str, Tensor]], rank: int, world: int, group: Any, device: torch.device
) -> list[tuple[str, str, Tensor]]:
    """Send this rank's tensors to all others, and return theirs with field and name."""
    own = [(field, name, x) for field, part in found.items() for name, x in part.items()]
    described: list[Any] = [None] * world
    dist.all_gather_object(described, [(f, n, tuple(x.shape), x.dtype) for f, n, x in own], group)
    received = []
    team: Any = dist.group.WORLD if group is None else group
    for source, entries in enumerate(described):
        for dtype in sorted({dtype for *_, dtype in entries}, key=str):
            wanted = [entry for entry in entries if entry[3] == dtype]
            sizes = [torch.Size(shape).numel() for _, _, shape, _ in wanted]
            if source == rank:
                flat = torch.cat([x.reshape(-1) for _, _, x in own if x.dtype == dtype])
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            dist.broadcast(flat, dist.get_global_rank(team, source), group)
            if source != rank:
                for (field, name, shape, _), piece in zip(wanted, flat.split(sizes), strict=True):
                    received.append((field, name, piece.reshape(shape)))
    return received
