"""The Hessian of the mean negative log-likelihood as a kind of product: forward over reverse.

    H v = d/dε ∇L(θ + ε v),    L = -(1/N) Σ_n w_n log p(y_n | x_n)

In eager mode the forward pass and the backward pass of L run on dual numbers; where results have to
compose it is `torch.func.jvp` of `torch.func.grad`. A model without forward-mode derivative is
differentiated backward twice: H is symmetric, so the transpose will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherfn.estimators.observe import Labels
from fisherfn.estimators.products import linear
from fisherfn.estimators.products.fallback import (
    DOUBLE,
    FORWARD,
    check_twice,
    no_forward_mode,
)
from fisherfn.estimators.products.linear import Map, Ready
from fisherfn.estimators.products.tape import UnrecordableError

if TYPE_CHECKING:
    from fisherfn.estimators.products.parts import Problem


@dataclass(frozen=True)
class Loss:
    """A chunk's share of the mean negative log-likelihood, as a function of the chosen leaves."""

    problem: Problem
    inputs: Any
    span: tuple[int, int]
    compose: bool

    def __call__(self, leaves: list[Tensor]) -> Tensor:
        """Return a 0-d tensor."""
        function = self.problem.function(self.inputs, compose=self.compose)
        outputs = function.restore(function(leaves))
        with torch.enable_grad():
            return -self.problem.observe(self.inputs, outputs, self.span).log_likelihood()

    def count(self, leaves: list[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        """Count the units outside of any derivative, where what is counted may be kept.

        Returns:
            What every derivative has to pass through: targets that cannot be must not leave a
            number, and a constant that is NaN has no derivative to show it.
        """
        function = self.problem.function(self.inputs, compose=self.compose)
        with torch.no_grad():
            outputs = function.restore(function([t.detach() for t in leaves]))
        observed = self.problem.observe(self.inputs, outputs, self.span)
        # kept from here on: first read inside of a derivative, it would belong to that one
        _ = observed.counted.root_weights
        poison = observed.poison
        if poison is None:
            return lambda found: found
        return lambda found: [t * poison.to(t.dtype) for t in found]

    def gradient(self, leaves: list[Tensor], *, again: bool = False) -> list[Tensor]:
        """Return the gradient by autograd; `again` if it is to be differentiated once more."""
        loss = self(leaves)
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in leaves]
        found = torch.autograd.grad(loss, leaves, create_graph=again, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


def gradient(loss: Loss, leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradient alone."""
    if loss.compose:
        checked = loss.count(leaves)
        found: Any = torch.func.grad(loss)(leaves)
        return checked(found)
    with torch.enable_grad():
        return [g.detach() for g in loss.gradient(linear.roots(leaves))]


def once(loss: Loss, leaves: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """Return H v."""
    if loss.compose:
        return _functional(loss, leaves)(vector)
    try:
        return linear.dual(loss.gradient, leaves, vector)[1]
    except Exception as error:
        reason = no_forward_mode(error)
    return _graph(loss, leaves, reason)[0](vector)


def many(loss: Loss, leaves: list[Tensor]) -> Ready:
    """Return H, ready for many vectors."""
    if loss.compose:
        push = _functional(loss, leaves)
        return Ready(push, torch.func.vmap(push), FORWARD)
    live = linear.roots(leaves)
    try:
        found, tape = linear.record(loss.gradient, live, [torch.zeros_like(p) for p in live])
    except UnrecordableError as error:
        return Ready(*_graph(loss, leaves, str(error)), DOUBLE, str(error))
    except Exception as error:
        reason = no_forward_mode(error)
        return Ready(*_graph(loss, leaves, reason), DOUBLE, reason)
    push = linear.player(tape, [g.detach() for g in found])
    alone = linear.one_by_one(tape, leaves)
    return Ready(push, linear.loop(push) if alone else linear.mapped(push), FORWARD)


def _functional(loss: Loss, leaves: list[Tensor]) -> Map:
    linear.load_forward_mode()
    checked = loss.count(leaves)
    slope: Callable[..., Any] = torch.func.grad(loss)

    def push(vector: list[Tensor]) -> list[Tensor]:
        try:
            return checked(torch.func.jvp(slope, (leaves,), (vector,))[1])
        except Exception as error:
            no_forward_mode(error, compose=True)
        return checked(torch.func.vjp(slope, leaves)[1](vector)[0])

    return push


def _graph(loss: Loss, leaves: list[Tensor], reason: str) -> tuple[Map, Map]:
    live = linear.roots(leaves)
    with torch.enable_grad():
        slope = loss.gradient(live, again=True)
    check_twice(slope, reason)
    push = linear.puller(slope, live, reason)
    return push, linear.batched(push)


@dataclass(frozen=True)
class HessianKind:
    """The Hessian of the mean negative log-likelihood of the observed targets."""

    labels: Labels

    def once(
        self,
        problem: Problem,
        inputs: Any,
        span: tuple[int, int],
        vector: list[Tensor],
        compose: bool,
    ) -> list[Tensor]:
        """Return the product of one chunk with one vector."""
        return once(Loss(problem, inputs, span, compose), problem.chosen.leaves, vector)

    def ready(self, problem: Problem, inputs: Any, span: tuple[int, int], compose: bool) -> Ready:
        """Return the matrix of one chunk, for many vectors."""
        loss = Loss(problem, inputs, span, compose)
        return many(loss, problem.chosen.leaves)
