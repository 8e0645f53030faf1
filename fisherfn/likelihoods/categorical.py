"""One of C classes a position, from logits.

With p = softmax(logits / T), everything differentiated with respect to the logits:

    score   (onehot(y) - p) / T            H = (diag(p) - p p^T) / T^2

The square root is that of Tanabe & Sagae: lower trapezoidal, C-1 columns. With r_k the probability
p_k + p_{k+1} + ... of class k or a later one,

    B_kk = sqrt(p_k r_{k+1} / r_k)         B_jk = -p_j sqrt(p_k / (r_k r_{k+1})),  j > k

The r are sums from the end. 1 - cumsum(p) would cancel, and give NaN where the rest underflows.

Reference: Tanabe & Sagae (1992), An exact Cholesky decomposition and the generalized inverse of the
variance-covariance matrix of the multinomial distribution, with applications, JRSS B 54(1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fisherfn.core import random
from fisherfn.core.errors import OptionError, ShapeError
from fisherfn.core.inversion import invert
from fisherfn.core.modes import transformed
from fisherfn.likelihoods import base


def categorical(temperature: float = 1.0, class_axis: int = -1) -> Categorical:
    """Make the likelihood of one of C classes a position; the outputs are logits.

    Args:
        temperature: Divides the logits, for drawing and for scoring alike: the model is
            softmax(logits / temperature), and its Fisher carries 1 / temperature^2.
        class_axis: -1 for outputs `[B, *positions, C]`, 1 for `[B, C, *positions]`.

    Returns:
        The likelihood. Targets are class indices, any integer dtype, `[B, *positions]`.

    Raises:
        OptionError: The temperature is not positive and finite, or the axis is neither -1 nor 1.

    Example:
        >>> lik = categorical()
        >>> lik.score(torch.zeros(1, 4), torch.tensor([2]))
        tensor([[-0.2500, -0.2500,  0.7500, -0.2500]])
        >>> lik.columns(torch.zeros(1, 4))
        3
    """
    return Categorical(temperature, class_axis)


@dataclass(frozen=True)
class Categorical(base.Likelihood):
    """See `categorical`."""

    name: ClassVar[str] = "categorical"
    fresh_scores: ClassVar[bool] = True
    temperature: float = 1.0
    class_axis: int = -1

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        t = self.temperature
        if isinstance(t, bool) or not isinstance(t, int | float) or not 0 < t < math.inf:
            raise OptionError(
                f"categorical: expected a positive finite number, got {t!r} at temperature. "
                "The model is softmax(logits / temperature)."
            )
        if isinstance(self.class_axis, bool) or self.class_axis not in (-1, 1):
            raise OptionError(
                f"categorical: expected -1 or 1, got {self.class_axis!r} at class_axis. Use -1 for "
                "outputs [B, *positions, C], 1 for [B, C, *positions]."
            )

    @property
    def event_axes(self) -> tuple[int, ...]:
        """The class axis."""
        return (self.class_axis,)

    def check_outputs(self, caller: str, outputs: Any) -> None:
        """Raise unless the outputs are logits of two classes at least."""
        layout = "[B, *positions, C]" if self.class_axis == -1 else "[B, C, *positions]"
        base.check_tensor_outputs(caller, outputs, 2, layout)
        if outputs.shape[self.class_axis] < 2:
            raise ShapeError(
                f"{caller}: expected at least 2 classes on axis {self.class_axis}, got shape "
                f"{tuple(outputs.shape)} at outputs. One logit a position is "
                "likelihoods.bernoulli()."
            )

    def event_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return `(C,)`."""
        return (outputs.shape[self.class_axis],)

    def positions_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the shape of the outputs without the class axis."""
        self.check_outputs("categorical", outputs)
        return _without(tuple(outputs.shape), self.class_axis)

    def columns(self, outputs: Tensor) -> int:
        """Return C - 1."""
        self.check_outputs("categorical.columns", outputs)
        return outputs.shape[self.class_axis] - 1

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return log p of the class, `[P]`; its derivatives are accurate where p is nearly 1."""
        self.check_structure("categorical.log_prob", outputs, targets)
        logits, dtype = self._logits(outputs)
        index, bad = self._index(outputs, targets)
        if not (transformed() or outputs.requires_grad):
            log_p = F.log_softmax(logits, -1, dtype=dtype)
            return torch.where(bad, math.nan, log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1))
        logits = logits.to(dtype)
        index, top = index.unsqueeze(-1), logits.detach().argmax(-1, keepdim=True)
        # log p = (z_y - z_top) - log(1 + sum of exp(z - z_top) over all but the top). Where y is
        # the top, derivatives of log_softmax get 1-p by cancellation, twice in a Hessian.
        own, highest = logits.gather(-1, torch.cat([index, top], -1)).split(1, -1)
        rest = (logits - highest).scatter(-1, top, -math.inf).exp().sum(-1).log1p()
        behind = torch.where(index == top, 0.0, own - highest).squeeze(-1)
        return torch.where(bad, math.nan, behind - rest)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (onehot - p) / T, like `outputs`."""
        self.check_structure("categorical.score", outputs, targets)
        index, bad = self._index(outputs, targets)
        p = self._probabilities(outputs)
        # A target that is no class poisons its own entry: cheaper than a pass over all classes.
        one = torch.where(bad, math.nan, torch.ones((), dtype=p.dtype, device=p.device))
        return self._score(p, index, one)

    def sample(self, outputs: Tensor, keys: Tensor) -> Tensor:
        """Draw classes, int64 `[P]`."""
        self.check_outputs("categorical.sample", outputs)
        return self._sample(self._probabilities(outputs.detach()), keys)

    def sample_score(self, outputs: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Draw classes and score them; the softmax is computed once."""
        self.check_outputs("categorical.sample_score", outputs)
        p = self._probabilities(outputs)
        targets = self._sample(p.detach(), keys)
        one = torch.ones(targets.shape, dtype=p.dtype, device=p.device)
        return targets, self._score(p, targets, one)

    def root(self, outputs: Tensor, index: int | Tensor) -> Tensor:
        """Return column `index` of the Tanabe & Sagae root at every position."""
        classes = self.columns(outputs) + 1
        base.check_index("categorical.root", index, classes - 1)
        p = _positive(self._probabilities(outputs))
        k = torch.as_tensor(index, dtype=torch.int64, device=p.device).reshape(1)
        rest = _sums_from_end(p)
        at, below = _coefficients(
            p.index_select(-1, k), rest.index_select(-1, k), rest.index_select(-1, k + 1)
        )
        axis = torch.arange(classes, device=p.device)
        column = torch.where(axis > k, p * -below, torch.where(axis == k, at, 0.0))
        return self._finish(column)

    def root_mv(self, outputs: Tensor, u: Tensor) -> Tensor:
        """Return B u; one exclusive sum over classes."""
        p = _positive(self._probabilities(outputs))
        base.check_vector("categorical.root_mv", "u", u, (*p.shape[:-1], self.columns(outputs)))
        u = u.to(p.dtype)
        at, below = _columns(p)
        # Row j holds at_j u_j on the diagonal (no such entry in the last row) and, to the left of
        # it, -p_j times the sum of below_k u_k over k < j (no such entry in the first row).
        diagonal, sums = F.pad(at * u, (0, 1)), F.pad((below * u).cumsum(-1), (1, 0))
        return self._finish(torch.addcmul(diagonal, p, sums, value=-1.0))

    def root_t_mv(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return B^T v; one sum over classes from the end."""
        self.check_outputs("categorical.root_t_mv", outputs)
        base.check_vector("categorical.root_t_mv", "v", v, tuple(outputs.shape))
        p = _positive(self._probabilities(outputs))
        w = self._classes_last(v).to(p.dtype)
        at, below = _columns(p)
        return self._scaled(at * w[..., :-1] - below * _sums_from_end(p * w)[..., 1:])

    def fisher_mv(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return (p v - p <p, v>) / T^2."""
        self.check_outputs("categorical.fisher_mv", outputs)
        base.check_vector("categorical.fisher_mv", "v", v, tuple(outputs.shape))
        p = self._probabilities(outputs)
        w = self._classes_last(v).to(p.dtype)
        # H is blind to a shift of v. Measured from its likeliest class, the mean of v no longer
        # cancels against v there, so confident predictions keep their relative accuracy.
        w = w - w.gather(-1, p.detach().argmax(-1, keepdim=True))
        return self._finish(p * (w - (p * w).sum(-1, keepdim=True)), power=2)

    def neutral(self, targets: Tensor, mask: Tensor | None) -> Tensor:
        """Return the targets with class 0 where the mask is false."""
        return targets if mask is None else torch.where(mask, targets, torch.zeros_like(targets))

    def check_structure(self, caller: str, outputs: Any, targets: Any) -> None:
        """Raise unless the targets are integers, one a position."""
        self.check_outputs(caller, outputs)
        shape = _without(tuple(outputs.shape), self.class_axis)
        if isinstance(targets, Tensor) and (
            targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
        ):
            raise ShapeError(
                f"{caller}: expected integer class indices of shape {shape}, got {targets.dtype} "
                f"of shape {tuple(targets.shape)} at targets. One-hot targets become indices with "
                f"targets.argmax({self.class_axis}); soft labels are not drawn from a categorical."
            )
        other = -1 if self.class_axis == 1 else 1
        hint = ""
        if isinstance(targets, Tensor) and tuple(targets.shape) == _without(
            tuple(outputs.shape), other
        ):
            hint = f"If axis {other} holds the classes, use categorical(class_axis={other})."
        base.check_tensor_targets(caller, targets, shape, hint)

    def invalid(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """Return where the targets that count are no class."""
        return base.counted(self._index(outputs, targets)[1], mask)

    def describe_targets(self, outputs: Tensor) -> tuple[str, str]:
        """Return the range of the classes, and how to leave targets out."""
        return (
            f"class indices from 0 to {outputs.shape[self.class_axis] - 1}",
            "Leave out what does not count, as in "
            "Batch(..., mask=Batch.ignore(targets, -100)); otherwise look at the labels.",
        )

    def _classes_last(self, x: Tensor) -> Tensor:
        return x if self.class_axis == -1 else x.movedim(1, -1)

    def _scaled(self, x: Tensor, power: int = 1) -> Tensor:
        return x if self.temperature == 1.0 else x / self.temperature**power

    def _finish(self, x: Tensor, power: int = 1) -> Tensor:
        """Divide by the temperature and put the classes back where the outputs have them."""
        x = self._scaled(x, power)
        return x if self.class_axis == -1 else x.movedim(-1, 1)

    def _logits(self, outputs: Tensor) -> tuple[Tensor, torch.dtype]:
        """Return logits / T, classes last, and the dtype to go on with."""
        x = self._classes_last(outputs)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Undivided logits are left as they are: a softmax widens them without a pass of its own.
        return (x if self.temperature == 1.0 else self._scaled(x.to(dtype))), dtype

    def _probabilities(self, outputs: Tensor) -> Tensor:
        logits, dtype = self._logits(outputs)
        return torch.softmax(logits, -1, dtype=dtype)

    def _index(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets as indices that are safe to use, and where they are no class."""
        classes = outputs.shape[self.class_axis]
        index = targets.to(torch.int64)
        return index.clamp(0, classes - 1), (index < 0) | (index >= classes)

    def _score(self, p: Tensor, index: Tensor, one: Tensor) -> Tensor:
        """Return -p / T, and (1 - p) / T at the targets; `p` is used up."""
        inverse = 1.0 / self.temperature
        index, one = index.unsqueeze(-1), (one * inverse).unsqueeze(-1)
        # 1 - p is the sum of the others: no rounding is left of it where p is nearly 1
        if transformed() or p.requires_grad:
            others = p.scatter(-1, index, 0.0)
            score = (others * -inverse).scatter_add(-1, index, one * others.sum(-1, keepdim=True))
        else:  # p is nobody else's: with tens of thousands of classes, two copies less
            others = p.scatter_(-1, index, 0.0).sum(-1, keepdim=True)
            score = p.mul_(-inverse).scatter_(-1, index, one * others)
        return score if self.class_axis == -1 else score.movedim(-1, 1)

    def _sample(self, p: Tensor, keys: Tensor) -> Tensor:
        keys = base.example_keys("categorical.sample", keys, p.shape[0])
        keys = base.position_keys(keys, tuple(p.shape[:-1]))
        return invert(p, lambda shape: random.uniform(keys, shape, p.dtype, open=True))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Drop one axis, -1 or 1, from a shape."""
    return shape[:-1] if axis == -1 else (shape[0], *shape[2:])


def _sums_from_end(x: Tensor) -> Tensor:
    """Return r_k = x_k + x_{k+1} + ..., along the last axis."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _positive(p: Tensor) -> Tensor:
    """Return p with its zeros and near zeros lifted, to 1e-29 in float32 and 2e-299 in float64.

    Far below rounding in B B^T, and enough that neither the root nor its derivative divides by zero
    or overflows.
    """
    return p.clamp(min=torch.finfo(p.dtype).tiny * 1e9)


def _columns(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return `_coefficients` of all C-1 columns."""
    rest = _sums_from_end(p)
    return _coefficients(p[..., :-1], rest[..., :-1], rest[..., 1:])


def _coefficients(p: Tensor, here: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return B_kk and c_k, with B_jk = -p_j c_k below the diagonal, from p_k, r_k and r_{k+1}.

    They are the product and the quotient of sqrt(p_k / r_k) and sqrt(r_{k+1}); in this form no
    intermediate value overflows, also in the derivative.
    """
    left, right = (p / here).sqrt(), after.sqrt()
    return left * right, left / right
