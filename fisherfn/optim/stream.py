"""Curvature as a stream: averaged over batches, and inverted every now and then.

The average is exponential and by meaning: Kronecker factors are averaged, not their products
(`ff.states.ema`). The steps at which it is updated and inverted are counted in the state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import random, trees
from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError, UnsupportedError
from fisherfn.core.modes import concrete, unmixed
from fisherfn.core.trees import Tree
from fisherfn.curvature import EKFAC, KFAC, Curvature, Layout, LowRank
from fisherfn.curvature.common import is_number
from fisherfn.curvature.implicit import Implicit
from fisherfn.estimators import opaque
from fisherfn.estimators.ekfac import ekfac
from fisherfn.estimators.estimator import Estimator, strip
from fisherfn.estimators.kfac import kfac
from fisherfn.estimators.products.fisher import Product
from fisherfn.estimators.together import statistics
from fisherfn.models import FunctionalModel
from fisherfn.optim.inverse import Inverse, invert
from fisherfn.optim.options import check_steps
from fisherfn.states import ema


class CurvatureState(NamedTuple):
    """What a stream of curvature remembers."""

    average: Any  # EmaState of the estimator's results; None before the first, or if decay is 0
    inverse: Any  # Inverse, as of the last refresh; None before the first batch


@dataclass(frozen=True)
class Stream:
    """An estimator, and when its results are averaged and inverted.

    Attributes:
        caller: The public function on whose behalf errors are raised.
        estimator: Called as `(params, buffers, batch, *, key)`, gives a curvature.
        decay: Of the average; 0 keeps the latest only.
        update_every: Steps between two estimates.
        invert_every: Steps between two inversions.
        invert: Makes an `Inverse` of a curvature.
    """

    caller: str
    estimator: Any
    decay: float
    update_every: int
    invert_every: int
    invert: Callable[[Any], Inverse]

    def init(self) -> CurvatureState:
        """Return the state before the first batch."""
        return CurvatureState(None, None)

    def update(
        self,
        state: CurvatureState,
        step: Tensor,
        params: Tree,
        buffers: Tree,
        batch: Batch | None,
        key: Tensor | None,
        refresh: bool | None = None,
    ) -> CurvatureState:
        """Return the state after one more step: with a new estimate or inverse, if they are due."""
        first = state.inverse is None
        if batch is None:
            if first:
                raise OptionError(
                    f"{self.caller}: expected batch= at the first step, got None. Pass the batch "
                    "that the gradients are of, or a part of it: update(grads, state, params, "
                    "buffers=buffers, batch=batch). For torchopt.chain, bind(batch=batch) does so."
                )
            return state
        self._check_key(key)
        if key is not None:
            key = random.fold_in(key, step.to(key.device))
        inverted, updated = self._now(step, first, refresh)
        if not self.decay:
            after = state if inverted is False else self._latest(params, buffers, batch, key)
            return after if isinstance(inverted, bool) else _choose(inverted, after, state)
        average = state.average
        if updated is not False:
            average = self._averaged(state, params, buffers, batch, key)
            if updated is not True:
                average = _choose(updated, average, state.average)
        after = CurvatureState(average, state.inverse)
        if inverted is False:
            return after
        fresh = after._replace(inverse=self.invert(average.mean))
        return fresh if inverted is True else _choose(inverted, fresh, after)

    def _now(self, step: Tensor, first: bool, refresh: Any) -> tuple[bool | Tensor, bool | Tensor]:
        """Return whether an inversion and an estimate are due."""
        if refresh is None:
            periods = self.invert_every, self.update_every
            inverted, updated = [True if first else _due(step, every) for every in periods]
            return inverted, updated
        if not isinstance(refresh, bool):
            raise OptionError(
                f"{self.caller}.update: expected refresh to be True, False or None, got "
                f"{refresh!r}. None leaves it to update_every and invert_every."
            )
        return first or refresh, first or refresh

    def _latest(self, params: Tree, buffers: Tree, batch: Batch, key: Any) -> CurvatureState:
        return CurvatureState(None, self.invert(self._estimate(params, buffers, batch, key)))

    def _estimate(self, params: Tree, buffers: Tree, batch: Batch, key: Tensor | None) -> Any:
        new = self.estimator(params, buffers, batch, key=key)
        if not isinstance(new, Curvature):
            raise OptionError(
                f"{self.caller}: expected an estimator of curvature, got one that gives "
                f"{type(new).__name__}. Use kfac, ekfac, diagonal, low_rank, dense or implicit."
            )
        if isinstance(new, Implicit) and self.decay:
            raise OptionError(
                f"{self.caller}: expected decay=0 for implicit, got {self.decay}. Products on all "
                "batches so far would be needed; set decay=0, or use low_rank or kfac."
            )
        return new

    def _averaged(
        self, state: CurvatureState, params: Tree, buffers: Tree, batch: Batch, key: Any
    ) -> Any:
        """Return the average with the estimate on one more batch in it."""
        return averaged(self.decay, state.average, self._estimate(params, buffers, batch, key))

    def _check_key(self, key: Any) -> None:
        fisher = getattr(self.estimator, "options", {}).get("fisher")
        if key is None and fisher in ("mc", "curvature_prop"):
            raise OptionError(
                f"{self.caller}: expected key= for fisher={fisher!r}, got None. Pass "
                "key=random.key(seed); the step is folded in, so one key serves all steps."
            )


@dataclass(frozen=True)
class EigenStream(Stream):
    """EKFAC: factors are averaged and give the basis, and scales are averaged in that basis.

    `average` is a pair: the average of the factors, and that of the scales since the last refresh
    of the basis. George et al. (2018), algorithm 1, with a running average of the scales.

    Attributes:
        parts: What the estimator consists of.
    """

    parts: Any

    def update(
        self,
        state: CurvatureState,
        step: Tensor,
        params: Tree,
        buffers: Tree,
        batch: Batch | None,
        key: Tensor | None,
        refresh: bool | None = None,
    ) -> CurvatureState:
        """Return the state after one more step: with new factors, basis or scales."""
        first = state.inverse is None
        if batch is None or not self.decay:
            return super().update(state, step, params, buffers, batch, key, refresh)
        self._check_key(key)
        inverted, updated = self._now(step, first, refresh)
        if not (isinstance(inverted, bool) and isinstance(updated, bool)):
            raise UnsupportedError(
                f"{self.caller}: expected refresh=True or False for ekfac where steps have no "
                "value (torch.compile, torch.vmap), got None. Compile one function for each."
            )
        if not (inverted or updated):
            return state
        if key is not None:
            key = random.fold_in(key, step.to(key.device))
        factors, scales = (None, None) if state.average is None else state.average
        if inverted:
            if updated:
                new = self.parts.factors(params, buffers, batch, key=key)
                factors = averaged(self.decay, factors, new)
            assert factors is not None
            basis = self.invert(factors.mean).matrix
            found = self.parts.scales(basis, params, buffers, batch, key)
            scales = averaged(self.decay, None, found)
        else:
            own = self.parts.estimator(state.inverse.matrix)
            both = statistics(factors=self.parts.factors, scales=own)
            found = both(params, buffers, batch, key=key)
            factors = averaged(self.decay, factors, found["factors"])
            scales = averaged(self.decay, scales, found["scales"])
        return CurvatureState((factors, scales), Inverse(scales.mean, None))


class Parts:
    """What an estimator of EKFAC consists of, for bases that are known only when it is called.

    Attributes:
        made: The estimator.
        factors: Estimates the Kronecker factors alone.
    """

    def __init__(self, made: Estimator) -> None:
        """Take the options of the estimator."""
        self.made = made
        self._options = {k: v for k, v in made.options.items() if k != "basis"}
        self.factors = kfac(made.model, made.likelihood, **self._options)
        self.slot = opaque.register(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by making it again."""
        return Parts, (self.made,)

    def estimator(self, basis: EKFAC) -> Estimator:
        """Return what estimates the scales in a basis."""
        return ekfac(self.made.model, self.made.likelihood, basis=basis, **self._options)

    def scales(self, basis: EKFAC, params: Tree, buffers: Tree, batch: Batch, key: Any) -> EKFAC:
        """Estimate the scales in a basis, also in code that `torch.compile` is tracing."""
        if not torch.compiler.is_dynamo_compiling():
            return self.estimator(basis)(params, buffers, batch, key=key)
        # what is static about the bases is in the names of their tensors
        given = {"params": params, "basis": replace(basis, basis="factors").stripped()}
        found = opaque.call(self.slot, given, buffers, batch, key)
        bases = {"output_basis": basis.output_basis, "input_basis": basis.input_basis}
        static: dict[str, Any] = {"fisher": basis.fisher, "unit": basis.unit}
        return EKFAC.restored(found, basis.layout, "given", given=bases, **static)

    def traced(self, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> Any:
        """Evaluate, without the static parts of a result that cannot leave a compiled call."""
        given: dict[str, Any] = params
        static: dict[str, Any] = {k: self._options[k] for k in ("fisher", "unit")}
        layout = Layout.of(given["params"])
        basis = EKFAC.restored(given["basis"], layout, "factors", **static)
        return strip(self.estimator(basis)(given["params"], buffers, batch, key=key))


def averaged(decay: float, average: Any, new: Curvature) -> Any:
    """Return an exponential average with one more result in it.

    Joined rows would grow without end; they are replaced by the best approximation with as many
    rows as one batch has.
    """
    smooth = ema(decay)
    _, state = smooth.update(new, smooth.init(new) if average is None else average)
    return state._replace(mean=bounded(state.mean, new))


def bounded(mean: Any, new: Curvature) -> Any:
    """Return an average with no more rows than one result has."""
    if isinstance(mean, LowRank) and isinstance(new, LowRank):
        return mean.truncate(len(new.weights))
    if isinstance(mean, KFAC) and isinstance(new, KFAC):
        sides: dict[str, dict[str, Tensor]] = {}
        for side in ("inputs", "outputs"):
            sides[side] = {}
            for b in mean.blocks:
                x, y = getattr(mean, side)[b.name], getattr(new, side)[b.name]
                rows = (b.input_form if side == "inputs" else b.output_form) == "rows"
                sides[side][b.name] = _strongest(x, y.shape[-2]) if rows else x
        return replace(mean, **sides)
    return mean


@unmixed
def _strongest(rows: Tensor, count: int) -> Tensor:
    """Return the best approximation of rowsᵀ rows, [R, m, n], by so many rows."""
    if rows.shape[-2] <= count:
        return rows
    wide = rows.to(working_dtype(rows))
    _, vectors = torch.linalg.eigh(wide @ wide.mT)
    return (vectors[..., -count:].mT @ wide).to(rows.dtype)


def _due(step: Tensor, every: int) -> bool | Tensor:
    """Return whether a step is due; a tensor where the step has no value."""
    if every == 1:
        return True
    due = step % every == 0
    return bool(due) if concrete(step) else due


def _choose(condition: Any, a: Any, b: Any) -> Any:
    """Return one of two states of the same structure, both of which have been computed."""
    return trees.map(lambda x, y: torch.where(condition.to(x.device), x, y.to(x.dtype)), a, b)


def stream(
    caller: str,
    estimator: Any,
    decay: Any,
    update_every: Any,
    invert_every: Any,
    inverter: Callable[[Any], Inverse] | None,
) -> Stream:
    """Return a stream with its options checked.

    Raises:
        OptionError: One of them makes no sense.
    """
    uncalled = inspect.isfunction(estimator) and estimator.__module__.startswith("fisherfn.")
    others = torch.nn.Module, FunctionalModel, Product
    if not callable(estimator) or isinstance(estimator, others) or uncalled:
        named = getattr(estimator, "__name__", "")
        got = f"the function {named}" if uncalled else type(estimator).__name__
        raise OptionError(
            f"{caller}: expected an estimator of curvature, got {got}. Pass for instance "
            "kfac(model, likelihood, fisher='mc')."
        )
    if not is_number(decay) or not 0 <= decay < 1:
        raise OptionError(
            f"{caller}: expected decay in [0, 1), got {decay!r}. 0.95 averages over about 20 "
            "estimates, 0 keeps the latest."
        )
    check_steps(caller, "update_every", update_every)
    check_steps(caller, "invert_every", invert_every)
    if inverter is not None and not callable(inverter):
        raise OptionError(
            f"{caller}: expected invert to be a function, got {type(inverter).__name__}. Pass "
            "for instance functools.partial(optim.sharded_inverse, group=group)."
        )

    if not decay:
        # one period: an estimate that is not inverted would be lost
        update_every = invert_every = max(update_every, invert_every)
    elif update_every % invert_every == 0:
        # an average that has not changed has the same inverse
        invert_every = update_every

    def default(matrix: Any) -> Inverse:
        return invert(matrix, reused=invert_every > 1)

    options = float(decay), update_every, invert_every, inverter or default
    if isinstance(estimator, Estimator) and estimator.name == "ekfac":
        if estimator.options["basis"] is None:
            return EigenStream(caller, estimator, *options, Parts(estimator))
    return Stream(caller, estimator, *options)
