"""Natural gradient descent: δ = -ε (F + λI)⁻¹ ∇h.

Amari (1998), Natural gradient works efficiently in learning; Martens (2020), New insights and
perspectives on the natural gradient method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.batch import Batch
from fisherfn.core import trees
from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError
from fisherfn.core.modes import concrete, unmixed
from fisherfn.core.trees import Tree
from fisherfn.curvature.common import is_number
from fisherfn.optim import damping as rules
from fisherfn.optim import inverse as inverses
from fisherfn.optim import quadratic
from fisherfn.optim.damping import Damping, LevenbergMarquardt
from fisherfn.optim.options import check_size
from fisherfn.optim.stream import CurvatureState, Stream, stream
from fisherfn.optim.transform import GradientTransform

EXACT = "exact"


class NaturalGradientState(NamedTuple):
    """What natural gradient descent remembers."""

    step: Tensor  # shape=(), dtype=int64, on the CPU: updates so far
    curvature: CurvatureState  # average and inverse; empty before the first batch
    damping: Tensor  # shape=(), dtype=float64: λ of the last step, or of the next if adapted
    velocity: Any  # tree like params, or None without momentum


@unmixed
def _lowest(stacked: Tensor, g: Tensor, exact: Tensor, shift: Any) -> tuple[Tensor, Tensor]:
    """Return the combination of vectors where the model is lowest, and its value there."""
    wide = working_dtype(stacked)
    matrix = exact.to(wide) + shift * (stacked @ stacked.mT).to(wide)
    slopes = (stacked @ g).to(wide)
    c = quadratic.minimum(matrix, slopes)
    return c.to(stacked.dtype) @ stacked, 0.5 * (c @ slopes)


@dataclass(frozen=True)
class _Rule:
    """The options, checked."""

    stream: Stream
    rate: Any
    damping: Damping
    kl_clip: float | None
    momentum: Any
    decay: float
    exact: quadratic.Quadratic | None  # where step lengths or dampings are taken from the loss

    def init(self, params: Tree) -> NaturalGradientState:
        """Return the state before the first step."""
        caller = self.stream.caller
        leaves = trees.leaves(params)
        if not leaves:
            raise OptionError(
                f"{caller}.init: expected params with at least one tensor, got none. Pass what "
                "functional() returned."
            )
        velocity = None if self.momentum == 0.0 else trees.map(_zeros, params)
        first = 0.0
        if isinstance(self.damping, LevenbergMarquardt):
            first = self.damping.initial
        elif is_number(self.damping):
            first = self.damping
        return NaturalGradientState(
            torch.zeros((), dtype=torch.int64),
            self.stream.init(),
            torch.tensor(first, dtype=torch.float64),
            velocity,
        )

    def update(
        self,
        grads: Tree,
        state: NaturalGradientState,
        params: Tree = None,
        *,
        buffers: Tree = None,
        batch: Batch | None = None,
        key: Tensor | None = None,
        refresh: bool | None = None,
        inplace: bool = False,
    ) -> tuple[Tree, NaturalGradientState]:
        """Return the step δ, to be added to the parameters, and the state after it."""
        caller = self.stream.caller
        self._check(caller, grads, state, params, batch)
        fixed = None if params is None else trees.map(lambda x: x.detach(), params)
        curvature = self.stream.update(
            state.curvature, state.step, fixed, buffers, batch, key, refresh
        )
        state = state._replace(curvature=curvature)
        damping = self._damping(caller, state, grads)
        shift = damping + self.decay if self.decay else damping
        slope = grads
        if self.decay:
            slope = trees.map(lambda g, p: g + self.decay * p.to(g.dtype), grads, params)
        direction = inverses.apply(caller, curvature.inverse, slope, 1.0, shift)
        if self.rate is None:
            step, promised = self._best(slope, direction, state, fixed, buffers, batch, shift)
            velocity = step if self.momentum == EXACT else None
        else:
            step, velocity, promised = self._usual(slope, direction, state, shift)
        after = state._replace(
            step=state.step + 1,
            velocity=velocity,
            damping=self._kept(damping, state),
        )
        if isinstance(self.damping, LevenbergMarquardt) and batch is not None:
            after = self._adapt(after, fixed, step, promised, buffers, batch)
        return step, after

    def _check(self, caller: str, grads: Tree, state: Any, params: Tree, batch: Any) -> None:
        if not isinstance(state, NaturalGradientState):
            raise OptionError(
                f"{caller}.update: expected a state of {caller}, got {type(state).__name__}. Make "
                "it with init(params), and pass the second value that update returned."
            )
        if params is None and (batch is not None or self.decay or self.rate is None):
            raise OptionError(
                f"{caller}.update: expected params, got None. Curvature and weight decay are taken "
                "at them: update(grads, state, params, ...)."
            )
        if params is not None:
            trees.check_like(f"{caller}.update", "grads", grads, params)
        if state.velocity is not None:
            trees.check_like(
                f"{caller}.update", "grads", grads, state.velocity, like_name="the state"
            )
        if batch is None and self.rate is None:
            raise OptionError(
                f"{caller}.update: expected batch= where learning_rate is None, got None. The step "
                "length is taken from the quadratic model on that batch."
            )

    def _damping(self, caller: str, state: NaturalGradientState, grads: Tree) -> Any:
        """Return the λ of this step: a number where it is one, else a 0-d tensor."""
        rule = self.damping
        if isinstance(rule, LevenbergMarquardt):
            return state.damping
        size = trees.size(grads)
        return rules.current(f"{caller}.update", rule, state, size, state.damping)

    def _kept(self, damping: Any, state: NaturalGradientState) -> Tensor:
        """Return the λ of a step as the state keeps it."""
        if isinstance(damping, Tensor):
            return damping.detach().to(working_dtype(damping))
        return torch.full_like(state.damping, damping)

    def _usual(
        self, slope: Tree, direction: Tree, state: NaturalGradientState, shift: Any
    ) -> tuple[Tree, Tree, Any]:
        """Return the step of a given length, the velocity, and what the model promises."""
        rate: Any = self.rate(state.step) if callable(self.rate) else self.rate
        tensor = isinstance(rate, Tensor)
        if not (is_number(rate) or (tensor and rate.ndim == 0 and not rate.is_complex())):
            got = f"{rate.dtype} of shape {tuple(rate.shape)}" if tensor else type(rate).__name__
            raise OptionError(
                f"{self.stream.caller}.update: expected the learning rate to be a number, got "
                f"{got}. A schedule is called with the step, a 0-d tensor."
            )
        if self.kl_clip is not None:
            size = trees.dot(slope, direction) * rate**2
            ratio = self.kl_clip / torch.where(size > self.kl_clip, size, self.kl_clip)
            direction = trees.scale(direction, ratio.sqrt())
        velocity = direction
        if state.velocity is not None:
            velocity = trees.axpy(self.momentum, state.velocity, direction)
        step = trees.map(lambda x, g: (-rate * x).to(g.dtype), velocity, slope)
        promised = None
        if isinstance(self.damping, LevenbergMarquardt):
            F = state.curvature.inverse.matrix
            curved = F.quadratic(step) + shift * trees.dot(step, step)
            promised = trees.dot(slope, step) + 0.5 * curved
        return step, velocity if state.velocity is not None else None, promised

    def _best(
        self,
        slope: Tree,
        direction: Tree,
        state: NaturalGradientState,
        params: Tree,
        buffers: Tree,
        batch: Any,
        shift: Any,
    ) -> tuple[Tree, Any]:
        """Return the step that minimises the model over its length (and along the last step)."""
        # one vector each, in the order of the parameters of the curvature
        first, unravel = trees.ravel(direction)
        vectors = [-first]
        if state.velocity is not None:
            last = trees.map(lambda _, x: x, direction, state.velocity)
            vectors.append(trees.ravel(last)[0].to(first.dtype))
        stacked = torch.stack(vectors)
        g = trees.ravel(trees.map(lambda _, x: x, direction, slope))[0].to(first.dtype)
        directions = [unravel(v) for v in vectors]
        assert self.exact is not None
        exact = self.exact.products(params, buffers, batch, directions)
        found, change = _lowest(stacked, g, exact, shift)
        return trees.map(lambda g, x: x.to(g.dtype), slope, unravel(found)), change

    def _adapt(
        self,
        state: NaturalGradientState,
        params: Tree,
        step: Tree,
        promised: Any,
        buffers: Tree,
        batch: Batch,
    ) -> NaturalGradientState:
        """Return the state with the damping that the loss after the step suggests."""
        rule = self.damping
        assert isinstance(rule, LevenbergMarquardt)
        assert self.exact is not None
        due = state.step % rule.every == 0
        if concrete(due) and not bool(due):
            return state
        total = []
        for point in (params, trees.add(params, step)):
            value = self.exact.loss(point, buffers, batch)
            total.append(value + 0.5 * self.decay * trees.dot(point, point))
        rho = (total[1] - total[0]) / promised
        found = rule.adapted(state.damping, rho.detach().to(state.damping))
        return state._replace(damping=torch.where(due, found, state.damping))


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def natural_gradient(
    estimator: Any,
    *,
    learning_rate: float | Callable[[Tensor], Any] | None = 1.0,
    damping: Damping = 1e-3,
    decay: float = 0.95,
    update_every: int = 1,
    invert_every: int = 1,
    momentum: Any = 0.0,
    kl_clip: float | None = None,
    weight_decay: float = 0.0,
    invert: Callable[[Any], inverses.Inverse] | None = None,
) -> GradientTransform:
    """Descend along the natural gradient: δ = -ε (F + λI)⁻¹ g, for any estimator of curvature.

    `update(grads, state, params, *, buffers, batch, key)` returns the step to be **added** to the
    parameters, and the next state. `grads` is the gradient of the mean negative log-likelihood of
    the batch, per unit of the estimator (`statistics(loss=True, gradient=True, ...)` gives it); the
    curvature is estimated on `batch`, which may be that of the gradients or another one. Without a
    batch the curvature stays as it is.

    Args:
        estimator: `kfac`, `ekfac`, `diagonal`, `low_rank`, `dense`, `block_diagonal` or, with
            `decay=0`, `implicit`, made with `fisher="mc"` or any other labels but those that cost
            too much. One that draws labels needs `key`, with which the step is folded.
        learning_rate: ε, or a schedule called with the step (a 0-d tensor); None takes the length
            that minimises M(δ) = gᵀδ + ½ δᵀ(F + λI)δ with the exact F of the batch.
        damping: λ, in the units of F: a number, a function of the `NaturalGradientState`,
            `levenberg_marquardt(...)` or `jeffreys(...)`.
        decay: Of the exponential average of the curvature; 0 uses the latest alone.
        update_every: Steps between two estimates of the curvature.
        invert_every: Steps between two inversions of its average. With `decay=0` an estimate is
            inverted when it is made, every `max(update_every, invert_every)` steps. Under
            `torch.compile`, where the step has no value, everything is computed and the periods
            only choose; there, compile one function with `update(..., refresh=True)` and one with
            `refresh=False`.
        momentum: μ of v ← μ v + (F + λI)⁻¹ g, δ = -ε v; or "exact", with `learning_rate=None`: the
            last step is a second direction over which M is minimised.
        kl_clip: Largest ε² gᵀ(F + λI)⁻¹ g, about twice the divergence (in nats) of the model after
            the step from the one before; longer directions are shortened.
        weight_decay: η of a penalty ½ η |θ|² on the loss: it is added to gradient and damping.
        invert: Makes an `Inverse` of a curvature, instead of `optim.invert`.

    Returns:
        A `GradientTransform`: pure functions `init(params)` and `update`. It goes into
        `optim.chain` as it is, and into `torchopt.chain` with `.bind(buffers=..., batch=...)`.

    Raises:
        OptionError: An option makes no sense.

    Cost: that of the estimator every `update_every` steps, that of an eigendecomposition of the
    factors every `invert_every` steps, and that of a solution at each step; two products with F
    more where the length is exact.

    Reference: Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored
    approximate curvature, sections 6.4, 6.5 and 7 for lengths, damping and exact momentum; Ba,
    Grosse & Martens (2017), Distributed second-order optimization, section 5, for `kl_clip`.

    Example:
        >>> import fisherfn as ff
        >>> model, lik = lambda params, buffers, x: x * params["w"], ff.likelihoods.gaussian(1.0)
        >>> optimizer = natural_gradient(ff.diagonal(model, lik), damping=0.0)
        >>> params, batch = {"w": torch.zeros(1)}, ff.Batch(torch.tensor([[3.0]]))
        >>> grads = {"w": torch.tensor([-18.0])}  # of ½ (6 - 3 w)²
        >>> step, state = optimizer.update(
        ...     grads, optimizer.init(params), params, buffers={}, batch=batch
        ... )
        >>> step
        {'w': tensor([2.])}
    """
    caller = "natural_gradient"
    source = stream(caller, estimator, decay, update_every, invert_every, invert)
    rule = rules.check_rule(caller, damping)
    if learning_rate is not None and not callable(learning_rate):
        check_size(caller, "learning_rate", learning_rate, zero=False)
    if momentum == EXACT:
        if learning_rate is not None:
            raise OptionError(
                f"{caller}: expected learning_rate=None for momentum='exact', got "
                f"{learning_rate!r}. Length and momentum are then found together."
            )
    else:
        check_size(caller, "momentum", momentum)
        if momentum >= 1:
            raise OptionError(f"{caller}: expected momentum below 1, got {momentum}. Use 0.9.")
        if momentum and learning_rate is None:
            raise OptionError(
                f"{caller}: expected momentum=0 or 'exact' for learning_rate=None, got {momentum}. "
                "Length and momentum are then found together."
            )
    if kl_clip is not None:
        check_size(caller, "kl_clip", kl_clip, zero=False)
        if learning_rate is None:
            raise OptionError(
                f"{caller}: expected kl_clip=None for learning_rate=None, got {kl_clip}. The "
                "length is then that of the quadratic model."
            )
    check_size(caller, "weight_decay", weight_decay)
    needs_loss = learning_rate is None or isinstance(rule, LevenbergMarquardt)
    known = [hasattr(estimator, name) for name in ("model", "likelihood", "options")]
    if needs_loss and not all(known):
        raise OptionError(
            f"{caller}: expected an estimator of this library for learning_rate=None and "
            f"levenberg_marquardt, got {type(estimator).__name__}. They need its model and "
            "likelihood."
        )
    exact = quadratic.Quadratic(f"{caller}.update", estimator) if needs_loss else None
    made = _Rule(source, learning_rate, rule, kl_clip, momentum, float(weight_decay), exact)
    return GradientTransform(made.init, made.update)
