"""XTrace and XDiag: every product serves both the low-rank part and the random part."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.trees import Tree
from fisherfn.linalg.exchangeable import corrected, pair_determinant
from fisherfn.linalg.hutchinson import FEWEST, at_least_rounding, check_sampling, stopper, summary
from fisherfn.linalg.probes import check_probes
from fisherfn.linalg.results import Estimate
from fisherfn.linalg.sketch import Sketch
from fisherfn.linalg.space import Operator, Space, rows

_ADVICE = "Half of the products are with test vectors, half with the basis of their images."


def xtrace(
    mv: Operator,
    like: Tree,
    *,
    num_matvecs: int = 30,
    key: Tensor,
    probes: str = "sphere",
    density: float = 1.0,
    target_stderr: float | None = None,
    relative: bool = False,
    chunk_size: int = 1,
) -> Estimate:
    """Estimate the trace of a symmetric operator by XTrace: leave one out, of every test vector.

    For each test vector i, with Q_i an orthonormal basis of A times the others,
    tr(Q_iᵀ A Q_i) + (P − m + 1) · pᵀ A p / pᵀ p with p = (I − Q_i Q_iᵀ) ω_i is an unbiased
    estimate of the trace; the result is the mean of all. (The factor is 1 instead for Rademacher
    and sparse test vectors, whose direction is not uniform.)

    Args:
        mv: Function tree -> tree, v to A v, symmetric.
        like: Tree like v; only shapes, dtypes and devices matter.
        num_matvecs: Products, at most; rounded down to an even number, at least 4. Twice the
            dimensions give the trace exactly, and more are not taken.
        key: Random key.
        probes: "sphere", "gaussian" or "rademacher".
        density: Share of entries that are not zero; see `hutchinson`.
        target_stderr: Stop as soon as the standard error is at most this, after 5 test vectors or
            more. No product is wasted by looking.
        relative: Whether the target is a share of the value.
        chunk_size: Vectors multiplied together by `torch.vmap`.

    Returns:
        `Estimate`, 0-d tensors; the standard error is that of the mean of the single estimates,
        with their covariance (see `linalg.exchangeable`), and never less than what rounding does.

    Raises:
        OptionError: an option does not exist; or fewer than 4 products.
        TreeMismatchError: mv does not return a tree like its argument.
        UnsupportedError: target_stderr inside `torch.compile` or `torch.func`.

    Cost: num_matvecs products, memory of num_matvecs vectors. Without target_stderr it compiles.

    Reference: Epperly, Tropp & Webber (2024), XTrace: Making the most of every sample in stochastic
    trace estimation, SIAM J. Matrix Anal. Appl. 45(1), sections 2.1 to 2.3.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> scale = 0.5 ** torch.arange(50.0, dtype=torch.float64)  # trace 2
        >>> mv = lambda v: {"w": scale * v["w"]}
        >>> like = {"w": torch.zeros(50, dtype=torch.float64)}
        >>> found = ff.linalg.xtrace(mv, like, num_matvecs=30, key=ff.random.key(0))
        >>> bool((found.value - 2).abs() < 5 * found.stderr), bool(found.stderr < 1e-3)
        (True, True)
    """
    space = Space("xtrace", like, mv)
    check_sampling("xtrace", num_matvecs, 4, key, chunk_size, _ADVICE)
    check_probes("xtrace", probes, density)
    stop = stopper("xtrace", target_stderr, relative)
    most = min(num_matvecs // 2, space.size)
    sketch = Sketch(space, mv, key, probes, chunk_size, most, density)
    uniform = probes != "rademacher" and density == 1
    h = torch.zeros(0, 0, dtype=space.small, device=space.device)
    step = most if stop is None else chunk_size
    value = stderr = torch.zeros((), dtype=space.small, device=space.device)
    draws: Tensor | None = None
    while sketch.count < most:
        before = sketch.count
        sketch.grow(min(most, before + step))
        h = _project(sketch, h, before)
        if sketch.count == space.size:  # nothing is left to chance
            value, stderr, draws = h.diagonal().sum(), torch.zeros_like(stderr), None
        elif sketch.count > 1:
            single = _leave_one_out(sketch, h, uniform)
            draws = corrected(single, _leave_two_out(sketch, h, uniform))
            value, stderr = summary(draws)
        else:
            continue
        stderr = at_least_rounding(space, stderr, h)
        if stop is not None and sketch.count >= FEWEST and stop(value, stderr):
            break
    return Estimate(
        value.to(space.dtype),
        stderr.to(space.dtype),
        matvecs=2 * sketch.count,
        draws=None if draws is None else draws.to(space.dtype),
    )


def _project(sketch: Sketch, h: Tensor, before: int) -> Tensor:
    """Return H = Qᵀ A Q, given that of the first `before` columns."""
    space, basis = sketch.space, sketch.basis
    assert basis is not None
    columns = []
    for start in range(before, sketch.count, sketch.chunk_size):
        stop = min(sketch.count, start + sketch.chunk_size)
        z = space.apply(sketch.mv, rows(basis.vectors, start, stop), sketch.chunk_size)
        columns.append(space.gram(basis.vectors, z))
    new = torch.cat(columns, dim=1)
    # A is symmetric: what new columns say of old rows is what old columns would say of new rows
    upper = torch.cat([h, new[:before]], dim=1)
    return torch.cat([upper, torch.cat([new[:before].T, new[before:]], dim=1)])


def _leave_one_out(sketch: Sketch, h: Tensor, uniform: bool) -> Tensor:
    """Return the estimate without each of the test vectors, `[m]`."""
    space, basis, omega, r = sketch.space, sketch.basis, sketch.omega, sketch.r
    assert basis is not None
    assert omega is not None
    s, _ = sketch.directions()
    w = space.gram(basis.vectors, omega.vectors)
    u = w - s * (s * w).sum(0)  # the part of ω_i inside the range of the others
    inside = h.diagonal().sum() - (s * (h @ s)).sum(0)
    # pᵀ A p for p = ω − Q u, from A ω = Q r
    outside = ((w - 2.0 * u) * r).sum(0) + (u * (h @ u)).sum(0)
    if not uniform:
        return inside + outside
    squared = space.norms(omega.vectors) ** 2
    length = squared - (u * u).sum(0)
    # all directions are taken when nothing is left of ω
    some = length > space.eps * squared
    factor = (space.size - sketch.count + 1) / torch.where(some, length, torch.ones_like(length))
    return inside + torch.where(some, factor * outside, torch.zeros_like(outside))


def _leave_two_out(sketch: Sketch, h: Tensor, uniform: bool) -> Tensor:
    """Return the estimate from test vector i without i and j in the range, `[m, m]`.

    It is NaN where the two directions that are then missing are one, up to rounding.
    """
    space, basis, omega, r = sketch.space, sketch.basis, sketch.omega, sketch.r
    assert basis is not None
    assert omega is not None
    s, _ = sketch.directions()
    w = space.gram(basis.vectors, omega.vectors)
    # [i, j]: inner products of s_j with s_i, through A too, and with ω_i, A ω_i and A Q w_i
    g, hs, sw, sr, hw = s.T @ s, s.T @ h @ s, w.T @ s, r.T @ s, w.T @ h @ s
    mine, own = [x.diagonal().unsqueeze(1) for x in (sw, sr, hw)], hs.diagonal()
    one = torch.ones_like(g)
    determinant, some = pair_determinant(one, one, g)
    # u = w_i − α s_i − β s_j is the part of ω_i inside the range of the others
    alpha, beta = (mine[0] - g * sw) / determinant, (sw - g * mine[0]) / determinant
    inside = h.diagonal().sum() - (own.unsqueeze(1) + own - 2.0 * g * hs) / determinant
    wr, whw = (w * r).sum(0).unsqueeze(1), (w * (h @ w)).sum(0).unsqueeze(1)
    ur = wr - alpha * mine[1] - beta * sr
    uhu = whw - 2.0 * (alpha * mine[2] + beta * hw)
    uhu = uhu + alpha**2 * own.unsqueeze(1) + 2.0 * alpha * beta * hs + beta**2 * own
    outside = wr - 2.0 * ur + uhu
    if uniform:
        squared = space.norms(omega.vectors).unsqueeze(1) ** 2
        length = squared - (w * w).sum(0).unsqueeze(1) + alpha * mine[0] + beta * sw
        left = length > space.eps * squared
        outside = outside * (space.size - sketch.count + 2) / torch.where(left, length, 1.0)
        outside = torch.where(left, outside, 0.0)
    return torch.where(some, inside + outside, torch.nan)


def xdiag(
    mv: Operator,
    like: Tree,
    *,
    num_matvecs: int = 30,
    key: Tensor,
    probes: str = "rademacher",
    density: float = 1.0,
    chunk_size: int = 1,
) -> Estimate:
    """Estimate the diagonal of a symmetric operator by XDiag: leave one out, of every test vector.

    For each test vector i, with Q_i an orthonormal basis of A times the others,
    diag(Q_i Q_iᵀ A) + ω_i ∘ (I − Q_i Q_iᵀ) A ω_i is an unbiased estimate of the diagonal; the
    result is the mean of all.

    Args:
        mv: Function tree -> tree, v to A v, symmetric.
        like: Tree like v; only shapes, dtypes and devices matter.
        num_matvecs: Products; rounded down to an even number, at least 4. Twice the dimensions
            give the diagonal exactly, and more are not taken.
        key: Random key.
        probes: "rademacher", "gaussian" or "sphere"; signs have the least variance.
        density: Share of entries that are not zero; see `hutchinson`.
        chunk_size: Vectors multiplied together by `torch.vmap`.

    Returns:
        `Estimate` of trees like v. The standard errors take the single estimates as independent,
        which they are not: over all entries they are too small by up to 1.5 times.

    Raises:
        OptionError: an option does not exist; or fewer than 4 products.
        TreeMismatchError: mv does not return a tree like its argument.

    Cost: num_matvecs products, memory of 5/2 num_matvecs vectors. It compiles.

    Reference: Epperly, Tropp & Webber (2024), XTrace: Making the most of every sample in stochastic
    trace estimation, SIAM J. Matrix Anal. Appl. 45(1), section 3.3.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> a = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
        >>> mv = lambda v: {"w": a * (a @ v["w"])}  # rank one
        >>> like = {"w": torch.zeros(3, dtype=torch.float64)}
        >>> ff.linalg.xdiag(mv, like, num_matvecs=4, key=ff.random.key(0)).value["w"]
        tensor([16.,  4.,  1.], dtype=torch.float64)
    """
    space = Space("xdiag", like, mv)
    check_sampling("xdiag", num_matvecs, 4, key, chunk_size, _ADVICE)
    check_probes("xdiag", probes, density)
    most = min(num_matvecs // 2, space.size)
    sketch = Sketch(space, mv, key, probes, chunk_size, most, density)
    sketch.grow(most)
    assert sketch.basis is not None
    assert sketch.omega is not None
    s, pivots = sketch.directions()
    q = sketch.basis.vectors
    z = space.apply(mv, q, chunk_size)
    values, errors = [], []
    for qi, zi, oi, leaf in zip(q, z, sketch.omega.vectors, space.leaves, strict=True):
        qs, zs = (space.combine(s.T, [x])[0] for x in (qi, zi))
        scale = pivots.to(qi.device, qi.dtype).unsqueeze(-1)
        # (I − Q_i Q_iᵀ) A ω_i = Q s_i (s_iᵀ r_i)
        mean, stderr = summary(qs * (scale * oi - zs))
        if most == space.size:  # nothing is left to chance
            mean = stderr = torch.zeros_like(mean)
        values.append(((qi * zi).sum(0) + mean).reshape(leaf.shape))
        errors.append(stderr.reshape(leaf.shape))
    return Estimate(
        trees.unflatten(space.structure, values),
        trees.unflatten(space.structure, errors),
        matvecs=2 * most,
    )
