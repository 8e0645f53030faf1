"""Running a module with other tensors in the places of its own.

`torch.func.functional_call` looks up every name and every tie at each call, which takes as long as
a small model itself. The places are looked up once here, and looked at again at each call: a module
that was changed since then is looked up afresh.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: A dict of a submodule, and the key in it.
Place = tuple[dict[str, Any], str]

# One for each module: two threads that fill the same places would read each other's tensors, and
# take them for the module's own.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def turn(module: nn.Module) -> threading.RLock:
    """Return the lock of a module, held while its places hold other tensors."""
    return _LOCKS.setdefault(module, threading.RLock())


class _Caller(nn.Module):
    """Calls a module: torch replaces the tensors of a scripted one only inside of another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _by_name(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module as torch does it, which knows all kinds of modules."""
    if isinstance(module, torch.jit.ScriptModule):
        named = {f"module.{name}": t for name, t in tensors.items()}
        return torch.func.functional_call(_Caller(module), named, args, kwargs)
    return torch.func.functional_call(module, dict(tensors), args, kwargs)


class Substitution:
    """Calls one module with other parameters and buffers; the module is as before afterwards.

    Threads take turns.
    """

    def __init__(self, module: nn.Module) -> None:
        """Look up the places of `module`."""
        self.module = module
        self._lock = turn(module)
        with self._lock:
            self._look()

    def __reduce__(self) -> tuple[type[Substitution], tuple[nn.Module]]:
        """Look up the places anew where it is copied to."""
        return Substitution, (self.module,)

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
        if torch.compiler.is_dynamo_compiling():
            return _by_name(self.module, tensors, args, kwargs)
        with self._lock:
            return self._run(tensors, args, kwargs)

    def _run(
        self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._opaque and not self._current():
            self._look()
        if self._opaque or any(name not in self._places for name in tensors):
            return _by_name(self.module, tensors, args, kwargs)
        try:
            for name, t in tensors.items():
                for store, key in self._places[name]:
                    store[key] = t
            return self.module(*args, **kwargs)
        finally:
            for store, key, t in self._own:
                store[key] = t
