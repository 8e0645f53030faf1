"""Parameters that scale and shift data, in every shape that broadcasts."""

from __future__ import annotations

import torch
from torch import nn

from cases.base import Case, normal, table
from cases.builders import between, elementwise

ALL = table(
    Case("scale_vector", lambda: elementwise(lambda m, h: h * m.s, 5, 4, s=normal(4))),
    Case("scale_reversed", lambda: elementwise(lambda m, h: m.s * h, 5, 4, s=normal(4))),
    Case("scale_call", lambda: elementwise(lambda m, h: torch.mul(h, m.s), 5, 4, s=normal(4))),
    Case("scale_method", lambda: elementwise(lambda m, h: h.mul(m.s), 5, 4, s=normal(4))),
    Case("scale_scalar", lambda: elementwise(lambda m, h: h * m.s, 5, 4, s=normal())),
    Case("scale_one", lambda: elementwise(lambda m, h: h * m.s, 5, 4, s=normal(1))),
    Case("scale_column", lambda: elementwise(lambda m, h: h * m.s, 5, 4, s=normal(5, 1))),
    Case("scale_grid", lambda: elementwise(lambda m, h: h * m.s, 5, 4, s=normal(5, 4))),
    Case("scale_leading_ones", lambda: elementwise(lambda m, h: h * m.s, 5, 4, s=normal(1, 1, 4))),
    Case("scale_channels", lambda: elementwise(lambda m, h: h * m.s, 2, 3, 4, s=normal(2, 1, 1))),
    Case(
        "scale_wider_than_data",
        lambda: elementwise(lambda m, h: h[..., :1] * m.s, 5, 4, s=normal(4)),
    ),
    Case("divide", lambda: elementwise(lambda m, h: h / m.s, 5, 4, s=normal(4) + 3), general=None),
    Case(
        "divided_by_data",
        lambda: elementwise(lambda m, h: m.s / (h + 3), 5, 4, s=normal(4)),
        general=None,
    ),
    Case(
        "one_plus_scale",
        lambda: elementwise(lambda m, h: h * (1 + m.s), 5, 4, s=normal(4)),
        general=None,
    ),
    Case(
        "exponential_scale",
        lambda: elementwise(lambda m, h: h * m.s.exp(), 5, 4, s=normal()),
        general=None,
    ),
    Case("shift_vector", lambda: elementwise(lambda m, h: h + m.b, 5, 4, b=normal(4))),
    Case("shift_reversed", lambda: elementwise(lambda m, h: m.b + h, 5, 4, b=normal(4))),
    Case("shift_scalar", lambda: elementwise(lambda m, h: h + m.b, 5, 4, b=normal())),
    Case("shift_column", lambda: elementwise(lambda m, h: h + m.b, 5, 4, b=normal(5, 1))),
    Case("shift_grid", lambda: elementwise(lambda m, h: h + m.b, 5, 4, b=normal(5, 4))),
    Case("shift_leading_one", lambda: elementwise(lambda m, h: h + m.b, 5, 4, b=normal(1, 5, 4))),
    Case(
        "shift_wider_than_data",
        lambda: elementwise(lambda m, h: h.sum(1, keepdim=True) + m.b, 5, 4, b=normal(5, 4)),
    ),
    Case(
        "shift_alpha",
        lambda: elementwise(lambda m, h: torch.add(h, m.b, alpha=2.5), 5, 4, b=normal(4)),
        general=None,
    ),
    Case("subtract", lambda: elementwise(lambda m, h: h - m.b, 5, 4, b=normal(4)), general=None),
    Case(
        "subtract_from", lambda: elementwise(lambda m, h: m.b - h, 5, 4, b=normal(4)), general=None
    ),
    Case(
        "addcmul",
        lambda: elementwise(
            lambda m, h: torch.addcmul(m.b, h, m.s), 5, 4, b=normal(4), s=normal(4, seed=1)
        ),
        general=None,
    ),
    Case("prelu", lambda: elementwise(lambda m, h: m.act(h), 5, 4, act=nn.PReLU()), general=None),
    Case("prelu_channels", lambda: between(nn.PReLU(3), 3, 3, 4), general=None),
    Case(
        "hand_written_rms_norm",
        lambda: elementwise(
            lambda m, h: m.s * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)),
            5,
            4,
            s=normal(4),
        ),
    ),
)
