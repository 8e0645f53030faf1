"""Heads of attention: how projections store them.

A projection `[out, in]` has its heads along axis 0, an output projection along axis 1; `Conv1D`
stores the transpose. What is fused is kept apart: its groups are the heads of q, then those of k,
then those of v, whatever the order in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from fisherfn.core.errors import OptionError, ShapeError
from fisherfn.core.options import is_count
from fisherfn.groups.spec import GroupSpec

HEAD_LAYOUTS = ("separate", "qkv", "kv", "interleaved")


def heads(
    shape: Sequence[int],
    num_heads: int,
    *,
    axis: int = 0,
    layout: str = "separate",
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
) -> GroupSpec:
    """Return the spec of one group for each head of a projection.

    Args:
        shape: Shape of the parameter.
        num_heads: Heads of the projection itself; for a fused one, heads of the query.
        axis: The axis along which the heads lie.
        layout: "separate" (one projection: heads one after the other), "qkv" (all heads of the
            query, then of the key, then of the value: `in_proj_weight`, GPT-2's `c_attn`), "kv"
            (key, then value), or "interleaved" (for each key head: its queries, the key, the value:
            GPT-NeoX, BLOOM, Falcon).
        num_kv_heads: Heads of key and value, for grouped queries in a fused layout; default
            `num_heads`.
        head_dim: Entries of one head, checked if it is given; it need not be hidden / heads.

    Returns:
        A spec of kind "head"; for a fused layout with `parts`.

    Raises:
        OptionError: An unknown layout, or numbers that are no positive integers.
        ShapeError: The heads do not divide the axis, or have another size than `head_dim`.

    Example:
        >>> spec = heads((16, 64), 4, layout="qkv", num_kv_heads=2)
        >>> spec.num_groups, spec.run, spec.parts
        (8, 2, (('q', 4), ('k', 2), ('v', 2)))
    """
    if layout not in HEAD_LAYOUTS:
        raise OptionError(
            f"groups.heads: expected layout to be one of {list(HEAD_LAYOUTS)}, got {layout!r}. "
            "For another order in memory, make a GroupSpec with order=."
        )
    kv = num_heads if num_kv_heads is None else num_kv_heads
    for name, value in (("num_heads", num_heads), ("num_kv_heads", kv), ("head_dim", head_dim)):
        if value is not None and not is_count(value):
            raise OptionError(
                f"groups.heads: expected {name} to be an integer of at least 1, got {value!r}. "
                "Read it from the model's configuration."
            )
    if num_kv_heads is not None and layout == "separate":
        raise OptionError(
            "groups.heads: expected num_kv_heads for fused projections only, got it for layout "
            "'separate'. Pass the projection's own number of heads as num_heads."
        )
    if not (is_count(axis, 0) and axis < len(shape)):
        raise ShapeError(
            f"groups.heads: expected an axis of the shape {tuple(shape)}, got {axis!r}. Axes are "
            "counted from 0."
        )
    if layout == "interleaved" and num_heads % kv:
        raise ShapeError(
            f"groups.heads: expected num_kv_heads to divide num_heads={num_heads}, got {kv}. Each "
            "key head serves the same number of queries."
        )
    total = {"separate": num_heads, "kv": 2 * kv}.get(layout, num_heads + 2 * kv)
    size, rest = divmod(shape[axis], total)
    if rest or size == 0 or (head_dim is not None and size != head_dim):
        each = "" if head_dim is None else f" of {head_dim} entries"
        raise ShapeError(
            f"groups.heads: expected {total} heads{each} along axis {axis}, got the shape "
            f"{tuple(shape)}, which they do not divide so. Check num_heads, num_kv_heads and the "
            "axis."
        )
    parts = {
        "separate": (),
        "kv": (("k", kv), ("v", kv)),
    }.get(layout, (("q", num_heads), ("k", kv), ("v", kv)))
    order = _interleaved(num_heads, kv) if layout == "interleaved" else None
    return GroupSpec("head", tuple(shape), axis, total, run=size, order=order, parts=parts)


def _interleaved(num_heads: int, kv: int) -> tuple[int, ...]:
    """Return the group of each run: for every key head its queries, then key, then value."""
    each, order = num_heads // kv, []
    for j in range(kv):
        order += [j * each + i for i in range(each)]
        order += [num_heads + j, num_heads + kv + j]
    return tuple(order)
