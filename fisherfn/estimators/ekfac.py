"""Exact second moments of the scores in a Kronecker eigenbasis.

With eigenbases Q_G, Q_A of a block's factors, and s_n the score of its weight [O, I] on unit n,

    S = (1/N) Σ_n w_n E_y[ (Q_Gᵀ s_n Q_A)² ]   entrywise; the block is Q diag(S) Qᵀ, Q = Q_G ⊗ Q_A.

K-FAC has the products of the factors' eigenvalues in place of S. S needs the scores themselves, so
it takes a pass of its own once a basis is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.core.errors import OptionError, TreeMismatchError, at
from fisherfn.curvature import EKFAC, KFAC, Layout
from fisherfn.curvature.kronecker import Block
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.kfac import Factors
from fisherfn.estimators.kronecker_settings import Settings
from fisherfn.estimators.kronecker_statistic import KroneckerStatistic, Place
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.convolution import Unfolded
from fisherfn.layers.form import Form
from fisherfn.layers.numerics import accumulate
from fisherfn.layers.rotated import rotated_squares
from fisherfn.likelihoods import resolve


class Scales(KroneckerStatistic):
    """Sums of the squared scores in given bases."""

    def __init__(self, settings: Settings, basis: EKFAC, source: str) -> None:
        """Take the bases of a result; `source` says where they come from."""
        super().__init__("ekfac", settings)
        self.basis = basis
        self.source = source
        self._known = {b.name: b for b in basis.blocks}
        self._scales: dict[str, Tensor] = {}

    def take_block(self, place: Place, form: Form) -> None:
        """Add the squares of one block, and of a bias beside it."""
        b = self._known_block(place.block)
        left, right = self.basis.output_basis[b.name], self.basis.input_basis.get(b.name)
        parts: Iterable[Form] = form.outers() if isinstance(form, Unfolded) else [form]
        for part in parts:
            found = rotated_squares(
                part,
                left,
                right,
                thin=(b.output_form == "rows", b.input_form == "rows"),
                bias=place.biased,
                factor=place.factor,
                parts=place.parts,
            )
            self._scales[b.name] = accumulate(self._scales.get(b.name), found)

    def take_bias(self, block: Block, scores: Tensor) -> None:
        """Add the squares of biases with a block of their own, [K, B, R, O]."""
        b = self._known_block(block)
        left = self.basis.output_basis[b.name]
        columns = scores.flatten(0, 1).movedim(1, 0)
        inside = (columns @ left.to(columns.dtype)).square().sum(1)
        if b.output_form == "rows":
            beside = columns.square().sum((1, 2)) - inside.sum(-1)
            width = max(1, b.outputs - left.shape[-1])
            inside = torch.cat([inside, (beside / width).clamp_min(0.0).unsqueeze(-1)], -1)
        found = inside.unsqueeze(-1)
        self._scales[b.name] = accumulate(self._scales.get(b.name), found)

    def _known_block(self, b: Block) -> Block:
        """Return the basis' own description of a block, which says where it is thin."""
        known = self._known.get(b.name)
        forms = {"output_form": b.output_form, "input_form": b.input_form}
        if known is None or replace(known, **forms) != b:
            got = "none" if known is None else _shown(known)
            raise TreeMismatchError(
                f"ekfac: expected a basis for a block {_shown(b)}{at(b.name)}, got {got}. Take it "
                "from ff.kfac or ff.ekfac of the same model with the same options."
            )
        return known

    def result(self, frame: Frame) -> EKFAC:
        """Return the scales, averaged over draws."""
        scale = 1.0 / self.settings.num_samples
        blocks = [self._known_block(b) for b in self.blocks()]
        extra = set(self._known) - {b.name for b in blocks}
        if extra:
            raise TreeMismatchError(
                f"ekfac: expected a basis for the blocks of this model, got one more"
                f"{at(sorted(extra)[0])}. Take it from ff.kfac or ff.ekfac of the same model with "
                "the same options."
            )
        names = [b.name for b in blocks]
        full = [b.name for b in blocks if b.input_form != "diagonal"]
        return EKFAC(
            {name: self._scales[name] * scale for name in names},
            {name: self.basis.output_basis[name] for name in names},
            {name: self.basis.input_basis[name] for name in full},
            self.rest(),
            frame.total,
            Layout.of(frame.params),
            tuple(blocks),
            self.source,
            fisher=frame.fisher,
            unit=frame.unit,
        )


def _shown(b: Block) -> str:
    """Say in a few words what a block is about."""
    return f"of {b.groups} x {b.outputs} outputs and {b.inputs} inputs"


def ekfac(
    model: Any,
    likelihood: Any,
    basis: KFAC | EKFAC | None = None,
    *,
    fisher: str = "exact",
    approx: str = "expand",
    bias: str = "joint",
    partition: Mapping[str, int] | None = None,
    joint: Sequence[Sequence[str]] = (),
    num_samples: int = 1,
    unit: str = "example",
    widest: int = 8192,
    chunk_size: int | None = None,
) -> Estimator:
    """Estimate blocks that are diagonal in a Kronecker eigenbasis, with exact scales.

    Without `basis` the batch is gone through twice: for the factors, whose eigenvectors are the
    basis, and for the scales. With one, of an earlier result, a single pass gives scales that are
    exact in that basis; results in one basis merge, and can be averaged in a stream. The result's
    `basis` says which it was.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        basis: A `KFAC` or `EKFAC` of the same model and options, whose eigenbases are used.
        fisher: Whose labels, as for `diagonal`.
        approx: "expand" or "reduce", as for `kfac`: how the factors are made. Scales are exact in
            either basis.
        bias: As for `kfac`.
        partition: As for `kfac`.
        joint: As for `kfac`.
        num_samples: Draws of labels for each example.
        unit: What N counts.
        widest: As for `kfac`. In such a factor only the span of the rows has eigenvectors; the
            scale on its complement is the mean over its directions.
        chunk_size: Examples processed together.

    Returns:
        An estimator: called with `(params, buffers, batch, *, key=None)` it gives an `EKFAC`.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: that of `kfac`, the eigendecompositions, and a pass like that of `diagonal` with inputs
    and cotangents, or the scores, rotated. With a basis, the last pass alone.

    Reference: George, Laurent, Bouthillier, Ballas & Vincent (2018), Fast approximate natural
    gradient descent in a Kronecker-factored eigenbasis, algorithm 1.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"].T
        >>> params = {"w": torch.zeros(2, 1, dtype=torch.float64)}
        >>> batch = ff.Batch(torch.tensor([[2.0], [1.0]], dtype=torch.float64))
        >>> F = ff.ekfac(model, ff.likelihoods.categorical())(params, {}, batch)
        >>> F.scales["w"].mT, F.basis
        (tensor([[[0.0000, 1.2500]]], dtype=torch.float64), 'batch')
    """
    settings = Settings(
        fisher, approx, bias, partition, joint, num_samples, unit, widest, chunk_size
    )
    labels = settings.check("ekfac", model, forward_only=False)
    lik = resolve("ekfac", likelihood)
    source = "batch" if basis is None else "given"

    static: dict[str, Any] = {"fisher": fisher, "unit": unit}
    if basis is None:
        return Estimator(
            "ekfac",
            model,
            lik,
            {"basis": None, **settings.options()},
            labels,
            lambda: Factors("ekfac", settings),
            lambda found, params: EKFAC.restored(found, Layout.of(params), source, **static),
            lambda factors: _second(settings, factors),
        )
    if not isinstance(basis, KFAC | EKFAC):
        raise OptionError(
            f"ekfac: expected basis= to be a KFAC, an EKFAC or None, got "
            f"{type(basis).__name__}. Take it from ff.kfac or ff.ekfac of the same model."
        )
    given = basis.eigh() if isinstance(basis, KFAC) else basis
    bases = {"output_basis": given.output_basis, "input_basis": given.input_basis}

    def rebuild(found: Any, params: Any) -> EKFAC:
        return EKFAC.restored(found, Layout.of(params), source, given=bases, **static)

    return Estimator(
        "ekfac",
        model,
        lik,
        {"basis": basis, **settings.options()},
        labels,
        lambda: Scales(settings, given, source),
        rebuild,
    )


def _second(settings: Settings, factors: KFAC) -> Callable[[], Statistic]:
    """Return what makes the statistic of the second pass, once the factors are known."""
    found = factors.eigh()
    return lambda: Scales(settings, found, "batch")
