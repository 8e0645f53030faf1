"""Vectors that are trees: blocks of them, their products, and operators applied to them.

Tensor format: a block of n vectors is a list with one matrix `[n, numel]` for each leaf, on the
leaf's device and in its dtype, but float32 at least. Coefficients, such as the inner products of
two blocks, are small float64 matrices on the first leaf's device. Operators get trees with the
leaves' own dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fisherfn.core import options, trees
from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError, ShapeError, TreeMismatchError, UnsupportedError
from fisherfn.core.modes import compiling, transformed, unmixed
from fisherfn.core.trees import Tree

Block: TypeAlias = list[Tensor]
Operator: TypeAlias = Callable[[Tree], Tree]


class Space:
    """The vector space of the trees like one tree."""

    def __init__(self, caller: str, like: Tree, mv: Operator | None = None, name: str = "like"):
        """Check the tree, and the operator if there is one."""
        if mv is not None and not callable(mv):
            raise OptionError(
                f"{caller}: expected mv to be a function tree -> tree, got {type(mv).__name__}. "
                "Pass for instance F.mv, or lambda v: A @ v."
            )
        leaves, self.structure = trees.flatten(like)
        if not leaves:
            raise TreeMismatchError(
                f"{caller}: expected {name} to hold at least one tensor, got none. Pass a tree "
                "like the vectors, such as params."
            )
        for path, leaf in zip(trees.paths(like), leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise TreeMismatchError(
                    f"{caller}: expected {name} to hold tensors, got {type(leaf).__name__} at "
                    f"'{path}'. Pass a tree like the vectors, such as params."
                )
            if not leaf.is_floating_point():
                raise ShapeError(
                    f"{caller}: expected {name} to hold floating-point tensors, got {leaf.dtype} "
                    f"at '{path}'. Leave it out: it is no direction to move in."
                )
        self.caller, self.like, self.leaves = caller, like, leaves
        self._checked = False
        self.size = sum([leaf.numel() for leaf in leaves])
        if self.size == 0:
            raise ShapeError(
                f"{caller}: expected {name} to hold at least one number, got empty tensors. Pass "
                "a tree like the vectors, such as params."
            )
        self.dtypes = [torch.promote_types(leaf.dtype, torch.float32) for leaf in leaves]
        self.device = leaves[0].device
        #: The dtype of results: that of the widest leaf, float32 at least.
        self.dtype = torch.float32
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        #: The dtype of coefficients.
        self.small = working_dtype(self.device)

    @property
    def eps(self) -> float:
        """Relative rounding error of the least exact leaf."""
        return max(torch.finfo(dtype).eps for dtype in self.dtypes)

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        sizes = zip(self.leaves, self.dtypes, strict=True)
        return sum([leaf.numel() * dtype.itemsize for leaf, dtype in sizes])

    # ---- to and from trees -----------------------------------------------------------------------

    def block(self, tree: Tree, *, lead: bool = False) -> Block:
        """Return a tree as a block of one vector; with a leading axis, of several."""
        return self._wide(self.structure.flatten_up_to(tree), lead)

    def _wide(self, leaves: list[Any], lead: bool) -> Block:
        found = []
        for leaf, dtype, like in zip(leaves, self.dtypes, self.leaves, strict=True):
            n = leaf.shape[0] if lead else 1
            found.append(leaf.to(like.device, dtype).reshape(n, -1))
        return found

    def stacked(self, block: Block, *, own: bool = False) -> Tree:
        """Return a block as a tree with leaves `[n, *shape]`, in their own dtypes if asked."""
        found = []
        for rows, leaf in zip(block, self.leaves, strict=True):
            shaped = rows.reshape(rows.shape[0], *leaf.shape)
            found.append(shaped.to(leaf.dtype) if own else shaped)
        return trees.unflatten(self.structure, found)

    def tree(self, block: Block, index: int = 0, *, own: bool = False) -> Tree:
        """Return one vector of a block as a tree."""
        found = []
        for rows, leaf in zip(block, self.leaves, strict=True):
            shaped = rows[index].reshape(leaf.shape)
            found.append(shaped.to(leaf.dtype) if own else shaped)
        return trees.unflatten(self.structure, found)

    # ---- products --------------------------------------------------------------------------------

    def apply(self, mv: Operator, block: Block, chunk_size: int = 1) -> Block:
        """Return the operator's products with all vectors of a block."""
        count, parts = block[0].shape[0], []
        if chunk_size == 1:
            for i in range(count):
                found = mv(self.tree(block, i, own=True))
                self._check(found)
                parts.append(self.block(found))
        else:
            for start in range(0, count, chunk_size):
                part = [rows[start : start + chunk_size] for rows in block]
                parts.append(self.block(self._many(mv, self.stacked(part, own=True)), lead=True))
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    def _many(self, mv: Operator, vectors: Tree) -> Tree:
        """Return the products with stacked vectors; operators may have a way of their own."""
        block = getattr(mv, "block", None)
        if block is not None:
            found = block(vectors)
            trees.check_like(self.caller, "mv.block(v)", found, vectors, like_name="v")
            return found

        def one(v: Tree) -> Tree:
            found = mv(v)
            self._check(found)
            return found

        return torch.vmap(one)(vectors)

    def _check(self, found: Any) -> None:
        if self._checked and compiling():
            return  # the same code again, and looking takes Dynamo a while
        trees.check_like(self.caller, "mv(v)", found, self.like, like_name="v")
        self._checked = True

    @unmixed
    def gram(self, a: Block, b: Block) -> Tensor:
        """Return the inner products `[n, m]` of all pairs of vectors."""
        total = None
        for x, y in zip(a, b, strict=True):
            part = (x @ y.T).to(self.device, self.small)
            total = part if total is None else total + part
        assert total is not None
        return total

    def dots(self, a: Block, b: Block) -> Tensor:
        """Return the inner products `[n]` of vectors of equal number."""
        total = None
        for x, y in zip(a, b, strict=True):
            part = (x * y).sum(-1).to(self.device, self.small)
            total = part if total is None else total + part
        assert total is not None
        return total

    def norms(self, a: Block) -> Tensor:
        """Return the norms `[n]`, without overflow of squares."""
        parts = [torch.linalg.vector_norm(x, dim=-1).to(self.device, self.small) for x in a]
        return torch.linalg.vector_norm(torch.stack(parts), dim=0)

    @unmixed
    def combine(self, coefficients: Tensor, a: Block) -> Block:
        """Return the combinations `coefficients [m, n] @ a`, a block of m vectors."""
        return [coefficients.to(x.device, x.dtype) @ x for x in a]

    def scale(self, a: Block, factors: Tensor) -> Block:
        """Return each vector times its factor, `[n]`."""
        return [x * factors.to(x.device, x.dtype).unsqueeze(-1) for x in a]

    def axpy(self, factors: Tensor, a: Block, b: Block) -> Block:
        """Return `factors [n] * a + b`."""
        pairs = zip(a, b, strict=True)
        return [y + x * factors.to(x.device, x.dtype).unsqueeze(-1) for x, y in pairs]


def joined(a: Block, b: Block) -> Block:
    """Return the vectors of both blocks."""
    return [torch.cat([x, y]) for x, y in zip(a, b, strict=True)]


def rows(a: Block, start: int, stop: int) -> Block:
    """Return the vectors `start` to `stop` of a block."""
    return [x[start:stop] for x in a]


def choose(condition: Tensor, a: Block, b: Block) -> Block:
    """Return the vectors of `a` where the condition `[n]` holds, and those of `b` elsewhere."""
    pairs = zip(a, b, strict=True)
    return [torch.where(condition.to(x.device).unsqueeze(-1), x, y) for x, y in pairs]


class Basis:
    """Orthonormal vectors, with room for more.

    Where nothing watches (no transformation, no graph) they lie in a buffer that is written to;
    elsewhere they are joined out of place.
    """

    def __init__(self, space: Space, capacity: int, *, buffered: bool) -> None:
        """Make room for `capacity` vectors."""
        self.space, self.count = space, 0
        self._buffered = buffered and not transformed()
        self._vectors: Block | None = None
        if self._buffered:
            kinds = zip(space.leaves, space.dtypes, strict=True)
            self._vectors = [
                torch.empty(capacity, leaf.numel(), dtype=dtype, device=leaf.device)
                for leaf, dtype in kinds
            ]

    @property
    def vectors(self) -> Block:
        """The vectors, a block."""
        assert self._vectors is not None
        return [v[: self.count] for v in self._vectors] if self._buffered else self._vectors

    def append(self, block: Block) -> None:
        """Add vectors that are orthonormal to these already."""
        n = block[0].shape[0]
        if self._buffered:
            assert self._vectors is not None
            for buffer, new in zip(self._vectors, block, strict=True):
                buffer[self.count : self.count + n] = new
        else:
            self._vectors = block if self._vectors is None else joined(self._vectors, block)
        self.count += n

    @unmixed
    def replace(self, coefficients: Tensor) -> None:
        """Become the combinations `coefficients [m, count]` of the vectors, a leaf at a time."""
        if not self._buffered:
            self._vectors = self.space.combine(coefficients, self.vectors)
        else:
            assert self._vectors is not None
            for buffer in self._vectors:
                old = buffer[: self.count]
                buffer[: len(coefficients)] = coefficients.to(old.device, old.dtype) @ old
        self.count = len(coefficients)

    @unmixed
    def release(self, coefficients: Tensor) -> Block:
        """Return the combinations `coefficients [m, count]` and let go of the vectors meanwhile."""
        own, found = self.vectors, []
        self._vectors, self.count = None, 0
        for i in range(len(own)):
            found.append(coefficients.to(own[i].device, own[i].dtype) @ own[i])
            own[i] = found[-1]
        return found

    @unmixed
    def reject(self, block: Block, passes: int = 2) -> tuple[Block, Tensor]:
        """Return what of some vectors is orthogonal to these, and the coefficients of the rest.

        Twice is enough (Giraud, Langou, Rozložník & van den Eshof 2005).

        Args:
            block: n vectors.
            passes: How often classical Gram-Schmidt is done.

        Returns:
            The remainders, and coefficients `[count, n]` with `block = coefficients @ basis +
            remainders`.
        """
        space, n = self.space, block[0].shape[0]
        total = torch.zeros(self.count, n, dtype=space.small, device=space.device)
        if self.count == 0:
            return block, total
        own = self.vectors
        for _ in range(passes):
            found = space.gram(own, block)
            total = total + found
            pairs = zip(block, own, strict=True)
            block = [torch.addmm(x, found.T.to(x), v, alpha=-1.0) for x, v in pairs]
        return block, total


def check_key(caller: str, key: Any) -> None:
    """Raise unless there is one key, for random vectors."""
    options.check_key(caller, key, "random vectors", "vectors")


def refuse_transformed(caller: str, instead: str) -> None:
    """Raise inside `torch.compile` and `torch.func` transformations."""
    if transformed():
        raise UnsupportedError(
            f"{caller}: expected to run eagerly, got a call inside torch.compile or a torch.func "
            f"transformation. How many steps it takes depends on the values; {instead}"
        )
