"""Uses of parameters that no layer rule knows; autograd knows them all."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from cases.base import Built, Case, normal, table
from cases.builders import linear, net, rows


def _experts(m: Any, x: Tensor) -> Tensor:
    choice = m.gate(x).argmax(-1)
    out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
    for number, expert in enumerate((m.first, m.second)):
        rows = choice == number
        out[rows] = expert(x[rows])
    return out + 0.1 * m.gate(x).sum(-1, keepdim=True)


class Product(torch.autograd.Function):
    """x @ w.T with a backward pass of its own, written for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class StraightThrough(torch.autograd.Function):
    """Sign forward, identity backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def _where(m: Any, x: Tensor) -> Tensor:
    hidden = (torch.arange(x.shape[1]) % 2 == 0).unsqueeze(-1)
    return m.head(torch.tanh(m.a(torch.where(hidden, m.token, x))))


def _scripted() -> Built:
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.script(inner)
    return net(lambda m, x: m.head(m.inner(x)), rows(4), inner=inner, head=linear())


def _recurrent_module(module: nn.Module, width: int) -> Built:
    return net(lambda m, x: m.head(m.rnn(x)[0]), rows(4, 3), rnn=module, head=linear(width, 3))


ALL = table(
    Case("lstm", lambda: _recurrent_module(nn.LSTM(3, 4, batch_first=True), 4), general=None),
    Case(
        "lstm_two_ways",
        lambda: _recurrent_module(
            nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True), 4
        ),
        general=None,
    ),
    Case("gru", lambda: _recurrent_module(nn.GRU(3, 4, batch_first=True), 4), general=None),
    Case("rnn", lambda: _recurrent_module(nn.RNN(3, 4, batch_first=True), 4), general=None),
    Case(
        "lstm_cell",
        lambda: net(
            lambda m, x: m.head(m.cell(x)[0]), rows(3), cell=nn.LSTMCell(3, 4), head=linear()
        ),
        general=None,
    ),
    Case(
        "weight_norm",
        lambda: net(
            lambda m, x: m.head(torch.tanh(m.a(x))),
            rows(4),
            a=parametrizations.weight_norm(linear(4, 4)),
            head=linear(),
        ),
        general=None,
    ),
    Case(
        "spectral_norm",
        lambda: net(
            lambda m, x: m.head(torch.tanh(m.a(x))),
            rows(4),
            a=parametrizations.spectral_norm(linear(4, 4)),
            head=linear(),
        ),
        general=None,
    ),
    Case(
        "orthogonal",
        lambda: net(
            lambda m, x: m.head(torch.tanh(m.a(x))),
            rows(4),
            a=parametrizations.orthogonal(linear(4, 4)),
            head=linear(),
        ),
        general=None,
    ),
    Case("scripted", _scripted, general=None),
    Case(
        "experts",
        lambda: net(
            _experts, normal(6, 4, seed=5), gate=linear(4, 2), first=linear(), second=linear()
        ),
        general=None,
    ),
    Case(
        "stacked_experts",
        lambda: net(
            lambda m, x: torch.einsum(
                "be,beo->bo", F.softmax(m.gate(x), -1), torch.einsum("bi,eio->beo", x, m.w).tanh()
            ),
            rows(4),
            gate=linear(4, 2),
            w=normal(2, 4, 3),
        ),
        general=("w",),
    ),
    Case(
        "concatenated_weights",
        lambda: net(
            lambda m, x: F.linear(x, torch.cat([m.a, m.b])),
            rows(4),
            a=normal(1, 4),
            b=normal(2, 4, seed=1),
        ),
        general=("a", "b"),
    ),
    Case(
        "stacked_weights",
        lambda: net(
            lambda m, x: F.linear(x, torch.stack([m.a, m.b, m.a])),
            rows(4),
            a=normal(4),
            b=normal(4, seed=1),
        ),
        general=("a", "b"),
    ),
    Case(
        "concatenated_and_seen",
        lambda: net(
            lambda m, x: F.linear(x, torch.cat([m.a, m.b])) + F.linear(x, m.a),
            rows(4),
            a=normal(1, 4),
            b=normal(2, 4, seed=1),
        ),
        general=("a", "b"),
    ),
    Case(
        "custom_function",
        lambda: net(
            lambda m, x: m.head(torch.tanh(Product.apply(x, m.w))),
            rows(4),
            w=normal(4, 4),
            head=linear(),
        ),
        general=("w",),
    ),
    Case(
        "straight_through",
        lambda: net(
            lambda m, x: m.head(StraightThrough.apply(m.a(x))),
            rows(4),
            a=linear(4, 4),
            head=linear(),
        ),
        general=None,
    ),
    Case(
        "mask_token",
        lambda: net(_where, rows(4, 4), token=normal(4), a=linear(4, 4), head=linear()),
        general=("token",),
    ),
    Case(
        "nonlinear_weight",
        lambda: net(
            lambda m, x: F.linear(x, m.w.tanh(), m.b), rows(4), w=normal(3, 4), b=normal(3)
        ),
        general=None,
    ),
    Case(
        "masked_weight",
        lambda: net(
            lambda m, x: F.linear(x, m.w * torch.tensor([1.0, 0.0, 1.0, 1.0])),
            rows(4),
            w=normal(3, 4),
        ),
        general=None,
    ),
    Case(
        "aten_operation",
        lambda: net(lambda m, x: torch.ops.aten.mm(x, m.w), rows(4), w=normal(4, 3)),
        general=None,
    ),
    Case(
        "aten_linear",
        lambda: net(
            lambda m, x: torch.ops.aten.linear(x, m.w, m.b) + m.a(x),
            rows(4),
            w=normal(3, 4),
            b=normal(3),
            a=linear(),
        ),
        general=None,
    ),
    Case(
        "attention_by_hand",
        lambda: net(
            lambda m, x: m.head(F.softmax(m.a(x) @ x.mT, -1) @ x),
            rows(5, 4),
            a=linear(4, 4),
            head=linear(),
        ),
    ),
    Case(
        "module_list_and_residual",
        lambda: net(
            lambda m, x: m.head(x + sum(torch.tanh(layer(x)) for layer in m.layers)),
            rows(4),
            layers=nn.ModuleList([linear(4, 4), linear(4, 4)]),
            head=linear(),
        ),
    ),
)
