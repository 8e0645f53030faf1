"""Hutch++: the trace on a sketch of the range exactly, and of the rest by Hutchinson."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core.trees import Tree
from fisherfn.linalg.hutchinson import FEWEST, at_least_rounding, check_sampling, stopper, summary
from fisherfn.linalg.probes import Probes, check_probes
from fisherfn.linalg.results import Estimate
from fisherfn.linalg.sketch import Sketch
from fisherfn.linalg.space import Operator, Space, rows


def hutchpp(
    mv: Operator,
    like: Tree,
    *,
    num_matvecs: int = 30,
    key: Tensor,
    probes: str = "rademacher",
    density: float = 1.0,
    target_stderr: float | None = None,
    relative: bool = False,
    chunk_size: int = 1,
) -> Estimate:
    """Estimate the trace of a symmetric operator, exactly on the range of a third of the products.

    With Q an orthonormal basis of A Ω, tr A = tr(Qᵀ A Q) + tr((I − Q Qᵀ) A (I − Q Qᵀ)); the second
    term by `hutchinson`. For a positive semi-definite A the error falls like 1/num_matvecs, not
    like its root.

    Args:
        mv: Function tree -> tree, v to A v.
        like: Tree like v; only shapes, dtypes and devices matter.
        num_matvecs: Products, at most; a third of them for each part.
        key: Random key.
        probes: "rademacher", "gaussian" or "sphere".
        density: Share of entries that are not zero; see `hutchinson`.
        target_stderr: Stop as soon as the standard error is at most this, after 5 draws or more of
            the second term.
        relative: Whether the target is a share of the value.
        chunk_size: Vectors multiplied together by `torch.vmap`.

    Returns:
        `Estimate`, 0-d tensors.

    Raises:
        OptionError: an option does not exist; or fewer than 3 products.
        TreeMismatchError: mv does not return a tree like its argument.
        UnsupportedError: target_stderr inside `torch.compile` or `torch.func`.

    Cost: num_matvecs products, memory of num_matvecs/3 vectors twice. Without target_stderr it
    compiles.

    Reference: Meyer, Musco, Musco & Woodruff (2021), Hutch++: optimal stochastic trace estimation,
    SOSA, algorithm 1.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> mv = lambda v: {"w": v["w"].sum().expand(50)}  # rank one, trace 50
        >>> key = ff.random.key(0)
        >>> round(float(ff.linalg.hutchpp(mv, {"w": torch.zeros(50)}, num_matvecs=6, key=key)), 3)
        50.0
    """
    space = Space("hutchpp", like, mv)
    advice = "A third of the products goes into each of three parts."
    check_sampling("hutchpp", num_matvecs, 3, key, chunk_size, advice)
    check_probes("hutchpp", probes, density)
    stop = stopper("hutchpp", target_stderr, relative)
    third = min(num_matvecs // 3, space.size)
    first, second = random.split(key).unbind(0)
    sketch = Sketch(space, mv, first, probes, chunk_size, third, density)
    sketch.grow(third)
    assert sketch.basis is not None
    q = sketch.basis.vectors
    parts = []
    for start in range(0, third, chunk_size):
        part = rows(q, start, start + chunk_size)
        parts.append(space.dots(part, space.apply(mv, part, chunk_size)))
    ritz = torch.cat(parts)
    inside = ritz.sum()
    values: list[Tensor] = []
    done, most = 0, num_matvecs - 2 * (num_matvecs // 3)
    vectors = Probes(space, second, most, probes, density)
    while done < most:
        upto = min(most, done + chunk_size)
        v, _ = sketch.basis.reject(vectors.take(done, upto))
        values.append(space.dots(v, space.apply(mv, v, chunk_size)))
        done = upto
        if stop is not None and done >= FEWEST:
            value, stderr = summary(torch.cat(values))
            if stop(value + inside, stderr):
                break
    draws = torch.cat(values)
    value, stderr = summary(draws)
    stderr = at_least_rounding(space, stderr, torch.diag(ritz))
    found = (value + inside).to(space.dtype)
    return Estimate(
        found,
        stderr.to(space.dtype),
        matvecs=2 * third + done,
        draws=(draws + inside).to(space.dtype),
    )
