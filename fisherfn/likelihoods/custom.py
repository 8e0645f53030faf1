"""A likelihood from functions of the user: a log-probability, and what else there is.

The score is derived by `torch.func.grad`. Drawing needs `sample`, the exact Fisher and curvature
propagation need `root` and `columns`; what is missing raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.errors import OptionError, ShapeError, UnsupportedError
from fisherfn.core.options import is_count
from fisherfn.likelihoods import base


def custom(
    log_prob: Callable[[Any, Any], Tensor],
    sample: Callable[[Any, Tensor], Any] | None = None,
    *,
    root: Callable[[Any, Tensor], Any] | None = None,
    columns: int | Callable[[Any], int] | None = None,
    fisher_mv: Callable[[Any, Any], Any] | None = None,
    position_ndim: int = 0,
) -> Custom:
    """Make a likelihood from a log-probability.

    Every function gets the outputs in at least float32 and must be made of torch operations.
    Outputs and targets may be trees of tensors, each beginning with the axes `P = (B, *positions)`.

    Args:
        log_prob: `log_prob(outputs, targets) -> [P]`, each entry a function of its own position,
            normalised over targets: a loss with its sign turned is not enough for drawn labels.
        sample: `sample(outputs, keys) -> targets`, with one key for each entry of P, `[P, 2]`, to
            hand to `ff.random`. Needed for fisher="mc".
        root: `root(outputs, index)`, column `index` (an integer scalar) of a square root of the
            Fisher of the outputs at every position, like `outputs`. Needed for fisher="exact" and
            fisher="curvature_prop", together with `columns`.
        columns: The number of columns of that root, or a function of the outputs that returns it.
        fisher_mv: `fisher_mv(outputs, v)`, the Fisher of the outputs times v; made from `root` if
            left out.
        position_ndim: Number of position axes after the batch axis; log_prob returns one axis more.

    Returns:
        The likelihood.

    Raises:
        OptionError: Not functions, `root` without `columns` or the reverse, bad numbers.

    Example:
        >>> laplace = custom(lambda z, y: -(y - z).abs().sum(-1))
        >>> laplace.score(torch.zeros(1, 2), torch.tensor([[3.0, -3.0]]))
        tensor([[ 1., -1.]])
    """
    return Custom(log_prob, sample, root, columns, fisher_mv, position_ndim)


@dataclass(frozen=True)
class Custom(base.Likelihood):
    """See `custom`."""

    name: ClassVar[str] = "custom"
    log_prob_function: Callable[[Any, Any], Tensor]
    sample_function: Callable[[Any, Tensor], Any] | None = None
    root_function: Callable[[Any, Tensor], Any] | None = None
    number_of_columns: int | Callable[[Any], int] | None = None
    fisher_mv_function: Callable[[Any, Any], Any] | None = None
    position_ndim: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no function, and half a square root."""
        for option, value in (
            ("log_prob", self.log_prob_function),
            ("sample", self.sample_function),
            ("root", self.root_function),
            ("fisher_mv", self.fisher_mv_function),
        ):
            if not callable(value) and (value is not None or option == "log_prob"):
                raise OptionError(
                    f"custom: expected a function, got {value!r} at {option}. "
                    "likelihoods.custom describes its arguments."
                )
        columns = self.number_of_columns
        if (self.root_function is None) != (columns is None):
            raise OptionError(
                f"custom: expected root and columns together, got columns={columns!r} and "
                f"root={self.root_function!r}. columns is the number of columns of the root."
            )
        if columns is not None and not callable(columns) and not is_count(columns, 1):
            raise OptionError(
                f"custom: expected an integer >= 1 or a function, got {columns!r} at columns. "
                "It is the number of columns of the root."
            )
        if not is_count(self.position_ndim, 0):
            raise OptionError(
                f"custom: expected an integer >= 0, got {self.position_ndim!r} at position_ndim. "
                "It counts the axes of log_prob after the batch."
            )

    @property
    def event_axes(self) -> None:
        """Not fixed: every axis after the positions, of each tensor of the outputs."""
        return None

    def check_outputs(self, caller: str, outputs: Any) -> None:
        """Raise unless the outputs are floating point tensors that begin with the same P."""
        leaves = trees.leaves(outputs)
        if not leaves:
            raise ShapeError(
                f"{caller}: expected tensors, got {outputs!r} at outputs. "
                "Let the model return a tensor or a tree of tensors."
            )
        for leaf in leaves:
            base.check_tensor_outputs(caller, leaf, 1 + self.position_ndim, "[B, *positions, ...]")
        self._check_leading(caller, "outputs", outputs, self._positions(outputs))

    def event_shape(self, outputs: Any) -> tuple[int, ...]:
        """Return the sizes after P; for a tree, the number of entries at one position."""
        if isinstance(outputs, Tensor):
            return tuple(outputs.shape[1 + self.position_ndim :])
        sizes = [x.shape[1 + self.position_ndim :].numel() for x in trees.leaves(outputs)]
        return (sum(sizes),)

    def positions_shape(self, outputs: Any) -> tuple[int, ...]:
        """Return the first `1 + position_ndim` sizes."""
        self.check_outputs("custom", outputs)
        return self._positions(outputs)

    def columns(self, outputs: Any) -> int:
        """Return the number of columns of the root.

        Raises:
            UnsupportedError: There is no root.
        """
        self._root("columns")
        columns = self.number_of_columns
        return int(columns(outputs)) if callable(columns) else int(columns or 0)

    def log_prob(self, outputs: Any, targets: Any) -> Tensor:
        """Return the user's log-probability, `[P]`."""
        self.check_structure("custom.log_prob", outputs, targets)
        return self._log_prob(_widen(outputs), targets)

    def score(self, outputs: Any, targets: Any) -> Any:
        """Return the gradient of the sum of `log_prob`, like `outputs`."""
        self.check_structure("custom.score", outputs, targets)
        leaves, treedef = trees.flatten(_widen(outputs))

        def total(leaves: list[Tensor]) -> Tensor:
            return self._log_prob(trees.unflatten(treedef, leaves), targets).sum()

        return trees.unflatten(treedef, torch.func.grad(total)(leaves))

    def sample(self, outputs: Any, keys: Tensor) -> Any:
        """Return targets drawn by the user's function.

        Raises:
            UnsupportedError: There is none.
        """
        if self.sample_function is None:
            raise UnsupportedError(
                "custom.sample: expected a way to draw targets, got none. Pass "
                "likelihoods.custom(log_prob, sample=...), or use fisher='empirical'."
            )
        self.check_outputs("custom.sample", outputs)
        positions = self._positions(outputs)
        keys = base.example_keys("custom.sample", keys, positions[0])
        constants = _widen(trees.map(lambda x: x.detach(), outputs))
        return self.sample_function(constants, base.position_keys(keys, positions))

    def root(self, outputs: Any, index: int | Tensor) -> Any:
        """Return column `index` by the user's function.

        Raises:
            UnsupportedError: There is none.
        """
        function = self._root("root")
        self.check_outputs("custom.root", outputs)
        base.check_index("custom.root", index, self.columns(outputs))
        device = trees.leaves(outputs)[0].device
        column = function(_widen(outputs), torch.as_tensor(index, device=device))
        _check_like("custom.root", "root(outputs, index)", column, outputs)
        return column

    def root_mv(self, outputs: Any, u: Tensor) -> Any:
        """Return B u, from all columns at once."""
        matrix = self._matrix("root_mv", outputs)
        shape = (*self._positions(outputs), self.columns(outputs))
        base.check_vector("custom.root_mv", "u", u, shape)
        first = u.movedim(-1, 0)

        def product(columns: Tensor) -> Tensor:
            return (columns * base.expand_mask(first, columns).to(columns.dtype)).sum(0)

        return trees.map(product, matrix)

    def root_t_mv(self, outputs: Any, v: Any) -> Tensor:
        """Return B^T v, from all columns at once."""
        matrix = self._matrix("root_t_mv", outputs)
        _check_like("custom.root_t_mv", "v", v, outputs)
        axes = 2 + self.position_ndim

        def product(columns: Tensor, x: Tensor) -> Tensor:
            terms = columns * x.to(columns.dtype)
            return terms.unsqueeze(-1).flatten(axes).sum(-1)

        parts = trees.leaves(trees.map(product, matrix, v))
        return torch.stack(parts).sum(0).movedim(0, -1)

    def fisher_mv(self, outputs: Any, v: Any) -> Any:
        """Return H v by the user's function, or B B^T v.

        Raises:
            UnsupportedError: There is neither `fisher_mv` nor `root`.
        """
        if self.fisher_mv_function is None:
            if self.root_function is None:
                raise UnsupportedError(
                    "custom.fisher_mv: expected the Fisher of the outputs, got none. Pass "
                    "likelihoods.custom(..., fisher_mv=...), or root=... and columns=..., or use "
                    "fisher='mc' or 'empirical'."
                )
            return self.root_mv(outputs, self.root_t_mv(outputs, v))
        self.check_outputs("custom.fisher_mv", outputs)
        _check_like("custom.fisher_mv", "v", v, outputs)
        product = self.fisher_mv_function(_widen(outputs), _widen(v))
        _check_like("custom.fisher_mv", "fisher_mv(outputs, v)", product, outputs)
        return product

    def neutral(self, targets: Any, mask: Tensor | None) -> Any:
        """Return the targets with the first that counts in place of those that do not.

        Only the user knows which values are valid; one that counts has to be.
        """
        if mask is None or mask.numel() == 0:
            return targets
        first = mask.reshape(-1).to(torch.uint8).argmax().reshape(1)

        def replace(x: Tensor) -> Tensor:
            valid = x.flatten(0, self.position_ndim).index_select(0, first).squeeze(0)
            return torch.where(base.expand_mask(mask, x), x, valid)

        return trees.map(replace, targets)

    def check_structure(self, caller: str, outputs: Any, targets: Any) -> None:
        """Raise unless every tensor of the targets begins with P."""
        self.check_outputs(caller, outputs)
        self._check_leading(caller, "targets", targets, self._positions(outputs))

    def invalid(self, outputs: Any, targets: Any, mask: Tensor | None) -> Tensor:
        """Return where log_prob is NaN and counts."""
        log_prob = self.log_prob(outputs, self.neutral(targets, mask))
        return base.counted(torch.isnan(log_prob), mask)

    def describe_targets(self, outputs: Any) -> tuple[str, str]:
        """Return that the log-probability has to be a number."""
        return (
            "a log_prob that is a number",
            "Look at the target and the outputs there, or leave the target out by a mask.",
        )

    def _positions(self, outputs: Any) -> tuple[int, ...]:
        return tuple(trees.leaves(outputs)[0].shape[: 1 + self.position_ndim])

    def _check_leading(self, caller: str, name: str, tree: Any, positions: tuple[int, ...]) -> None:
        for path, leaf in zip(trees.paths(tree), trees.leaves(tree), strict=True):
            got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            if not isinstance(got, tuple) or got[: len(positions)] != positions:
                place = f"{name}/{path}" if path else name
                raise ShapeError(
                    f"{caller}: expected tensors whose shape begins with {positions}, got {got} at "
                    f"{place}. These are the batch and {self.position_ndim} position axes "
                    "(position_ndim), the same in outputs and targets."
                )

    def _log_prob(self, outputs: Any, targets: Any) -> Tensor:
        value = self.log_prob_function(outputs, targets)
        want = self._positions(outputs)
        if not isinstance(value, Tensor) or tuple(value.shape) != want:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"custom.log_prob: expected a tensor of shape {want}, got {got} from log_prob. "
                "Sum over the event axes only; position_ndim says how many axes follow the batch."
            )
        if not torch.compiler.is_dynamo_compiling() and _detached(outputs, value):
            raise UnsupportedError(
                "custom.log_prob: expected a differentiable function of the outputs, got one "
                f"without derivative ({value.dtype}) from log_prob: every score would be zero. "
                "Leave out detach(), item(), argmax and torch.no_grad()."
            )
        return value

    def _root(self, what: str) -> Callable[[Any, Tensor], Any]:
        if self.root_function is None:
            raise UnsupportedError(
                f"custom.{what}: expected a square root of the Fisher of the outputs, got none. "
                "Pass likelihoods.custom(..., root=..., columns=...), or use fisher='mc' or "
                "'empirical'."
            )
        return self.root_function

    def _matrix(self, what: str, outputs: Any) -> Any:
        """All columns, each leaf `[K, P, ...]`."""
        self._root(what)
        self.check_outputs(f"custom.{what}", outputs)
        device = trees.leaves(outputs)[0].device
        index = torch.arange(self.columns(outputs), device=device)
        columns = torch.vmap(lambda k: trees.leaves(self.root(outputs, k)))(index)
        return trees.unflatten(trees.structure(outputs), columns)


def _check_like(caller: str, name: str, got: Any, outputs: Any) -> None:
    trees.check_like(caller, name, got, outputs, like_name="outputs")


def _detached(outputs: Any, value: Tensor) -> bool:
    """Return True if a derivative by the outputs is being recorded, and none reaches the value."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in trees.leaves(outputs))
    return recorded and not value.requires_grad


def _widen(tree: Any) -> Any:
    return trees.map(wide, tree)
