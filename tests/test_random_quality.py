"""Random numbers: statistics of bits, uniforms, normals, signs and classes.

The keys are fixed, so nothing here is flaky; the bounds would be missed by chance once in 10^4.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fisherfn.core import random

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def z_score(counts: Tensor, expected: Tensor | float) -> float:
    """Chi-square statistic in standard deviations from its mean."""
    expected = torch.as_tensor(expected, dtype=torch.float64).expand(counts.shape)
    chi2 = ((counts.double() - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def kolmogorov(u: Tensor) -> float:
    """√n times the distance of a sample from the uniform distribution; above 2.2 once in 10^4."""
    u = u.flatten().double().sort().values
    grid = torch.arange(len(u) + 1, dtype=torch.float64) / len(u)
    return math.sqrt(len(u)) * max(
        (u - grid[:-1]).abs().max().item(), (u - grid[1:]).abs().max().item()
    )


def bits_of(words: Tensor) -> Tensor:
    return (words.unsqueeze(-1) >> torch.arange(64)) & 1


def neighbours(kind: str) -> tuple[Tensor, Tensor]:
    """Return 64-bit words that differ in one step of a seed, an id, a counter, or the use."""
    key, n = random.key(42), torch.arange(4000)
    if kind == "seeds":
        root = torch.tensor(random._ROOT)
        return random.bits(random._fold("", root, n)), random.bits(random._fold("", root, n + 1))
    if kind == "ids":
        return random.bits(random.fold_in(key, n)), random.bits(random.fold_in(key, n + 1))
    if kind == "nested":
        first = random.fold_in(random.fold_in(key, n), 0)
        return random.bits(first), random.bits(random.fold_in(random.fold_in(key, 0), n))
    if kind == "counters":
        words = random.bits(key, 4001)
        return words[:-1], words[1:]
    if kind == "halves":
        return random.fold_in(key, n).unbind(-1)  # type: ignore[return-value]
    keys = random.fold_in(key, n)
    return random.bits(keys), random.fold_in(keys, 0)[:, 0]  # "use": a draw and a child of one key


KINDS = ["seeds", "ids", "nested", "counters", "halves", "use"]


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_independent(kind: str) -> None:
    a, b = (bits_of(words).double() for words in neighbours(kind))
    n = len(a)
    # Every bit is balanced and uncorrelated with every bit of the other: 64 x 64 normal numbers.
    for sample in (a, b):
        assert (sample.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)
    correlation = (2 * a - 1).T @ (2 * b - 1) / math.sqrt(n)
    assert correlation.abs().max() < 5.5
    assert abs(correlation.square().mean().item() - 1) < 5 * math.sqrt(2 / 64**2)
    # Pairs of leading nibbles fill the 256 cells evenly.
    cells = [(random_word >> 60) & 15 for random_word in neighbours(kind)]
    assert abs(z_score(torch.bincount(cells[0] * 16 + cells[1], minlength=256), n / 256)) < 5


@pytest.mark.parametrize("what", ["seed", "data", "first half", "second half"])
def test_every_input_bit_flips_every_output_bit_half_of_the_time(what: str) -> None:
    n = 2000
    flip = torch.ones((), dtype=torch.int64) << torch.arange(64)
    start = random.bits(random.key(5), n).unsqueeze(-1)
    if what == "seed":
        root = torch.tensor(random._ROOT)
        before, after = (random.bits(random._fold("", root, s)) for s in (start, start ^ flip))
    elif what == "data":
        before, after = (random.fold_in(random.key(6), s)[..., 1] for s in (start, start ^ flip))
    else:
        column = 0 if what == "first half" else 1
        flips = torch.nn.functional.pad(flip.unsqueeze(-1), (column, 1 - column))
        keys = random.fold_in(random.key(7), torch.arange(n)).unsqueeze(1)
        before, after = random.bits(keys), random.bits(keys ^ flips)
        if column == 1:  # the lowest bit of the second half is set anyway
            before, after = before.expand_as(after)[:, 1:], after[:, 1:]
    rate = bits_of(before ^ after).double().mean(0)
    assert (rate - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("open", [False, True])
def test_uniform_numbers_are_uniform_and_below_one(dtype: torch.dtype, open: bool) -> None:
    u = random.uniform(random.key(1), 100_000, dtype, open=open)
    digits = random._DIGITS[dtype]
    assert u.dtype == dtype
    assert u.max() <= 1 - 2.0**-digits
    assert u.min() >= (2.0**-digits if open else 0)
    assert kolmogorov(u.double() + (0 if open else 2.0 ** (-1 - digits))) < 2.2 + 320 * 2.0**-digits
    last = (u.double() * 2.0**digits).long() & 3  # the resolution is used to the last bit
    counts = torch.bincount(last, minlength=4)
    assert (counts[::2].sum() == 0) if open else abs(z_score(counts, 25_000)) < 5


@pytest.mark.parametrize("shape", ["one key", "many keys"])
def test_serial_pairs_fill_the_square(shape: str) -> None:
    if shape == "one key":
        u = random.uniform(random.key(3), (100_000, 2))
    else:
        u = random.uniform(random.fold_in(random.key(3), torch.arange(100_000)), 2)
    cell = (u * 16).long()
    assert abs(z_score(torch.bincount(cell[:, 0] * 16 + cell[:, 1], minlength=256), 1e5 / 256)) < 5


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal_numbers_are_normal(dtype: torch.dtype) -> None:
    n = 200_000
    x = random.normal(random.key(2), n, dtype)
    assert x.dtype == dtype
    x = x.double()
    assert x.isfinite().all()
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((x**power).mean().item() - moment) < 5 * math.sqrt(variance / n) + 1e-3
    if dtype in FLOATS[:2]:
        assert kolmogorov(torch.special.ndtr(x)) < 2.2
        assert x.abs().max() > 4
    # The extreme words: symmetric, finite, far out.
    ends = torch.tensor([-(2**63), 2**63 - 1])
    keys = torch.stack([ends, torch.zeros(2, dtype=torch.int64)], -1)
    original, random_mix = random._mix, lambda words: ends.reshape(words.shape)
    try:
        random._mix = random_mix
        low, high = random.normal(keys, (), dtype).tolist()
    finally:
        random._mix = original
    assert -low == high
    assert 5 < high < 9


def test_signs_are_balanced_and_pairwise_independent() -> None:
    signs = random.rademacher(random.fold_in(random.key(4), torch.arange(4000)), 128, torch.float64)
    assert signs.abs().eq(1).all()
    products = signs.T @ signs / math.sqrt(4000)
    products.fill_diagonal_(0)
    assert products.abs().max() < 5.5
    assert (signs.sum(0) / math.sqrt(4000)).abs().max() < 5


@pytest.mark.parametrize("classes", [1, 2, 10, 128, 129, 1000])
@pytest.mark.parametrize("form", ["probs", "logits"])
def test_classes_have_their_probabilities(classes: int, form: str) -> None:
    n = 100_000
    logits = random.normal(random.key(classes), classes, torch.float64)
    keys = random.fold_in(random.key(8), torch.arange(n))
    rows = logits.softmax(-1) if form == "probs" else logits
    drawn = random.categorical(keys, **{form: rows.float() if form == "logits" else rows})
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=classes)
    assert len(counts) == classes
    if classes > 1:
        assert abs(z_score(counts, n * logits.softmax(-1))) < 5


def test_every_row_has_its_own_key_and_probabilities() -> None:
    keys = random.fold_in(random.key(0), torch.arange(20_000)).reshape(5, 4000, 2)
    p = random.uniform(random.key(1), (5, 1, 200), torch.float64)
    drawn = random.categorical(keys, p)
    assert drawn.shape == (5, 4000)
    for row in range(5):
        assert torch.equal(drawn[row], random.categorical(keys[row], p[row]))
        counts = torch.bincount(drawn[row], minlength=200)
        assert abs(z_score(counts, 4000 * p[row, 0] / p[row, 0].sum())) < 5


@pytest.mark.parametrize("classes", [3, 100, 500, 5000])
def test_classes_of_probability_zero_are_never_drawn(classes: int) -> None:
    keys = random.fold_in(random.key(1), torch.arange(20_000))
    possible = random.uniform(random.key(2), classes) < 0.2
    possible[classes // 2] = True
    possible[-1] = possible[0] = False  # the ends are where rounding would go
    for scale in (1.0, 1e-30, 1e30):
        assert possible[random.categorical(keys, possible * scale)].all()
    assert possible[random.categorical(keys, logits=possible.float().log())].all()


@pytest.mark.parametrize("u", [2.0**-24, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("classes", [7, 1000, 50_257])
def test_no_rounding_leads_out_of_the_possible_classes(
    u: float, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        random, "uniform", lambda key, shape, dtype, open: torch.full((*key.shape[:-1], *shape), u)
    )
    p = random.normal(random.key(0), (50, classes)).mul(4).exp()
    p[:, random.normal(random.key(1), classes) > 0] = 0
    p[:, -3:] = 0
    drawn = random.categorical(random.split(random.key(0), 50), p)
    assert (p.gather(-1, drawn.unsqueeze(-1)) > 0).all()


def test_small_probabilities_of_a_large_vocabulary_are_resolved() -> None:
    # One class has all but 1e-3; the other 49_151 share it, 2e-8 each, below float32's 2^-24 step.
    n, classes = 40_000, 49_152
    p = torch.full((classes,), 1e-3 / (classes - 1))
    p[17] = 1 - 1e-3
    keys = random.fold_in(random.key(3), torch.arange(n))
    drawn = torch.cat([random.categorical(chunk, p) for chunk in keys.split(2000)])
    rare = drawn[drawn != 17]
    assert abs(len(rare) - 1e-3 * n) < 5 * math.sqrt(1e-3 * n)
    assert kolmogorov((rare.double() + 0.5) / classes) < 2.2
    assert len(rare.unique()) == len(rare)


def test_rows_without_meaning_give_valid_classes() -> None:
    keys = random.split(random.key(0), 4)
    for classes in (5, 500):
        rows = torch.ones(4, classes)
        rows[0], rows[1], rows[2, classes // 2], rows[3] = torch.nan, 0, torch.nan, torch.inf
        for drawn in (random.categorical(keys, rows), random.categorical(keys, logits=rows)):
            assert ((drawn >= 0) & (drawn < classes)).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_any_float_dtype_are_read_in_float32_or_wider(dtype: torch.dtype) -> None:
    logits = random.normal(random.key(0), (300, 40)).to(dtype)
    keys = random.split(random.key(1), 300)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(
        random.categorical(keys, logits=logits), random.categorical(keys, logits=wide)
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by torch, at a first jvp
def test_labels_are_constants_to_every_derivative() -> None:
    keys, logits = random.split(random.key(0), 6), random.normal(random.key(1), (6, 300))

    def log_prob(z: Tensor) -> Tensor:
        labels = random.categorical(keys, logits=z)
        return z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum()

    labels = random.categorical(keys, logits=logits)
    want = torch.nn.functional.one_hot(labels, 300) - logits.softmax(-1)
    torch.testing.assert_close(torch.func.grad(log_prob)(logits), want)
    slope = torch.func.jvp(log_prob, (logits,), (want,))[1]
    torch.testing.assert_close(slope, want.square().sum())
