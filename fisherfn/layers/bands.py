"""A convolution as one matrix product for each row of its window, so that less is copied.

Tensor format: `x` is `[N, C, *space]`. The patches of a `k x ... ` window are `k` bands of the same
array: band i is the input unfolded along all dimensions but the first, from row i on. Only those
other dimensions are copied, and with a stride of 1 along the first a band is a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Window of a convolution: sizes a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def padded(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """Pad `x`, and drop what lies beyond the last of `places` windows a dimension."""
        if any(p for both in self.padding for p in both):
            x = F.pad(x, [p for both in reversed(self.padding) for p in both])
        for d, extent in enumerate(self.extents):
            x = x.narrow(2 + d, 0, (places[d] - 1) * self.stride[d] + extent)
        return x

    @property
    def extents(self) -> list[int]:
        """What a window spans along each dimension."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]

    def _windows(self, x: Tensor, first: int) -> Tensor:
        """Return a view `[N, C, *places, *window]`, without the dimensions before `first`."""
        for d in range(first, len(self.kernel)):
            x = x.unfold(2 + d, self.extents[d], self.stride[d])[..., :: self.dilation[d]]
        return x

    def windows(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """Return the patches of `[N, C, *space]` as a view `[N, C, *window, *places]`."""
        nd = len(self.kernel)
        x = self._windows(self.padded(x, places), 0)
        return x.permute(0, 1, *range(2 + nd, 2 + 2 * nd), *range(2, 2 + nd))

    def patches(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """Return the patches of `[N, C, *space]` as `[N, groups, positions, C/groups * window]`.

        `places` is the number of windows along each dimension; windows beyond it are dropped.
        """
        # copied by whole rows of places: F.unfold takes twice to eight times as long on a CPU, and
        # a launch for each example on a GPU
        x = self.windows(x, places)
        rows = x.shape[1] // self.groups * math.prod(self.kernel)
        return x.reshape(len(x), self.groups, rows, math.prod(places)).transpose(-1, -2)

    def bands(self, x: Tensor, places: Sequence[int]) -> list[Tensor]:
        """Return, for each row of the window, `[N, groups, positions, C/groups * other rows]`."""
        nd, first = len(self.kernel), self.dilation[0]
        x = self._windows(self.padded(x, places), 1)
        n, _, height = x.shape[:3]
        # [N, C, window, height, places]: positions stay contiguous, as they are in the input
        x = x.permute(0, 1, *range(2 + nd, 1 + 2 * nd), *range(2, 2 + nd))
        inner = math.prod(places[1:])
        x = x.reshape(n, self.groups, -1, height, inner)
        found = []
        for k in range(self.kernel[0]):
            stop = k * first + (places[0] - 1) * self.stride[0] + 1
            rows = x[:, :, :, k * first : stop : self.stride[0]]
            found.append(rows.flatten(3).transpose(-1, -2))
        return found
