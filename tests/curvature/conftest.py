"""Every representation beside the dense float64 matrix that it stands for.

A test takes `cases`, a Hypothesis strategy, and `data`; a new representation joins `KINDS` and is
tested everywhere.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from hypothesis import strategies as st
from torch import Tensor

from fisherfn import groups
from fisherfn.core import random, trees
from fisherfn.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    Curvature,
    Dense,
    Diagonal,
    Grouped,
    Layout,
    LowRank,
    layer_groups,
    leaf_groups,
)
from fisherfn.curvature.kronecker import Block, Layer, Piece

KINDS = (
    "diagonal",
    "dense",
    "leaves",
    "layers",
    "crossed",
    "low_rank",
    "grouped",
    "pooled",
    "kfac",
    "ekfac",
    "joint_kfac",
    "joint_ekfac",
)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Case:
    """A representation, the matrix it represents, and the parameters it is about."""

    kind: str
    F: Curvature
    matrix: Tensor
    params: Any

    def vector(self, tree: Any) -> Tensor:
        """A tree like the parameters as one vector, in their own order."""
        leaves = trees.leaves(trees.map(lambda _, x: x, self.params, tree))
        return torch.cat([x.reshape(-1) for x in leaves]).double() if leaves else torch.zeros(0)

    def draw(self, seed: int, dtype: torch.dtype = torch.float64) -> Any:
        """A tree of normal numbers like the parameters."""
        like = trees.map(lambda x: x.to(dtype), self.params)
        return trees.random_like(random.key(seed), like)


def partition(kind: str, layout: Layout) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Groups of leaves: one a leaf, one a layer, or blocks that cross the order of the leaves."""
    if kind == "leaves":
        return leaf_groups(layout)
    if kind == "layers":
        return layer_groups(layout)
    odd, even = layout.paths[1::2], layout.paths[::2]
    return tuple([(f"block{i}", tuple(reversed(g))) for i, g in enumerate((odd, even)) if g])


def spd(n: int, seed: int, rank: int, floor: float, dtype: torch.dtype) -> Tensor:
    """An average of `rank` outer products plus `floor` times the identity."""
    scores = random.normal(random.key(seed), (rank, n), torch.float64).to(dtype)
    return scores.mT @ scores / rank + floor * torch.eye(n, dtype=dtype)


def build(
    kind: str,
    params: Any,
    seed: int = 0,
    *,
    rank: int = 30,
    floor: float = 0.05,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    """A representation of some matrix about these parameters, and that matrix in float64.

    `rank` scores make each block; with fewer than its size and `floor=0.0` it is singular.
    """
    layout = Layout.of(params)
    count = torch.tensor(float(rank))
    sizes, n = layout.sizes, layout.size
    whole = spd(n, seed, rank, floor, dtype)
    if kind == "dense":
        return Case(kind, Dense(whole, count, layout, **options), whole.double(), params)
    if kind == "low_rank":
        scores = random.normal(random.key(seed), (rank, n), torch.float64).to(dtype)
        rows = torch.cat([scores, torch.eye(n, dtype=dtype)])
        weights = torch.cat([torch.full((rank,), 1.0 / rank), torch.full((n,), floor)]).to(dtype)
        cut = zip(rows.split(sizes, dim=1), layout.shapes, strict=True)
        tree = layout.build([part.reshape(len(rows), *shape) for part, shape in cut])
        both = rows.double(), weights.double()
        sums = sum((w * torch.outer(s, s) for s, w in zip(*both, strict=True)), torch.zeros(n, n))
        return Case(kind, LowRank(tree, weights, count, **options), sums, params)
    if kind.endswith("kfac"):
        return kronecker(
            kind, layout, whole.diagonal(), count, params, seed, rank, floor, **options
        )
    if kind in ("grouped", "pooled"):
        return grouped(kind, layout, whole.diagonal(), count, params, **options)
    if kind == "diagonal":
        values = layout.unravel(whole.diagonal())
        F: Curvature = Diagonal(values, count, **options)
        return Case(kind, F, whole.diagonal().double().diag(), params)
    groups = partition(kind, layout)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    blocks: dict[str, Tensor] = {}
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i, (name, paths) in enumerate(groups):
        places = [layout.paths.index(path) for path in paths]
        rows = [starts[p] + j for p in places for j in range(sizes[p])]
        block = spd(len(rows), seed + 1 + i, rank, floor, dtype)
        blocks[name] = block
        for a, row in enumerate(rows):
            for b, column in enumerate(rows):
                matrix[row, column] = block[a, b].double()
    return Case(kind, BlockDiagonal(blocks, count, layout, groups, **options), matrix, params)


def grouped(
    kind: str, layout: Layout, diagonal: Tensor, count: Tensor, params: Any, **options: Any
) -> Case:
    """Columns, pairs of entries and whole leaves by turns, or everything in one pool.

    Entries of one group all have the mean of their group.
    """
    specs, labels = [], []
    for i, (path, shape) in enumerate(zip(layout.paths, layout.shapes, strict=True)):
        size = math.prod(shape)
        if kind == "pooled":
            specs.append((path, groups.whole(shape).renamed(into="0.all")))
            labels += ["all"] * size
        elif len(shape) == 2:
            specs.append((path, groups.channels(shape, axis=1)))
            labels += [(path, j % shape[1]) for j in range(size)]
        elif len(shape) == 1 and i % 2:
            specs.append((path, groups.rows(shape, bucket=2)))
            labels += [(path, j // 2) for j in range(size)]
        else:
            specs.append((path, groups.whole(shape)))
            labels += [(path, 0)] * size
    entries = [diagonal[[b == a for b in labels]].double().mean() for a in labels]
    dense = torch.stack(entries) if entries else torch.zeros(0, dtype=torch.float64)
    values = groups.reduce(layout.unravel(diagonal), dict(specs))
    F = Grouped(values, count, layout, tuple(specs), **options)
    return Case(kind, F, dense.diag(), params)


def kronecker(
    kind: str,
    layout: Layout,
    diagonal: Tensor,
    count: Tensor,
    params: Any,
    seed: int,
    rank: int,
    floor: float,
    **options: Any,
) -> Case:
    """A block for each matrix, with the bias of its layer, and the diagonal for everything else.

    Of the joint kinds, matrices with as many columns share a block, without biases.
    """
    shapes = dict(zip(layout.paths, layout.shapes, strict=True))
    matrices = [path for path in shapes if len(shapes[path]) == 2]
    if kind.startswith("joint"):
        widths = dict.fromkeys(shapes[path][1] for path in matrices)
        blocks = [joint_block([p for p in matrices if shapes[p][1] == n], shapes) for n in widths]
        kind = kind.removeprefix("joint_")
    else:
        blocks = [kronecker_block(path, shapes) for path in matrices]
    taken = {path for b in blocks for path in b.paths()}
    values = dict(zip(layout.paths, trees.leaves(layout.unravel(diagonal)), strict=True))
    rest = {path: values[path] for path in layout.paths if path not in taken}
    dtype = diagonal.dtype
    A = {b.name: spd(b.inputs, seed + i, rank, floor, dtype) for i, b in enumerate(blocks)}
    G = {b.name: spd(b.outputs, seed + 50 + i, rank, floor, dtype) for i, b in enumerate(blocks)}
    matrix = diagonal.double().diag()
    entries = {}
    for b in blocks:
        if kind == "kfac":
            entries[b.name] = torch.kron(G[b.name].double(), A[b.name].double())
        else:
            Q = [torch.linalg.eigh(x[b.name].double()).eigenvectors for x in (G, A)]
            G[b.name], A[b.name] = (x.to(dtype) for x in Q)
    scales = {b.name: spd(b.outputs * b.inputs, seed + 9, rank, floor, dtype) for b in blocks}
    scales = {b.name: scales[b.name].diagonal().reshape(b.outputs, b.inputs) for b in blocks}
    for b in blocks:
        if kind == "ekfac":
            Q = torch.kron(G[b.name].double(), A[b.name].double())
            entries[b.name] = Q @ scales[b.name].double().reshape(-1).diag() @ Q.T
        place = coordinates(b, layout)
        for i, row in enumerate(place):
            for j, column in enumerate(place):
                matrix[row, column] = entries[b.name][i, j]
    A, G, scales = ({k: x.unsqueeze(0) for k, x in y.items()} for y in (A, G, scales))
    static = layout, tuple(blocks)
    if kind == "ekfac":
        return Case(kind, EKFAC(scales, G, A, rest, count, *static, **options), matrix, params)
    rows = {b.name: count for b in blocks}
    return Case(kind, KFAC(A, G, rows, rest, count, *static, **options), matrix, params)


def kronecker_block(path: str, shapes: dict[str, tuple[int, ...]]) -> Block:
    outputs, inputs = shapes[path]
    weight = Piece(path, (("reshape", (outputs, inputs), (1, outputs, inputs)),))
    beside = path.replace("weight", "bias")
    if beside == path or shapes.get(beside) != (outputs,):
        return Block(path, weight, None, 1, outputs, inputs)
    bias = Piece(beside, (("reshape", (outputs,), (1, outputs, 1)),))
    return Block(path, weight, bias, 1, outputs, inputs + 1)


def joint_block(paths: list[str], shapes: dict[str, tuple[int, ...]]) -> Block:
    """One block of several matrices, the last one first."""
    layers, width = [], shapes[paths[0]][1]
    for path in reversed(paths):
        rows = shapes[path][0]
        layers.append(
            Layer(Piece(path, (("reshape", (rows, width), (1, rows, width)),)), None, rows)
        )
    name, outputs = "+".join(layer.weight.path for layer in layers), sum(x.outputs for x in layers)
    return Block(name, layers[0].weight, None, 1, outputs, width, beside=tuple(layers[1:]))


def coordinates(b: Block, layout: Layout) -> list[int]:
    """Where in a vector of all parameters the entries of a block are, row by row."""
    starts = {path: sum(layout.sizes[:i]) for i, path in enumerate(layout.paths)}
    width = b.inputs - (b.bias is not None)
    found = []
    for layer in (Layer(b.weight, b.bias, b.outputs - sum(x.outputs for x in b.beside)), *b.beside):
        for o in range(layer.outputs):
            found += [starts[layer.weight.path] + o * width + i for i in range(width)]
            if layer.bias is not None:
                found.append(starts[layer.bias.path] + o)
    return found


SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (1, 2), (0,)])
LEAVES = SHAPES.map(lambda shape: torch.zeros(shape, dtype=torch.float64))
FLAT = st.lists(LEAVES, min_size=1, max_size=4).map(
    lambda xs: {f"{i // 2}.{'weight' if i % 2 else 'bias'}": x for i, x in enumerate(xs)}
)
NESTED = st.tuples(LEAVES, LEAVES, LEAVES).map(
    lambda xs: {"z": {"b": xs[0], "a": None}, "list": [xs[1], (xs[2],)]}
)
OTHERS = st.one_of(
    LEAVES,
    st.tuples(LEAVES, LEAVES).map(lambda xs: Pair(*xs)),
    st.tuples(LEAVES, LEAVES).map(lambda xs: OrderedDict(y=xs[0], x=xs[1])),
)
PARAMS = st.one_of(FLAT, NESTED, OTHERS)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Each test compiles anew, below the limit of recompilations."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def make() -> Callable[..., Case]:
    """The function `build`: `make(kind, params, seed, rank=, floor=, dtype=)`."""
    return build


@pytest.fixture(scope="session")
def cases() -> st.SearchStrategy[Case]:
    """Regular matrices of every kind, about parameters of every structure."""
    return st.builds(build, st.sampled_from(KINDS), PARAMS, st.integers(0, 1000))


@pytest.fixture(scope="session")
def params_trees() -> st.SearchStrategy[Any]:
    """Small trees of parameters."""
    return PARAMS


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    """One regular matrix of each kind, about the same two layers."""
    return build(request.param, two_layers(), seed=3)


def two_layers() -> dict[str, Tensor]:
    shapes = {"0.weight": (2, 2), "0.bias": (2,), "1.weight": (1, 2)}
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def layers() -> dict[str, Tensor]:
    """Parameters of two layers, eight scalars."""
    return two_layers()
