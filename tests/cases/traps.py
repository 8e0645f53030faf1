"""In-place operations, constants made of parameters, and outputs of unusual shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases.base import Built, Case, normal, table
from cases.builders import linear, net, rows, two_layers
from oracles import Categorical, Gaussian


def _add_bias(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.add_(m.b)
    return m.head(torch.tanh(h))


def _mul_scale(m: Any, x: Tensor) -> Tensor:
    h = torch.sin(m.a(x))
    h = h + 0.0
    h.mul_(m.b)
    return m.head(torch.tanh(h))


def _plus_equals(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += m.b
    return m.head(torch.tanh(h))


def _times_equals(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h *= m.b
    return m.head(torch.tanh(h))


def _relu_in_place(m: Any, x: Tensor) -> Tensor:
    return m.head(F.relu(m.a(x), inplace=True) + m.b)


def _slice_assignment(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, :2] = h[:, :2] * 3.0
    return m.head(torch.tanh(h + m.b))


def _parameter_assigned(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, :2] = m.b[:2]
    return m.head(torch.tanh(h))


def _copy_in_place(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    h.copy_(m.b)
    return m.head(torch.tanh(h * m.a(x)))


def _zero_a_view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, 0].zero_()
    return m.head(torch.tanh(h + m.b))


def _input_changed_before(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.mul_(2.0)
    return m.head(torch.tanh(h) + m.b)


def _addcmul_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.addcmul_(x, m.b)
    return m.head(torch.tanh(h))


def _in_place(forward: Any) -> Built:
    return net(forward, rows(4), a=linear(4, 4), b=normal(4), head=linear())


IN_PLACE = table(
    *(
        Case(f"in_place_{name}", lambda forward=forward: _in_place(forward), general=None)
        for name, forward in {
            "add_bias": _add_bias,
            "mul_scale": _mul_scale,
            "plus_equals": _plus_equals,
            "times_equals": _times_equals,
            "relu": _relu_in_place,
            "slice_assignment": _slice_assignment,
            "parameter_assigned": _parameter_assigned,
            "copy": _copy_in_place,
            "zero_a_view": _zero_a_view,
            "changed_before": _input_changed_before,
            "addcmul": _addcmul_in_place,
        }.items()
    )
)


# ---- constants -----------------------------------------------------------------------------------


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = F.linear(x, m.w)
    return fixed + torch.tanh(F.linear(x, m.w))


CONSTANT = table(
    Case(
        "detached_and_used",
        lambda: net(
            lambda m, x: F.linear(x, m.w.detach()) + F.linear(x.cos(), m.w), rows(4), w=normal(3, 4)
        ),
    ),
    Case(
        "data_and_used",
        lambda: net(
            lambda m, x: F.linear(x, m.w.data) + F.linear(x.cos(), m.w), rows(4), w=normal(3, 4)
        ),
    ),
    Case("no_grad_and_used", lambda: net(_no_grad, rows(4), w=normal(3, 4)), general=None),
    Case(
        "only_detached",
        lambda: net(
            lambda m, x: F.linear(x, m.w.detach()) + m.b, rows(4), w=normal(3, 4), b=normal(3)
        ),
        general=None,
    ),
    Case(
        "activation_detached",
        lambda: net(
            lambda m, x: m.b(m.a(x).tanh().detach()) + m.c(x),
            rows(4),
            a=linear(4, 5),
            b=linear(5, 3),
            c=linear(),
        ),
        general=None,
    ),
    Case(
        "dtype_and_device_read",
        lambda: net(
            lambda m, x: m.a(x.to(m.a.weight.dtype).to(m.spare.device)) * m.spare.shape[0],
            rows(4),
            a=linear(),
            spare=normal(2),
        ),
        general=None,
    ),
    Case(
        "unused_parameter",
        lambda: net(lambda m, x: m.a(x), rows(4), a=linear(), spare=normal(2, 3)),
        general=None,
    ),
    Case(
        "unused_module",
        lambda: net(lambda m, x: m.a(x), rows(4), a=linear(), spare=linear()),
        general=None,
    ),
)


# ---- likelihoods on shapes of their own ----------------------------------------------------------

SHAPES = table(
    Case(
        "no_positions_gaussian",
        lambda: net(lambda m, x: m.b(torch.tanh(m.a(x))), rows(4), **two_layers()),
        Gaussian((0.5, 1.0, 2.0)),
    ),
    Case(
        "image_event",
        lambda: net(lambda m, x: m.a(x), normal(2, 1, 3, 3), a=nn.Conv2d(1, 2, 2)),
        Gaussian(0.7, event_ndim=3),
    ),
    Case(
        "temperature",
        lambda: net(lambda m, x: m.b(torch.tanh(m.a(x))), rows(5, 4), **two_layers()),
        Categorical(temperature=1.7),
    ),
)

ALL = IN_PLACE | CONSTANT | SHAPES
