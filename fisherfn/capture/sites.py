"""Where a model's parameters meet data: the pass that learns the sites.

A `TorchFunctionMode` watches one run of the model, recognises parameters (and views of them) by
identity, numbers their uses, and asks the rules what to keep. Whatever else touches a parameter is
written down as a reason for the general path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisherfn.capture.calls import LOOKED_AT, CallMode, is_attention
from fisherfn.capture.views import getter, steps_of
from fisherfn.core.modes import in_functorch, version
from fisherfn.layers.composing import composable
from fisherfn.layers.registry import Builder, Call, bind, rule_for
from fisherfn.layers.views import View

_CONSTANTS = (torch.Tensor.detach, getter("data"))


@dataclass
class RoleUse:
    """A parameter among the arguments of a call: which leaf, which view, which builder."""

    leaf: int
    argument: str
    view: View
    builder: Builder


@dataclass
class SiteCall:
    """One call of a registered function with parameters among its arguments."""

    number: int
    function: Any
    rule: str
    kept: tuple[str, ...]
    kept_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    roles: list[RoleUse]
    batchless: bool


@dataclass
class Recording:
    """All that one pass has seen."""

    calls: list[SiteCall] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    attention: bool = False
    kept: list[tuple[Tensor, int, list[int]]] = field(default_factory=list)

    def blame(self, leaf: int, reason: str) -> None:
        """Write down why a leaf needs the general path; the first reason stays."""
        self.reasons.setdefault(leaf, reason)


class Tracker:
    """Knows parameters, and views of them, by identity."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        """Recognise `leaves`."""
        # identity by id is safe only while the tensors live: keep them
        self.known: dict[int, tuple[int, View]] = {id(t): (i, ()) for i, t in enumerate(leaves)}
        self.alive: list[Any] = list(leaves)

    def indifferent(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
        """Return True if it is plain at first sight that a call is of no interest.

        Nine calls in ten are: no parameter is among their arguments, nor anything that may hold
        one, and the function is none that is refused or rewritten.
        """
        if kwargs or function in LOOKED_AT:
            return False
        known = self.known
        for value in args:
            if id(value) in known:
                return False
            if isinstance(value, (list, tuple, dict)) and type(value) is not torch.Size:
                return False
        return True

    def touched(self, args: Any, kwargs: Any) -> list[tuple[Tensor, int, View]]:
        """Return the parameters among the arguments of a call, with leaf and view."""
        found = []
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, (list, tuple, dict)):
                found += self.touched(_flat(value), {})
                continue
            known = self.known.get(id(value))
            if known is not None:
                found.append((value, *known))
        return found

    def follow(
        self,
        function: Any,
        touched: Sequence[tuple[Tensor, int, View]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> str:
        """Say what a call does with parameters: "nothing", a "view" (now known too), or a "use"."""
        results = [t for t in _flat(out) if isinstance(t, Tensor)]
        if function in _CONSTANTS or not (results or out is None):
            return "nothing"  # a constant, or a question such as p.shape
        if len(touched) == 1:
            source, leaf, view = touched[0]
            steps = steps_of(function, source, args, kwargs, out)
            if steps is not None:
                for result, step in zip(results, steps, strict=True):
                    self.known[id(result)] = (leaf, (*view, *step))
                    self.alive.append(result)
                return "view"
        return "use"


class SitePass(CallMode):
    """Watches one run of the model and fills a `Recording`."""

    def __init__(self, leaves: Sequence[Tensor], recording: Recording) -> None:
        """Recognise `leaves` by identity."""
        super().__init__()
        self.recording = recording
        self.number = 0
        self.tracker = Tracker(leaves)

    def admitted(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function and write down what it does with parameters."""
        if is_attention(function):
            self.recording.attention = True
        touched = self.tracker.touched(args, kwargs)
        run = composable(function, args, kwargs) if in_functorch() else function
        out = run(*args, **kwargs)
        if touched:
            done = self.tracker.follow(function, touched, args, kwargs, out)
            if done != "nothing":
                self.recording.seen.update(leaf for _, leaf, _ in touched)
            if done == "use":
                self._use(function, args, kwargs, out, touched)
        self._mutation(function, args)
        return out

    def _use(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        touched: Sequence[tuple[Tensor, int, View]],
    ) -> None:
        rule = rule_for(function)
        site = None
        if rule is not None:
            site = self._site(function, rule, self.number, args, kwargs, out)
            self.number += 1
        if site is None:
            name = getattr(function, "__name__", str(function))
            for _, leaf, _ in touched:
                self.recording.blame(leaf, f"no rule for this use in {name}")
            return
        named = {role.leaf for role in site.roles}
        for _, leaf, _ in touched:
            if leaf not in named:
                self.recording.blame(leaf, f"no rule for this argument of {site.rule}")
        self.recording.calls.append(site)

    def _site(
        self,
        function: Any,
        rule: Any,
        number: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> SiteCall | None:
        if not isinstance(out, Tensor) or kwargs.get("out") is not None:
            return None
        arguments = bind(rule, args, kwargs)
        tracked = {
            n: v
            for n, v in arguments.items()
            if isinstance(v, Tensor) and id(v) in self.tracker.known
        }
        match = rule.match(Call(rule.name, arguments, tracked, tuple(out.shape)))
        if match is None:
            return None
        kept = [arguments[n] for n in match.kept]
        if not all(isinstance(t, Tensor) for t in kept):
            return None
        roles = []
        for role in match.roles:
            leaf, view = self.tracker.known[id(arguments[role.argument])]
            roles.append(RoleUse(leaf, role.argument, view, role.builder))
        leaves = [role.leaf for role in roles]
        for t in kept:
            self.recording.kept.append((t, version(t), leaves))
            self.tracker.alive.append(t)
        shapes = tuple(tuple(t.shape) for t in kept)
        return SiteCall(
            number,
            function,
            rule.name,
            match.kept,
            shapes,
            tuple(out.shape),
            roles,
            match.batchless,
        )

    def _mutation(self, function: Any, args: tuple[Any, ...]) -> None:
        """Notice parameters that are written to; inputs of sites are compared by version."""
        name = getattr(function, "__name__", "")
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and args and isinstance(args[0], Tensor):
            for t, _, leaves in self.recording.kept:
                if t is args[0]:
                    for leaf in leaves:
                        self.recording.blame(leaf, f"its layer's input is overwritten by {name}")

    def finish(self) -> None:
        """Compare the versions of all inputs that rules want to keep."""
        for t, before, leaves in self.recording.kept:
            if version(t) != before:
                for leaf in leaves:
                    self.recording.blame(leaf, "its layer's input is overwritten in place")
        self.recording.kept.clear()


def _flat(value: Any) -> list[Any]:
    """Return the values of nested arguments."""
    if isinstance(value, (list, tuple)):
        return [x for v in value for x in _flat(v)]
    if isinstance(value, dict):
        return [x for v in value.values() for x in _flat(v)]
    return [value]


def record(run: Callable[[], Any], leaves: Sequence[Tensor]) -> tuple[Any, Recording]:
    """Run a model once under a `SitePass`; return its outputs and what was seen."""
    recording = Recording()
    watch = SitePass(leaves, recording)
    with torch.no_grad(), watch:
        outputs = run()
    watch.finish()
    return outputs, recording
