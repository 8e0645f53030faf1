"""Second moments of the patches of a convolution with stride 1, without forming the patches.

Two rows k and k' of a window are a shift apart, and so are the rows of the image that they see.
With P_h the rows of the image, unfolded along the other dimensions only, and L places,

    A[k, k'] = Σ_{h = k}^{k + L - 1} P_hᵀ P_{h + k' - k}

(times the dilation). The sums for one shift differ in their first and last few rows, so each shift
takes one product over all rows, cut at the ends, in place of one for each pair of window rows.

Tensor format: rows are `[groups, height, n, C/groups * other window rows]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisherfn.core.matmul import quick, stacked_product
from fisherfn.layers.bands import Geometry


def applies(geometry: Geometry, places: Sequence[int]) -> bool:
    """Return whether the sums for each shift have rows in common."""
    kernel, dilation = geometry.kernel[0], geometry.dilation[0]
    return kernel > 1 and geometry.stride[0] == 1 and places[0] > (kernel - 1) * dilation


def image_rows(geometry: Geometry, x: Tensor, places: Sequence[int]) -> Tensor:
    """Return the rows `[groups, height, N * other places, C/groups * other window rows]`."""
    nd = len(geometry.kernel)
    x = geometry.padded(x, places)
    extents = geometry.extents
    for d in range(1, nd):
        x = x.unfold(2 + d, extents[d], geometry.stride[d])[..., :: geometry.dilation[d]]
    n, c, height = x.shape[:3]
    # [N, C, height, *places, *window] -> [groups, height, N, *places, C/groups, *window]
    x = x.unflatten(1, (geometry.groups, c // geometry.groups))
    x = x.permute(1, 3, 0, *range(4, 3 + nd), 2, *range(3 + nd, 2 + 2 * nd))
    return x.reshape(geometry.groups, height, n * math.prod(places[1:]), -1)


def patch_gram(
    geometry: Geometry, rows: Tensor, places: int, gram: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `Σ aᵀ a` over all patches a, `[groups, C/groups * window, C/groups * window]`.

    Args:
        geometry: A window with stride 1 along the first dimension.
        rows: What `image_rows` returns, maybe scaled row by row.
        places: L.
        gram: Gives `xᵀ x` for each of `[groups, n, d]`.
    """
    kernel, dilation = geometry.kernel[0], geometry.dilation[0]
    groups, _, each, width = rows.shape
    turned = rows.flatten(1, 2).mT
    fast = quick(rows, width, places * each, width)
    if fast:
        turned = turned.contiguous()  # once, for all products

    def product(start: int, stop: int, shift: int) -> Tensor:
        right = rows[:, start + shift : stop + shift].reshape(groups, -1, width)
        if shift == 0 and not fast:
            return gram(right)
        return stacked_product(turned[..., start * each : stop * each], right)

    blocks: dict[tuple[int, int], Tensor] = {}
    for apart in range(kernel):
        shift, last = apart * dilation, kernel - 1 - apart
        cuts = [k * dilation for k in range(last + 1)]
        common = product(cuts[-1], places, shift)
        pairs = list(itertools.pairwise(cuts))
        first = [product(a, b, shift) for a, b in pairs]
        end = [product(places + a, places + b, shift) for a, b in pairs]
        for k in range(last + 1):
            terms = [common, *first[k:], *end[:k]]
            blocks[k, k + apart] = sum(terms[1:], terms[0])
    channels = width // math.prod(geometry.kernel[1:])
    grid = [
        torch.stack([blocks[i, j] if i <= j else blocks[j, i].mT for j in range(kernel)], 1)
        for i in range(kernel)
    ]
    sizes = groups, kernel, kernel, channels, -1, channels, width // channels
    found = torch.stack(grid, 1).reshape(sizes)
    found = found.permute(0, 3, 1, 4, 5, 2, 6)
    return found.reshape(groups, kernel * width, kernel * width)


def patch_sum(geometry: Geometry, rows: Tensor, places: int) -> Tensor:
    """Return `Σ a` over all patches, `[groups, C/groups * window]`."""
    kernel, dilation = geometry.kernel[0], geometry.dilation[0]
    each = rows.sum(2)
    sums = [each[:, k * dilation : k * dilation + places].sum(1) for k in range(kernel)]
    channels = rows.shape[-1] // math.prod(geometry.kernel[1:])
    found = torch.stack(sums, 1).unflatten(-1, (channels, -1))
    return found.transpose(1, 2).flatten(1)
