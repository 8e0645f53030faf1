"""Random vectors with E[v vᵀ] = I."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core.errors import OptionError
from fisherfn.core.modes import compiling
from fisherfn.linalg.space import Block, Space, rows

PROBES = ("rademacher", "gaussian", "sphere")


def check_probes(caller: str, probes: Any, density: Any) -> None:
    """Raise unless these probes exist."""
    if probes not in PROBES:
        raise OptionError(
            f"{caller}: expected probes= to be one of {', '.join(map(repr, PROBES))}, got "
            f"{probes!r}. 'rademacher' are random signs."
        )
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if not number or not 0 < density <= 1:
        raise OptionError(
            f"{caller}: expected density= to be a number in (0, 1], got {density!r}. It is the "
            "share of entries that are not zero."
        )
    if density < 1 and probes == "sphere":
        raise OptionError(
            f"{caller}: expected density=1 for probes='sphere', got {density}. Sparse vectors are "
            "not uniform on a sphere; use 'rademacher' or 'gaussian'."
        )


class Probes:
    """The probes of a key, in order; in a compiled graph all are drawn at once."""

    def __init__(
        self, space: Space, key: Tensor, count: int, probes: str, density: float = 1.0
    ) -> None:
        """Prepare to draw up to `count` of them."""
        self._options = space, key, probes, density
        self._all = draw(space, key, 0, count, probes, density) if compiling() else None

    def take(self, start: int, stop: int) -> Block:
        """Return those with numbers `start` to `stop`."""
        if self._all is not None:
            return rows(self._all, start, stop)
        space, key, probes, density = self._options
        return draw(space, key, start, stop, probes, density)


def draw(
    space: Space, key: Tensor, start: int, stop: int, probes: str, density: float = 1.0
) -> Block:
    """Return probes number `start` to `stop` of a key.

    Each is drawn from (key, number, leaf), so it depends neither on how many there are nor on how
    they are chunked. Sparse probes are zero with probability 1 − density and are divided by
    √density elsewhere, so that they stay isotropic. "sphere" is uniform on the sphere of radius √P.
    """
    numbers = torch.arange(start, stop, device=key.device)
    keys = random.fold_in(key, numbers)
    sample = random.rademacher if probes == "rademacher" else random.normal
    found = []
    for i, (leaf, dtype) in enumerate(zip(space.leaves, space.dtypes, strict=True)):
        own = random.fold_in(keys, i).to(leaf.device)
        values = sample(own, leaf.numel(), dtype)
        if density < 1:
            # the factor as the operator will see it, and the probability that fits it exactly
            factor = torch.tensor(1.0 / math.sqrt(density), dtype=leaf.dtype).item()
            uniform = random.uniform(random.fold_in(own, 1), leaf.numel(), torch.float32)
            values = torch.where(uniform < factor**-2, values * factor, torch.zeros_like(values))
        found.append(values)
    if probes == "sphere":
        found = space.scale(found, math.sqrt(space.size) / space.norms(found))
    # Operators see the leaves' own dtypes, so the probes have to be exact in them.
    pairs = zip(found, space.leaves, strict=True)
    return [x.to(leaf.dtype).to(x.dtype) for x, leaf in pairs]
