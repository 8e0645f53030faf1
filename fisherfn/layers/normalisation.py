"""Normalisation layers: a scale and a shift of something normalised.

Tensor format: the layer's input is kept, `[B, M, *rest]`, and normalised again when its scores are
asked for; the normalisation has no parameters, so this is exact and costs one elementwise pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core.dtypes import wide
from fisherfn.layers.elementwise import Alignment, ShiftBuilder
from fisherfn.layers.form import Form
from fisherfn.layers.registry import Call, Match, Role, register_rule
from fisherfn.layers.views import View


@dataclass(frozen=True)
class NormalisedBuilder:
    """The cotangent times the normalised input, summed to the weight's shape.

    `normalise` acts on inputs whose leading axes are flattened examples. `first` is the first axis
    of the input that it looks at; axes before it may be the examples.
    """

    alignment: Alignment
    normalise: Callable[[Sequence[Tensor]], Tensor]
    first: int

    def accepts(self, axis: int, rank: int) -> bool:
        """Return True if the normalisation does not mix along `axis`."""
        return axis < self.first and self.alignment.accepts(axis, rank)

    def __call__(self, kept: Sequence[Tensor], g: Tensor, axis: int) -> tuple[Form, View]:
        """Return the direct form."""
        x = kept[0]
        flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        normal = self.normalise([flat, *kept[1:]]).reshape(x.shape)
        return self.alignment.reduce(wide(g) * wide(normal), axis), ()


def _roles(
    call: Call, normalise: Callable[[Sequence[Tensor]], Tensor], first: int, channels: bool
) -> Match | None:
    """Return the roles of `weight` and `bias`, per channel (axis 1) or aligned from the right."""
    rank = len(call.output_shape)
    roles = []
    for argument in ("weight", "bias"):
        if argument not in call.tracked:
            continue
        parameter = call.tracked[argument]
        shape = tuple(parameter.shape)
        if channels:
            aligned = Alignment(shape, (1, *shape, *[1] * (rank - 2)))
        else:
            aligned = Alignment.of(parameter, rank)
        builder: Any = ShiftBuilder(aligned)
        if argument == "weight":
            builder = NormalisedBuilder(aligned, normalise, first)
        roles.append(Role(argument, builder))
    return Match(("input",) if "weight" in call.tracked else (), tuple(roles))


def match_layer_norm(call: Call) -> Match | None:
    """`layer_norm(input, normalized_shape, weight, bias, eps)`."""
    if "input" in call.tracked:
        return None
    shape, eps = tuple(call["normalized_shape"]), call["eps"]
    first = len(call.output_shape) - len(shape)
    return _roles(call, lambda kept: F.layer_norm(kept[0], shape, eps=eps), first, channels=False)


def match_rms_norm(call: Call) -> Match | None:
    """`rms_norm(input, normalized_shape, weight, eps)`."""
    if "input" in call.tracked:
        return None
    shape, eps = tuple(call["normalized_shape"]), call["eps"]
    first = len(call.output_shape) - len(shape)
    return _roles(call, lambda kept: F.rms_norm(kept[0], shape, eps=eps), first, channels=False)


def match_group_norm(call: Call) -> Match | None:
    """`group_norm(input, num_groups, weight, bias, eps)`."""
    if "input" in call.tracked:
        return None
    groups, eps = call["num_groups"], call["eps"]
    return _roles(call, lambda kept: F.group_norm(kept[0], groups, eps=eps), 1, channels=True)


def match_instance_norm(call: Call) -> Match | None:
    """`instance_norm(input, ..., weight, bias, ...)` with statistics of the input."""
    if "input" in call.tracked or not call["use_input_stats"]:
        return None
    eps = call["eps"]
    return _roles(call, lambda kept: F.instance_norm(kept[0], eps=eps), 1, channels=True)


def match_batch_norm(call: Call) -> Match | None:
    """`batch_norm(input, running_mean, running_var, weight, bias, training=False, ...)`."""
    if call["training"] or {"input", "running_mean", "running_var"} & set(call.tracked):
        return None
    eps = call["eps"]

    def normalise(kept: Sequence[Tensor]) -> Tensor:
        mean, var = kept[1].reshape(-1), kept[2].reshape(-1)
        return F.batch_norm(kept[0], mean, var, training=False, eps=eps)

    match = _roles(call, normalise, 1, channels=True)
    if match is None or not match.kept:
        return match
    return Match(("input", "running_mean", "running_var"), match.roles)


_EPS = {"eps": 1e-5, "weight": None, "bias": None}
register_rule(
    [F.layer_norm, torch.layer_norm],
    ("input", "normalized_shape", "weight", "bias", "eps"),
    match_layer_norm,
    name="layer_norm",
    defaults=_EPS,
)
register_rule(
    [F.rms_norm, torch.rms_norm],
    ("input", "normalized_shape", "weight", "eps"),
    match_rms_norm,
    name="rms_norm",
    defaults={"eps": None, "weight": None},
)
register_rule(
    [F.group_norm],
    ("input", "num_groups", "weight", "bias", "eps"),
    match_group_norm,
    name="group_norm",
    defaults=_EPS,
)
register_rule(
    [F.instance_norm],
    (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "use_input_stats",
        "momentum",
        "eps",
    ),
    match_instance_norm,
    name="instance_norm",
    defaults={**_EPS, "use_input_stats": True},
)
register_rule(
    [F.batch_norm],
    ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    match_batch_norm,
    name="batch_norm",
    defaults={**_EPS, "training": False},
)
