"""Traces from random quadratic forms: tr A = E[vᵀ A v]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherfn.core.errors import OptionError, UnsupportedError
from fisherfn.core.modes import concrete
from fisherfn.core.options import check_count
from fisherfn.core.trees import Tree
from fisherfn.linalg.probes import Probes, check_probes
from fisherfn.linalg.results import Estimate, summary
from fisherfn.linalg.space import Operator, Space, check_key

#: Draws before an early stop is thought of: the spread of fewer is too often small by chance.
FEWEST = 5


def hutchinson(
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
    """Estimate the trace of any square operator from random quadratic forms.

    tr A = E[vᵀ A v] for E[v vᵀ] = I. With signs, and A symmetric, the variance of one draw is
    2 (‖A‖_F² − Σ A_ii²).

    Args:
        mv: Function tree -> tree, v to A v.
        like: Tree like v; only shapes, dtypes and devices matter.
        num_matvecs: Random vectors, at most.
        key: Random key.
        probes: "rademacher", "gaussian", or "sphere" (uniform, of radius √P).
        density: Share of entries that are not zero. Sparse vectors are rescaled by 1/√density, so
            the estimate stays unbiased, with more variance.
        target_stderr: Stop as soon as the standard error is at most this, after 5 draws or more.
        relative: Whether the target is a share of the value.
        chunk_size: Vectors multiplied together by `torch.vmap`; 1 calls mv with one at a time,
            which every function bears.

    Returns:
        `Estimate`, 0-d tensors.

    Raises:
        OptionError: an option does not exist.
        TreeMismatchError: mv does not return a tree like its argument.
        UnsupportedError: target_stderr inside `torch.compile` or `torch.func`.

    Cost: num_matvecs products, memory of chunk_size vectors. Without target_stderr it compiles.

    Reference: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> mv = lambda v: {"w": torch.tensor([1.0, 2.0, 3.0]) * v["w"]}
        >>> key = ff.random.key(0)
        >>> ff.linalg.hutchinson(mv, {"w": torch.zeros(3)}, num_matvecs=4, key=key).value
        tensor(6.)
    """
    space = Space("hutchinson", like, mv)
    check_sampling("hutchinson", num_matvecs, 1, key, chunk_size)
    check_probes("hutchinson", probes, density)
    stop = stopper("hutchinson", target_stderr, relative)
    values: list[Tensor] = []
    vectors = Probes(space, key, num_matvecs, probes, density)
    done = 0
    while done < num_matvecs:
        upto = min(num_matvecs, done + chunk_size)
        v = vectors.take(done, upto)
        values.append(space.dots(v, space.apply(mv, v, chunk_size)))
        done = upto
        if stop is not None and done >= FEWEST and stop(*summary(torch.cat(values))):
            break
    draws = torch.cat(values)
    value, stderr = summary(draws)
    return Estimate(
        value.to(space.dtype),
        stderr.to(space.dtype),
        matvecs=done,
        draws=draws.to(space.dtype),
    )


def at_least_rounding(space: Space, stderr: Tensor, h: Tensor) -> Tensor:
    """Return the standard error, together with the rounding of a trace that was summed from H."""
    return torch.hypot(stderr, 8.0 * space.eps * h.diagonal().abs().sum())


def check_sampling(
    caller: str, num_matvecs: Any, fewest: int, key: Any, chunk_size: Any, advice: str = ""
) -> None:
    """Check what all estimators from random vectors share."""
    advice = advice or "It is the number of products with the operator."
    check_count(caller, "num_matvecs", num_matvecs, fewest, advice)
    check_count(caller, "chunk_size", chunk_size, 1, "It is the number of vectors in a block.")
    check_key(caller, key)


def stopper(caller: str, target: Any, relative: bool) -> Callable[[Tensor, Tensor], bool] | None:
    """Return the function of value and standard error that says whether that is enough."""
    if target is None:
        return None
    if isinstance(target, bool) or not isinstance(target, int | float) or not target > 0:
        raise OptionError(
            f"{caller}: expected target_stderr= to be a positive number or None, got {target!r}. "
            "It is in the units of the trace; with relative=True, a share of it."
        )

    def enough(value: Tensor, stderr: Tensor) -> bool:
        if not concrete(value, stderr):
            raise UnsupportedError(
                f"{caller}: expected no target_stderr= inside torch.compile or a torch.func "
                f"transformation, got {target}. Values cannot be looked at there; choose "
                "num_matvecs instead."
            )
        return bool(stderr <= (target * value.abs() if relative else target))

    return enough
