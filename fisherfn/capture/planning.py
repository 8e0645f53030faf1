"""Plans by need: built and checked once for a structure, then remembered with the model."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from fisherfn.capture.check import check, check_examples_apart
from fisherfn.capture.engines import refuse_checkpointing
from fisherfn.capture.plan import Plan, build
from fisherfn.core import trees
from fisherfn.core.modes import concrete

_COUNTS = (2, 3)
_KEPT = 32
_PLANS: weakref.WeakKeyDictionary[Any, OrderedDict[Any, Plan]] = weakref.WeakKeyDictionary()


def plan_for(model: Any, params: Any, buffers: Any, inputs: Any) -> Plan:
    """Return the plan of a model for inputs of this structure, building and checking it if needed.

    A plan depends on ranks and data types, not on sizes. Inside a transformation values cannot be
    compared: a plan that was checked before is used, otherwise one that rests on structure alone.

    Raises:
        RuntimeError: the model itself fails.
        UnsupportedError: no per-example scores exist, or checkpointing is on.
    """
    key = _structure(params, buffers, inputs)
    known = _of(model)
    plan = None if known is None else known.get(key)
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
        check_examples_apart(outputs, _COUNTS)
        plan = check(model, params, buffers, inputs, plan, outputs[0])
    if known is not None:
        remember(model, params, buffers, inputs, plan)
    return plan


def remember(model: Any, params: Any, buffers: Any, inputs: Any, plan: Plan) -> None:
    """Keep a plan with the model, as long as the model lives."""
    known = _of(model)
    if known is not None:
        known[_structure(params, buffers, inputs)] = plan
        while len(known) > _KEPT:
            known.popitem(last=False)


def _of(model: Any) -> OrderedDict[Any, Plan] | None:
    try:
        return _PLANS.setdefault(model, OrderedDict())
    except TypeError:  # cannot be hashed or referenced weakly
        return None


def _structure(params: Any, buffers: Any, inputs: Any) -> Any:
    def sizes(tree: Any) -> Any:
        leaves, structure = trees.flatten(tree)
        return str(structure), tuple(
            # int: parameters keep their sizes, also where the compiler would make symbols of them
            (tuple(int(n) for n in t.shape), t.dtype, t.device.type)
            if isinstance(t, Tensor)
            else repr(t)
            for t in leaves
        )

    leaves, structure = trees.flatten(inputs)
    ranks = tuple(
        (t.dim(), t.dtype, t.device.type) if isinstance(t, Tensor) else repr(t) for t in leaves
    )
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return str(structure), ranks, sizes(params), sizes(buffers), autocast
