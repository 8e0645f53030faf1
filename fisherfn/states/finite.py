"""Finding what is not finite in a result, for little more than one pass over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.modes import concrete


def first_bad_leaf(result: Any) -> str | None:
    """Return the path of the first leaf that has NaN or infinity, None if there is none.

    Where values cannot be looked at, there is none to be found. One synchronisation with a GPU.

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
            bad = ~leaves[i].detach().isfinite()
            if bad.any():
                first = leaves[i].detach()[bad][0].item()
                path = trees.paths(result)[i] or "the root"
                return f"{path} ({int(bad.sum())} of {bad.numel()} entries, the first is {first})"
    return None
