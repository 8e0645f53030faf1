"""XNysTrace: XTrace for positive semi-definite operators, with one product a test vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherfn.core.trees import Tree
from fisherfn.linalg.exchangeable import corrected, pair_determinant
from fisherfn.linalg.hutchinson import (
    FEWEST,
    at_least_rounding,
    check_sampling,
    stopper,
    summary,
)
from fisherfn.linalg.probes import check_probes
from fisherfn.linalg.results import Estimate
from fisherfn.linalg.sketch import Sketch
from fisherfn.linalg.space import Operator, Space


def xnystrace(
    mv: Operator,
    like: Tree,
    *,
    num_matvecs: int = 30,
    key: Tensor,
    probes: str = "sphere",
    target_stderr: float | None = None,
    relative: bool = False,
    chunk_size: int = 1,
) -> Estimate:
    """Estimate the trace of a positive semi-definite operator: leave one out, of a Nyström sketch.

    For each test vector i, with N_i = Y (ΩᵀY)⁻¹ Yᵀ, Y = A Ω, made without it,
    tr N_i + (P − m + 1) · ωᵢᵀ (A − N_i) ωᵢ / ‖p‖² is an unbiased estimate of the trace, p the part
    of ω_i that is orthogonal to the other test vectors; the result is the mean of all. (The factor
    is 1 instead for Rademacher test vectors.) Twice as many test vectors as by `xtrace` for the
    same number of products; for an operator with negative eigenvalues use that one.

    Args:
        mv: Function tree -> tree, v to A v, symmetric and positive semi-definite.
        like: Tree like v; only shapes, dtypes and devices matter.
        num_matvecs: Products, at most; at least 2. More than dimensions are not taken.
        key: Random key.
        probes: "sphere", "gaussian" or "rademacher".
        target_stderr: Stop as soon as the standard error is at most this, after 5 test vectors or
            more.
        relative: Whether the target is a share of the value.
        chunk_size: Vectors multiplied together by `torch.vmap`.

    Returns:
        `Estimate`, 0-d tensors; the standard error is that of the mean of the single estimates,
        with their covariance (see `linalg.exchangeable`), and never less than what rounding does.

    Raises:
        OptionError: an option does not exist, or fewer than 2 products.
        TreeMismatchError: mv does not return a tree like its argument.
        UnsupportedError: target_stderr inside `torch.compile` or `torch.func`.

    Cost: num_matvecs products, memory of twice as many vectors. Without target_stderr it compiles.

    Reference: Epperly, Tropp & Webber (2024), XTrace: Making the most of every sample in stochastic
    trace estimation, SIAM J. Matrix Anal. Appl. 45(1), section 2.3.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> scale = 0.5 ** torch.arange(50.0, dtype=torch.float64)  # trace 2
        >>> mv = lambda v: {"w": scale * v["w"]}
        >>> like = {"w": torch.zeros(50, dtype=torch.float64)}
        >>> found = ff.linalg.xnystrace(mv, like, num_matvecs=20, key=ff.random.key(0))
        >>> bool((found.value - 2).abs() < 5 * found.stderr), bool(found.stderr < 1e-3)
        (True, True)
    """
    space = Space("xnystrace", like, mv)
    check_sampling("xnystrace", num_matvecs, 2, key, chunk_size)
    check_probes("xnystrace", probes, 1.0)
    stop = stopper("xnystrace", target_stderr, relative)
    most = min(num_matvecs, space.size)
    if most == space.size:  # what spans everything is exact, and random signs may span less
        probes = "gaussian"
    sketch = Sketch(space, mv, key, probes, chunk_size, most)
    value = stderr = torch.zeros((), dtype=space.small, device=space.device)
    step = most if stop is None else chunk_size
    while sketch.count < most:
        sketch.grow(min(most, sketch.count + step))
        if sketch.count < min(FEWEST, most):
            continue
        value, stderr = _estimate(sketch, probes != "rademacher")
        if stop is not None and stop(value, stderr):
            break
    return Estimate(value.to(space.dtype), stderr.to(space.dtype), matvecs=sketch.count)


def _estimate(sketch: Sketch, uniform: bool) -> tuple[Tensor, Tensor]:
    """Return value and standard error for the test vectors so far."""
    space, basis, omega, r = sketch.space, sketch.basis, sketch.omega, sketch.r
    assert basis is not None
    assert omega is not None
    w = space.gram(basis.vectors, omega.vectors)
    g = space.gram(omega.vectors, omega.vectors)
    # Everything is done for A + νI, which is definite beyond rounding; ν P is taken off again.
    size = torch.linalg.matrix_norm(r)
    shift = 8.0 * space.eps * size / math.sqrt(space.size)
    h = w.T @ r
    h = (h + h.T) / 2 + shift * (g + g.T) / 2
    # eigh raises where it is not, and a broken operator is no mistake of ours
    finite = h.isfinite().all()
    h = torch.where(finite, h, torch.zeros_like(h))
    d, u = torch.linalg.eigh(h)
    floor = 8.0 * torch.finfo(d.dtype).eps * d[-1]
    some = d[-1] > 0  # of the zero operator, nothing is left to divide by
    root = u / torch.where(some, torch.maximum(d, floor), torch.ones_like(d)).sqrt()

    def squared(c: Tensor) -> Tensor:
        """Return the squared norms of (Y + ν Ω) c, column by column."""
        rc, wc = r @ c, w @ c
        return (rc * (rc + 2.0 * shift * wc)).sum(0) + shift**2 * (c * (g @ c)).sum(0)

    inverse = root @ root.T
    pivots = inverse.diagonal()
    z, wz = r @ inverse, w @ inverse
    # inner products of the columns of (Y + ν Ω) inverse
    zz = z.T @ (z + shift * wz) + shift * wz.T @ z + shift**2 * inverse @ g @ inverse
    lost = zz.diagonal()
    whole = squared(root).sum()
    if sketch.count == space.size:  # nothing is left to chance
        value, stderr = whole - shift * space.size, torch.zeros_like(whole)
    else:
        free = space.size - sketch.count
        rest = 1.0 / pivots
        determinant, tell = pair_determinant(pivots.unsqueeze(1), pivots, inverse)
        rests = pivots / determinant
        if uniform:
            # one over what is left of each test vector beside the others, and beside all but two
            around = torch.linalg.inv(g)
            left = around.diagonal()
            rest = rest * left * (free + 1)
            areas, apart = pair_determinant(left.unsqueeze(1), left, around)
            rests, tell = rests * areas / left * (free + 2), tell & apart
        single = whole - lost / pivots + rest
        pair = pivots * lost.unsqueeze(1) + pivots.unsqueeze(1) * lost - 2.0 * inverse * zz
        fewer = torch.where(tell, whole - pair / determinant + rests, torch.nan)
        value, stderr = summary(corrected(single, fewer))
        value = value - shift * space.size
    value = torch.where(some, value, torch.zeros_like(value))
    value = torch.where(finite, value, torch.nan)
    stderr = torch.where(some, stderr, torch.zeros_like(stderr))
    stderr = torch.where(finite, stderr, torch.nan)
    # the shift is of the size of the rounding in h, which is what it comes to in the trace
    rounding = shift * math.sqrt(space.size * sketch.count)
    return value, torch.hypot(at_least_rounding(space, stderr, value.reshape(1, 1)), rounding)
