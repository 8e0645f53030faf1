"""Calls that only look at a parameter differently: transposes, reshapes, slices, casts, constants.

The result of such a call still is the parameter, seen through a view; a rule that meets it later
knows where its scores belong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfn.layers.views import Factor, Permute, Reshape, Slice, Step

#: What a call makes of a parameter: for each result that is a tensor, the steps that lead to it.
Steps = Sequence[tuple[Step, ...]]
Handler = Callable[[Tensor, tuple[Any, ...], dict[str, Any], Any], "Steps | None"]


def _same(source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Steps | None:
    return [()] if isinstance(out, Tensor) and out.shape == source.shape else None


def _reshaped(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    if not isinstance(out, Tensor) or out.numel() != source.numel() or not out.is_floating_point():
        return None
    return [(Reshape(tuple(source.shape)),)]


def _transposed(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    d0 = kwargs.get("dim0", args[1] if len(args) > 1 else None)
    d1 = kwargs.get("dim1", args[2] if len(args) > 2 else None)
    if not isinstance(d0, int) or not isinstance(d1, int):
        return None
    dims = list(range(source.dim()))
    dims[d0], dims[d1] = dims[d1], dims[d0]
    return [(Permute(tuple(dims)),)]


def _reversed(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    return [(Permute(tuple(reversed(range(source.dim())))),)]


def _matrix_transposed(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    dims = list(range(source.dim()))
    dims[-1], dims[-2] = dims[-2], dims[-1]
    return [(Permute(tuple(dims)),)]


def _permuted(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    dims = kwargs.get("dims", args[1:])
    if len(dims) == 1 and not isinstance(dims[0], int):
        dims = dims[0]
    return [(Permute(tuple(int(d) % source.dim() for d in dims)),)]


def _parts(source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Steps | None:
    """`chunk`, `split`, `tensor_split`: consecutive pieces along one axis."""
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0)) % source.dim()
    size, start, found = source.shape[dim], 0, []
    for piece in out:
        stop = start + piece.shape[dim]
        found.append((Slice(dim, start, stop, size),))
        start = stop
    return found


def _unbound(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    dim = int(kwargs.get("dim", args[1] if len(args) > 1 else 0)) % source.dim()
    return [_one(source, dim, i) for i in range(len(out))]


def _one(source: Tensor, dim: int, index: int) -> tuple[Step, ...]:
    size = source.shape[dim]
    kept = list(source.shape)
    kept[dim] = 1
    return (Slice(dim, index, index + 1, size), Reshape(tuple(kept)))


def _selected(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    index = kwargs.get("index", args[2] if len(args) > 2 else None)
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    return [_one(source, dim % source.dim(), index % source.shape[dim])]


def _narrowed(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    start = kwargs.get("start", args[2] if len(args) > 2 else None)
    if not isinstance(dim, int) or not isinstance(start, int):
        return None
    dim, start = dim % source.dim(), start % source.shape[dim]
    return [(Slice(dim, start, start + out.shape[dim], source.shape[dim]),)]


def _indexed(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    """`p[...]` with integers, plain slices, None and an ellipsis."""
    items = args[1] if isinstance(args[1], tuple) else (args[1],)
    steps: list[Step] = []
    shape = list(source.shape)
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    dim = 0
    for item in items:
        if item is None:
            continue
        if item is Ellipsis:
            dim += source.dim() - used
        elif isinstance(item, bool) or not isinstance(item, (int, slice)):
            return None
        elif isinstance(item, int):
            start = item % shape[dim]
            steps.append(Slice(dim, start, start + 1, shape[dim]))
            shape[dim] = 1
            dim += 1
        else:
            start, stop, stride = item.indices(shape[dim])
            if stride != 1:
                return None
            if (start, stop) != (0, shape[dim]):
                steps.append(Slice(dim, start, max(start, stop), shape[dim]))
                shape[dim] = max(start, stop) - start
            dim += 1
    if tuple(out.shape) != tuple(shape):
        steps.append(Reshape(tuple(shape)))
    return [tuple(steps)]


def _scaled(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    other = args[1] if args[0] is source else args[0]
    return [(Factor(float(other)),)] if _number(other) else None


def _divided(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    if args[0] is not source or not _number(args[1]) or kwargs.get("rounding_mode") is not None:
        return None
    return [(Factor(1.0 / float(args[1])),)]


def _offset(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    other = args[1] if args[0] is source else args[0]
    return [()] if _number(other) and not kwargs else None


def _lowered(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    return [()] if args[0] is source and _number(args[1]) and not kwargs else None


def _negated(
    source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    return [(Factor(-1.0),)]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _both(*names: str) -> list[Any]:
    """Return the method and the function of each name, as far as they exist."""
    found = [getattr(torch.Tensor, n, None) for n in names]
    found += [getattr(torch, n, None) for n in names]
    return [f for f in found if f is not None]


def getter(name: str) -> Any:
    """Return an attribute's getter as a `TorchFunctionMode` sees it."""
    return getattr(torch.Tensor, name).__get__


_TABLE: list[tuple[list[Any], Handler]] = [
    (
        _both("to", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone", "type")
        + _both("cuda", "cpu", "requires_grad_"),
        _same,
    ),
    (
        _both("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "ravel")
        + _both("reshape_as"),
        _reshaped,
    ),
    (_both("transpose", "swapaxes", "swapdims"), _transposed),
    ([*_both("t"), getter("T")], _reversed),
    ([*_both("adjoint"), getter("mT")], _matrix_transposed),
    (_both("permute"), _permuted),
    (_both("chunk", "split", "tensor_split", "split_with_sizes"), _parts),
    (_both("unbind"), _unbound),
    (_both("select"), _selected),
    (_both("narrow"), _narrowed),
    ([torch.Tensor.__getitem__], _indexed),
    (_both("mul", "multiply"), _scaled),
    (_both("div", "divide", "true_divide"), _divided),
    (_both("add"), _offset),
    (_both("sub", "subtract"), _lowered),
    (_both("neg", "negative"), _negated),
]
_HANDLERS: dict[Any, Handler] = {f: handler for group, handler in _TABLE for f in group}


def steps_of(
    function: Any, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Steps | None:
    """Return the steps from `source` to each result, or None if the call is no view of it."""
    handler = _HANDLERS.get(function)
    if handler is None or not args:
        return None
    return handler(source, args, kwargs, out)
