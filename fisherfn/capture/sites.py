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
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherfn.capture.views import getter, steps_of
from fisherfn.core.modes import version
from fisherfn.layers import attention
from fisherfn.layers.registry import Builder, Call, bind, rule_for
from fisherfn.layers.views import View

_MHA = F.multi_head_attention_forward
_MHA_NAMES = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v "
    "add_zero_attn dropout_p out_proj_weight out_proj_bias training key_padding_mask need_weights "
    "attn_mask use_separate_proj_weight q_proj_weight k_proj_weight v_proj_weight static_k "
    "static_v average_attn_weights is_causal"
).split()
_MHA_DEFAULTS = {
    "training": True,
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "use_separate_proj_weight": False,
    "static_k": None,
    "static_v": None,
    "average_attn_weights": True,
}
_SDPA = F.scaled_dot_product_attention
_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
)
_NOISY = frozenset([*_DROPOUTS, F.batch_norm, _SDPA])
_LOOKED_AT = _NOISY | {_MHA}
_CONSTANTS = (torch.Tensor.detach, getter("data"))


def rewritten(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a call that capture rewrites, or None for any other call."""
    if function is not _MHA:
        return None
    arguments = {**_MHA_DEFAULTS, **dict(zip(_MHA_NAMES, args, strict=False)), **kwargs}
    known = arguments["static_k"] is None and arguments["static_v"] is None
    if arguments["is_causal"] and arguments["attn_mask"] is None:
        return None  # the original refuses that
    return arguments if known else None


def is_attention(function: Any) -> bool:
    """Return True for fused attention, which neither composes nor batches."""
    return function is _SDPA


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
        if kwargs or function in _LOOKED_AT:
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


class SitePass(TorchFunctionMode):
    """Watches one run of the model and fills a `Recording`."""

    def __init__(self, leaves: Sequence[Tensor], recording: Recording) -> None:
        """Recognise `leaves` by identity."""
        super().__init__()
        self.recording = recording
        self.number = 0
        self.tracker = Tracker(leaves)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run and watch one call."""
        return self.call(func, *args, **(kwargs or {}))

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a torch function and write down what it does with parameters."""
        arguments = rewritten(function, args, kwargs)
        if arguments is not None:
            return attention.multi_head_attention(self.call, arguments)
        refuse_noise(function, args, kwargs)
        if is_attention(function):
            self.recording.attention = True
        touched = self.tracker.touched(args, kwargs)
        out = function(*args, **kwargs)
        if touched:
            done = self.tracker.follow(function, touched, args, kwargs, out)
            if done != "nothing":
                self.recording.seen.update(leaf for _, leaf, _ in touched)
            if done == "use":
                self._use(function, args, kwargs, out, touched)
        self._mutation(function, args, kwargs)
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

    def _mutation(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


def refuse_noise(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse calls that make outputs random or mix the examples of a batch."""
    if function not in _NOISY:
        return
    name = getattr(function, "__name__", "")
    if function in _DROPOUTS:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        on = kwargs.get("training", args[2] if len(args) > 2 else name != "dropout")
        if on and p:
            attention.refuse_random(name, f"p={p} in training mode")
    elif function is F.batch_norm and kwargs.get("training", len(args) > 5 and args[5]):
        attention.refuse_random("batch_norm", "statistics of the batch (training mode)")
    elif function is _SDPA and kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0):
        attention.refuse_random(name, "dropout")


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
