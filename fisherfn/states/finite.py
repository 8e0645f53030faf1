"""Finding what is not finite in a result, for little more than one pass over it."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.modes import concrete


def first_bad_leaf(result: Any) -> str | None:
    """Return the path of the first leaf that has NaN or infinity, None if there is none.

    A standard error may be infinite, which says that nothing is known of it. Where values cannot be
    looked at, there is none to be found. One synchronisation with a GPU.

    >>> first_bad_leaf({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
    'b (1 of 2 entries, the first is nan)'
    """
    leaves = trees.leaves(result)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    if not places or not concrete(*[leaves[i] for i in places]):
        return None
    sums = [leaves[i].detach().sum() for i in places]
    fine = torch.stack([s.isfinite().to(sums[0].device) for s in sums]).tolist()
    # a sum may overflow where no entry does, so a bad one is only a suspicion
    for i, good in zip(places, fine, strict=True):
        if not good:
            x = leaves[i].detach()
            error = any(leaves[i] is y for y in _standard_errors(result))
            bad = x.isnan() if error else ~x.isfinite()
            if bad.any():
                first = x[bad][0].item()
                path = trees.paths(result)[i] or "the root"
                return f"{path} ({int(bad.sum())} of {bad.numel()} entries, the first is {first})"
    return None


def _standard_errors(result: Any) -> list[Tensor]:
    """Return the tensors that are standard errors of results."""
    cells = optree.tree_leaves(
        result, is_leaf=lambda x: hasattr(x, "stderr"), namespace=trees.NAMESPACE
    )
    return trees.leaves([getattr(cell, "stderr", None) for cell in cells])
