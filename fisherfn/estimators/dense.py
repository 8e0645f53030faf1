"""The whole Fisher information matrix, and its diagonal blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.curvature import BlockDiagonal, Dense, Layout, layer_groups, leaf_groups
from fisherfn.estimators import checks
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.numerics import accumulate
from fisherfn.likelihoods import resolve

#: Bytes of the largest result that is made.
MATRIX_BUDGET = 16 * 2**30


class OuterSum(Statistic):
    """Sums of `s sᵀ` over groups of parameters."""

    needs_rows = True

    def __init__(self, num_samples: int, finish: Callable[[OuterSum, Frame], Any]) -> None:
        """Expect `num_samples` draws; `finish` names the groups and wraps the blocks."""
        self.num_samples = num_samples
        self._finish = finish
        self._rows: dict[int, Tensor] = {}
        self.groups: list[list[int]] = []
        self.blocks: list[Tensor | None] = []

    def begin(self, params: Any) -> None:
        """Put all parameters into one group."""
        leaves = trees.leaves(params)
        self.groups = [list(range(len(leaves)))]
        self.blocks = [None]
        _check_size("dense", leaves, self.groups)

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Keep this parameter's rows until the others have come."""
        s = scores.scores()
        self._rows[leaf] = s.reshape(s.shape[0] * s.shape[1], -1)

    def end_pull(self) -> None:
        """Add the outer products of complete rows."""
        rows, self._rows = self._rows, {}
        for i, group in enumerate(self.groups):
            part = torch.cat([rows[leaf] for leaf in group], dim=1)
            self.blocks[i] = accumulate(self.blocks[i], part.T @ part)

    def finished(self) -> list[Tensor]:
        """Return the blocks, averaged over draws, exactly symmetric."""
        found = []
        for block in self.blocks:
            assert block is not None
            found.append((block + block.T) * (0.5 / self.num_samples))
        return found

    def result(self, frame: Frame) -> Any:
        """Return the curvature."""
        return self._finish(self, frame)


class BlockSum(OuterSum):
    """Sums of `s sᵀ` for given groups of parameters."""

    def __init__(self, num_samples: int, by: str) -> None:
        """Group by leaf or by layer."""
        super().__init__(num_samples, _block_diagonal)
        self.by = by

    def begin(self, params: Any) -> None:
        """Learn the groups from the parameters' paths."""
        layout = Layout.of(params)
        place = {path: i for i, path in enumerate(trees.unique_paths("block_diagonal", params))}
        self.groups = [[place[p] for p in paths] for _, paths in _groups(layout, self.by)]
        self.blocks = [None] * len(self.groups)
        _check_size("block_diagonal", trees.leaves(params), self.groups)


def _check_size(caller: str, leaves: list[Tensor], groups: list[list[int]]) -> None:
    """Refuse matrices that no machine should be asked for."""
    needed = 0
    for group in groups:
        size = sum(leaves[i].numel() for i in group)
        needed += size * size * max(4, *(leaves[i].element_size() for i in group))
    if needed > MATRIX_BUDGET:
        smaller = "block_diagonal() or diagonal()" if caller == "dense" else "diagonal()"
        raise OptionError(
            f"{caller}: expected matrices of at most {MATRIX_BUDGET / 2**30:.0f} GiB, got "
            f"{needed / 2**30:.3g} GiB. Use {smaller}, or select fewer parameters."
        )


def _groups(layout: Layout, by: str) -> Any:
    return leaf_groups(layout) if by == "leaf" else layer_groups(layout)


def _dense(statistic: OuterSum, frame: Frame) -> Dense:
    (matrix,) = statistic.finished()
    layout = Layout.of(frame.params)
    return Dense(matrix, frame.total, layout, fisher=frame.fisher, unit=frame.unit)


def _block_diagonal(statistic: OuterSum, frame: Frame) -> BlockDiagonal:
    assert isinstance(statistic, BlockSum)
    layout = Layout.of(frame.params)
    groups = _groups(layout, statistic.by)
    names = [name for name, _ in groups]
    blocks = dict(zip(names, statistic.finished(), strict=True))
    return BlockDiagonal(blocks, frame.total, layout, groups, fisher=frame.fisher, unit=frame.unit)


def dense(
    model: Any,
    likelihood: Any,
    *,
    fisher: str = "exact",
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
) -> Estimator:
    """Give the whole Fisher information matrix `[P, P]`, for small models and for tests.

    See `diagonal` for the options and the definition.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        fisher: Whose labels.
        num_samples: Draws of labels for each example.
        unit: What N counts.
        chunk_size: Examples processed together.

    Returns:
        An estimator that gives a `Dense`: parameters in insertion order, row-major.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: P² memory, and P² multiplications for each example and column.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> batch = ff.Batch(torch.tensor([[2.0]]))
        >>> fim = ff.dense(model, ff.likelihoods.categorical())
        >>> fim({"w": torch.zeros(1, 2)}, {}, batch).matrix
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    labels = checks.check_options("dense", model, fisher, num_samples, unit, chunk_size)
    options = {
        "fisher": fisher,
        "num_samples": num_samples,
        "unit": unit,
        "chunk_size": chunk_size,
    }
    lik = resolve("dense", likelihood)

    def rebuild(found: Any, params: Any) -> Dense:
        matrix, count = found
        return Dense(matrix, count, Layout.of(params), fisher=fisher, unit=unit)

    return Estimator(
        "dense", model, lik, options, labels, lambda: OuterSum(num_samples, _dense), rebuild
    )


def block_diagonal(
    model: Any,
    likelihood: Any,
    *,
    by: str = "leaf",
    fisher: str = "exact",
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
) -> Estimator:
    """Give the diagonal blocks of the Fisher information, one a leaf or one a layer.

    See `diagonal` for the other options and the definition.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        by: "leaf", a block for each tensor, or "layer", for all tensors of one module.
        fisher: Whose labels.
        num_samples: Draws of labels for each example.
        unit: What N counts.
        chunk_size: Examples processed together.

    Returns:
        An estimator that gives a `BlockDiagonal`.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: the sum of the squared block sizes, in memory and for each example and column.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"] + params["b"]
        >>> params = {"w": torch.zeros(1, 2), "b": torch.zeros(2)}
        >>> fim = ff.block_diagonal(model, ff.likelihoods.categorical())
        >>> fim(params, {}, ff.Batch(torch.tensor([[2.0]]))).blocks["b"]
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    labels = checks.check_options("block_diagonal", model, fisher, num_samples, unit, chunk_size)
    if by not in ("leaf", "layer"):
        raise OptionError(
            f"block_diagonal: expected by='leaf' or 'layer', got {by!r}. A leaf is one tensor of "
            "the parameters; a layer has all tensors of one module."
        )
    options = {
        "by": by,
        "fisher": fisher,
        "num_samples": num_samples,
        "unit": unit,
        "chunk_size": chunk_size,
    }
    lik = resolve("block_diagonal", likelihood)

    def rebuild(found: Any, params: Any) -> BlockDiagonal:
        layout = Layout.of(params)
        blocks, count = found
        groups = _groups(layout, by)
        return BlockDiagonal(blocks, count, layout, groups, fisher=fisher, unit=unit)

    return Estimator(
        "block_diagonal", model, lik, options, labels, lambda: BlockSum(num_samples, by), rebuild
    )
