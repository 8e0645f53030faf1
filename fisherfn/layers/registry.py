"""The rules: which calls are layers, and which form the scores of their parameters have.

A rule is registered for torch functions. When one of them is called with a parameter, the rule says
which arguments must be kept and, for each parameter among the arguments, how the kept tensors and
the cotangent of the output make a form.

Tensor format given to a builder: every kept tensor is `[B or 1, M, *rest]` and the cotangent is
`[K, B, M, *rest]`, where M is 1 unless the model had flattened other axes into the batch axis;
`rest` are the tensor's own axes without the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fisherfn.core.errors import OptionError
from fisherfn.layers.form import Form
from fisherfn.layers.views import View


class Builder(Protocol):
    """Makes the form of one parameter from the kept tensors and the output's cotangent."""

    def accepts(self, axis: int, rank: int) -> bool:
        """Return True if the examples may lie along `axis` of an output with `rank` axes."""
        ...

    def __call__(self, kept: Sequence[Tensor], g: Tensor, axis: int) -> tuple[Form, View]:
        """Return the form, and the view from the argument to the form's shape."""
        ...


@dataclass(frozen=True)
class Role:
    """One parameter among the arguments of a call."""

    argument: str
    builder: Builder


@dataclass(frozen=True)
class Match:
    """What a rule makes of a call: arguments to keep, and the roles of the parameters."""

    kept: tuple[str, ...]
    roles: tuple[Role, ...]
    #: True where the output may lack a batch axis, as a positional embedding does.
    batchless: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a registered function, with its arguments by name."""

    name: str
    arguments: dict[str, Any]
    tracked: dict[str, Any] = field(repr=False)
    output_shape: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> Any:
        """Return an argument, or None if it was not given."""
        return self.arguments.get(name)


Matcher = Callable[[Call], "Match | None"]


@dataclass(frozen=True)
class Rule:
    """A named matcher for some functions."""

    name: str
    match: Matcher
    parameters: tuple[str, ...]
    defaults: dict[str, Any]


_RULES: dict[Any, Rule] = {}


def register_rule(
    functions: Sequence[Any],
    parameters: Sequence[str],
    match: Matcher,
    *,
    name: str,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Register a contraction rule for some torch functions.

    Args:
        functions: Functions as a `TorchFunctionMode` sees them, such as
            `torch.nn.functional.linear`.
        parameters: Names of their arguments, in order.
        match: Says what to keep of a `Call`, or None if this call has no form.
        name: What `explain` calls the rule.
        defaults: Values of arguments that may be left out.

    Raises:
        OptionError: a function is registered already.
    """
    for function in functions:
        if function in _RULES:
            raise OptionError(
                f"register_rule: expected a function without a rule, got "
                f"{getattr(function, '__name__', function)!r}, which '{_RULES[function].name}' "
                "handles. Register the function that your layer calls."
            )
        _RULES[function] = Rule(name, match, tuple(parameters), dict(defaults or {}))


def rule_for(function: Any) -> Rule | None:
    """Return the rule of a function, or None."""
    return _RULES.get(function)


def bind(rule: Rule, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    return {**rule.defaults, **dict(zip(rule.parameters, args, strict=False)), **kwargs}
