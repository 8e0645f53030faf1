"""What a likelihood is: a model's outputs turned into a distribution over targets.

Everything here concerns the outputs alone, never the parameters. With z the outputs at one
position,

    score   s(y) = d log p(y | z) / d z              output Fisher   H = E_y[ s s^T ] = B B^T

Glossary, shared by all likelihoods (their docstrings only say what differs):

- `outputs`: what the model returned, the examples on the leading axis. At least float32 inside:
  bfloat16 and float16 are widened, and so are all results.
- `P`, `positions_shape(outputs)`: `(B, *positions)`, the shape of `log_prob`; an entry is a draw.
- event: the axes of the outputs that one draw depends on (`event_axes`, `event_shape`); H acts on
  them.
- `keys`: int64 `[B, 2]`, one random key an example. The draw of a position depends on the key of
  its example and on its index along each position axis, so padding never moves a draw.
- `root`, `root_mv`, `root_t_mv`: a square root B of H with K = `columns(outputs)` columns; column k
  at all positions at once, B u, and B^T v. `u` has shape `P + (K,)`.
- `mask`: bool of shape P, true where a position counts; `None` counts them all.

Values are never raised for inside these methods: targets that cannot be drawn give NaN.
`check_targets` raises for them where values can be looked at, `poison` reports them where not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core.errors import DataError, OptionError, ShapeError
from fisherfn.core.modes import concrete
from fisherfn.core.options import is_count


class Likelihood(ABC):
    """The interface of every likelihood; see the glossary of this module."""

    name: ClassVar[str]
    #: Whether nobody else holds the memory of what `score` and `sample_score` return.
    fresh_scores: ClassVar[bool] = False
    """The name under which `fisherfn.likelihoods` makes it."""

    @property
    @abstractmethod
    def event_axes(self) -> tuple[int, ...] | None:
        """Axes of the outputs that make up one event; None: every axis after the positions."""

    @abstractmethod
    def check_outputs(self, caller: str, outputs: Any) -> None:
        """Raise `ShapeError` unless the outputs have the type and the axes that are needed."""

    @abstractmethod
    def event_shape(self, outputs: Any) -> tuple[int, ...]:
        """Return the sizes of one event in the outputs."""

    @abstractmethod
    def positions_shape(self, outputs: Any) -> tuple[int, ...]:
        """Return P = `(B, *positions)`."""

    @abstractmethod
    def log_prob(self, outputs: Any, targets: Any) -> Tensor:
        """Return log p(targets | outputs) of each position, `[P]`, normalised over targets."""

    @abstractmethod
    def score(self, outputs: Any, targets: Any) -> Any:
        """Return d log_prob / d outputs, each position its own, like `outputs`."""

    @abstractmethod
    def sample(self, outputs: Any, keys: Tensor) -> Any:
        """Draw targets from the distribution of the outputs; constants to differentiation."""

    @abstractmethod
    def columns(self, outputs: Any) -> int:
        """Return K, the number of columns of the square root at each position."""

    @abstractmethod
    def root(self, outputs: Any, index: int | Tensor) -> Any:
        """Return column `index` of B at every position, like `outputs`; may be under `vmap`."""

    @abstractmethod
    def root_mv(self, outputs: Any, u: Tensor) -> Any:
        """Return B u, like `outputs`."""

    @abstractmethod
    def root_t_mv(self, outputs: Any, v: Any) -> Tensor:
        """Return B^T v, `[P, K]`."""

    @abstractmethod
    def fisher_mv(self, outputs: Any, v: Any) -> Any:
        """Return H v = B B^T v, like `outputs`."""

    @abstractmethod
    def neutral(self, targets: Any, mask: Tensor | None) -> Any:
        """Return the targets with a harmless valid value wherever the mask is false."""

    @abstractmethod
    def check_structure(self, caller: str, outputs: Any, targets: Any) -> None:
        """Raise `ShapeError` unless type, dtype and shape of the targets fit the outputs."""

    @abstractmethod
    def invalid(self, outputs: Any, targets: Any, mask: Tensor | None) -> Tensor:
        """Return where the targets cannot be drawn and count: bool, `P` or `P + event`."""

    @abstractmethod
    def describe_targets(self, outputs: Any) -> tuple[str, str]:
        """Return what valid targets are and what to do about others, for the error message."""

    def sample_score(self, outputs: Any, keys: Tensor) -> tuple[Any, Any]:
        """Draw targets and return them with their score, sharing what work there is to share."""
        targets = self.sample(outputs, keys)
        return targets, self.score(outputs, targets)

    def check_targets(
        self, caller: str, outputs: Any, targets: Any, mask: Tensor | None = None
    ) -> None:
        """Raise unless the targets that count can have been drawn.

        Structure is always checked. Values are where they can be looked at, at the cost of one
        synchronisation; under `torch.compile` and `torch.func` transformations use `poison`.

        Raises:
            ShapeError: Type, dtype or shape do not fit the outputs.
            DataError: There are no targets, or values out of range or NaN where the mask is true.
        """
        self.check_targets_fit(caller, outputs, targets)
        self.raise_invalid(caller, outputs, targets, self.invalid(outputs, targets, mask))

    def check_targets_fit(self, caller: str, outputs: Any, targets: Any) -> None:
        """Raise unless there are targets whose structure fits the outputs; no value is read."""
        if targets is None:
            raise DataError(
                f"{caller}: expected targets, got None at targets. Give "
                "Batch(targets=...). Where there is a choice of fisher=, 'exact', 'mc' and "
                "'curvature_prop' do not look at targets."
            )
        self.check_outputs(caller, outputs)
        self.check_structure(caller, outputs, targets)

    def raise_invalid(self, caller: str, outputs: Any, targets: Any, bad: Tensor) -> None:
        """Raise if `bad`, which `invalid` returned, is true anywhere and may be looked at.

        Of the outputs only the shapes are used.

        Raises:
            DataError: Some targets that count cannot be drawn.
        """
        if not concrete(bad) or not bool(bad.any()):
            return
        where = tuple(int(i) for i in bad.nonzero()[0])
        got = f"{targets[where].item():g}" if isinstance(targets, Tensor) else "NaN"
        place = ", ".join(map(str, where))
        expected, fix = self.describe_targets(outputs)
        raise DataError(f"{caller}: expected {expected}, got {got} at targets[{place}]. {fix}")

    def poison(self, outputs: Any, targets: Any, mask: Tensor | None = None) -> Tensor:
        """Return a bool scalar, true if targets that count are invalid: `check_targets`, traced."""
        return self.invalid(outputs, targets, mask).any()


def position_keys(keys: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Fold the index along each position axis into the keys: `[B, 2]` -> `[B, *positions, 2]`."""
    for size in positions[1:]:
        index = torch.arange(size, dtype=torch.int64, device=keys.device)
        keys = random.fold_in(keys.unsqueeze(-2), index)
    return keys


def counted(bad: Tensor, mask: Tensor | None) -> Tensor:
    """Return `bad` where the mask of shape P counts; `bad` may have event axes after P."""
    return bad if mask is None else bad & expand_mask(mask, bad)


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Append axes of size one to the mask until it broadcasts over the event axes of `like`."""
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


def check_tensor_outputs(caller: str, outputs: Any, ndim: int, what: str) -> None:
    """Raise unless the outputs are one floating point tensor with at least `ndim` axes."""
    if not isinstance(outputs, Tensor):
        raise ShapeError(
            f"{caller}: expected one tensor, got {type(outputs).__name__} at outputs. "
            "Let the model return the tensor itself, as in outputs.logits."
        )
    if not outputs.is_floating_point():
        raise ShapeError(
            f"{caller}: expected floating point outputs, got {outputs.dtype} at outputs. "
            "A likelihood is differentiated with respect to the outputs."
        )
    if outputs.ndim < ndim:
        raise ShapeError(
            f"{caller}: expected outputs {what}, got shape {tuple(outputs.shape)} at outputs. "
            f"They need at least {ndim} axes, the examples first."
        )


def check_tensor_targets(caller: str, targets: Any, shape: tuple[int, ...], hint: str = "") -> None:
    """Raise unless the targets are a tensor of this shape."""
    if not isinstance(targets, Tensor):
        raise ShapeError(
            f"{caller}: expected a tensor of shape {shape}, got {type(targets).__name__} at "
            "targets. Build one with torch.as_tensor(targets)."
        )
    if tuple(targets.shape) != shape:
        fix = hint or "Reshape the targets: nothing is broadcast."
        raise ShapeError(
            f"{caller}: expected targets of shape {shape}, got {tuple(targets.shape)} at targets. "
            f"{fix}"
        )


def check_vector(caller: str, name: str, vector: Any, shape: tuple[int, ...]) -> None:
    """Raise unless `vector` is a tensor of this shape."""
    if not isinstance(vector, Tensor) or tuple(vector.shape) != shape:
        got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ShapeError(
            f"{caller}: expected shape {shape}, got {got} at {name}. Nothing is broadcast."
        )


def example_keys(caller: str, keys: Any, batch: int) -> Tensor:
    """Return keys int64 `[B, 2]`; one key `[2]` is that of examples 0 to B-1."""
    if isinstance(keys, Tensor) and keys.dtype == torch.int64:
        if tuple(keys.shape) == (batch, 2):
            return keys
        if tuple(keys.shape) == (2,):
            return random.fold_in(keys, torch.arange(batch, device=keys.device))
    got = f"{keys.dtype} {tuple(keys.shape)}" if isinstance(keys, Tensor) else repr(keys)
    raise ShapeError(
        f"{caller}: expected one key an example, int64 of shape {(batch, 2)}, got {got} at keys. "
        "Build them with random.fold_in(key, ids), or pass a single key."
    )


def check_index(caller: str, index: int | Tensor, columns: int) -> None:
    """Raise unless the column exists; the value of a tensor is not looked at."""
    if isinstance(index, Tensor):
        if index.ndim != 0 or index.is_floating_point() or index.dtype == torch.bool:
            raise ShapeError(
                f"{caller}: expected an integer or an integer scalar, got {index.dtype} of shape "
                f"{tuple(index.shape)} at index. Use vmap for several columns."
            )
    elif not (is_count(index, 0) and index < columns):
        raise OptionError(
            f"{caller}: expected a column from 0 to {columns - 1}, got {index!r} at index. "
            "columns(outputs) says how many there are."
        )
