"""The algebra that all representations with Kronecker blocks share.

Each block takes its entries out of leaves of the parameters (`fisherfn.curvature.kronecker`); what
no block takes is in `rest`, the exact diagonal of each remaining leaf.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fisherfn.core.dtypes import wide
from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError, at
from fisherfn.core.trees import Tree
from fisherfn.curvature.base import Curvature
from fisherfn.curvature.common import (
    Scalar,
    check_damping,
    check_floating,
    combine,
    relative_to,
)
from fisherfn.curvature.kronecker import Block, block_from
from fisherfn.curvature.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Self


class Kronecker(Curvature):
    """Base of the representations with Kronecker blocks and a diagonal for everything else.

    Attributes:
        rest: For each leaf that no block takes, by path, its exact diagonal.
        layout: Static structure of the parameters.
        blocks: Static description of the blocks.
    """

    rest: dict[str, Tensor]
    layout: Layout
    blocks: tuple[Block, ...]

    #: The fields with tensors of blocks.
    _by_block: ClassVar[tuple[str, ...]] = ()
    _averages = ("inputs", "outputs", "rest")
    _tallies = ("rows",)

    def __fisher_tensors__(self) -> dict[str, dict[str, Tensor]]:
        # A side that is kept as rows is no average of them.
        rows = {
            "inputs": [b.name for b in self.blocks if b.input_form == "rows"],
            "outputs": [b.name for b in self.blocks if b.output_form == "rows"],
        }
        return {
            field: {k: x for k, x in getattr(self, field).items() if k not in rows.get(field, ())}
            for field in self._averages
        }

    def stripped(self) -> dict[str, Any]:
        """Return the tensors, under descriptions of their blocks; `restored` undoes it."""
        texts = {b.name: b.text() for b in self.blocks}
        found: dict[str, Any] = {
            field: {texts[name]: x for name, x in getattr(self, field).items()}
            for field in self._by_block
            if field not in self._given()
        }
        return {**found, "rest": self.rest, "count": self.count}

    def _given(self) -> tuple[str, ...]:
        """Return the fields that were not computed, but handed in."""
        return ()

    @classmethod
    def restored(
        cls,
        found: dict[str, Any],
        layout: Layout,
        *static: Any,
        given: Mapping[str, dict[str, Tensor]] | None = None,
        **named: Any,
    ) -> Self:
        """Return the result whose `stripped` is `found`; `given` has the fields that it lacks."""
        given = given or {}
        blocks = tuple([block_from(text) for text in found[cls._by_block[0]]])
        names = dict(zip(found[cls._by_block[0]], [b.name for b in blocks], strict=True))
        fields = [
            {names[text]: x for text, x in found[field].items()}
            if field in found
            else {name: given[field][name] for name in names.values() if name in given[field]}
            for field in cls._by_block
        ]
        build: Any = cls
        return build(*fields, found["rest"], found["count"], layout, blocks, *static, **named)

    def _summary(self) -> str:
        many = "block" if len(self.blocks) == 1 else "blocks"
        leaves = "leaf" if len(self.rest) == 1 else "leaves"
        return f"{len(self.blocks)} {many}, {len(self.rest)} diagonal {leaves}"

    def _check(self, caller: str) -> None:
        self._check_count(caller)
        shapes = dict(zip(self.layout.paths, self.layout.shapes, strict=True))
        covered = {path: 0 for path in shapes}
        for block in self.blocks:
            for path in block.paths():
                if path not in covered:
                    self._refuse_cover(caller, path)
            for layer in block.layers:
                many = block.groups * layer.outputs
                covered[layer.weight.path] += many * (block.inputs - (layer.bias is not None))
                if layer.bias is not None:
                    covered[layer.bias.path] += many
        for path, values in self.rest.items():
            if path not in covered or covered[path]:
                self._refuse_cover(caller, path)
            shape = tuple(values.shape) if isinstance(values, Tensor) else None
            if shape != shapes[path]:
                raise ShapeError(
                    f"{caller}: expected the diagonal to be like the parameter, got shape {shape}"
                    f"{at(path)}, needs {shapes[path]}. Give one number for each scalar."
                )
            check_floating(caller, "the diagonal", [values], [path])
            covered[path] = math.prod(shapes[path])
        for path, entries in covered.items():
            if entries != math.prod(shapes[path]):
                self._refuse_cover(caller, path)
        self._check_blocks(caller)

    def _refuse_cover(self, caller: str, path: str) -> None:
        raise OptionError(
            f"{caller}: expected blocks and rest that cover each leaf of the parameters once, got "
            f"another cover{at(path)}. Take them from ff.kfac or ff.ekfac."
        )

    @abc.abstractmethod
    def _check_blocks(self, caller: str) -> None:
        """Check that there are factors for each block, of the right shapes."""

    def _check_factor(
        self, caller: str, what: str, name: str, x: Any, shapes: Sequence[tuple[int | None, ...]]
    ) -> None:
        """Check one tensor of a block against the shapes that it may have; None is any size."""
        got = tuple(x.shape) if isinstance(x, Tensor) else None
        for shape in shapes:
            if got is not None and len(got) == len(shape):
                if all([b is None or a == b for a, b in zip(got, shape, strict=True)]):
                    check_floating(caller, what, [x], [name])
                    return
        wanted = " or ".join(
            [str(tuple(["any" if n is None else n for n in shape])) for shape in shapes]
        )
        shown = f"shape {got}" if got is not None else f"a {type(x).__name__}"
        raise ShapeError(
            f"{caller}: expected {what} of shape {wanted}{at(name)}, got {shown}. Take it from "
            "ff.kfac or ff.ekfac of the same model."
        )

    def _check_names(self, caller: str, what: str, names: Any) -> None:
        wanted = [block.name for block in self.blocks]
        if not isinstance(names, dict) or set(names) != set(wanted) or len(names) != len(wanted):
            got = list(names) if isinstance(names, dict) else type(names).__name__
            raise TreeMismatchError(
                f"{caller}: expected {what} for each of the blocks {wanted}, got {got}. Name them "
                "like the blocks."
            )

    def _check_same(self, caller: str, other: Any) -> None:
        other.layout.check_same(caller, self.layout)
        if self.blocks != other.blocks or set(self.rest) != set(other.rest):
            ours, theirs = (
                [(b.name, b.groups, b.outputs, b.inputs) for b in x.blocks] for x in (self, other)
            )
            raise TreeMismatchError(
                f"{caller}: expected two results with the same blocks, got {ours} and {theirs}. "
                "Compute both with the same options."
            )

    def _gather(self, caller: str, v: Tree) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return a tree as a stack [R, O, I] for each block, and the leaves of `rest`."""
        self._check(caller)
        found = self.layout.leaves(caller, "v", v)
        leaves = dict(zip(self.layout.paths, found, strict=True))
        rest = {path: wide(leaves[path]) for path in self.rest}
        return [block.take(leaves) for block in self.blocks], rest

    def _scatter(
        self,
        matrices: Sequence[Tensor],
        rest: Mapping[str, Tensor],
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> Tree:
        """Return stacks and the leaves of `rest` as a tree; in the leaves' `dtypes` if given."""
        found = dict(rest)
        for block, matrix in zip(self.blocks, matrices, strict=True):
            block.put(matrix, found)
        leaves = [found[path] for path in self.layout.paths]
        if dtypes is not None:
            leaves = [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        return self.layout.build(leaves)

    def _normal(self, key: Tensor, like: Tensor | None) -> Tree:
        """Return standard normal numbers like the parameters, those of `tree.random_like`."""
        leaves = []
        for i, path in enumerate(self.layout.paths):
            model = self.rest[path] if path in self.rest else like
            assert model is not None
            leaves.append(self.layout.normal(key, i, model).reshape(self.layout.shapes[i]))
        return self.layout.build(leaves)

    def _dense(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return [P, P] from a matrix [R, O·I, O·I] for each block."""
        device = self.count.device
        places = self._places(device)
        size = self.layout.size
        whole = torch.zeros(size * size, dtype=dtype, device=device)
        for block, place, stack in zip(self.blocks, places[0], matrices, strict=True):
            index = place.reshape(block.groups, -1)
            flat = (index.unsqueeze(-1) * size + index.unsqueeze(-2)).reshape(-1)
            whole = whole.index_copy(0, flat, stack.to(dtype).reshape(-1))
        for path, values in self.rest.items():
            flat = (places[1][path] * (size + 1)).reshape(-1)
            whole = whole.index_copy(0, flat, values.to(dtype).reshape(-1))
        return whole.reshape(size, size)

    def _places(self, device: torch.device) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return where in a vector [P] the entries of each block and of `rest` are."""
        start, places = 0, {}
        layout = zip(self.layout.paths, self.layout.shapes, self.layout.sizes, strict=True)
        for path, shape, size in layout:
            places[path] = torch.arange(start, start + size, device=device).reshape(shape)
            start += size
        return [block.places(places) for block in self.blocks], places

    def _damping(self, caller: str, damping: Any, relative: bool) -> Scalar:
        """Return λ, which may be given in units of the mean eigenvalue of F."""
        return relative_to(check_damping(caller, damping), self.trace, self.layout.size, relative)

    def _names(self) -> list[str]:
        """Return what messages call the blocks, and then the leaves of `rest`."""
        return [b.name for b in self.blocks] + list(self.rest)

    def _like(self, caller: str, v: Tree, found: Tree) -> Tree:
        """Return a tree in the dtypes of `v`, leaf by leaf."""
        dtypes = [x.dtype for x in self.layout.leaves(caller, "v", v)]
        leaves = self.layout.leaves(caller, "v", found)
        return self.layout.build([x.to(d) for x, d in zip(leaves, dtypes, strict=True)])

    def _rest_linear(self, a: Any, other: Any, b: Any) -> dict[str, Tensor]:
        return {
            path: combine(a, x, b, None if other is None else other.rest[path])
            for path, x in self.rest.items()
        }
