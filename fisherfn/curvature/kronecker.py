"""Which parts of the parameters a Kronecker block covers, and the algebra that all of them share.

A block is about a stack of R matrices W [R, O, I]: R groups that do not interact (groups of a
convolution, heads), O outputs and I inputs. Its coordinates are row-major, so that G ⊗ A, with G
[O, O] over outputs and A [I, I] over inputs, maps W to G W A. A bias may be the last column of W:
the input that is always one.

Each block takes its entries out of leaves of the parameters; what no block takes is in `rest`, the
exact diagonal of each remaining leaf.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError
from fisherfn.core.trees import Tree
from fisherfn.curvature.base import Curvature
from fisherfn.curvature.common import (
    Scalar,
    at,
    check_damping,
    check_floating,
    combine,
    scalar_like,
    wide,
)
from fisherfn.curvature.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Self

#: ("slice", dim, start, stop, size), ("permute", dims) or ("reshape", source, target).
Step: TypeAlias = "tuple[Any, ...]"

#: How a factor is kept: a matrix [R, n, n]; its diagonal [R, n], if it has no other entries; or
#: "rows" [R, m, n], which stand for rowsᵀ rows.
FORMS = ("matrix", "diagonal", "rows")


@dataclass(frozen=True)
class Piece:
    """A part of one leaf, seen as a stack of matrices; plain data.

    Attributes:
        path: Path of the leaf.
        steps: Slices, permutations and reshapes from the leaf to [R, O, I].
    """

    path: str
    steps: tuple[Step, ...]

    def take(self, leaf: Tensor) -> Tensor:
        """Return the stack [R, O, I] of a leaf."""
        for step in self.steps:
            if step[0] == "slice":
                leaf = leaf.narrow(step[1], step[2], step[3] - step[2])
            elif step[0] == "permute":
                leaf = leaf.permute(step[1])
            else:
                leaf = leaf.reshape(step[2])
        return leaf

    def put(self, matrix: Tensor) -> Tensor:
        """Return a leaf with this stack in its place and zeros elsewhere."""
        for step in reversed(self.steps):
            if step[0] == "slice":
                after = matrix.dim() - 1 - step[1]
                matrix = F.pad(matrix, [0, 0] * after + [step[2], step[4] - step[3]])
            elif step[0] == "permute":
                inverse = sorted(range(len(step[1])), key=step[1].__getitem__)
                matrix = matrix.permute(inverse)
            else:
                matrix = matrix.reshape(step[1])
        return matrix


@dataclass(frozen=True)
class Block:
    """What a Kronecker block is about; plain data, part of the structure of a result.

    Attributes:
        name: Path of its weight, with a number if several blocks share one.
        weight: Where its matrices are.
        bias: Where the column of its bias is, or None.
        groups: R.
        outputs: O.
        inputs: I, with the column of the bias.
        output_form: How G is kept, one of `FORMS`.
        input_form: How A is kept.
    """

    name: str
    weight: Piece
    bias: Piece | None
    groups: int
    outputs: int
    inputs: int
    output_form: str = "matrix"
    input_form: str = "matrix"

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.groups * self.outputs * self.inputs

    def take(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the stack [R, O, I] of this block, float32 or wider."""
        matrix = wide(self.weight.take(leaves[self.weight.path]))
        if self.bias is None:
            return matrix
        column = wide(self.bias.take(leaves[self.bias.path]))
        dtype = torch.promote_types(matrix.dtype, column.dtype)
        return torch.cat([matrix.to(dtype), column.to(dtype)], -1)

    def put(self, matrix: Tensor, found: dict[str, Tensor]) -> None:
        """Add the stack [R, O, I] to the leaves that it belongs to."""
        if self.bias is not None:
            _add(found, self.bias.path, self.bias.put(matrix[..., -1:]))
            matrix = matrix[..., :-1]
        _add(found, self.weight.path, self.weight.put(matrix))

    def text(self) -> str:
        """Return this description as text, which `block_from` reads."""
        return json.dumps(dataclasses.astuple(self))

    def paths(self) -> list[str]:
        """Return the paths of the leaves that it takes entries from."""
        return [self.weight.path] + ([] if self.bias is None else [self.bias.path])


def block_from(text: str) -> Block:
    """Return the description that `Block.text` wrote."""
    name, weight, bias, *numbers = _parsed(text)
    return Block(name, Piece(*weight), None if bias is None else Piece(*bias), *numbers)


def _parsed(text: str) -> Any:
    return _tuples(json.loads(text))


# Plain data cannot leave compiled code but as the keys of a dict, which are read while tracing.
_parsed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tuples(x: Any) -> Any:
    return tuple([_tuples(y) for y in x]) if isinstance(x, list) else x


def _add(found: dict[str, Tensor], path: str, leaf: Tensor) -> None:
    found[path] = found[path] + leaf if path in found else leaf


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
            inputs = block.inputs - (0 if block.bias is None else 1)
            covered[block.weight.path] += block.groups * block.outputs * inputs
            if block.bias is not None:
                covered[block.bias.path] += block.groups * block.outputs
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
        found = []
        for block in self.blocks:
            index = block.weight.take(places[block.weight.path])
            if block.bias is not None:
                index = torch.cat([index, block.bias.take(places[block.bias.path])], -1)
            found.append(index)
        return found, places

    def _damping(self, caller: str, damping: Any, relative: bool) -> Scalar:
        """Return λ, which may be given in units of the mean eigenvalue of F."""
        scalar = check_damping(caller, damping)
        if not relative:
            return scalar
        mean = self.trace() / max(1, self.layout.size)
        return mean * scalar_like(scalar, mean)

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
