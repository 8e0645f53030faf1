"""The exact result on the data of all ranks, on every rank.

Results are averages, so with N_r units on rank r the sum over ranks is Σ_r (N_r/N) F_r, and what
goes over the wire is one all-reduce of their entries. States add in the same way with their weights
(`ema`, `window`) and with the spread between ranks (`welford`). Representations that do not add
entry by entry (bases, rows) are gathered and merged one after the other, in the order of the ranks.
Kronecker factors add like entries: outputs with the shares of the units, inputs with those of the
rows that they are averages over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.core import merging, trees
from fisherfn.core.errors import OptionError, UnsupportedError
from fisherfn.curvature import KFAC, BlockDiagonal, Dense, Diagonal, GradientMoments, Result
from fisherfn.distributed import agree
from fisherfn.distributed.wire import Wire, cut
from fisherfn.io.structure import dtype_named, read
from fisherfn.states import (
    AccumulateState,
    EmaState,
    EveryState,
    WelfordState,
    WindowState,
)
from fisherfn.states import transform as kinds
from fisherfn.states.welford import entries


class Reduced(NamedTuple):
    """The result on the data of all ranks, and what it took to get it."""

    value: Any
    bytes: int  # payload that this rank sent
    full_bytes: int  # the same without triangles and narrow dtypes
    error: float  # bound of ‖error‖/‖value‖ over all tensors that were sent in a narrow dtype


def all_reduce(
    obj: Any,
    *,
    group: Any = None,
    sharded: bool = False,
    triangular: bool = False,
    dtype: torch.dtype | None = None,
) -> Any:
    """Return the exact result on the data of all ranks; every rank has to call it.

    Args:
        obj: What `ff.merge` takes: a result, a state, or a dict, list or tuple of them. None on a
            rank that has no data.
        group: Process group; None is the default group.
        sharded: Leave each rank only its rows (the first axis of every leaf, cut as FSDP2's
            `Shard(0)` cuts parameters), for trees like the parameters. `unshard` undoes it.
        triangular: Send symmetric matrices as triangles: half the bytes, the same result.
        dtype: Send entries rounded to this, for instance `torch.bfloat16`; counts and weights never
            are. `reduce` reports the error.

    Returns:
        The same on every rank (with `sharded`, its rows).

    Raises:
        TreeMismatchError: Ranks hold different things, such as results of different models; raised
            on every rank, with the place.
        DataError: No rank has data.
        OptionError: Kinds or units differ, or `dtype` cannot be sent.
        UnsupportedError: There is no process group, or `obj` cannot be merged or cut into rows.

    Cost: one all-reduce of the size of `obj`; twice that for a spread. Bases and rows (`EKFAC`,
    `LowRank`, `KFAC`) are gathered, at that size times the number of ranks.
    """
    return reduce(obj, group=group, sharded=sharded, triangular=triangular, dtype=dtype).value


def reduce(
    obj: Any,
    *,
    group: Any = None,
    sharded: bool = False,
    triangular: bool = False,
    dtype: torch.dtype | None = None,
) -> Reduced:
    """Do what `all_reduce` does, and say what was sent and what was lost on the way.

    Args:
        obj: As for `all_reduce`.
        group: As for `all_reduce`.
        sharded: As for `all_reduce`.
        triangular: As for `all_reduce`.
        dtype: As for `all_reduce`.

    Returns:
        The value, the bytes that this rank sent, what they would have been, and a bound of the
        relative error, the same on every rank.

    Raises:
        TreeMismatchError: As for `all_reduce`.
        DataError: As for `all_reduce`.
        OptionError: As for `all_reduce`.
        UnsupportedError: As for `all_reduce`.
    """
    caller = "distributed.all_reduce"
    wire = Wire(caller, group, triangular, dtype)
    if sharded and dtype is not None:
        raise OptionError(
            f"{caller}: expected dtype=None with sharded=True, got {dtype}. Rows are added where "
            "they are sent, in their own dtype."
        )
    found, tensors = agree.exchange(caller, wire, obj)
    model = next(d for d in found if d is not None)
    like = obj if obj is not None else agree.empty(model, wire.device)
    if not _adds(like):
        if sharded:
            _refuse_rows(type(like).__name__)
        agree.check_same(caller, found, shapes=False)
        value = _gathered(wire, found, tensors)
    else:
        agree.check_same(caller, found)
        value = _Sum(wire, sharded).of(like)
    error = 0.0 if dtype is None else wire.error()
    return Reduced(value, wire.sent, wire.full, error)


class _Sum:
    """Adds one object over ranks, part by part."""

    def __init__(self, wire: Wire, sharded: bool) -> None:
        self.wire, self.sharded = wire, sharded

    def of(self, obj: Any) -> Any:
        """Return the object on the data of all ranks."""
        if obj is None:
            return None
        if isinstance(obj, Result):
            count = self.wire.scalar(obj.count)
            return replace(self._cell(obj, _share(obj.count, count)), count=count)
        if isinstance(obj, AccumulateState):
            counters = [self.wire.scalar(x) for x in obj[1:]]
            return AccumulateState(self.of(obj.result), *counters)
        if isinstance(obj, EmaState):
            weight = self.wire.scalar(obj.weight)
            mean = self._cells(obj.mean, _share(obj.weight, weight).unbind())
            return EmaState(mean, weight, self._latest(obj.updates))
        if isinstance(obj, WindowState):
            weights = self.wire.scalar(obj.weights)
            shares = _share(obj.weights, weights).unbind()
            kept = [
                self._cells(entry, [share] * len(kinds.flatten("all_reduce", entry)[0]))
                for entry, share in zip(obj.entries, shares, strict=True)
            ]
            return WindowState(tuple(kept), weights, self._latest(obj.updates))
        if isinstance(obj, WelfordState):
            return self._welford(obj)
        if isinstance(obj, EveryState):
            step, period = self._latest(obj.step), self._period(obj.period)
            return EveryState(step, period, self.of(obj.every), self.of(obj.otherwise))
        if isinstance(obj, dict):
            return type(obj)((key, self.of(x)) for key, x in obj.items())
        parts = [self.of(x) for x in obj]
        if hasattr(obj, "_fields"):
            return type(obj)(*parts)
        return parts if isinstance(obj, list) else tuple(parts)

    def _welford(self, state: WelfordState) -> WelfordState:
        """Add spreads within ranks to those between them."""
        count = self.wire.scalar(state.count)
        share = _share(state.count, count)
        cells, treedef = kinds.flatten("all_reduce", state.mean)
        whole = _Sum(self.wire, False)  # the spread between ranks needs all of the mean
        mean = treedef.unflatten([whole._cell(cell, share) for cell in cells])

        def spread(m2: Tensor, mine: Tensor, ours: Tensor) -> Tensor:
            apart = (mine.to(m2.dtype) - ours.to(m2.dtype)).square()
            return self._tensor(m2 + state.count.to(m2.dtype) * apart)

        m2 = trees.map(spread, state.m2, entries(state.mean), entries(mean))
        if self.sharded:
            mean = trees.map(self._rows, mean)
        return WelfordState(
            count,
            self.wire.scalar(state.updates),
            self.wire.scalar(state.weight_sq),
            mean,
            m2,
        )

    def _cells(self, tree: Any, shares: Any) -> Any:
        cells, treedef = kinds.flatten("all_reduce", tree)
        return treedef.unflatten([self._cell(c, s) for c, s in zip(cells, shares, strict=True)])

    def _cell(self, cell: Any, share: Tensor) -> Any:
        """Return Σ_r share_r · cell_r, by the meaning of its fields."""
        if isinstance(cell, Tensor):
            return self._tensor(cell * share.to(cell.device, cell.dtype))
        if self.sharded and not isinstance(cell, Diagonal | GradientMoments):
            _refuse_rows(type(cell).__name__)
        if isinstance(cell, KFAC):
            return self._kfac(cell, share)
        symmetric = isinstance(cell, Dense | BlockDiagonal)
        changes: dict[str, Any] = {"count": self._worth(cell, share)}
        for name in cell._averages:
            changes[name] = trees.map(
                lambda x: self._tensor(x * share.to(x.device, x.dtype), symmetric),
                getattr(cell, name),
            )
        errors = getattr(cell, "stderr", None)
        if errors is not None:
            changes["stderr"] = trees.map(
                lambda x: self._tensor((x * share.to(x.device, x.dtype)).square()).sqrt(),
                errors,
            )
        return replace(cell, **changes)

    def _worth(self, cell: Any, share: Tensor) -> Tensor:
        """Return the units that an average with these shares is worth; see `joined_count`."""
        none = (share == 0) | (cell.count == 0)
        part = torch.where(none, 0.0, share.square() / torch.where(none, 1.0, cell.count))
        spread = self.wire.scalar(part)
        return torch.where(spread == 0, 0.0, 1.0 / torch.where(spread == 0, 1.0, spread))

    def _kfac(self, cell: KFAC, share: Tensor) -> KFAC:
        """Add factors; the rows of each rank count with its share of the units."""
        mine = cell._with_count(share)
        rows = {name: self.wire.scalar(n) for name, n in mine.rows.items()}
        inputs, outputs = {}, {}
        for b in cell.blocks:
            part = _share(mine.rows[b.name], rows[b.name])
            for factors, x, c, form in (
                (inputs, cell.inputs[b.name], part, b.input_form),
                (outputs, cell.outputs[b.name], share, b.output_form),
            ):
                factors[b.name] = self._tensor(x * c.to(x.device, x.dtype), form == "matrix")
        rest = {p: self._tensor(x * share.to(x.device, x.dtype)) for p, x in cell.rest.items()}
        count = self._worth(cell, share)
        rows = {name: n * count.to(n.device, n.dtype) for name, n in rows.items()}
        return replace(cell, inputs=inputs, outputs=outputs, rows=rows, rest=rest, count=count)

    def _tensor(self, x: Tensor, symmetric: bool = False) -> Tensor:
        return self.wire.shard(x) if self.sharded else self.wire.sum(x, symmetric)

    def _rows(self, x: Tensor) -> Tensor:
        return x if x.ndim == 0 else cut(x, self.wire.world)[self.wire.rank].clone()

    def _period(self, mine: Tensor) -> Tensor:
        """Return the period that all ranks share; one without data has 0."""
        found = self.wire.objects(int(mine))
        shared = {period for period in found if period}
        if len(shared) > 1:
            raise OptionError(
                f"distributed.all_reduce: expected states of one period, got {found} on the ranks. "
                "Make them with the same states.every(n, ...)."
            )
        return torch.full_like(mine, max(found))

    def _latest(self, steps: Tensor) -> Tensor:
        """Return the largest clock of all ranks."""
        found = [torch.tensor(x) for x in self.wire.objects(steps.tolist())]
        return torch.stack(found).amax(0).to(steps.device, steps.dtype)


def _share(mine: Tensor, total: Tensor) -> Tensor:
    """Return mine/total in float64; 0 where there is nothing."""
    none = total == 0
    safe = torch.where(none, torch.ones_like(total), total).double()
    return torch.where(none, 0.0, mine.double() / safe)


def _adds(obj: Any) -> bool:
    """Return whether everything in an object adds entry by entry."""
    if isinstance(obj, KFAC):
        return all("rows" not in (b.input_form, b.output_form) for b in obj.blocks)
    if isinstance(obj, Result):
        return obj._entrywise
    if isinstance(obj, dict):
        return all(map(_adds, obj.values()))
    if isinstance(obj, list | tuple):
        return all(map(_adds, obj))
    return obj is None or isinstance(obj, Tensor)


def _gathered(wire: Wire, found: list[Any], mine: dict[str, Tensor]) -> Any:
    """Return the merge of what all ranks hold, made by everybody in the same order."""
    names = list(next(d for d in found if d is not None).tensors)
    columns: list[dict[str, Tensor]] = [{} for _ in found]
    for name in names:
        shapes = [None if d is None else d.tensors[name][0] for d in found]
        example = next(d for d in found if d is not None).tensors[name]
        x = mine.get(name)
        if x is None:
            x = torch.zeros(0, dtype=dtype_named(example[1]), device=wire.device)
        for rank, part in enumerate(wire.every(x, shapes)):
            if part is not None:
                columns[rank][name] = part
    merged = None
    for description, tensors in zip(found, columns, strict=True):
        if description is None:
            continue
        part = read(description.content, tensors)
        merged = part if merged is None else merging.merge(merged, part)
    return merged


def _refuse_rows(name: str) -> None:
    raise UnsupportedError(
        f"distributed.all_reduce: expected trees like the parameters for sharded=True, got {name}. "
        "Leave it whole, or shard its diagonal()."
    )
