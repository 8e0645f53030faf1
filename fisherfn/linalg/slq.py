"""Stochastic Lanczos quadrature: densities of spectra, and traces of functions of operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import OptionError
from fisherfn.core.modes import transformed
from fisherfn.core.options import check_count
from fisherfn.core.trees import Tree
from fisherfn.linalg.hutchinson import summary
from fisherfn.linalg.probes import Probes, check_probes
from fisherfn.linalg.results import Estimate
from fisherfn.linalg.space import Basis, Block, Operator, Space, check_key, choose

# Products with each random vector, where nothing is said.
_STEPS = 30


@dataclass(frozen=True, eq=False)
class Density:
    """A spectral density, as a Gauss quadrature for each of m random vectors.

    Attributes:
        nodes: `[m, s]`, points on the spectrum.
        weights: `[m, s]`, not negative; each row sums to 1.
        size: P, the number of eigenvalues, 0-d.
    """

    nodes: Tensor
    weights: Tensor
    size: Tensor

    def trace(self, fn: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate tr f(A) = Σ f(λ_i).

        Args:
            fn: f, elementwise on a tensor.

        Returns:
            `Estimate`, 0-d tensors; the standard error is that over random vectors and knows
            nothing of the error of the quadrature.

        Raises:
            OptionError: fn does not return a tensor of the shape of its argument.

        Example:
            >>> nodes, weights = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]])
            >>> Density(nodes, weights, torch.tensor(10.0)).trace(torch.square).value
            tensor(50.)
        """
        # where there is no weight there need not be a value either
        used = self.weights > torch.finfo(self.weights.dtype).eps ** 2
        somewhere = self.nodes.gather(-1, self.weights.argmax(-1, keepdim=True))
        values = fn(torch.where(used, self.nodes, somewhere))
        if not isinstance(values, Tensor) or values.shape != self.nodes.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise OptionError(
                f"slq: expected fn to be elementwise, shape {tuple(self.nodes.shape)}, got {got}. "
                "Pass for instance torch.log."
            )
        terms = torch.where(used, self.weights * values, torch.zeros_like(values))
        value, stderr = summary(terms.sum(-1) * self.size)
        return Estimate(value, stderr, matvecs=self.nodes.numel())

    def evaluate(self, grid: Tensor, width: float) -> Tensor:
        """Return the density on a grid, smoothed by Gaussians of a width.

        Args:
            grid: `[G]`, points.
            width: Standard deviation of the Gaussians, in the units of the eigenvalues.

        Returns:
            `[G]`, eigenvalues per unit, as a share of P; integrates to 1.

        Example:
            >>> density = Density(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor(3.0))
            >>> density.evaluate(torch.zeros(1), 1.0)
            tensor([0.3989])
        """
        z = (grid.unsqueeze(-1).unsqueeze(-1) - self.nodes) / width
        bumps = torch.exp(-0.5 * z * z) / (width * math.sqrt(2.0 * math.pi))
        return (bumps * self.weights).sum(-1).mean(-1)


trees.register_dataclass_node(Density, ("nodes", "weights", "size"))


def density(
    mv: Operator,
    like: Tree,
    *,
    num_probes: int = 10,
    num_steps: int | None = None,
    key: Tensor,
    probes: str = "rademacher",
) -> Density:
    """Estimate the spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Each random vector starts a Lanczos iteration (reorthogonalised in full, twice), whose
    tridiagonal matrix is a Gauss quadrature for the spectral measure of that vector.

    Args:
        mv: Function tree -> tree, v to A v, symmetric.
        like: Tree like v; only shapes, dtypes and devices matter.
        num_probes: Random vectors.
        num_steps: Products with each, and nodes of its quadrature; at most the dimensions, and 30
            or these by default. Fewer are taken where a vector's invariant subspace is complete;
            nodes are then repeated with weight zero.
        key: Random key.
        probes: "rademacher", "gaussian" or "sphere".

    Returns:
        `Density`.

    Raises:
        OptionError: an option does not exist, or there are more steps than dimensions.
        TreeMismatchError: mv does not return a tree like its argument.

    Cost: num_probes · num_steps products, memory of num_steps vectors. It compiles.

    Reference: Ubaru, Chen & Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
    quadrature, SIAM J. Matrix Anal. Appl. 38(4); Ghorbani, Krishnan & Xiao (2019).

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> scale = torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=torch.float64)
        >>> mv = lambda v: {"w": scale * v["w"]}
        >>> like, key = {"w": torch.zeros(4, dtype=torch.float64)}, ff.random.key(0)
        >>> ff.linalg.density(mv, like, num_probes=1, num_steps=2, key=key).nodes
        tensor([[1., 5.]], dtype=torch.float64)
    """
    space = Space("slq", like, mv)
    check_key("slq", key)
    check_probes("slq", probes, 1.0)
    check_count("slq", "num_probes", num_probes, 1, "It is the number of random vectors.")
    if num_steps is None:
        num_steps = min(_STEPS, space.size)
    check_count("slq", "num_steps", num_steps, 1, "It is the number of products with each.")
    if num_steps > space.size:
        raise OptionError(
            f"slq: expected num_steps= of at most {space.size}, the dimensions, got {num_steps}. "
            "So many steps find all eigenvalues."
        )
    nodes, weights = [], []
    vectors = Probes(space, key, num_probes, probes)
    for i in range(num_probes):
        theta, weight = _quadrature(space, mv, vectors.take(i, i + 1), num_steps)
        nodes.append(theta)
        weights.append(weight)
    size = torch.tensor(float(space.size), dtype=space.dtype, device=space.device)
    return Density(torch.stack(nodes).to(space.dtype), torch.stack(weights).to(space.dtype), size)


def _quadrature(space: Space, mv: Operator, v: Block, steps: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights `[steps]` of the spectral measure of one vector."""
    basis = Basis(space, steps, buffered=False)
    v = space.scale(v, 1.0 / space.norms(v))
    zero = torch.zeros(1, dtype=space.small, device=space.device)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    scale = zero
    for _ in range(steps):
        basis.append(v)
        product = space.apply(mv, v)
        rest, coefficients = basis.reject(product)
        alphas.append(coefficients[-1])
        beta = space.norms(rest)
        scale = torch.maximum(scale, space.norms(product))
        done = ~(beta > 64 * space.eps * scale)
        if not transformed() and bool(done):
            break
        # where this runs unseen, zero vectors follow an invariant subspace
        betas.append(torch.where(done, torch.zeros_like(beta), beta))
        unit = space.scale(rest, 1.0 / torch.where(done, torch.ones_like(beta), beta))
        v = choose(done, [torch.zeros_like(part) for part in unit], unit)
    count = len(alphas)
    matrix = torch.diag(torch.cat(alphas))
    if count > 1:
        side = torch.diag(torch.cat(betas[: count - 1]), 1)
        matrix = matrix + side + side.T
    if not transformed() and not bool(matrix.isfinite().all()):
        nan = torch.full((steps,), float("nan"), dtype=space.small, device=space.device)
        return nan, nan
    theta, y = torch.linalg.eigh(matrix)
    weights = y[0] ** 2
    missing = steps - count
    theta = torch.cat([theta, theta[-1:].expand(missing)])
    return theta, torch.cat([weights, zero.expand(missing)])


def slq(
    mv: Operator,
    like: Tree,
    fn: Callable[[Tensor], Tensor] = torch.log,
    *,
    num_probes: int = 10,
    num_steps: int | None = None,
    key: Tensor,
    damping: float | Tensor = 0.0,
    lower: float | None = None,
    probes: str = "rademacher",
) -> Estimate:
    """Estimate tr f(A + λI) of a symmetric operator by stochastic Lanczos quadrature.

    With the default f, the log-determinant.

    Args:
        mv: Function tree -> tree, v to A v, symmetric.
        like: Tree like v; only shapes, dtypes and devices matter.
        fn: f, elementwise on a tensor of eigenvalues.
        num_probes: Random vectors; the standard error falls like the root of their number.
        num_steps: Products with each; quadrature is exact for polynomials of twice the degree. At
            most the dimensions, and 30 or these by default.
        key: Random key.
        damping: λ.
        lower: A number that no eigenvalue of A is below, such as 0 for a Fisher information: nodes
            that rounding has moved below it are put there.
        probes: "rademacher", "gaussian" or "sphere".

    Returns:
        `Estimate`, 0-d tensors. The standard error knows the randomness, not the quadrature; NaN
        where f is not defined on the spectrum.

    Raises:
        OptionError: an option does not exist, or there are more steps than dimensions.
        TreeMismatchError: mv does not return a tree like its argument.

    Cost: num_probes · num_steps products, memory of num_steps vectors. It compiles.

    Reference: Ubaru, Chen & Saad (2017); see `density`.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> scale = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)
        >>> mv = lambda v: {"w": scale * v["w"]}
        >>> like, key = {"w": torch.zeros(4, dtype=torch.float64)}, ff.random.key(0)
        >>> ff.linalg.slq(mv, like, num_steps=2, key=key, damping=1.0).value  # log(2·2·4·4)
        tensor(4.1589, dtype=torch.float64)
    """
    if not callable(fn):
        raise OptionError(
            f"slq: expected fn= to be a function of a tensor, got {type(fn).__name__}. Pass for "
            "instance torch.log."
        )
    shift = _number("damping", damping)
    found = density(mv, like, num_probes=num_probes, num_steps=num_steps, key=key, probes=probes)
    nodes = found.nodes
    if lower is not None:
        nodes = nodes.clamp_min(_number("lower", lower))
    shifted = Density(nodes + torch.as_tensor(shift).to(nodes), found.weights, found.size)
    return shifted.trace(fn)


def _number(name: str, value: Any) -> Any:
    """Return a number or 0-d tensor, or raise."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise OptionError(
            f"slq: expected {name}= to be a number or a 0-d tensor, got {got}. It is in the units "
            "of the operator."
        )
    return value
