"""Running a module with other tensors in the places of its own.

`torch.func.functional_call` looks up every name and every tie at each call, which takes as long as
a small model itself. The places are looked up once here, and looked at again at each call: a module
that was changed since then is looked up afresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: A dict of a submodule, and the key in it.
Place = tuple[dict[str, Any], str]


class Substitution:
    """Calls one module with other parameters and buffers; the module is as before afterwards."""

    def __init__(self, module: nn.Module) -> None:
        """Look up the places of `module`."""
        self.module = module
        self._look()

    def _look(self) -> None:
        self._children: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._own: list[tuple[dict[str, Any], str, Tensor]] = []
        #: Every place of a tensor, under the first of its names.
        self._places: dict[str, list[Place]] = {}
        #: Modules whose tensors are not kept in plain dicts, such as scripted ones.
        self._opaque = False
        first: dict[int, str] = {}
        seen: set[int] = set()
        pending: list[tuple[str, nn.Module]] = [("", self.module)]
        while pending:
            prefix, module = pending.pop()
            stores = (module._parameters, module._buffers, module._modules)
            if any(type(store) is not dict for store in stores):
                self._opaque = True
                return
            if id(module) in seen:  # a module in two places has its tensors in one
                continue
            seen.add(id(module))
            for store in stores[:2]:
                for key, t in store.items():
                    if t is not None:
                        name = first.setdefault(id(t), prefix + key)
                        self._places.setdefault(name, []).append((store, key))
                        self._own.append((store, key, t))
            children = [(k, m) for k, m in module._modules.items() if m is not None]
            self._children += [(module._modules, k, m) for k, m in children]
            pending += [(f"{prefix}{k}.", m) for k, m in reversed(children)]

    def _current(self) -> bool:
        """Return True while the module holds what it held when it was looked at."""
        return all(store.get(key) is m for store, key, m in self._children) and all(
            store.get(key) is t for store, key, t in self._own
        )

    def __call__(
        self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the module; tied places share the tensor that is given under their first name."""
        direct = not torch.compiler.is_dynamo_compiling() and not self._opaque
        if direct and not self._current():
            self._look()
            direct = not self._opaque
        if not direct or any(name not in self._places for name in tensors):
            return torch.func.functional_call(self.module, dict(tensors), args, kwargs)
        try:
            for name, t in tensors.items():
                for store, key in self._places[name]:
                    store[key] = t
            return self.module(*args, **kwargs)
        finally:
            for store, key, t in self._own:
                store[key] = t
