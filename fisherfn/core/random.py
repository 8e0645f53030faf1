"""Random numbers as a function of a key and a counter (`ff.random`).

A key is an int64 tensor [2]; a tensor [*K, 2] is a batch of keys. Nothing is mutated and no global
state is read or moved: the same key gives the same draw, bit for bit, on CPU and GPU, eager,
compiled and under `vmap`, alone or in a batch (normals and labels up to rounding).

The generator follows SplittableRandom: word i of the key (s, g) is mix(s xor i·g'), i = 1, 2, ...,
where g' is g with its lowest bit set and mix is a bijection of 64-bit words (variant 13 of the
MurmurHash3 finalizer). So the words of one key are all distinct, and so are the keys folded from
one. It is made of int64 operations alone, few of them, since each costs microseconds.

The functions follow torch's private `torch.func._random`, except that `shape` is what is drawn for
each key: keys [*K, 2] and shape S give a tensor [*K, *S]. A longer draw begins with the shorter
one. Whatever is not an int64 tensor [..., 2] is refused as a key (OptionError, ShapeError).

Reference: Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators, OOPSLA.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor

from fisherfn.core.errors import DataError, OptionError, ShapeError
from fisherfn.core.inversion import invert
from fisherfn.core.modes import concrete, transformed

Shape: TypeAlias = int | Sequence[int]

_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_ROOT = (0x243F6A8885A308D3, 0x13198A2E03707344)  # any constants: these are the digits of pi
_FOLD = 0x2545F4914F6CDD1D  # where folded counters lie; those of draws count from 1
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_WIDTHS = {torch.int64: 64, torch.int32: 32, torch.int16: 16, torch.int8: 8}
_BLOCK = {"cpu": 2**15, "other": 2**24}  # words at a time: in the CPU's cache, or a bound on memory


def key(seed: SupportsIndex | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Return the key of a seed; different seeds give different keys.

    Args:
        seed: Any integer of 64 bits, negative ones and 0-d integer tensors included.
        device: Where the key, and all that is drawn from it, lives. Default: the seed's, if it is a
            tensor, else torch's default device.

    Returns:
        int64 [2].

    Raises:
        OptionError: `seed` is no integer of 64 bits.
        ShapeError: `seed` is a tensor but not a 0-d one of integers.

    >>> uniform(key(0), 3)
    tensor([...])
    """
    if isinstance(seed, Tensor):
        if seed.ndim != 0:
            raise ShapeError(
                f"random.key: expected a 0-d integer tensor as seed, got shape "
                f"{tuple(seed.shape)}. For a batch of keys use ff.random.fold_in(key, data)."
            )
        device = seed.device if device is None else device
    root = torch.tensor(_ROOT, dtype=torch.int64, device=device)
    return _fold("random.key", root, seed)


def fold_in(key: Tensor, data: SupportsIndex | Tensor) -> Tensor:
    """Return the child of a key that an integer names: an example's id, a position, a sample index.

    `fold_in(key, i)` equals `split(key, n)[i]`; different integers give different keys.

    Args:
        key: int64 [*K, 2].
        data: An integer of 64 bits, or a tensor of integers that broadcasts with [*K].

    Returns:
        int64 [*broadcast, 2].

    Raises:
        OptionError: `data` is no integer of 64 bits.
        ShapeError: `data` is a tensor but not of integers, or does not broadcast.

    >>> torch.equal(fold_in(key(0), 3), split(key(0), 5)[3])
    True
    >>> fold_in(key(0), torch.arange(4)).shape
    torch.Size([4, 2])
    """
    _check_key("fold_in", key)
    return _fold("random.fold_in", key, data)


def split(key: Tensor, num: int = 2) -> Tensor:
    """Return `num` independent children of a key.

    Args:
        key: int64 [*K, 2].
        num: How many.

    Returns:
        int64 [num, *K, 2].

    Raises:
        OptionError: `num` is no integer, or negative.

    >>> a, b = split(key(0))
    """
    _check_key("split", key)
    if not isinstance(num, int | torch.SymInt) or num < 0:
        raise OptionError(
            f"random.split: expected an int num >= 0, got {num!r}. Ask for 1 or more."
        )
    index = torch.arange(num, device=key.device)
    return _fold("random.split", key, index.reshape(num, *[1] * (key.ndim - 1)))


def _fold(caller: str, key: Tensor, data: Any) -> Tensor:
    """Return the child keys: two words of one counter, the second with the halves exchanged."""
    gamma = key.flip(-1) | 1
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise ShapeError(
                f"{caller}: expected integers, got a tensor of {data.dtype}. Use its .long()."
            )
        _broadcast(caller, "data", data.shape, key.shape[:-1])
        counter = data.to(key.device, torch.int64) ^ _FOLD
        return _mix(key ^ _times(gamma, counter.unsqueeze(-1)))
    try:
        number = data if isinstance(data, int) else operator.index(data)
    except TypeError:
        raise OptionError(
            f"{caller}: expected an integer, got {data!r} of type {type(data).__name__}. Pass one."
        ) from None
    if not -(2**63) <= number < 2**64:
        raise OptionError(
            f"{caller}: expected an integer of 64 bits, got {number}. Take it modulo 2**64."
        )
    if number >= 2**63:
        number -= 2**64
    if torch.compiler.is_compiling():  # an integer that is symbolic there goes wrong as a scalar
        return _fold(caller, key, torch.full((), number, dtype=torch.int64, device=key.device))
    return _mix(key ^ _times(gamma, number ^ _FOLD))


def _check_key(caller: str, key: Any) -> None:
    """Refuse what cannot be a key."""
    advice = "Make one with ff.random.key(seed)."
    if not isinstance(key, Tensor):
        raise OptionError(
            f"random.{caller}: expected a key, got {key!r} of type {type(key).__name__}. {advice}"
        )
    if key.dtype != torch.int64 or key.ndim == 0 or key.shape[-1] != 2:
        raise ShapeError(
            f"random.{caller}: expected a key, int64 of shape [..., 2], got {key.dtype} of shape "
            f"{tuple(key.shape)}. {advice}"
        )


def _broadcast(caller: str, name: str, a: Sequence[int], b: Sequence[int]) -> torch.Size:
    """Return the common shape of two batches, one of them the keys'."""
    if not a or not b or a == b:  # torch.broadcast_shapes takes as long as drawing
        return torch.Size(a or b)
    try:
        return torch.broadcast_shapes(tuple(a), tuple(b))
    except RuntimeError:
        raise ShapeError(
            f"{caller}: expected {name} that broadcast with the keys, got {tuple(a)} beside keys "
            f"of batch shape {tuple(b)}. Give one key a row."
        ) from None


def _mix(x: Tensor) -> Tensor:
    """Map 64-bit words to 64-bit words, one to one and without visible pattern."""
    # torch shifts int64 arithmetically; the masks make the shifts logical.
    x = _times(x ^ ((x >> 30) & (2**34 - 1)), _MULTIPLIERS[0])
    x = _times(x ^ ((x >> 27) & (2**37 - 1)), _MULTIPLIERS[1])
    return x ^ ((x >> 31) & (2**33 - 1))


def _times(x: Tensor, y: Tensor | int) -> Tensor:
    """Return the product modulo 2^64; the only operation here that can overflow."""
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return x * y
    # In the C++ that inductor writes, signed overflow is undefined, and with a key known at compile
    # time it does go wrong. Unsigned it is defined; eager torch has few unsigned operations. The
    # conversions keep the bits, as `view` would, which torch 2.11 cannot trace under vmap.
    factor = y.to(torch.uint64) if isinstance(y, Tensor) else y
    return (x.to(torch.uint64) * factor).to(torch.int64)


def _words(key: Tensor, start: int, stop: int) -> Tensor:
    """Return words start..stop-1 of each key: [*K, stop - start]."""
    base, gamma = key.unbind(-1)
    gamma = gamma | 1
    if start == 0 and stop == 1:
        return _mix(base ^ gamma).unsqueeze(-1)
    counter = torch.arange(start + 1, stop + 1, device=key.device)
    return _mix(base.unsqueeze(-1) ^ _times(gamma.unsqueeze(-1), counter))


def _draw(
    caller: str,
    key: Tensor,
    shape: Shape,
    dtype: torch.dtype,
    finish: Callable[[Tensor], Tensor],
    per_word: int = 1,
) -> Tensor:
    """Return [*K, *shape] values; `finish` turns [*K, W] words into [*K, W * per_word] of them."""
    _check_key(caller, key)
    sizes = (shape,) if isinstance(shape, int | torch.SymInt) else tuple(shape)
    if any([not isinstance(size, int | torch.SymInt) or size < 0 for size in sizes]):
        raise ShapeError(
            f"random.{caller}: expected a shape of ints >= 0, got {sizes}. "
            "Pass an int or a sequence of ints."
        )
    numel, batch = prod(sizes), key.shape[:-1]
    words = -(-numel // per_word)
    if transformed() or words * prod(batch) <= 2 * _BLOCK["cpu"]:
        return finish(_words(key, 0, words))[..., :numel].reshape((*batch, *sizes))
    # Block by block: the same words, without a dozen passes over memory and int64 temporaries.
    on_cpu = key.device.type == "cpu"
    block = _BLOCK["cpu"] * torch.get_num_threads() if on_cpu else _BLOCK["other"]
    step = max(1, block // prod(batch))
    flat = torch.empty((*batch, numel), dtype=dtype, device=key.device)
    for start in range(0, words, step):
        part = flat[..., start * per_word : (start + step) * per_word]
        part.copy_(finish(_words(key, start, min(start + step, words)))[..., : part.shape[-1]])
    return flat.reshape((*batch, *sizes))


def _digits(caller: str, dtype: torch.dtype) -> int:
    """Return the number of significant bits of a floating-point dtype."""
    if dtype not in _DIGITS:
        raise OptionError(
            f"random.{caller}: expected a floating-point dtype, got {dtype}. "
            f"Choose one of {[str(d) for d in _DIGITS]}."
        )
    return _DIGITS[dtype]


def bits(key: Tensor, shape: Shape = (), dtype: torch.dtype = torch.int64) -> Tensor:
    """Return integers [*K, *shape] over the whole range of int64, int32, int16 or int8.

    Raises:
        OptionError: Another dtype.

    >>> bits(key(0), 2, torch.int32).dtype
    torch.int32
    """
    if dtype not in _WIDTHS:
        raise OptionError(
            f"random.bits: expected a signed integer dtype, got {dtype}. "
            f"Choose one of {[str(d) for d in _WIDTHS]}."
        )
    shift = 64 - _WIDTHS[dtype]
    return _draw("bits", key, shape, dtype, lambda words: (words >> shift).to(dtype))


def uniform(
    key: Tensor, shape: Shape = (), dtype: torch.dtype = torch.float32, *, open: bool = False
) -> Tensor:
    """Return uniform numbers in [0, 1), of as many random bits as the dtype has digits.

    Args:
        key: int64 [*K, 2].
        shape: Shape drawn for each key.
        dtype: A floating-point dtype.
        open: Leave out 0 as well, for logarithms; costs one bit of resolution.

    Returns:
        [*K, *shape], never 1.

    >>> u = uniform(key(0), (2, 3), torch.float64)
    >>> u.shape, bool(((u >= 0) & (u < 1)).all())
    (torch.Size([2, 3]), True)
    """
    digits = _digits("uniform", dtype)
    shift, mask, step = 64 - digits, 2**digits - 1, 2.0**-digits

    def finish(words: Tensor) -> Tensor:
        number = (words >> shift) & mask
        return (number | 1 if open else number).to(dtype) * step

    return _draw("uniform", key, shape, dtype, finish)


def normal(key: Tensor, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers [*K, *shape], by inversion of the distribution function.

    >>> x = normal(key(0), 10_000)
    >>> bool(x.mean().abs() < 0.05), bool((x.std() - 1).abs() < 0.05)
    (True, True)
    """
    work = torch.promote_types(dtype, torch.float32)
    digits = _digits("normal", work if dtype in _DIGITS else dtype)
    shift, step = 64 - digits, 2.0 ** (1 - digits)

    def finish(words: Tensor) -> Tensor:
        # An odd number of `digits` bits, sign included: symmetric in (-1, 1), never 0 or an end.
        symmetric = ((words >> shift) | 1).to(work) * step
        return (symmetric.erfinv() * 2.0**0.5).to(dtype)

    return _draw("normal", key, shape, dtype, finish)


def rademacher(key: Tensor, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Return independent signs ±1, [*K, *shape] of any signed dtype; 64 of them from one word.

    >>> rademacher(key(0), 5).abs()
    tensor([1., 1., 1., 1., 1.])
    """

    def finish(words: Tensor) -> Tensor:
        # Bytes first, so that the step to one element a bit is made in the narrowest dtype.
        shifts = torch.arange(0, 64, 8, device=words.device)
        octets = ((words.unsqueeze(-1) >> shifts) & 255).to(torch.uint8)
        places = torch.arange(8, dtype=torch.uint8, device=words.device)
        signs = ((octets.unsqueeze(-1) >> places) & 1).to(torch.int8) * 2 - 1
        return signs.to(dtype).flatten(-3)

    return _draw("rademacher", key, shape, dtype, finish, per_word=64)


def categorical(
    key: Tensor, probs: Tensor | None = None, *, logits: Tensor | None = None
) -> Tensor:
    """Return one class a key, drawn from probabilities or logits along the last axis.

    Inverts the distribution function (see `core.inversion`). A class of probability zero is never
    drawn and no rounding leads out of 0..V−1. A row with NaN or without a positive entry gives a
    valid class without meaning.

    Args:
        key: int64 [*K, 2], one key a row. A single key [2] draws for each row by itself, for row i
            from `fold_in(key, i)`.
        probs: [*R, V], need not sum to 1; [*R] broadcasts with [*K]. Give these or `logits`.
        logits: [*R, V], log-probabilities up to a constant of each row.

    Returns:
        int64 [*broadcast] of classes.

    Raises:
        OptionError: Both or none of `probs` and `logits` are given, or their dtype is no float.
        ShapeError: There are no classes, or the rows do not broadcast with the keys.
        DataError: Some of `probs` are negative (where values can be looked at).

    Cost: a few passes over the rows; beside the softmax of `logits`, memory of one block a row.

    >>> keys = split(key(0), 4)
    >>> categorical(keys, torch.tensor([0.0, 1.0, 0.0]))
    tensor([1, 1, 1, 1])
    """
    _check_key("categorical", key)
    given = logits if probs is None else probs
    if given is None or (probs is not None and logits is not None):
        raise OptionError(
            f"random.categorical: expected either probs or logits, got "
            f"{'none' if given is None else 'both'}. Pass one of them."
        )
    _digits("categorical", given.dtype)
    if given.ndim == 0 or given.shape[-1] == 0:
        raise ShapeError(
            f"random.categorical: expected classes along the last axis, got shape "
            f"{tuple(given.shape)}. Pass [..., V] with V >= 1."
        )
    if key.ndim == 1 and given.ndim > 1:
        many = prod(given.shape[:-1])
        index = torch.arange(many, device=key.device).reshape(given.shape[:-1])
        key = fold_in(key, index)
    _broadcast("random.categorical", "rows", given.shape[:-1], key.shape[:-1])
    work = torch.promote_types(given.dtype, torch.float32)
    rows = given.detach()
    if probs is not None and concrete(rows) and bool((rows < 0).any()):
        raise DataError(
            f"random.categorical: expected probs >= 0, got {rows.min().item():g}. If these are "
            "log-probabilities, pass them as logits=."
        )
    weights = rows.to(work) if probs is not None else torch.softmax(rows, dim=-1, dtype=work)
    return invert(weights, lambda shape: uniform(key, shape, work, open=True))
