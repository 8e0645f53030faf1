"""What every representation of a Fisher information matrix answers, and the checks they share.

With scores s_n = +grad_theta log p(y | x_n, theta), F = (1/N) sum_n E_y[ s_n s_n^T ], a symmetric
matrix [P, P] in nats² / parameter². A representation stores F, or an approximation of it, in some
form and answers each question below **exactly for the matrix that it represents**.

Glossary, for all representations:

- `v`: tree like the parameters, of any floating-point dtype. Results are float32 or wider; `solve`
  returns the dtype of `v`, leaf by leaf.
- `damping`: the λ of F + λI, in the units of F: a number or a 0-d tensor, finite, not negative. It
  is 0 unless given, and then F itself has to be regular.
- Where F + λI is singular or indefinite, `solve`, `logdet`, `sample` and negative powers raise
  `NotPositiveDefiniteError` in eager mode. Inside `torch.compile` or a `torch.func` transformation
  values cannot be looked at; there the whole result is NaN.
- `c * F` and `F + G` are matrix algebra. `c * F` keeps the count; `F + G` adds the counts, and the
  standard errors as those of independent estimates, so that `merge(F, G)` is
  `N_F/N * F + N_G/N * G` in every field.
- `merge(F, G)` is the result on the joined data.

Results are pytrees. A batch of results (of an ensemble, by `torch.vmap`) has a leading axis in
every tensor; use `torch.vmap` again to ask each of its members.
"""

from __future__ import annotations

import abc
import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.errors import OptionError, ShapeError, UnsupportedError
from fisherfn.core.merging import joined_count, merge_weights, toward
from fisherfn.core.modes import Unmixed, concrete
from fisherfn.core.trees import Tree
from fisherfn.curvature.common import Scalar, combine, hypot, is_number, scalar_like

if TYPE_CHECKING:
    from typing_extensions import Self

UNITS = ("example", "position")
_PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")


class Result(abc.ABC):
    """An average over N units that can be merged: curvature, or moments of the scores.

    Attributes:
        count: N, a 0-d floating-point tensor.
        fisher: Which labels were used: "exact", "mc", "curvature_prop" or "empirical".
        unit: What is counted: "example" or "position".
    """

    count: Tensor
    fisher: str
    unit: str

    #: Fields whose entries are averages over units: states keep means and spreads of them.
    _averages: ClassVar[tuple[str, ...]] = ()
    #: Whether these, `count` and `stderr` are all the data there is, so that an average of results
    #: is taken entry by entry. Where it is not, averages go through `merge`.
    _entrywise: ClassVar[bool] = False
    #: Fields besides `count` that count units or rows of the same data, and so grow with it.
    _tallies: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:  # every result is a dataclass
        __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        # Runs for the user's own calls only: pytree transformations set fields directly, and put
        # other things than tensors there.
        if isinstance(self.count, numbers.Real):
            count = torch.tensor(float(self.count), dtype=torch.float64)
            object.__setattr__(self, "count", count)
        name = type(self).__name__
        if self.unit not in UNITS:
            raise OptionError(
                f"{name}: expected unit to be one of {list(UNITS)}, got {self.unit!r}. "
                "It says what the count counts."
            )
        if not isinstance(self.fisher, str):
            raise OptionError(
                f"{name}: expected fisher to be a string such as 'exact', got {self.fisher!r}. "
                "It says which labels were used."
            )
        self._check(name)

    def __repr__(self) -> str:
        count: Any = self.count
        if isinstance(count, Tensor) and count.ndim == 0 and concrete(count):
            count = f"{count.item():g}"
        elif isinstance(count, Tensor):
            count = f"<{tuple(count.shape)}>"
        return (
            f"{type(self).__name__}({self._summary()}, count={count}, "
            f"fisher={self.fisher!r}, unit={self.unit!r})"
        )

    @abc.abstractmethod
    def _summary(self) -> str:
        """Say in a few words what is stored."""

    @abc.abstractmethod
    def _check(self, caller: str) -> None:
        """Check that the fields fit together."""

    @abc.abstractmethod
    def _check_same(self, caller: str, other: Any) -> None:
        """Check that the structure of another result of this class is the same."""

    @abc.abstractmethod
    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        """Return a·self + b·other, with this count (by default one's own)."""

    def _check_count(self, caller: str) -> None:
        """Check that this is one result, not a batch of them."""
        if not isinstance(self.count, Tensor) or self.count.ndim != 0:
            got = (
                f"shape {tuple(self.count.shape)}"
                if isinstance(self.count, Tensor)
                else type(self.count).__name__
            )
            raise ShapeError(
                f"{caller}: expected count to be a 0-d tensor, got {got}. "
                "For a batch of results, map over its leading axis with torch.vmap."
            )

    def _check_pair(self, caller: str, other: Result, checked: bool = False) -> None:
        """Check that another result is of the same class, kind, unit and structure."""
        if type(other) is not type(self):
            raise OptionError(
                f"{caller}: expected two results of one class, got {type(self).__name__} and "
                f"{type(other).__name__}. Compute both with the same estimator."
            )
        for name in ("fisher", "unit"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise OptionError(
                    f"{caller}: expected two results with the same {name}, got {ours!r} and "
                    f"{theirs!r}. Compute both with the same options."
                )
        if not checked:  # what is in a state was, when it was put there
            self._check(caller)
        other._check(caller)
        self._check_same(caller, other)

    def __fisher_merge__(self, other: Self) -> Self:
        self._check_pair("merge", other)
        a, b, count = merge_weights(self.count, other.count)
        return self._linear(a, other, b, count)

    def __fisher_empty__(self) -> Self:
        # Not 0·self: a NaN would survive the product.
        return pytree.tree_map(torch.zeros_like, self)

    def __fisher_tensors__(self) -> Tree:
        """Return the tensors whose entries are averages over units, for spreads and reports."""
        fields = {name: getattr(self, name) for name in self._averages}
        if not fields:
            raise UnsupportedError(
                f"{type(self).__name__}: expected a result whose entries are averages over units, "
                "got one that has none. Average it with ff.states.ema, or fold it with "
                "ff.states.accumulate."
            )
        return fields if len(fields) > 1 else next(iter(fields.values()))

    def _with_count(self, count: Tensor) -> Self:
        """Return the result on more or less data of the same kind, so that N is this."""
        none = self.count == 0
        ratio = torch.where(none, 0.0, count / torch.where(none, 1.0, self.count))
        changes = {
            name: trees.map(lambda n: n * scalar_like(ratio, n), getattr(self, name))
            for name in self._tallies
        }
        return replace(self, count=count, **changes)

    def __fisher_toward__(self, other: Self, share: Tensor) -> Self:
        """Return self + share·(other − self), the average of two results with these shares.

        Factors and entries are averaged, never products of them; a basis has to be the same. The
        count is the number of units whose plain average would have the same standard error.
        """
        self._check_pair("states", other, checked=True)
        kept = 1.0 - share
        count = joined_count(self.count, kept, other.count, share)
        if not self._entrywise:
            return (
                self._with_count(kept).__fisher_merge__(other._with_count(share))._with_count(count)
            )
        changes: dict[str, Any] = {"count": count}
        first = next(iter(trees.leaves(getattr(self, self._averages[0]))), share)
        share = share.to(wide(first).dtype)
        for name in self._averages:
            ours, theirs = getattr(self, name), getattr(other, name)
            changes[name] = trees.map(lambda x, y: toward(x, y, share), ours, theirs)
        errors = getattr(self, "stderr", None), getattr(other, "stderr", None)
        if hasattr(self, "stderr"):
            both = errors[0] is not None and errors[1] is not None
            changes["stderr"] = (
                trees.map(lambda x, y: hypot(combine(kept, x), combine(share, y)), *errors)
                if both
                else None
            )
        return replace(self, **changes)


class Curvature(Result, Unmixed):
    """A representation of a Fisher information matrix; the module says what all of them share."""

    _unmixed: ClassVar[tuple[str, ...]] = (
        *("mv", "solve", "pow", "quadratic", "trace", "frobenius", "logdet", "diagonal"),
        *("eigenvalues", "sample", "to_dense", "eigh", "truncate", "inverse"),
    )

    # numpy scalars then leave `c * F` to F.
    __array_ufunc__ = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Answer `tensor * F`, which `torch.compile` traces as a torch function of F."""
        if getattr(func, "__name__", "") in _PRODUCTS and len(args) == 2 and not kwargs:
            left, right = args
            return left.__mul__(right) if isinstance(left, Curvature) else right.__mul__(left)
        return NotImplemented

    def __mul__(self, c: Scalar) -> Self:
        if not (is_number(c) or isinstance(c, Tensor)):
            return NotImplemented
        if isinstance(c, Tensor) and (c.ndim != 0 or c.is_complex()):
            raise ShapeError(
                f"c * F: expected c to be a real number or a 0-d tensor, got {c.dtype} of shape "
                f"{tuple(c.shape)}. Scale each leaf with ff.tree.map instead."
            )
        self._check("c * F")
        return self._linear(c)

    def __rmul__(self, c: Scalar) -> Self:
        return self.__mul__(c)

    def __add__(self, other: Self) -> Self:
        if not isinstance(other, Curvature):
            return NotImplemented
        self._check_pair("F + G", other)
        return self._linear(1.0, other, 1.0, self.count + other.count)

    @abc.abstractmethod
    def mv(self, v: Tree) -> Tree:
        """Return F v, a tree like `v`."""

    @abc.abstractmethod
    def solve(self, v: Tree, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)⁻¹ v in the dtype of `v`."""

    @abc.abstractmethod
    def pow(self, v: Tree, p: float, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)ᵖ v for any real number p."""

    @abc.abstractmethod
    def quadratic(self, v: Tree) -> Tensor:
        """Return vᵀ F v, a 0-d tensor."""

    @abc.abstractmethod
    def trace(self) -> Tensor:
        """Return the trace of F, a 0-d tensor."""

    @abc.abstractmethod
    def frobenius(self) -> Tensor:
        """Return the Frobenius norm of F, a 0-d tensor."""

    @abc.abstractmethod
    def logdet(self, *, damping: Scalar = 0.0) -> Tensor:
        """Return log det (F + λI), a 0-d tensor."""

    @abc.abstractmethod
    def diagonal(self) -> Tree:
        """Return the diagonal of F, a tree like the parameters."""

    @abc.abstractmethod
    def eigenvalues(self) -> Tensor:
        """Return the P eigenvalues of F, largest first."""

    @abc.abstractmethod
    def sample(self, key: Tensor, *, damping: Scalar = 0.0) -> Tree:
        """Return a draw from N(0, (F + λI)⁻¹), a tree like the parameters."""

    @abc.abstractmethod
    def to_dense(self) -> Tensor:
        """Return F as a matrix [P, P]; parameters in insertion order, each row-major."""
