"""Conjugate gradients for (A + λI) x = b, which say how far they came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.core.modes import concrete
from fisherfn.core.options import check_count
from fisherfn.core.trees import Tree
from fisherfn.linalg.results import REASONS, Solution
from fisherfn.linalg.space import Block, Operator, Space, choose

_MOST_STEPS = 1000
#: Steps without a new smallest residual after which a solve counts as stagnating.
_PATIENCE = 50
_RUNNING = -1


def cg(
    mv: Operator,
    b: Tree,
    *,
    damping: float | Tensor = 0.0,
    preconditioner: Operator | None = None,
    max_steps: int | None = None,
    tolerance: float = 1e-5,
    x0: Tree | None = None,
    stacked: bool = False,
    chunk_size: int = 1,
) -> Solution:
    """Solve (A + λI) x = b for a symmetric positive definite A + λI.

    Whatever happens is a value: an operator that is indefinite or not symmetric, a residual that
    stagnates, numbers that are not finite end the iteration with `converged=False` and a reason;
    `value` is then the best x so far. A zero b has the solution zero.

    Args:
        mv: Function tree -> tree, v to A v.
        b: Tree; with `stacked`, each leaf `[n, *shape]`, n right-hand sides.
        damping: λ, a number or a 0-d tensor.
        preconditioner: Function tree -> tree, v to roughly (A + λI)⁻¹ v, symmetric positive
            definite; for instance `lambda v: K.solve(v, damping=λ)` for a K-FAC K of A.
        max_steps: Products, at most, beside one that computes the residual at the end. Default:
            1000, or ten times the dimensions if that is less.
        tolerance: Largest residual ‖b − (A + λI) x‖, as a share of ‖b‖.
        x0: First guess, a tree like b; zero by default, and best left so.
        stacked: Whether b holds several right-hand sides; each iterates by itself, and products are
            taken with all of them.
        chunk_size: Right-hand sides multiplied together by `torch.vmap`.

    Returns:
        `Solution`, whose value has the dtypes of b. Iterates are kept in float32 or wider.

    Raises:
        OptionError: an option does not exist.
        TreeMismatchError: mv, the preconditioner or x0 do not give a tree like b.

    Cost: a product a step, memory of 6 vectors, and one synchronisation a step. Inside
    `torch.compile`, `torch.vmap` or `torch.func.grad` values cannot be looked at: there exactly
    max_steps steps are unrolled, which has to be given, and finished solutions stand still.

    Reference: Hestenes & Stiefel (1952), Methods of conjugate gradients for solving linear systems.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> mv = lambda v: {"w": torch.tensor([1.0, 3.0]) * v["w"]}
        >>> found = ff.linalg.cg(mv, {"w": torch.ones(2)}, damping=1.0)
        >>> found.value, bool(found.converged), found.reason
        ({'w': tensor([0.5000, 0.2500])}, True, 'converged')
        >>> ff.linalg.cg(lambda v: {"w": -v["w"]}, {"w": torch.ones(2)}).reason
        'the operator is not positive definite'
    """
    like = _one(b) if stacked else b
    space = Space("cg", like, mv, name="b")
    if preconditioner is not None and not callable(preconditioner):
        raise OptionError(
            f"cg: expected preconditioner= to be a function tree -> tree, got "
            f"{type(preconditioner).__name__}. Pass for instance lambda v: K.solve(v, damping=d)."
        )
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not number or not tolerance >= 0:
        raise OptionError(
            f"cg: expected tolerance= to be a number of at least 0, got {tolerance!r}. It is the "
            "largest residual as a share of the norm of b."
        )
    check_count("cg", "chunk_size", chunk_size, 1, "It is a number of right-hand sides.")
    shift = _shift(damping, space)
    right = space.block(b, lead=stacked)
    eager = concrete(*right)
    if max_steps is None:
        if not eager:
            raise OptionError(
                "cg: expected max_steps= inside torch.compile or a torch.func transformation, got "
                "None. That many steps are unrolled there."
            )
        max_steps = min(_MOST_STEPS, 10 * space.size)
    check_count("cg", "max_steps", max_steps, 1, "It is the number of products.")
    if x0 is not None:
        trees.check_like("cg", "x0", x0, b, like_name="b")
    guess = None if x0 is None else space.block(x0, lead=stacked)
    solver = _Solver(space, mv, preconditioner, shift, chunk_size, float(tolerance), right, eager)
    return solver.solution(solver.run(guess, max_steps), b, stacked)


def _one(b: Tree) -> Tree:
    """Return the first of several right-hand sides."""
    sizes = set()
    for leaf in trees.leaves(b):
        sizes.add(leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else 0)
    if len(sizes) != 1 or 0 in sizes:
        raise OptionError(
            f"cg: expected leaves of b= with one leading axis of right-hand sides for "
            f"stacked=True, got leading sizes {sorted(sizes)}. Stack them leaf by leaf."
        )
    return trees.map(lambda leaf: leaf[0], b)


def _shift(damping: Any, space: Space) -> Tensor:
    """Return λ as a 0-d tensor."""
    if isinstance(damping, Tensor) and damping.ndim == 0 and not damping.is_complex():
        return damping.to(space.device, space.small)
    if isinstance(damping, bool) or not isinstance(damping, int | float):
        got = tuple(damping.shape) if isinstance(damping, Tensor) else repr(damping)
        raise OptionError(
            f"cg: expected damping= to be a number or a 0-d tensor, got {got}. It is the λ of "
            "A + λI."
        )
    return torch.tensor(float(damping), dtype=space.small, device=space.device)


class _Solver:
    """One solve: the operator, the right-hand sides, and the state of each of them."""

    def __init__(
        self,
        space: Space,
        mv: Operator,
        preconditioner: Operator | None,
        shift: Tensor,
        chunk_size: int,
        tolerance: float,
        right: Block,
        eager: bool,
    ) -> None:
        self.space, self.mv, self.preconditioner = space, mv, preconditioner
        self.shift, self.chunk_size, self.tolerance = shift, chunk_size, tolerance
        self.right, self.eager = right, eager
        self.scale = space.norms(right)
        count = right[0].shape[0]
        self.status = torch.full((count,), _RUNNING, dtype=torch.int64, device=space.device)
        self.steps = torch.zeros_like(self.status)

    def product(self, v: Block) -> Block:
        """Return (A + λI) v."""
        shift = self.shift.expand(v[0].shape[0])
        return self.space.axpy(shift, v, self.space.apply(self.mv, v, self.chunk_size))

    def prepared(self, r: Block) -> Block:
        """Return the preconditioned residual."""
        if self.preconditioner is None:
            return r
        return self.space.apply(self.preconditioner, r, self.chunk_size)

    def end(self, where: Tensor, reason: str) -> None:
        """Note why some solves end; the first reason stays."""
        mark = where & (self.status == _RUNNING)
        self.status = torch.where(mark, REASONS.index(reason), self.status)

    def run(self, guess: Block | None, max_steps: int) -> Block:
        """Iterate; return the best x found for each right-hand side."""
        space = self.space
        zero = [torch.zeros_like(part) for part in self.right]
        empty = self.scale == 0
        x = zero if guess is None else choose(empty, zero, guess)
        r = self.right if guess is None else self._residual(x)
        self.end(~self.scale.isfinite(), "not finite")
        self.end(empty, "zero right-hand side")
        best, best_size = x, space.norms(r)
        since = torch.zeros_like(self.steps)
        self.end(best_size <= self.tolerance * self.scale, "converged")
        p = z = self.prepared(r)
        rho, gained = space.dots(r, z), torch.zeros_like(best_size)
        before: tuple[Block, Block] | None = None
        over = self.eager and bool((self.status != _RUNNING).all())
        for step in range(max_steps):
            if over:
                break
            q = self.product(p)
            curvature = space.dots(p, q)
            self.end(~(curvature.isfinite() & rho.isfinite()), "not finite")
            self.end(rho <= 0, "the preconditioner is not positive definite")
            # rounding may make a zero curvature positive
            rounding = space.eps * space.norms(p) * space.norms(q)
            self.end(curvature <= rounding, "the operator is not positive definite")
            if before is not None:
                self.end(self._asymmetric(p, q, *before), "the operator is not symmetric")
            before = (p, q) if step < 2 else None
            going = self.status == _RUNNING
            alpha = torch.where(going, rho / torch.where(curvature > 0, curvature, 1.0), 0.0)
            x, r = space.axpy(alpha, p, x), space.axpy(-alpha, q, r)
            self.steps = self.steps + going
            size = space.norms(r)
            self.end(going & ~size.isfinite(), "not finite")
            better, close = (
                going & (size < best_size),
                going & (size <= self.tolerance * self.scale),
            )
            # Residuals may rise for long before they fall, but the energy falls in every step.
            gain = alpha * rho
            gained, since = gained + gain, torch.where(better, 0, since + going)
            stuck = going & (since >= _PATIENCE) & (gain <= space.eps * gained)
            self.end(stuck & ~close, "the residual no longer falls")
            over, all_better, any_close = self._look(
                (self.status != _RUNNING).all(), better.all(), close.any()
            )
            best = x if all_better else choose(better, x, best)
            best_size = torch.where(better, size, best_size)
            if any_close:
                # The recurrence drifts away from the residual of x by rounding; the latter counts.
                true = self._residual(x)
                self.end(close & (space.norms(true) <= self.tolerance * self.scale), "converged")
                r = choose(close, true, r)
                best_size = torch.where(close, space.norms(true), best_size)
                over = self.eager and bool((self.status != _RUNNING).all())
            z = r if over else self.prepared(r)
            following = space.dots(r, z)
            beta = torch.where(going & (rho > 0), following / torch.where(rho > 0, rho, 1.0), 0.0)
            # after a replaced residual the directions are conjugate no longer: start again
            beta = torch.where(close, torch.zeros_like(beta), beta)
            p, rho = space.axpy(beta, p, z), following
        self.end(self.status == _RUNNING, "reached max_steps")
        return choose(self.scale.isfinite(), best, [torch.full_like(b, torch.nan) for b in best])

    def _look(self, over: Tensor, all_better: Tensor, any_close: Tensor) -> tuple[bool, bool, bool]:
        """Look at three conditions at the cost of one; unseen, all that may be needed is."""
        if not self.eager:
            return False, False, True
        first, second, third = torch.stack([over, all_better, any_close]).tolist()
        return first, second, third

    def _residual(self, x: Block) -> Block:
        pairs = zip(self.right, self.product(x), strict=True)
        return [b - q for b, q in pairs]

    def _asymmetric(self, p: Block, q: Block, last_p: Block, last_q: Block) -> Tensor:
        """Compare pᵀ A p' with p'ᵀ A p, for two directions whose products are known."""
        space = self.space
        difference = (space.dots(p, last_q) - space.dots(last_p, q)).abs()
        largest = torch.maximum(
            space.norms(p) * space.norms(last_q), space.norms(last_p) * space.norms(q)
        )
        return difference > space.eps**0.5 * largest

    def solution(self, x: Block, b: Tree, stacked: bool) -> Solution:
        """Return x with its own residual."""
        space = self.space
        safe = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        residual = (space.norms(self._residual(x)) / safe).to(space.dtype)
        fine = (self.status == REASONS.index("converged")) | (self.scale == 0)
        tree = space.stacked(x) if stacked else space.tree(x)
        value = trees.map(lambda leaf, like: leaf.to(like.dtype), tree, b)
        found = [fine, self.steps, residual, self.status]
        if not stacked:
            found = [part[0] for part in found]
        return Solution(value, found[0], found[1], found[2], found[3])
