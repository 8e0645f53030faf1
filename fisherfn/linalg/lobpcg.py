"""LOBPCG, torch's own, on an operator that is a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherfn.core.errors import OptionError, UnsupportedError
from fisherfn.core.modes import unmixed
from fisherfn.core.options import check_count
from fisherfn.core.trees import Tree
from fisherfn.linalg.lanczos import check_pairs
from fisherfn.linalg.probes import draw
from fisherfn.linalg.results import Eigenpairs
from fisherfn.linalg.space import (
    Block,
    Operator,
    Space,
    check_key,
    refuse_transformed,
)


class _Standin(TorchFunctionMode):
    """Products with one particular matrix, which has no entries, are products with an operator."""

    def __init__(self, matrix: Tensor, product: Any) -> None:
        super().__init__()
        self.matrix, self.product = matrix, product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator instead of `torch.matmul(matrix, x)`."""
        if func is torch.matmul and args[0] is self.matrix:
            return self.product(args[1])
        return func(*args, **(kwargs or {}))


def lobpcg(
    mv: Operator,
    like: Tree,
    *,
    k: int = 5,
    key: Tensor,
    which: str = "largest",
    max_steps: int = 100,
    tolerance: float = 1e-5,
    chunk_size: int = 1,
) -> Eigenpairs:
    """Compute extreme eigenpairs of a symmetric operator by `torch.lobpcg`.

    All k vectors are multiplied in each step, so multiple eigenvalues are no difficulty; `lanczos`
    usually takes fewer products.

    Args:
        mv: Function tree -> tree, v to A v, symmetric.
        like: Tree like v, of one dtype (float32 or float64) on one device.
        k: Pairs to compute; P >= 3 k.
        key: Random key of the starting vectors.
        which: "largest" or "smallest" (algebraically).
        max_steps: Steps, at most, of k products each.
        tolerance: Largest residual ‖A v − θ v‖, as a share of the largest ‖A x‖/‖x‖ seen.
        chunk_size: Vectors multiplied together by `torch.vmap`.

    Returns:
        `Eigenpairs`; the residuals are computed from the vectors themselves.

    Raises:
        OptionError: an option does not exist, or k is too large.
        TreeMismatchError: mv does not return a tree like its argument.
        UnsupportedError: several dtypes or devices, or called inside a transformation.

    Cost: k products a step and k in the end, memory of about 10 k vectors.

    Reference: Knyazev (2001), Toward the optimal preconditioned eigensolver, SIAM J. Sci. Comput.
    23(2); Duersch, Shao, Yang & Gu (2018), on which torch's implementation rests.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> scale = torch.arange(1.0, 13.0, dtype=torch.float64)
        >>> mv = lambda v: {"w": scale * v["w"]}
        >>> like = {"w": torch.zeros(12, dtype=torch.float64)}
        >>> ff.linalg.lobpcg(mv, like, k=2, key=ff.random.key(0)).eigenvalues
        tensor([12., 11.], dtype=torch.float64)
    """
    refuse_transformed("lobpcg", "for a trace of a function there, use slq.")
    space = Space("lobpcg", like, mv)
    check_key("lobpcg", key)
    check_pairs("lobpcg", k, which, tolerance, ("largest", "smallest"))
    check_count("lobpcg", "max_steps", max_steps, 1, "It is the number of steps.")
    check_count("lobpcg", "chunk_size", chunk_size, 1, "It is a number of vectors.")
    if 3 * k > space.size:
        raise OptionError(
            f"lobpcg: expected k= of at most a third of the {space.size} dimensions, got {k}. Use "
            "lanczos, or the dense matrix."
        )
    kinds = {(leaf.dtype, leaf.device) for leaf in space.leaves}
    if len(kinds) > 1 or space.leaves[0].dtype not in (torch.float32, torch.float64):
        names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise UnsupportedError(
            f"lobpcg: expected a tree in float32 or float64 on one device, got {names}. Use "
            "lanczos."
        )
    sizes = [leaf.numel() for leaf in space.leaves]
    sign = 1.0 if which == "largest" else -1.0
    taken, largest = 0, torch.zeros((), dtype=space.small, device=space.device)

    def multiply(block: Block) -> Block:
        nonlocal taken, largest
        taken += block[0].shape[0]
        found = [part.detach() for part in space.apply(mv, block, chunk_size)]
        sizes = space.norms(block)
        ratios = space.norms(found) / torch.where(sizes > 0, sizes, torch.ones_like(sizes))
        largest = torch.maximum(largest, ratios.max())
        return found

    def product(x: Tensor) -> Tensor:
        found = multiply([part.contiguous() for part in x.T.split(sizes, dim=1)])
        return sign * torch.cat(found, dim=1).T

    first = torch.cat(draw(space, key, 0, k, "gaussian"), dim=1).T
    matrix = torch.zeros((), dtype=space.dtype, device=space.device)
    matrix = matrix.expand(space.size, space.size)
    # torch compares residuals with a share of its own that involves the norm of the vectors too
    with _Standin(matrix, product):
        values, vectors = unmixed(torch.lobpcg)(
            matrix, X=first, niter=max_steps, tol=tolerance / 4, largest=True
        )
    block = [part.contiguous() for part in vectors.T.split(sizes, dim=1)]
    theta = (sign * values).to(space.small)
    order = theta.argsort(descending=True)
    theta, block = theta[order], [part[order.to(part.device)] for part in block]
    rest = space.axpy(-theta, block, multiply(block))
    residuals = space.norms(rest) + space.eps * largest
    limit = max(tolerance, 64 * space.eps) * largest
    return Eigenpairs(
        theta.to(space.dtype),
        space.stacked(block),
        residuals.to(space.dtype),
        (residuals <= limit).all(),
        torch.tensor(taken, device=space.device),
    )
