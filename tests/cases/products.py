"""Matrix products with parameters written in every way, and weights seen through views."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cases.base import Case, normal, table
from cases.builders import data, function
from oracles import Gaussian


def _narrow(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, p["w"].double(), p["b"].to(torch.float64))


ALL = table(
    Case(
        "function_linear",
        lambda: function(
            lambda p, x: F.linear(x, p["w"], p["b"]), data(4), w=normal(3, 4), b=normal(3, seed=1)
        ),
    ),
    Case(
        "at",
        lambda: function(
            lambda p, x: x @ p["w"] + p["b"], data(4), w=normal(4, 3), b=normal(3, seed=1)
        ),
    ),
    Case(
        "at_3d",
        lambda: function(lambda p, x: torch.tanh(x @ p["w"]).mean(1), data(5, 4), w=normal(4, 3)),
    ),
    Case("matmul", lambda: function(lambda p, x: torch.matmul(x, p["w"]), data(4), w=normal(4, 3))),
    Case(
        "mm",
        lambda: function(lambda p, x: torch.mm(x, p["w"]), data(4), w=normal(4, 3)),
        general=None,
    ),
    Case(
        "addmm",
        lambda: function(
            lambda p, x: torch.addmm(p["b"], x, p["w"]),
            data(4),
            w=normal(4, 3),
            b=normal(3, seed=1),
        ),
    ),
    Case(
        "addmm_scaled",
        lambda: function(
            lambda p, x: torch.addmm(p["b"], x, p["w"], beta=0.5, alpha=2.0),
            data(4),
            w=normal(4, 3),
            b=normal(3, seed=1),
        ),
        general=None,
    ),
    Case(
        "conv1d_of_gpt2",
        lambda: function(
            lambda p, x: torch.tanh(
                torch.addmm(p["b"], x.view(-1, 4), p["w"]).view(*x.shape[:-1], 3)
            ).mean(1),
            data(5, 4),
            w=normal(4, 3),
            b=normal(3, seed=1),
        ),
    ),
    Case("transposed_T", lambda: function(lambda p, x: x @ p["w"].T, data(4), w=normal(3, 4))),
    Case("transposed_t", lambda: function(lambda p, x: x @ p["w"].t(), data(4), w=normal(3, 4))),
    Case(
        "transposed_mT",
        lambda: function(lambda p, x: x @ p["w"].mT, data(4), w=normal(3, 4)),
        general=None,
    ),
    Case(
        "transposed_call",
        lambda: function(
            lambda p, x: torch.matmul(x, p["w"].transpose(0, 1)), data(5, 4), w=normal(3, 4)
        ),
    ),
    Case(
        "transposed_linear",
        lambda: function(lambda p, x: F.linear(x, p["w"].T), data(4), w=normal(4, 3)),
    ),
    Case(
        "permuted",
        lambda: function(lambda p, x: x @ p["w"].permute(1, 0), data(4), w=normal(3, 4)),
        general=None,
    ),
    Case(
        "viewed",
        lambda: function(
            lambda p, x: F.linear(x, p["w"].view(3, 4), p["b"].view(-1)),
            data(4),
            w=normal(12),
            b=normal(3, 1, seed=1),
        ),
    ),
    Case(
        "reshaped",
        lambda: function(lambda p, x: F.linear(x, p["w"].reshape(3, 4)), data(4), w=normal(2, 6)),
        general=None,
    ),
    Case(
        "same_dtype",
        lambda: function(lambda p, x: F.linear(x, p["w"].to(x.dtype)), data(4), w=normal(3, 4)),
    ),
    Case(
        "widened",
        lambda: function(
            _narrow,
            data(4),
            w=normal(3, 4, dtype=torch.float32),
            b=normal(3, seed=1, dtype=torch.float32),
        ),
        rtol=1e-5,
    ),
    Case("chunked", lambda: function(_chunk, data(5, 4), w=normal(9, 4), b=normal(9, seed=1))),
    Case("split", lambda: function(_split, data(5, 4), w=normal(8, 4), b=normal(8, seed=1))),
    Case(
        "sliced",
        lambda: function(
            lambda p, x: torch.tanh(F.linear(x, p["w"][:3])) * F.linear(x, p["w"][3:]),
            data(4),
            w=normal(6, 4),
        ),
        general=None,
    ),
    Case(
        "indexed_stack",
        lambda: function(
            lambda p, x: torch.tanh(x @ p["w"][0]) @ p["w"][1], data(3), w=normal(2, 3, 3)
        ),
        general=None,
    ),
    Case(
        "unbound",
        lambda: function(
            lambda p, x: torch.tanh(x @ p["w"].unbind()[0]) @ p["w"].unbind()[1],
            data(3),
            w=normal(2, 3, 3),
        ),
        general=None,
    ),
    Case(
        "weight_from_the_left",
        lambda: function(lambda p, x: (p["w"] @ x.T).T, data(4), w=normal(3, 4)),
        general=None,
    ),
    Case(
        "weight_from_the_left_3d",
        lambda: function(lambda p, x: torch.tanh(p["w"] @ x).mean(-1), data(4, 5), w=normal(3, 4)),
        general=None,
    ),
    Case(
        "vector_product",
        lambda: function(
            lambda p, x: (x @ p["w"]).unsqueeze(-1) * p["s"],
            data(4),
            w=normal(4),
            s=normal(3, seed=1),
        ),
        general=None,
    ),
    Case(
        "batched_product",
        lambda: function(
            lambda p, x: torch.bmm(x, p["w"].expand(x.shape[0], 4, 3)), data(2, 4), w=normal(4, 3)
        ),
        general=None,
    ),
    Case(
        "stacked_product",
        lambda: function(
            lambda p, x: torch.tanh(torch.matmul(x.unsqueeze(1), p["w"])).mean((1, 2)),
            data(2, 4),
            w=normal(5, 4, 3),
        ),
        general=None,
    ),
    Case(
        "low_rank_factors",
        lambda: function(
            lambda p, x: x @ p["a"] @ p["b"], data(4), a=normal(4, 2), b=normal(2, 3, seed=1)
        ),
    ),
    Case(
        "merged_factors",
        lambda: function(
            lambda p, x: x @ (p["a"] @ p["b"]), data(4), a=normal(4, 2), b=normal(2, 3, seed=1)
        ),
        general=None,
    ),
    Case(
        "einsum",
        lambda: function(
            lambda p, x: torch.einsum("bti,oi->bto", x, p["w"]).tanh().mean(1),
            data(5, 4),
            w=normal(3, 4),
        ),
        general=None,
    ),
    Case(
        "scalar_output",
        lambda: function(lambda p, x: F.linear(x, p["w"]).squeeze(-1), data(4), w=normal(1, 4)),
        Gaussian(0.5, event_ndim=0),
    ),
)


def _chunk(p: dict[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w, b) for w, b in zip(p["w"].chunk(3), p["b"].chunk(3), strict=True))
    return F.softmax(q @ k.mT, dim=-1) @ v


def _split(p: dict[str, Tensor], x: Tensor) -> Tensor:
    w1, w2, w3 = p["w"].split([2, 2, 4])
    b1, b2, b3 = torch.split(p["b"], [2, 2, 4])
    scores = F.softmax(F.linear(x, w1, b1) @ F.linear(x, w2, b2).mT, dim=-1)
    return scores @ F.linear(x, w3, b3)
