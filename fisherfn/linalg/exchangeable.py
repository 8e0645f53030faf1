"""The standard error of a mean of leave-one-out estimates, which are not independent.

For test vectors ω_1 ... ω_m let t_i be an estimate whose expectation over ω_i, the others held, is
the truth τ, and T the mean of all. The spread of the t_i alone says too little: with
C = Cov(t_i, t_j) its expectation is Var t − C, while Var T = (Var t − C)/m + C. Let t_{i∖j} be the
estimate t_i made without ω_j altogether. Averaged over ω_i alone, (t_i − τ) g vanishes for every g
that does not depend on ω_i, and t_{j∖i} is such a one. So

    E[(t_i − t_{i∖j}) (t_j − t_{j∖i})] = E[(t_i − τ) (t_j − τ)] = C,

and spread/m plus the mean of these products is an unbiased estimate of Var T. Products of an
operator are not needed for it.

References: Epperly, Tropp & Webber (2024), XTrace: Making the most of every sample in stochastic
trace estimation, SIAM J. Matrix Anal. Appl. 45(1), for the estimates and their spread; Epperly &
Tropp (2024), Efficient error and variance estimation for randomized matrix computations, SIAM J.
Sci. Comput. 46(1), for leaving one more out (there to bound a variance).
"""

from __future__ import annotations

import torch
from torch import Tensor


def corrected(single: Tensor, fewer: Tensor) -> Tensor:
    """Return leave-one-out estimates moved apart, so that their spread says the error of the mean.

    Args:
        single: `[m]`, t_i, for m of 2 at least.
        fewer: `[m, m]`, t_{i∖j}; NaN where that cannot be told, which then counts as t_i.

    Returns:
        `[m]`, of the same mean; the standard error of the mean of as many independent numbers is
        the root of spread/m plus the estimate of C, where that is positive.
    """
    count, mean = len(single), single.mean()
    change = torch.where(fewer.isnan(), 0.0, single.unsqueeze(1) - fewer)
    pairs = ~torch.eye(count, dtype=torch.bool, device=single.device)
    covariance = torch.where(pairs, change * change.T, 0.0).sum() / (count * (count - 1))
    variance = ((single - mean) ** 2).sum() / (count * (count - 1))
    some = (variance > 0) & (covariance > 0)
    share = torch.where(some, covariance, 0.0) / torch.where(some, variance, 1.0)
    return mean + (single - mean) * (1.0 + share).sqrt()


def pair_determinant(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the determinant of [[a, c], [c, b]], and whether it is more than rounding.

    Where it is not, 1 takes its place.
    """
    determinant = a * b - c * c
    some = determinant > 1e3 * torch.finfo(a.dtype).eps * a * b
    return torch.where(some, determinant, 1.0), some
