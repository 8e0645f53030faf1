"""Which parts of the parameters a Kronecker block covers.

A block is about a stack of R matrices W [R, O, I]: R groups that do not interact (groups of a
convolution, heads), O outputs and I inputs. Its coordinates are row-major, so that G ⊗ A, with G
[O, O] over outputs and A [I, I] over inputs, maps W to G W A. A bias may be the last column of W:
the input that is always one. Layers that read the same inputs may share a block: their outputs
follow each other, as if their weights were stacked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfn.core.dtypes import wide, widest

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
class Layer:
    """One of the layers of a block; plain data.

    Attributes:
        weight: Where its matrices are.
        bias: Where the column of its bias is, or None.
        outputs: How many of the block's outputs are its own.
    """

    weight: Piece
    bias: Piece | None
    outputs: int

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What stands side by side: the weight, and the column of the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Block:
    """What a Kronecker block is about; plain data, part of the structure of a result.

    Attributes:
        name: Path of its weight, with a number if several blocks share one; the names of several
            layers are joined by "+".
        weight: Where its matrices are.
        bias: Where the column of its bias is, or None.
        groups: R.
        outputs: O, of all its layers.
        inputs: I, with the column of the bias.
        output_form: How G is kept, one of `FORMS`.
        input_form: How A is kept.
        beside: Further layers that read the same inputs, whose outputs come last, in this order.
    """

    name: str
    weight: Piece
    bias: Piece | None
    groups: int
    outputs: int
    inputs: int
    output_form: str = "matrix"
    input_form: str = "matrix"
    beside: tuple[Layer, ...] = ()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.groups * self.outputs * self.inputs

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, in the order of their outputs."""
        own = self.outputs - sum([layer.outputs for layer in self.beside])
        return (Layer(self.weight, self.bias, own), *self.beside)

    def take(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the stack [R, O, I] of this block, float32 or wider."""
        cut = [[wide(x) for x in row] for row in self._cut(leaves)]
        dtype = widest([x for row in cut for x in row])
        return _stacked([[x.to(dtype) for x in row] for row in cut])

    def places(self, index: Mapping[str, Tensor]) -> Tensor:
        """Return the stack [R, O, I] of what `index` has in the places of the leaves' entries."""
        return _stacked(self._cut(index))

    def _cut(self, leaves: Mapping[str, Tensor]) -> list[list[Tensor]]:
        return [[p.take(leaves[p.path]) for p in layer.pieces] for layer in self.layers]

    def put(self, matrix: Tensor, found: dict[str, Tensor]) -> None:
        """Add the stack [R, O, I] to the leaves that it belongs to."""
        layers = self.layers
        stacks = [matrix]
        if len(layers) > 1:
            stacks = list(matrix.split([layer.outputs for layer in layers], -2))
        for layer, rows in zip(layers, stacks, strict=True):
            if layer.bias is not None:
                _add(found, layer.bias.path, layer.bias.put(rows[..., -1:]))
                rows = rows[..., :-1]
            _add(found, layer.weight.path, layer.weight.put(rows))

    def text(self) -> str:
        """Return this description as text, which `block_from` reads."""
        beside = tuple([(_bare(x.weight), _bare(x.bias), x.outputs) for x in self.beside])
        sizes = self.groups, self.outputs, self.inputs
        forms = self.output_form, self.input_form
        return _written((self.name, _bare(self.weight), _bare(self.bias), *sizes, *forms, beside))

    def paths(self) -> list[str]:
        """Return the paths of the leaves that it takes entries from, layer by layer."""
        return [piece.path for layer in self.layers for piece in layer.pieces]


def block_from(text: str) -> Block:
    """Return the description that `Block.text` wrote."""
    name, weight, bias, groups, outputs, inputs, output_form, input_form, beside = _parsed(text)
    first, further = _layer(weight, bias, outputs), tuple([_layer(*layer) for layer in beside])
    sizes = groups, outputs, inputs
    return Block(name, first.weight, first.bias, *sizes, output_form, input_form, further)


def _layer(weight: Any, bias: Any, outputs: int) -> Layer:
    return Layer(Piece(*weight), None if bias is None else Piece(*bias), outputs)


def _bare(piece: Piece | None) -> Any:
    return None if piece is None else (piece.path, piece.steps)


def _written(x: Any) -> str:
    """Return plain data as JSON, in code that `torch.compile` can trace."""
    if isinstance(x, tuple):
        return "[" + ",".join([_written(y) for y in x]) + "]"
    if isinstance(x, str):
        return '"' + x.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "null" if x is None else str(x)


def _parsed(text: str) -> Any:
    return _tuples(json.loads(text, strict=False))


# Plain data cannot leave compiled code but as the keys of a dict, which are read while tracing.
_parsed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tuples(x: Any) -> Any:
    return tuple([_tuples(y) for y in x]) if isinstance(x, list) else x


def _stacked(rows: list[list[Tensor]]) -> Tensor:
    return _joined([_joined(row, -1) for row in rows], -2)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _add(found: dict[str, Tensor], path: str, leaf: Tensor) -> None:
    found[path] = found[path] + leaf if path in found else leaf
