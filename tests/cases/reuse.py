"""One parameter, several uses: its scores add before they are squared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases.base import Built, Case, normal, table, tokens
from cases.builders import linear, net, rows


def _recurrent(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    for t in range(x.shape[1]):
        h = torch.tanh(m.into(x[:, t]) + m.over(h))
    return m.head(h)


def _tied_head(m: Any, t: Tensor) -> Tensor:
    h = torch.tanh(m.mix(m.embed(t)))
    return F.linear(h, m.embed.weight)


class TiedModule(nn.Module):
    """Embedding and head share one parameter, as modules do it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(t))))


def _shared_convolution(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.conv(torch.tanh(m.conv(x))))
    return m.head(h.flatten(2).mean(-1))


ALL = table(
    Case(
        "recurrent_reuse",
        lambda: net(
            _recurrent, rows(3, 4), into=linear(4, 5), over=linear(5, 5), head=linear(5, 3)
        ),
    ),
    Case(
        "same_linear_twice",
        lambda: net(
            lambda m, x: m.head(torch.tanh(m.a(torch.tanh(m.a(x))))),
            rows(4),
            a=linear(4, 4),
            head=linear(),
        ),
    ),
    Case(
        "same_linear_twice_3d",
        lambda: net(
            lambda m, x: m.head(torch.tanh(m.a(torch.tanh(m.a(x))))),
            rows(5, 4),
            a=linear(4, 4),
            head=linear(),
        ),
    ),
    Case(
        "same_linear_on_different_lengths",
        lambda: net(
            lambda m, x: m.a(x).tanh().mean(1) + m.a(x[:, :2]).tanh().sum(1), rows(5, 4), a=linear()
        ),
    ),
    Case(
        "siamese",
        lambda: net(
            lambda m, x, y: m.head(torch.tanh(m.a(x)) * torch.tanh(m.a(y))),
            (rows(4), rows(4) + 1),
            a=linear(4, 4),
            head=linear(),
        ),
    ),
    Case(
        "tied_embedding_and_function",
        lambda: net(_tied_head, tokens(3, 4), embed=nn.Embedding(7, 4), mix=linear(4, 4)),
    ),
    Case("tied_embedding_and_head", lambda: Built(TiedModule().double(), tokens(3, 4))),
    Case(
        "tied_autoencoder",
        lambda: net(lambda m, x: torch.tanh(x @ m.w) @ m.w.T, rows(4), w=normal(4, 2)),
    ),
    Case(
        "same_norm_twice",
        lambda: net(
            lambda m, x: m.head(m.norm(torch.tanh(m.norm(x)))),
            rows(5, 4),
            norm=nn.LayerNorm(4),
            head=linear(),
        ),
    ),
    Case(
        "same_convolution_twice",
        lambda: net(
            _shared_convolution, rows(2, 6), conv=nn.Conv1d(2, 2, 3, padding=1), head=linear(2, 3)
        ),
    ),
    Case(
        "same_embedding_twice",
        lambda: net(
            lambda m, t, u: m.head(torch.tanh(m.e(t)) * m.e(u)),
            (tokens(3, 4), tokens(3, 4, seed=1)),
            e=nn.Embedding(7, 4),
            head=linear(),
        ),
    ),
    Case(
        "scale_and_shift_at_once",
        lambda: net(
            lambda m, x: m.head(torch.tanh(x * m.s + m.s)), rows(5, 4), s=normal(4), head=linear()
        ),
    ),
    Case(
        "bias_as_scale",
        lambda: net(lambda m, x: F.linear(x, m.w, m.b) * m.b, rows(4), w=normal(3, 4), b=normal(3)),
    ),
    Case(
        "weight_and_its_row_sums",
        lambda: net(lambda m, x: F.linear(x, m.w) + m.w.sum(1), rows(4), w=normal(3, 4)),
        general=None,
    ),
    Case(
        "row_of_weight_as_shift",
        lambda: net(lambda m, x: F.linear(x + m.w[0], m.w), rows(4), w=normal(3, 4)),
        general=None,
    ),
    Case(
        "square_weight_both_ways",
        lambda: net(lambda m, x: F.linear(torch.tanh(x @ m.w), m.w), rows(4), w=normal(4, 4)),
    ),
    Case(
        "parameter_times_itself",
        lambda: net(
            lambda m, x: m.head(torch.tanh(x * m.s * m.s)), rows(4), s=normal(4), head=linear()
        ),
    ),
    Case(
        "regulariser_in_the_output",
        lambda: net(lambda m, x: m.a(x) + m.a.weight.square().sum(1), rows(4), a=linear()),
        general=None,
    ),
)
