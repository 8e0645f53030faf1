"""Gradients multiplied by a power of the damped Fisher information: (F + λI)^-α g."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.core.trees import Tree
from fisherfn.curvature.common import check_number
from fisherfn.optim import damping as rules
from fisherfn.optim import inverse as inverses
from fisherfn.optim.damping import Damping, LevenbergMarquardt
from fisherfn.optim.stream import CurvatureState, stream
from fisherfn.optim.transform import GradientTransform


class ScaleByFisherState(NamedTuple):
    """What scaling by the Fisher information remembers."""

    step: Tensor  # shape=(), dtype=int64, on the CPU: updates so far
    curvature: CurvatureState  # average and inverse; empty before the first batch


def scale_by_fisher(
    estimator: Any,
    power: float = 1.0,
    *,
    damping: Damping = 1e-3,
    decay: float = 0.0,
    update_every: int = 1,
    invert_every: int = 1,
    invert: Callable[[Any], inverses.Inverse] | None = None,
) -> GradientTransform:
    """Multiply gradients by (F + λI)^-α: α = 1 is the natural gradient, ½ is the scale of Adam.

    Only the scaling: sign, step length and momentum come from what it is chained with.

    Args:
        estimator: As for `natural_gradient`.
        power: α, any number.
        damping: λ, a number, a function of the state, or `jeffreys(...)`.
        decay: As for `natural_gradient`.
        update_every: As for `natural_gradient`.
        invert_every: As for `natural_gradient`.
        invert: As for `natural_gradient`.

    Returns:
        A `GradientTransform`, called as that of `natural_gradient`.

    Raises:
        OptionError: An option makes no sense.

    Example:
        >>> import fisherfn as ff
        >>> model, lik = lambda params, buffers, x: x * params["w"], ff.likelihoods.gaussian(1.0)
        >>> root = scale_by_fisher(ff.diagonal(model, lik), 0.5, damping=0.0)
        >>> params, batch = {"w": torch.zeros(1)}, ff.Batch(torch.tensor([[3.0]]))
        >>> grads = {"w": torch.tensor([6.0])}
        >>> root.update(grads, root.init(params), params, buffers={}, batch=batch)[0]
        {'w': tensor([2.])}
    """
    caller = "scale_by_fisher"
    power = check_number(caller, "power", power)
    rule = rules.check_rule(caller, damping)
    if isinstance(rule, LevenbergMarquardt):
        raise OptionError(
            f"{caller}: expected damping that needs no step length, got levenberg_marquardt. Use "
            "natural_gradient, which knows the step."
        )
    source = stream(caller, estimator, decay, update_every, invert_every, invert)

    def init(params: Tree) -> ScaleByFisherState:
        return ScaleByFisherState(torch.zeros((), dtype=torch.int64), source.init())

    def update(
        grads: Tree,
        state: ScaleByFisherState,
        params: Tree = None,
        *,
        buffers: Tree = None,
        batch: Batch | None = None,
        key: Tensor | None = None,
        refresh: bool | None = None,
        inplace: bool = False,
    ) -> tuple[Tree, ScaleByFisherState]:
        if not isinstance(state, ScaleByFisherState):
            raise OptionError(
                f"{caller}.update: expected a state of {caller}, got {type(state).__name__}. Make "
                "it with init(params), and pass the second value that update returned."
            )
        if params is None and batch is not None:
            raise OptionError(
                f"{caller}.update: expected params, got None. Curvature is taken at them: "
                "update(grads, state, params, ...)."
            )
        if params is not None:
            trees.check_like(f"{caller}.update", "grads", grads, params)
        fixed = None if params is None else trees.map(lambda x: x.detach(), params)
        curvature = source.update(state.curvature, state.step, fixed, buffers, batch, key, refresh)
        state = state._replace(curvature=curvature)
        like = torch.zeros((), dtype=torch.float64)
        value = rules.current(f"{caller}.update", rule, state, trees.size(grads), like)
        found = inverses.apply(f"{caller}.update", curvature.inverse, grads, power, value)
        return found, state._replace(step=state.step + 1)

    return GradientTransform(init, update)
