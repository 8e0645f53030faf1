"""Layers that read one input, seen as a single layer whose outputs follow each other.

Tensor format: cotangents [K, B, R, T, O_l] of layers l become [K, B, R, T, Σ O_l], and those of
convolutions, [K, B, M, O_l, *space], become [K, B, M, Σ O_l, *space], group by group. The inputs
are those of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherfn.layers.convolution import Unfolded
from fisherfn.layers.form import Form
from fisherfn.layers.outer import Outer


def fused(forms: Sequence[Form], parts: int = 1) -> Form:
    """Return the form of the layer whose weights are those of several layers, stacked.

    Args:
        forms: `Outer` forms, or `Unfolded` ones of equal geometry, of layers with equal inputs.
        parts: Into how many blocks the outputs of each group will be cut: each layer is cut alike,
            and its pieces go to the blocks in turn.

    Returns:
        A form of the same kind.

    >>> a, g = torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 1, 2)
    >>> fused([Outer(a, g), Outer(a, 2 * g)]).shape
    (1, 4, 3)
    """
    first = forms[0]
    if isinstance(first, Outer):
        return Outer(first.a, _following([f.g for f in forms if isinstance(f, Outer)], 4, parts))
    assert isinstance(first, Unfolded)
    cut = first.geometry.groups * parts
    return replace(first, g=_following([f.g for f in forms if isinstance(f, Unfolded)], 3, cut))


def _following(parts: Sequence[Tensor], dim: int, cut: int) -> Tensor:
    """Put the first of `cut` equal pieces of all tensors behind each other, then the second, ..."""
    if cut == 1:
        return torch.cat(list(parts), dim)
    pieces = [t.unflatten(dim, (cut, t.shape[dim] // cut)) for t in parts]
    return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)


def same_shape(one: Form, other: Form) -> bool:
    """Return whether two layers read and write in equal shapes, but for their outputs."""
    x, y = _inputs(one), _inputs(other)
    if x is None or y is None or x.shape != y.shape or x.device != y.device:
        return False
    outputs = 4 if isinstance(one, Outer) else 3
    pairs = zip(one.sample().shape, other.sample().shape, strict=True)
    return all(a == b for d, (a, b) in enumerate(pairs) if d != outputs)


def equal_inputs(one: Form, other: Form) -> bool:
    """Return whether the inputs of two forms of equal shapes hold the same values."""
    x, y = _inputs(one), _inputs(other)
    assert x is not None
    assert y is not None
    if x.dtype == y.dtype and x.data_ptr() == y.data_ptr() and x.stride() == y.stride():
        return True
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


def _inputs(form: Form) -> Tensor | None:
    if isinstance(form, Outer):
        return form.a
    return form.x if isinstance(form, Unfolded) else None
