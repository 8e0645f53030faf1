"""Traces over groups of parameters: the same multiple of the identity for all scalars of a group.

With t_g the trace of the Fisher information over group g and |g| its number of scalars, the matrix
represented is ⊕_g (t_g / |g|) I. `values` holds t_g. Its trace is that of the Fisher information;
its eigenvalues are averages of diagonal entries, not eigenvalues of the Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.errors import OptionError, TreeMismatchError
from fisherfn.core.trees import Tree
from fisherfn.curvature.base import Curvature
from fisherfn.curvature.common import (
    Scalar,
    check_damping,
    check_number,
    combine,
    hypot,
    norm,
    poison,
    require,
    scalar_like,
    total,
)
from fisherfn.curvature.diagonal import Diagonal, check_tensors
from fisherfn.curvature.layout import Layout
from fisherfn.groups import GroupSpec, reduce, regroup, relabel
from fisherfn.groups.pools import check_leaves, check_reduced, pool_sizes

if TYPE_CHECKING:
    from typing_extensions import Self

#: The spec of each leaf, in the order of the layout.
Groups = tuple[tuple[str, GroupSpec], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Grouped(Curvature):
    """⊕_g (t_g / |g|) I: see `fisherfn.curvature.base` for the algebra and its conventions.

    Attributes:
        values: Vectors `[num_groups]` of the sums t_g, whatever the `reduction` of the specs, by
            the path of the parameter or the name of the pool.
        count: N, the units averaged over; 0-d float tensor.
        layout: Static structure of the parameters, `Layout.of(params)`.
        groups: Static pairs (path, `GroupSpec`), one a leaf.
        stderr: Vectors like `values`, the standard error of each sum as an estimate of the
            expectation over labels, or None if it is exact or not known.
        fisher: Which labels were used.
        unit: What is counted.

    Example:
        >>> from fisherfn.groups import channels
        >>> params = {"w": torch.zeros(2, 2)}
        >>> groups = (("w", channels((2, 2))),)
        >>> values = {"w": torch.tensor([2.0, 6.0])}
        >>> F = Grouped(values, torch.tensor(8.0), Layout.of(params), groups)
        >>> F.trace(), F.eigenvalues()
        (tensor(8.), tensor([3., 3., 1., 1.]))
        >>> F.solve({"w": torch.ones(2, 2)}, damping=1.0)["w"]
        tensor([[0.5000, 0.5000],
                [0.2500, 0.2500]])
        >>> F
        Grouped(2 groups of 4 scalars, count=8, fisher='exact', unit='example')
    """

    values: dict[str, Tensor]
    count: Tensor
    layout: Layout
    groups: Groups
    stderr: dict[str, Tensor] | None = None
    _: KW_ONLY
    fisher: str = "exact"
    unit: str = "example"

    _averages = ("values",)
    _entrywise = True

    @staticmethod
    def of(diagonal: Diagonal, specs: Mapping[str, GroupSpec]) -> Grouped:
        """Return the traces over groups of a diagonal.

        Args:
            diagonal: A `Diagonal`; its standard errors do not add up and are left out.
            specs: A spec for every leaf, from `ff.groups.infer`.

        Returns:
            A `Grouped` of the same trace, count, labels and unit.

        Raises:
            OptionError: Not a `Diagonal`.
            TreeMismatchError: A leaf has no spec or another shape.
        """
        if not isinstance(diagonal, Diagonal):
            raise OptionError(
                f"Grouped.of: expected a Diagonal, got {type(diagonal).__name__}. Ask another "
                "representation for its diagonal() first."
            )
        diagonal._check("Grouped.of")
        layout = Layout.of(diagonal.values)
        check_leaves("Grouped.of", diagonal.values, specs)
        groups = in_order(summing(specs), layout)
        return Grouped(
            reduce(diagonal.values, dict(groups)),
            diagonal.count,
            layout,
            groups,
            fisher=diagonal.fisher,
            unit=diagonal.unit,
        )

    def regroup(
        self, labels: Mapping[str, Sequence[Hashable]], *, into: str | None = None
    ) -> Grouped:
        """Return the traces over labelled groups, such as heads by what they do.

        Args:
            labels: For some paths, the label of each group; see `ff.groups.relabel`.
            into: A name under which all labelled parameters are added up, label by label.

        Returns:
            A `Grouped` of the same trace, with fewer groups and without standard errors: those of
            groups that draw the same labels are not independent.

        Raises:
            TreeMismatchError: There are no groups at a labelled path.
            ShapeError: There are more or fewer labels than groups.
            OptionError: Nothing is labelled, or a labelled parameter is in a pool already.
        """
        self._check("Grouped.regroup")
        specs = relabel(self.specs, labels, into=into)
        values = regroup(self.values, self.specs, labels, into=into)
        groups = in_order(specs, self.layout)
        return replace(self, values=values, groups=groups, stderr=None)

    @property
    def specs(self) -> dict[str, GroupSpec]:
        """The specs by path; they reduce by sum, as `values` do."""
        return dict(self.groups)

    def _summary(self) -> str:
        groups = sum([spec.num_groups for _, spec in self._pools().values()])
        return f"{groups} groups of {self.layout.size} scalars"

    def _pools(self) -> dict[str, tuple[str, GroupSpec]]:
        """Return the first member of each vector, by the name of the vector."""
        found: dict[str, tuple[str, GroupSpec]] = {}
        for path, spec in self.groups:
            found.setdefault(spec.into or path, (path, spec))
        return found

    def _check(self, caller: str) -> None:
        self._check_count(caller)
        shapes = tuple([spec.shape for _, spec in self.groups])
        if tuple([path for path, _ in self.groups]) != self.layout.paths or (
            shapes != self.layout.shapes
        ):
            raise TreeMismatchError(
                f"{caller}: expected one spec for each leaf of {list(self.layout.paths)}, in this "
                f"order and of its shape, got {[path for path, _ in self.groups]} with {shapes}. "
                "Make them with ff.groups.infer(params, module)."
            )
        specs = self.specs
        check_reduced(caller, self.values, specs)
        check_tensors(caller, "values", self.values)
        if self.stderr is not None:
            check_reduced(caller, self.stderr, specs)
            check_tensors(caller, "stderr", self.stderr)

    def _check_same(self, caller: str, other: Any) -> None:
        other.layout.check_same(caller, self.layout)
        if self.groups != other.groups:
            different = [a[0] for a, b in zip(self.groups, other.groups, strict=True) if a != b]
            raise TreeMismatchError(
                f"{caller}: expected two results with the same groups, got others at "
                f"{different[0]!r}. Compute both with the same specs."
            )

    def _linear(
        self, a: Scalar, other: Any = None, b: Scalar = 0.0, count: Tensor | None = None
    ) -> Self:
        count = self.count if count is None else count
        if other is None:
            values = {name: combine(a, x) for name, x in self.values.items()}
            stderr = self.stderr
            if stderr is not None:
                stderr = {name: combine(a, x).abs() for name, x in stderr.items()}
            return replace(self, values=values, count=count, stderr=stderr)
        values = {name: combine(a, x, b, other.values[name]) for name, x in self.values.items()}
        stderr = None
        if self.stderr is not None and other.stderr is not None:
            stderr = {
                name: hypot(combine(a, x), combine(b, other.stderr[name]))
                for name, x in self.stderr.items()
            }
        return replace(self, values=values, count=count, stderr=stderr)

    # ---- groups ----------------------------------------------------------------------------------

    def _sizes(self, caller: str) -> dict[str, Tensor]:
        """Return the number of scalars of each group, like `values`."""
        sizes = pool_sizes(caller, self.specs)
        return {name: sizes(name, wide(x)) for name, x in self.values.items()}

    def means(self) -> dict[str, Tensor]:
        """Return t_g / |g|, the average diagonal entry of each group, like `values`.

        Returns:
            Vectors by path or name of the pool; 0 for a group without scalars.
        """
        self._check_count("Grouped.means")
        sizes = self._sizes("Grouped.means")
        return {name: wide(x) / sizes[name].clamp_min(1) for name, x in self.values.items()}

    def _shifted(
        self, caller: str, damping: Any, need: str, holds: Callable[[Tensor], Tensor] | None
    ) -> dict[str, Tensor]:
        """Return t_g/|g| + λ where every group passes a test, or say where one does not."""
        self._check_count(caller)
        scalar = check_damping(caller, damping)
        shifted = {name: d + scalar_like(scalar, d) for name, d in self.means().items()}
        if holds is None:
            return shifted
        sizes = self._sizes(caller)
        good = [(holds(x) | (sizes[name] == 0)).all() for name, x in shifted.items()]
        known = require(caller, need, lambda: list(shifted), good, scalar)
        return {name: poison(known, x) for name, x in shifted.items()}

    def _positive(self, caller: str, damping: Any) -> dict[str, Tensor]:
        return self._shifted(caller, damping, "positive definite", lambda x: x > 0)

    def _vector(self, caller: str, v: Tree) -> list[Tensor]:
        self._check_count(caller)
        return self.layout.leaves(caller, "v", v)

    def _spread(self, density: dict[str, Tensor]) -> list[Tensor]:
        """Return the entries of each leaf, broadcastable to its shape."""
        return [spec.spread(density[spec.into or path]) for path, spec in self.groups]

    def _apply(self, density: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
        entries = self._spread(density)
        return [wide(x) * d for x, d in zip(leaves, entries, strict=True)]

    # ---- algebra ---------------------------------------------------------------------------------

    def mv(self, v: Tree) -> Tree:
        """Return F v, a tree like `v`."""
        leaves = self._vector("Grouped.mv", v)
        return self.layout.build(self._apply(self.means(), leaves))

    def solve(self, v: Tree, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)⁻¹ v in the dtype of `v`."""
        leaves = self._vector("Grouped.solve", v)
        shifted = self._positive("Grouped.solve", damping)
        parts = zip(leaves, self._spread(shifted), strict=True)
        return self.layout.build([(wide(x) / d).to(x.dtype) for x, d in parts])

    def pow(self, v: Tree, p: float, *, damping: Scalar = 0.0) -> Tree:
        """Return (F + λI)ᵖ v for any real number p."""
        caller = "Grouped.pow"
        leaves = self._vector(caller, v)
        p = check_number(caller, "p", p)
        if p < 0:
            shifted = self._positive(caller, damping)
        elif p == int(p):
            shifted = self._shifted(caller, damping, "", None)
        else:
            shifted = self._shifted(caller, damping, "positive semi-definite", lambda x: x >= 0)
        powers = {name: d**p for name, d in shifted.items()}
        return self.layout.build(self._apply(powers, leaves))

    def quadratic(self, v: Tree) -> Tensor:
        """Return vᵀ F v, a 0-d tensor."""
        leaves = self._vector("Grouped.quadratic", v)
        means = self.means()
        parts = [
            (spec.fold(wide(x).square()) * means[spec.into or path]).sum()
            for (path, spec), x in zip(self.groups, leaves, strict=True)
        ]
        return total(parts, self.count)

    def trace(self) -> Tensor:
        """Return the trace of F, a 0-d tensor."""
        self._check_count("Grouped.trace")
        return total([wide(t).sum() for t in self.values.values()], self.count)

    def frobenius(self) -> Tensor:
        """Return the Frobenius norm of F, a 0-d tensor."""
        means, sizes = self.means(), self._sizes("Grouped.frobenius")
        return norm([d * sizes[name].sqrt() for name, d in means.items()], self.count)

    def logdet(self, *, damping: Scalar = 0.0) -> Tensor:
        """Return log det (F + λI), a 0-d tensor."""
        shifted = self._positive("Grouped.logdet", damping)
        sizes = self._sizes("Grouped.logdet")
        parts = []
        for name, d in shifted.items():
            empty = sizes[name] == 0
            parts.append((sizes[name] * torch.where(empty, torch.ones_like(d), d).log()).sum())
        return total(parts, self.count)

    def diagonal(self) -> Tree:
        """Return the diagonal of F, a tree like the parameters."""
        entries = zip(self._spread(self.means()), self.layout.shapes, strict=True)
        return self.layout.build([d.expand(shape).clone() for d, shape in entries])

    def eigenvalues(self) -> Tensor:
        """Return the P eigenvalues of F, largest first."""
        return self._entries("Grouped.eigenvalues").sort(descending=True).values

    def sample(self, key: Tensor, *, damping: Scalar = 0.0) -> Tree:
        """Return a draw from N(0, (F + λI)⁻¹), a tree like the parameters."""
        entries = self._spread(self._positive("Grouped.sample", damping))
        drawn = [
            self.layout.normal(key, i, d).reshape(shape) * d.rsqrt()
            for i, (d, shape) in enumerate(zip(entries, self.layout.shapes, strict=True))
        ]
        return self.layout.build(drawn)

    def to_dense(self) -> Tensor:
        """Return F as a matrix [P, P]; parameters in insertion order, each row-major."""
        return self._entries("Grouped.to_dense").diag()

    def _entries(self, caller: str) -> Tensor:
        """Return the diagonal as a vector [P]."""
        self._check_count(caller)
        entries = zip(self._spread(self.means()), self.layout.shapes, strict=True)
        flat = [d.expand(shape).reshape(-1) for d, shape in entries]
        return torch.cat(flat) if flat else torch.zeros(0, device=self.count.device)


def in_order(specs: Mapping[str, GroupSpec], layout: Layout) -> Groups:
    """Return specs as static data, in the order of a layout."""
    return tuple([(path, specs[path]) for path in layout.paths])


def summing(specs: Mapping[str, GroupSpec]) -> dict[str, GroupSpec]:
    """Return the same specs with sums, which is what `Grouped` keeps."""
    return {path: spec.renamed(reduction="sum") for path, spec in specs.items()}


trees.register_dataclass_node(
    Grouped, ("values", "count", "stderr"), ("layout", "groups", "fisher", "unit")
)
