"""How a transformation is copied, and sent to another process: as the call that made it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def recipe(
    name: str, model: Any, likelihood: Any, options: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return what `__reduce__` returns for what `ff.<name>(model, likelihood, **options)` made."""
    return repeat, (name, model, likelihood, dict(options))


def repeat(name: str, model: Any, likelihood: Any, options: Mapping[str, Any]) -> Any:
    """Call the public function of this name again."""
    return getattr(importlib.import_module("fisherfn"), name)(model, likelihood, **options)
