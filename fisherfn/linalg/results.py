"""What the matrix-free algorithms return: values with what is known of their error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, UnsupportedError
from fisherfn.core.merging import joined_count, merge_weights, toward
from fisherfn.core.trees import Tree

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimate and its standard error; unpacks as `value, stderr = estimate`.

    Averages of estimates (`ff.merge`, `ff.states`) go draw by draw: parts that share their random
    vectors, as batches under one key do, are not independent, and the spread of the averaged draws
    is right either way. Of parts without draws the errors are taken to be independent, of parts
    with different numbers of them to add up, which is the most that it can be.

    Attributes:
        value: The estimate: a 0-d tensor, or a tree.
        stderr: Its standard error, of the same shape: 0 where nothing is random, infinite where a
            single draw tells nothing of the spread.
        count: N, the units that the value is an average over, or None if it is no average over
            data. Estimates with a count merge.
        fisher: Which labels were used, if it belongs to a Fisher information.
        unit: What is counted, if anything is.
        matvecs: Products with the operator that it took; merged, the most of any part.
        draws: `[m]`, the estimate from each of m random draws, if it is a 0-d tensor and they are
            known.

    Example:
        >>> value, stderr = Estimate(torch.tensor(2.0), torch.tensor(0.1))
        >>> value, stderr
        (tensor(2.), tensor(0.1000))
    """

    value: Any
    stderr: Any
    count: Tensor | None = None
    _: KW_ONLY
    fisher: str | None = None
    unit: str | None = None
    matvecs: int = 0
    draws: Tensor | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Any]:
        """Yield value and standard error."""
        yield self.value
        yield self.stderr

    def __float__(self) -> float:
        return float(self.value)

    def __fisher_merge__(self, other: Self) -> Self:
        if self.count is None or other.count is None:
            raise UnsupportedError(
                "merge: expected estimates with a count, got one without. It is no average over "
                "units of data; average such estimates with ff.states."
            )
        self._check_same("merge", other)
        a, b, count = merge_weights(self.count, other.count)
        return self._average(a, other, b, count)

    def _average(self, a: Tensor, other: Self, b: Tensor, count: Tensor | None) -> Self:
        """Return a·self + b·other; the class says what of their standard errors."""
        value = trees.map(lambda x, y: _average(a, x, b, y), self.value, other.value)
        mine, theirs, draws = self.draws, other.draws, None
        if mine is not None and theirs is not None and mine.shape == theirs.shape:
            draws = _average(a[..., None], mine, b[..., None], theirs)
            spread = summary(draws.movedim(-1, 0))[1].to(self.stderr.dtype)
            alone = torch.where(b == 0, self.stderr, spread)
            stderr = torch.where(a == 0, other.stderr, alone)
        else:
            join = torch.hypot if mine is None or theirs is None else torch.add
            stderr = trees.map(lambda x, y: join(*_shares(a, x, b, y)), self.stderr, other.stderr)
        matvecs = max(self.matvecs, other.matvecs)
        return replace(self, value=value, stderr=stderr, count=count, matvecs=matvecs, draws=draws)

    def _check_same(self, caller: str, other: Self) -> None:
        for name in ("fisher", "unit"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise OptionError(
                    f"{caller}: expected two estimates with the same {name}, got {ours!r} and "
                    f"{theirs!r}. Compute both with the same options."
                )

    def __fisher_tensors__(self) -> Tree:
        return self.value

    def __fisher_toward__(self, other: Self, share: Tensor) -> Self:
        self._check_same("states", other)
        kept, count = 1.0 - share, None
        if self.count is not None and other.count is not None:
            count = joined_count(self.count, kept, other.count, share)
        mixed = self._average(kept, other, share, count)
        return replace(
            mixed, value=trees.map(lambda x, y: toward(x, y, share), self.value, other.value)
        )

    def __fisher_empty__(self) -> Self:
        if self.count is None:
            raise UnsupportedError(
                "empty_like: expected an estimate with a count, got one without. It is no average "
                "over units of data."
            )
        parts = (self.value, self.stderr, self.count, self.draws)
        value, stderr, count, draws = [trees.zeros_like(part) for part in parts]
        return replace(self, value=value, stderr=stderr, count=count, draws=draws, matvecs=0)


def summary(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over the leading axis; the latter is infinite for one draw."""
    count = values.shape[0]
    mean = values.mean(0)
    if count == 1:
        return mean, torch.full_like(mean, float("inf"))
    variance = ((values - mean) ** 2).sum(0) / (count * (count - 1))
    spread = variance > 0  # the root has no derivative at zero; NaN stays NaN
    root = torch.where(spread, variance, 1.0).sqrt()
    return mean, torch.where(spread, root, variance)


def _shares(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a·x and b·y; a share of zero leaves zero, whatever it is a share of."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    a, b = a.to(x.device, x.dtype), b.to(x.device, x.dtype)
    return torch.where(a == 0, zero, a * x), torch.where(b == 0, zero, b * y)


def _average(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    first, second = _shares(a, x, b, y)
    return first + second


trees.register_dataclass_node(
    Estimate, ("value", "stderr", "count", "draws"), ("fisher", "unit", "matvecs")
)


#: What `Solution.status` says, by number.
REASONS = (
    "converged",
    "reached max_steps",
    "the operator is not positive definite",
    "the operator is not symmetric",
    "the residual no longer falls",
    "the preconditioner is not positive definite",
    "not finite",
    "zero right-hand side",
)


@dataclass(frozen=True, eq=False)
class Solution:
    """The solution of a linear system, or the best there is, and whether to trust it.

    With several right-hand sides each tensor has them as its leading axis.

    Attributes:
        value: x, a tree like the right-hand side.
        converged: bool, 0-d: whether `residual` is within the tolerance, of an operator that is as
            the method needs it.
        steps: int64, 0-d: iterations taken.
        residual: 0-d: ‖b − (A + λI) x‖ / ‖b‖, computed from x itself.
        status: int64, 0-d: the number of the reason.
    """

    value: Tree
    converged: Tensor
    steps: Tensor
    residual: Tensor
    status: Tensor

    @property
    def reason(self) -> Any:
        """Why the iteration ended, in words; a tuple for several right-hand sides."""
        found = self.status.tolist()
        return tuple(REASONS[i] for i in found) if isinstance(found, list) else REASONS[found]


trees.register_dataclass_node(Solution, ("value", "converged", "steps", "residual", "status"))


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenvalues of a symmetric operator, with vectors and residuals.

    Attributes:
        eigenvalues: `[k]`, descending; multiple eigenvalues as often as their multiplicity.
        eigenvectors: Tree like a vector, each leaf `[k, *shape]`, orthonormal.
        residuals: `[k]`, ‖A v − θ v‖. Each interval θ ± residual holds an eigenvalue of A.
        converged: bool, 0-d: whether every residual is within the tolerance.
        steps: int64, 0-d: products with the operator.
    """

    eigenvalues: Tensor
    eigenvectors: Tree
    residuals: Tensor
    converged: Tensor
    steps: Tensor

    def vector(self, i: int) -> Tree:
        """Return eigenvector number `i`, a tree."""
        return trees.map(lambda leaf: leaf[i], self.eigenvectors)


trees.register_dataclass_node(
    Eigenpairs, ("eigenvalues", "eigenvectors", "residuals", "converged", "steps")
)
