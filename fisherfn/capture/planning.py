"""Plans by need: built and checked once for a structure, then remembered with the model."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from fisherfn.capture.check import check, check_examples_apart, coarsest
from fisherfn.capture.engines import refuse_checkpointing, size_of
from fisherfn.capture.plan import Plan, build
from fisherfn.core import trees
from fisherfn.core.modes import concrete, transformed

_COUNTS = (2, 3)
_KEPT = 32
_PLANS: weakref.WeakKeyDictionary[Any, OrderedDict[Any, Plan]] = weakref.WeakKeyDictionary()


def plan_for(model: Any, params: Any, buffers: Any, inputs: Any, *, afresh: bool = False) -> Plan:
    """Return the plan of a model for inputs of this structure, building and checking it if needed.

    A plan depends on ranks and data types, not on sizes; `afresh` makes one for these very sizes.
    Inside a transformation values cannot be compared: a plan that was checked before is used,
    otherwise one that rests on structure alone.

    Raises:
        RuntimeError: the model itself fails.
        UnsupportedError: no per-example scores exist, or checkpointing is on.
    """
    key = _structure(params, buffers, inputs)
    known = _of(model)
    if known is not None and not afresh:
        plan = known.get((key, _sizes(inputs))) or known.get(key)
        if plan is not None:
            return plan
    try:
        plan, outputs = build(model, params, buffers, inputs, _COUNTS)
    except RuntimeError as error:
        refuse_checkpointing(error)
        raise
    if not concrete(*trees.leaves((params, buffers, inputs, outputs[0]))):
        return plan
    with torch.no_grad():
        check_examples_apart(outputs, _COUNTS, coarsest(*trees.leaves((params, outputs[0]))))
        plan = check(model, params, buffers, inputs, plan, outputs[1])
    if plan.checked and _tellable(inputs):
        remember(model, params, buffers, inputs, plan, exactly=afresh)
    return plan


def _tellable(inputs: Any) -> bool:
    """Return True unless the first two examples are equal, so that their order cannot be seen."""
    tensors = [t for t in trees.leaves(inputs) if isinstance(t, Tensor)]
    return size_of(inputs) == 1 or any(not torch.equal(t[0], t[1]) for t in tensors)


def remember(
    model: Any, params: Any, buffers: Any, inputs: Any, plan: Plan, *, exactly: bool
) -> None:
    """Keep a plan with the model, as long as the model lives; `exactly` for these sizes only."""
    known = _of(model)
    if known is not None:
        key = _structure(params, buffers, inputs)
        known[(key, _sizes(inputs)) if exactly else key] = plan
        while len(known) > _KEPT:
            known.popitem(last=False)


def _sizes(inputs: Any) -> Any:
    return tuple(
        tuple(int(n) for n in t.shape) for t in trees.leaves(inputs) if isinstance(t, Tensor)
    )


def _of(model: Any) -> OrderedDict[Any, Plan] | None:
    try:
        return _PLANS.setdefault(model, OrderedDict())
    except TypeError:  # cannot be hashed or referenced weakly
        return None


def _structure(params: Any, buffers: Any, inputs: Any) -> Any:
    symbolic = transformed()

    def sizes(tree: Any) -> Any:
        leaves, structure = trees.flatten(tree)
        return structure, tuple(
            # int: parameters keep their sizes, also where the compiler would make symbols of them
            (
                tuple(int(n) for n in t.shape) if symbolic else t.shape,
                t.dtype,
                t.device.type,
            )
            if isinstance(t, Tensor)
            else repr(t)
            for t in leaves
        )

    leaves, structure = trees.flatten(inputs)
    ranks = tuple(
        (t.dim(), t.dtype, t.device.type) if isinstance(t, Tensor) else repr(t) for t in leaves
    )
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    # one example shows less than two do: what was learned from it serves single examples only
    single = size_of(inputs) == 1
    return structure, ranks, sizes(params), sizes(buffers), autocast, single
