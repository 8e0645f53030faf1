"""The Nyström form of XTrace, for positive semi-definite operators."""

from __future__ import annotations

import math

import pytest
import torch
from linalg.operators import SIZE, SPECTRA, rotated
from linalg.test_traces import PROBES, SLACK, drawn, error_of_mean
from torch import Tensor

import fisherfn as ff

POSITIVE = [name for name in SPECTRA if name not in ("indefinite", "negative")]


def leave_one_out(matrix: Tensor, omega: Tensor, uniform: bool) -> Tensor:
    """The definition: a Nyström approximation for each test vector that is left out."""
    size, m = omega.shape
    found = []
    for i in range(m):
        others = omega[:, [j for j in range(m) if j != i]]
        y = matrix @ others
        low = y @ torch.linalg.solve(others.T @ y, y.T)
        rest = omega[:, i] @ (matrix - low) @ omega[:, i]
        if uniform:
            q, _ = torch.linalg.qr(others)
            p = omega[:, i] - q @ (q.T @ omega[:, i])
            rest = rest * (size - m + 1) / (p @ p)
        found.append(low.trace() + rest)
    return torch.stack(found)


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("name", ["geometric", "flat", "double top", "identity"])
def test_it_is_its_definition(name: str, probes: str) -> None:
    known, key = rotated(SPECTRA[name]), ff.random.key(3)
    omega = drawn(known, 8, probes, key).T
    single = leave_one_out(known.matrix, omega, probes != "rademacher")
    got = ff.linalg.xnystrace(known.mv, known.like, num_matvecs=8, key=key, probes=probes)
    torch.testing.assert_close(got.value, single.mean(), rtol=1e-10, atol=1e-11)
    stderr = error_of_mean(
        single, lambda kept: leave_one_out(known.matrix, omega[:, kept], probes != "rademacher")
    )
    torch.testing.assert_close(got.stderr, stderr, rtol=1e-6, atol=1e-11)
    assert got.matvecs == len(known.calls) == 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", POSITIVE)
def test_it_is_unbiased_and_says_its_error(name: str, dtype: torch.dtype) -> None:
    known, runs = rotated(SPECTRA[name], dtype=dtype), 25
    truth = known.matrix.double().trace()
    found = [
        ff.linalg.xnystrace(known.mv, known.like, num_matvecs=12, key=ff.random.key(s))
        for s in range(runs)
    ]
    values = torch.stack([e.value for e in found]).double()
    stderrs = torch.stack([e.stderr for e in found]).double()
    assert values.isfinite().all()
    rounding = 16 * torch.finfo(dtype).eps * max(float(truth), 1e-30)
    assert (values.mean() - truth).abs() <= 5 * values.std() / math.sqrt(runs) + rounding
    happened = (values - truth).square().mean().sqrt()
    assert happened <= SLACK * stderrs.square().mean().sqrt() + 1e-30


def test_it_stops_early_and_with_the_dimensions() -> None:
    known, key = rotated(SPECTRA["flat"]), ff.random.key(0)
    got = ff.linalg.xnystrace(known.mv, known.like, key=key, target_stderr=0.02, relative=True)
    assert got.stderr <= 0.02 * got.value
    assert 5 <= got.matvecs == len(known.calls) < 30
    whole = ff.linalg.xnystrace(known.mv, known.like, num_matvecs=100, key=key)
    assert whole.matvecs == SIZE
    torch.testing.assert_close(whole.value, known.matrix.trace(), rtol=1e-10, atol=0)


def test_it_needs_two_products() -> None:
    known = rotated(SPECTRA["flat"])
    with pytest.raises(ff.OptionError, match="xnystrace: expected num_matvecs= to be an integer"):
        ff.linalg.xnystrace(known.mv, known.like, num_matvecs=1, key=ff.random.key(0))
    with pytest.raises(ff.OptionError, match="xnystrace: expected probes= to be one of"):
        ff.linalg.xnystrace(known.mv, known.like, probes="normal", key=ff.random.key(0))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_an_operator_that_is_not_finite_gives_nan(broken: float) -> None:
    like = {"w": torch.zeros(6)}
    got = ff.linalg.xnystrace(lambda v: ff.tree.scale(v, broken), like, key=ff.random.key(0))
    assert got.value.isnan()
    assert not got.stderr.isfinite()
