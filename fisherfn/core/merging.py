"""Joining results on two pieces of data into the result on both.

A class takes part by two methods, so that this file, and states that fold results, need not know
which classes there are:

    __fisher_merge__(self, other) -> the result on the joined data; refuses what does not fit
    __fisher_empty__(self) -> the result on no data at all, its identity

Averages over time need two more, which tell what such an average is of this class:

    __fisher_toward__(self, other, share) -> self + share·(other − self), `share` a 0-d tensor
    __fisher_tensors__(self) -> tree of the tensors whose entries are averages over units

Dicts, lists, tuples and NamedTuples of such results take part as well, member by member.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError, TreeMismatchError, UnsupportedError, at

R = TypeVar("R")
_WIDE = (torch.float32, torch.float64)


def merge(a: R, b: R) -> R:
    """Return the exact result on the joined data of two results on disjoint data.

    For averages over N units, such as every Fisher information matrix here, that is
    (N_a A + N_b B) / (N_a + N_b). It is associative and commutative to rounding, and `empty_like`
    is its identity to the last bit.

    Args:
        a: A result, or a dict, list, tuple or NamedTuple of results.
        b: One of the same class, kind, unit and structure.

    Returns:
        A result of the same class.

    Raises:
        OptionError: The classes differ.
        TreeMismatchError: The containers differ.
        UnsupportedError: Results of this class cannot be merged.

    Example:
        >>> from fisherfn.curvature import Diagonal
        >>> a = Diagonal({"w": torch.tensor([1.0, 2.0])}, torch.tensor(1.0))
        >>> b = Diagonal({"w": torch.tensor([5.0, 2.0])}, torch.tensor(3.0))
        >>> merge(a, b).values, merge(a, b).count
        ({'w': tensor([4., 2.])}, tensor(4.))
    """
    return cast(R, _merge(a, b, ""))


def empty_like(a: R) -> R:
    """Return the result on no data, the identity of `merge`: zeros with a count of zero.

    Args:
        a: A result, or a dict, list, tuple or NamedTuple of results.

    Returns:
        A result of the same class, kind, unit and structure.

    Raises:
        UnsupportedError: Results of this class cannot be merged.

    Example:
        >>> from fisherfn.curvature import Diagonal
        >>> empty_like(Diagonal({"w": torch.ones(2)}, torch.tensor(3.0))).count
        tensor(0.)
    """
    return cast(R, _empty(a, ""))


def merge_weights(count_a: Tensor, count_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return N_a/N, N_b/N (float64) and N = N_a + N_b; the shares are 0 where N is 0.

    >>> merge_weights(torch.tensor(1.0), torch.tensor(3.0))
    (tensor(0.2500, dtype=torch.float64), tensor(0.7500, dtype=torch.float64), tensor(4.))
    """
    # Counts may be float32 beside values in float64, whose shares have to be as exact as they are.
    dtype = working_dtype(count_a)
    total = count_a + count_b
    safe = torch.where(total == 0, torch.ones_like(total), total).to(dtype)
    return count_a.to(dtype) / safe, count_b.to(dtype) / safe, total


def joined_count(count_a: Tensor, a: Tensor, count_b: Tensor, b: Tensor) -> Tensor:
    """Return the number of units that an average with the shares a and b is worth.

    It is the N of the plain average over N units with the same standard error: with averages of
    variance σ²/N_a and σ²/N_b, 1/N = a²/N_a + b²/N_b. Shares in proportion to the counts give their
    sum.

    >>> joined_count(torch.tensor(1.0), torch.tensor(0.25), torch.tensor(3.0), torch.tensor(0.75))
    tensor(4.)
    """
    shares, counts = torch.stack([a, b]), torch.stack([count_a.to(a.dtype), count_b.to(a.dtype)])
    none = shares == 0
    spread = torch.where(none, 0.0, shares.square() / torch.where(none, 1.0, counts)).sum()
    return torch.where(none.all(), 0.0, 1.0 / spread)


def toward(x: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """Return x + share·(y − x) in float32 or wider: y where the share is 1, x where y is x.

    >>> toward(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor(0.5))
    tensor([2.])
    """
    if x.dtype != y.dtype or x.dtype not in _WIDE:
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(dtype), y.to(dtype)
    # one small operation less for each leaf of a tree
    return torch.lerp(x, y, share if share.dtype == x.dtype else share.to(x.dtype))


def check_mergeable(caller: str, a: Any, path: str = "") -> None:
    """Check that `merge` will take a result.

    Args:
        caller: The public function on whose behalf this is checked.
        a: A result, or a dict, list, tuple or NamedTuple of results.
        path: Where in a larger container it is.

    Raises:
        UnsupportedError: Results of this class cannot be merged.
    """
    if a is None or hasattr(type(a), "__fisher_merge__"):
        return
    if isinstance(a, dict):
        entries = list(a.items())
    elif isinstance(a, list | tuple):
        entries = list(enumerate(a))
    else:
        _refuse(caller, a, path)
    for name, part in entries:
        check_mergeable(caller, part, _join(path, name))


def _merge(a: Any, b: Any, path: str) -> Any:
    if type(a) is not type(b):
        raise OptionError(
            f"merge: expected two results of one class, got {type(a).__name__} and "
            f"{type(b).__name__}{at(path)}. Compute both with the same estimator."
        )
    method = getattr(type(a), "__fisher_merge__", None)
    if method is not None:
        return method(a, b)
    if a is None:
        return None
    if isinstance(a, dict):
        if set(a) != set(b):
            raise TreeMismatchError(
                f"merge: expected the same keys on both sides, got {list(a)} and "
                f"{list(b)}{at(path)}. Compute both with the same estimator."
            )
        return {key: _merge(value, b[key], _join(path, key)) for key, value in a.items()}
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            raise TreeMismatchError(
                f"merge: expected the same length on both sides, got {len(a)} and "
                f"{len(b)}{at(path)}. Compute both with the same estimator."
            )
        parts = [_merge(x, y, _join(path, i)) for i, (x, y) in enumerate(zip(a, b, strict=True))]
        return _rebuild(a, parts)
    _refuse("merge", a, path)


def _empty(a: Any, path: str) -> Any:
    method = getattr(type(a), "__fisher_empty__", None)
    if method is not None:
        return method(a)
    if a is None:
        return None
    if isinstance(a, dict):
        return {key: _empty(value, _join(path, key)) for key, value in a.items()}
    if isinstance(a, list | tuple):
        return _rebuild(a, [_empty(x, _join(path, i)) for i, x in enumerate(a)])
    _refuse("empty_like", a, path)


def _rebuild(like: Any, parts: list[Any]) -> Any:
    """Return a list, tuple or NamedTuple of the same class with other members."""
    if isinstance(like, list):
        return parts
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def _refuse(caller: str, got: Any, path: str) -> NoReturn:
    raise UnsupportedError(
        f"{caller}: expected results that can be merged (curvature, moments, states), got "
        f"{type(got).__name__}{at(path)}. Average other quantities with ff.states."
    )


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)
