"""Convolutions of wide layers are contracted row by row of their window; so is every case here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.grad import conv2d_weight

import cases
import fisherfn as ff
import oracles
from fisherfn.layers import convolution, numerics
from fisherfn.testing import assert_close

NAMES = [name for name in cases.ALL if name.startswith("conv")]


@pytest.mark.parametrize("blocks", [1, 2**20])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_window(name: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_NARROW", 1)
    monkeypatch.setattr(numerics, "_CPU_BLOCK", blocks)
    s, rtol = cases.ALL[name].setup(), cases.ALL[name].rtol
    scores = oracles.rows(s.problem, "empirical").scores
    seen = ff.gradient_moments(s.model, s.likelihood)(*s.args)
    assert_close(seen.mean, oracles.unravel(scores.mean(0), s.params), rtol, "mean")
    assert_close(seen.square, oracles.unravel(scores.square().mean(0), s.params), rtol, "square")
    rows = ff.per_sample_gradients(s.model, s.likelihood)(*s.args)
    assert_close(rows, oracles.unravel(scores, s.params), rtol, "scores")
    norms = ff.score_norms(s.model, s.likelihood)(*s.args)
    assert_close(norms, scores.square().sum(1), rtol, "norms")
    specs = ff.groups.infer(s.params, rules=[("", "channel")])
    groups = ff.grouped(s.model, s.likelihood, specs, fisher="empirical")(*s.args)
    squares = oracles.unravel(scores.square().mean(0), s.params)
    assert_close(groups.values, ff.groups.reduce(squares, specs), rtol, "groups")


@pytest.mark.parametrize(
    ("channels", "outputs", "height", "rows"),
    [(10, 2, 4, 1), (11, 2, 4, 3), (11, 30, 12, 3), (11, 50, 12, 1)],
)
def test_narrow_windows_stay_whole(channels: int, outputs: int, height: int, rows: int) -> None:
    """Three rows of 3 x 11 inputs are worth three products, those of 3 x 10 are not.

    Nor are they where there are few places beside the outputs, here (height - 2) x 2.
    """
    with torch.random.fork_rng(devices=[]):
        layer = torch.nn.Conv2d(channels, outputs, 3)
    model, params, buffers = ff.functional(layer)
    seen = ff.capture(model)(params, buffers, torch.zeros(2, channels, height, 4))
    form = seen.pullback(torch.ones(2, outputs, height - 2, 2))["weight"].uses[0][0]
    assert isinstance(form, convolution.Unfolded)
    assert form._rows_of_window == rows


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_precision_follows_the_convolutions(precision: str) -> None:
    """The contraction rounds as the convolution's own gradient does; the flags stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPU too
        layer = torch.nn.Conv2d(64, 64, 3).cuda()
        x, g = torch.randn(4, 64, 16, 16).cuda(), torch.randn(4, 64, 14, 14).cuda()
    model, params, buffers = ff.functional(layer)
    exact = conv2d_weight(x.double(), layer.weight.shape, g.double())
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = precision
    try:
        inner = torch.backends.cuda.matmul.fp32_precision
        got = ff.capture(model)(params, buffers, x).pullback(g)["weight"].sum()
        assert torch.backends.cuda.matmul.fp32_precision == inner
    finally:
        cudnn.conv.fp32_precision = before
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert (error < 1e-6) == (precision == "ieee"), error
    assert error < 1e-2
