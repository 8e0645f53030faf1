"""Pairs of pure functions that turn gradients into updates, in the manner of optax and torchopt.

    init(params) -> state
    update(grads, state, params=None, **data) -> (updates, state)
    apply_updates(params, updates) -> params + updates

A `GradientTransform` is such a pair; so is torchopt's `GradientTransformation`, and the two mix:
`torchopt.chain` takes ours, and `chain` here takes theirs. What ours read besides the gradients
(buffers, batch, key) comes as keywords: `chain` passes them on, and for `torchopt.chain`, which
does not, `bind` fixes them for a step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, TreeMismatchError
from fisherfn.core.trees import Tree


class GradientTransform(NamedTuple):
    """A pair of pure functions; nothing is changed in place, whatever `inplace=` says.

    Attributes:
        init: `init(params) -> state`.
        update: `update(grads, state, params=None, *, buffers=None, batch=None, key=None,
            refresh=None, inplace=False) -> (updates, state)`. The curvature is estimated on `batch`
            with `key`; `refresh=True` or `False` says that it is due now, or not, whatever the
            periods are.
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]

    def bind(self, **data: Any) -> GradientTransform:
        """Fix the data of a step, for a caller that passes none, such as `torchopt.chain`.

        Args:
            **data: Keywords of `update`: `buffers`, `batch`, `key`, `refresh`.

        Returns:
            The same pair, whose `update` takes gradients, state and parameters only.
        """
        return GradientTransform(self.init, functools.partial(self.update, **data))


def chain(*transforms: Any) -> GradientTransform:
    """Apply several transforms after each other, each to the updates of the one before.

    Args:
        *transforms: `GradientTransform`s, or pairs `(init, update)` of other libraries, which are
            called with the keywords that they know (`params`, and `inplace=False`).

    Returns:
        One transform; its state is the tuple of theirs. Keywords of its `update` go to those that
        take them.

    Raises:
        OptionError: One is no pair of functions, or there is none.

    Example:
        >>> import torch
        >>> def scale(c):
        ...     update = lambda updates, state, params=None: (trees.scale(updates, c), state)
        ...     return GradientTransform(lambda params: (), update)
        >>> both = chain(scale(2.0), scale(-0.5))
        >>> both.update({"w": torch.ones(2)}, both.init({"w": torch.zeros(2)}))
        ({'w': tensor([-1., -1.])}, ((), ()))
    """
    if not transforms:
        raise OptionError("optim.chain: expected at least one transform, got none. Pass some.")
    calls = []
    for i, transform in enumerate(transforms):
        init, update = getattr(transform, "init", None), getattr(transform, "update", None)
        if not callable(init) or not callable(update):
            raise OptionError(
                f"optim.chain: expected pairs of functions (init, update), got "
                f"{type(transform).__name__} as number {i}. Pass for instance "
                "natural_gradient(...)."
            )
        calls.append((init, _adapted(update)))

    def init_all(params: Tree) -> tuple[Any, ...]:
        return tuple([init(params) for init, _ in calls])

    def update_all(
        grads: Tree, state: Any, params: Tree = None, **data: Any
    ) -> tuple[Tree, tuple[Any, ...]]:
        if not isinstance(state, tuple) or len(state) != len(calls):
            got = f"{len(state)}" if isinstance(state, tuple) else type(state).__name__
            raise OptionError(
                f"optim.chain: expected a tuple of {len(calls)} states, one for each transform, "
                f"got {got}. Make it with init(params) of this chain."
            )
        after = []
        for (_, update), one in zip(calls, state, strict=True):
            grads, new = update(grads, one, params, data)
            after.append(new)
        return grads, tuple(after)

    return GradientTransform(init_all, update_all)


def _adapted(update: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of updates, state, params and all data, for any library's `update`."""
    known = inspect.signature(update).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())

    def call(grads: Tree, state: Any, params: Tree, data: dict[str, Any]) -> Any:
        given = {**data, "params": params, "inplace": False}
        return update(grads, state, **{k: v for k, v in given.items() if anything or k in known})

    return call


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Return params + updates, each leaf in the dtype of the parameter.

    Args:
        params: Tree of parameters.
        updates: Tree like them.

    Returns:
        New parameters; the old ones are left as they are.

    Raises:
        TreeMismatchError: The two differ in structure or shapes.

    Example:
        >>> import torch
        >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([-0.5, 1.0])})
        {'w': tensor([0.5000, 2.0000])}
    """
    for p in trees.leaves(params):
        if not isinstance(p, Tensor):
            raise TreeMismatchError(
                f"optim.apply_updates: expected params to be tensors, got {type(p).__name__}. "
                "Pass what ff.functional returned."
            )
    trees.check_like("optim.apply_updates", "updates", updates, params)
    return trees.map(lambda p, u: (p + u).to(p.dtype), params, updates)
