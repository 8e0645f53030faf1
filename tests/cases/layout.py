"""Where the examples are: first, flattened away, behind time, or nowhere at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cases.base import Case, normal, table, tokens
from cases.builders import linear, net, rows, two_layers


def _flat(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.reshape(-1, x.shape[-1])))
    return m.b(h).reshape(*x.shape[:2], -1)


def _flat_time_first(m: Any, x: Tensor) -> Tensor:
    size, length = x.shape[:2]
    h = torch.tanh(m.a(x.transpose(0, 1).reshape(length * size, -1)))
    return m.b(h).reshape(length, size, -1).transpose(0, 1)


def _time_first(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x.transpose(0, 1)))).transpose(0, 1)


def _examples_last(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x.permute(1, 2, 0).mT)).permute(1, 0, 2))


def _positional(m: Any, t: Tensor) -> Tensor:
    h = m.embed(t) + m.place(torch.arange(t.shape[1]))
    return m.head(torch.tanh(h))


def _per_example_function(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: m.b(torch.tanh(m.a(row))))(x)


def _sorted_rows(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return m.b(torch.tanh(m.a(x[order])))[order.argsort()]


def _rolled_rows(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x.roll(1, 0))).roll(-1, 0))


def _class_token(m: Any, x: Tensor) -> Tensor:
    h = torch.cat([m.cls.expand(x.shape[0], -1, -1), m.a(x)], dim=1)
    return m.b(torch.tanh(h).mean(1))


ALL = table(
    Case("flattened_batch", lambda: net(_flat, rows(5, 4), **two_layers())),
    Case(
        "flattened_batch_time_first",
        lambda: net(_flat_time_first, rows(5, 4), **two_layers()),
        general=None,
    ),
    Case(
        "flattened_time_first_coincident_sizes",
        lambda: net(_flat_time_first, normal(4, 4, 4), **two_layers()),
        general=None,
    ),
    Case("time_first", lambda: net(_time_first, rows(5, 4), **two_layers()), general=None),
    Case(
        "time_first_coincident_sizes",
        lambda: net(_time_first, normal(4, 4, 4), **two_layers()),
        general=None,
    ),
    Case(
        "examples_in_the_middle",
        lambda: net(_examples_last, rows(5, 4), **two_layers()),
        general=None,
    ),
    Case(
        "positional_embedding",
        lambda: net(
            _positional,
            tokens(3, 5),
            embed=nn.Embedding(7, 4),
            place=nn.Embedding(6, 4),
            head=linear(),
        ),
    ),
    Case(
        "positional_coincident_sizes",
        lambda: net(
            _positional,
            tokens(4, 4),
            embed=nn.Embedding(7, 4),
            place=nn.Embedding(6, 4),
            head=linear(),
        ),
    ),
    Case(
        "positional_parameter_sliced",
        lambda: net(
            lambda m, x: m.head(torch.tanh(x + m.place[:, : x.shape[1]])),
            rows(5, 4),
            place=normal(1, 8, 4),
            head=linear(),
        ),
        general=None,
    ),
    Case(
        "linear_of_a_parameter",
        lambda: net(
            lambda m, x: m.head(torch.tanh(x + m.a(m.place))),
            rows(5, 4),
            place=normal(5, 4),
            a=linear(4, 4),
            head=linear(),
        ),
        general=None,
    ),
    Case(
        "linear_of_a_constant",
        lambda: net(
            lambda m, x: m.head(torch.tanh(x + m.a(torch.ones(4, dtype=x.dtype)))),
            rows(5, 4),
            a=linear(4, 4),
            head=linear(),
        ),
        general=None,
    ),
    Case(
        "written_with_vmap",
        lambda: net(_per_example_function, rows(4), **two_layers()),
        general=None,
    ),
    Case(
        "written_with_vmap_sequence",
        lambda: net(_per_example_function, rows(5, 4), **two_layers()),
        general=None,
    ),
    Case(
        "sorted_rows", lambda: net(_sorted_rows, normal(6, 4, seed=2), **two_layers()), general=None
    ),
    Case("rolled_rows", lambda: net(_rolled_rows, rows(4), **two_layers()), general=None),
    Case(
        "class_token",
        lambda: net(_class_token, rows(5, 4), cls=normal(1, 1, 5), **two_layers()),
        general=None,
    ),
    Case("one_example", lambda: net(_flat, normal(1, 5, 4), **two_layers())),
    Case("one_position", lambda: net(_flat, rows(1, 4), **two_layers())),
    Case(
        "one_of_everything",
        lambda: net(
            lambda m, x: m.b(torch.tanh(m.a(x))), normal(1, 1, 1), a=linear(1, 1), b=linear(1, 2)
        ),
    ),
)
