"""How estimators enter a compiled graph: as one call that Dynamo does not look into.

The capture needs real Python: identity of tensors, attribute access such as `W.T`, a mode that
watches. AOTAutograd traces through it with fake tensors, so the compiled graph contains every
operation; only Dynamo's symbolic interpretation of the Python code is skipped
(`torch._dynamo.nonstrict_trace`).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._guards import TracingContext

from fisherfn.batch import Batch
from fisherfn.core.modes import compiling


class Entry(Protocol):
    """Something that is called with the arguments of an estimator."""

    def traced(self, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> Any:
        """Do the work, and return what can leave a compiled call."""
        ...


_ENTRIES: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_traced: Callable[..., Any] | None = None


def register(entry: Entry) -> str:
    """Give an entry the name by which compiled code refers to it."""
    slot = f"estimator {next(_NUMBERS)}"  # Dynamo would make a symbol of a number
    _ENTRIES[slot] = entry
    return slot


def _run(slot: str, params: Any, buffers: Any, fields: dict[str, Any], keys: list[Tensor]) -> Any:
    entry, key = _ENTRIES[slot], keys[0] if keys else None
    before = torch.compiler._is_compiling_flag
    # until torch 2.12 AOTAutograd's own traces say that nothing is being compiled, and models that
    # ask (Hugging Face masks do) would look at values that are not there
    torch.compiler._is_compiling_flag = before or compiling()
    _allow_constants()
    try:
        return entry.traced(params, buffers, Batch(**fields), key)
    finally:
        torch.compiler._is_compiling_flag = before


def _allow_constants() -> None:
    """Let a graph hold tensors that are no arguments: a given basis, a scale, a model's closure.

    Dynamo would have made inputs of them; what it does not look into it does not see, and inductor
    refuses them unless the mode under which it looks at the graph says otherwise.
    """
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        context.fake_mode.allow_non_fake_inputs = True


def _prepare() -> int:
    """Import Dynamo's decorator only when something is being compiled: it takes seconds to load."""
    global _traced
    if _traced is None:
        import torch._dynamo

        _traced = torch._dynamo.nonstrict_trace(_run)
    return 0


# Dynamo evaluates this function instead of tracing it, before it looks up `_traced`.
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call(slot: str, params: Any, buffers: Any, batch: Batch, key: Tensor | None) -> Any:
    """Call an entry from code that Dynamo is tracing."""
    _prepare()
    assert _traced is not None
    fields = {
        "inputs": batch.inputs,
        "targets": batch.targets,
        "mask": batch.mask,
        "weights": batch.weights,
        "ids": batch.ids,
        "positions": batch.positions,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return _traced(slot, params, buffers, given, [] if key is None else [key])
