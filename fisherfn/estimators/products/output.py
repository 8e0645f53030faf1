"""The Fisher information of the outputs, normalised, times a tangent of the outputs.

With z the outputs and s = dlog p / dz, on positions t of examples n of weight w:

    exact                  c_nt = (w/N) H_nt dz_nt, H = E[s sᵀ] in closed form
    mc, curvature_prop     c_n  = (w/N) s_n <s_n, dz_n>, s the scores at all positions of an example
    empirical              the same; unit="position": c_nt = (w/N) s_nt <s_nt, dz_nt>

No graph goes through the loss. With tens of thousands of classes the closed form takes a block of
rows at a time, so that only one tensor like the outputs is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.modes import concrete
from fisherfn.estimators.observe import Labels, Observed, broadcast

_BLOCK = 2**18  # numbers in a block of rows: what a core's cache holds


class OutputFisher:
    """A linear map of tangents of the outputs to cotangents of the outputs."""

    def __init__(self, observed: Observed, labels: Labels) -> None:
        """Draw the labels, if any are drawn: equal keys, one map."""
        self._observed, self._labels = observed, labels
        self._by_position = labels.fisher == "empirical" and labels.unit == "position"
        self._factor: Tensor | None = None
        self._scores: list[Any] = []
        if labels.fisher == "exact":
            self._factor = observed.factor(True) ** 2
            return
        # one cotangent holds the scores of all positions; they are told apart below
        whole = Labels(labels.fisher, labels.num_samples, "example")
        for sample in range(labels.num_samples):
            for block in observed.cotangents(whole, sample, normalised=True, step=1):
                self._scores.append(trees.map(lambda t: t[0], block))

    def __call__(self, tangents: Any) -> Any:
        """Return the cotangents, like the outputs."""
        if self._factor is not None:
            return self._exact(tangents, self._factor)
        live = self._live(tangents)
        total: Any = None
        for scores in self._scores:
            part = self._rank_one(scores, live)
            total = part if total is None else trees.add(total, part)
        return trees.map(lambda c, out: c.to(out.dtype), total, self._observed.outputs)

    def _rank_one(self, scores: Any, tangents: Any) -> Any:
        """Return s <s, dz> / draws, the inner product over an example, or over a position."""
        outputs, likelihood = self._observed.outputs, self._observed.likelihood
        positions = likelihood.positions_shape(outputs)
        inner: Any = None
        for s, d in zip(trees.leaves(scores), trees.leaves(tangents), strict=True):
            s = wide(s)
            d = d.to(s.dtype)
            if not self._by_position:
                product = torch.einsum("bi,bi->b", s.reshape(len(s), -1), d.reshape(len(d), -1))
            elif likelihood.event_axes is None:
                product = (s * d).reshape(*positions, -1).sum(-1)
            else:
                product = (s * d).sum(likelihood.event_axes) if likelihood.event_axes else s * d
            inner = product if inner is None else inner + product
        if not self._by_position:
            inner = inner.reshape(-1, *[1] * (len(positions) - 1))
        factors = broadcast(inner / len(self._scores), outputs, likelihood)
        return trees.map(lambda s, f: s.to(f.dtype) * f, scores, factors)

    def _exact(self, tangents: Any, factor: Tensor) -> Any:
        observed = self._observed
        rows = _rows(observed, tangents)
        if rows is not None:
            return self._exact_by_rows(rows, factor.reshape(-1))
        product = observed.likelihood.fisher_mv(observed.outputs, self._live(tangents))
        return observed.scaled(product, factor, 0)

    def _live(self, tangents: Any) -> Any:
        """Replace the tangents of what is masked: their outputs may have no finite derivative."""
        observed = self._observed
        if observed.mask is None:
            return tangents
        masks = broadcast(observed.mask, observed.outputs, observed.likelihood)
        return trees.map(lambda m, d: torch.where(m, d, torch.zeros_like(d)), masks, tangents)

    def _exact_by_rows(self, rows: tuple[Tensor, Tensor, Sequence[int]], factor: Tensor) -> Tensor:
        z, d, shape = rows
        found = torch.empty_like(z)
        step = max(1, _BLOCK // max(1, z.shape[1]))
        masked = self._observed.mask is not None
        for first in range(0, len(z), step):
            part = slice(first, first + step)
            f = factor[part].unsqueeze(-1)
            tangents = (
                torch.where(f == 0, torch.zeros_like(d[part]), d[part]) if masked else d[part]
            )
            product = self._observed.likelihood.fisher_mv(z[part], tangents) * f
            found[part] = torch.where(f == 0, 0.0, product) if masked else product
        return found.reshape(shape)


def _rows(observed: Observed, tangents: Any) -> tuple[Tensor, Tensor, Sequence[int]] | None:
    """Return outputs and tangents as rows of events, if they are large and may be written to."""
    z, likelihood = observed.outputs, observed.likelihood
    if not isinstance(z, Tensor) or not isinstance(tangents, Tensor) or z.numel() <= 4 * _BLOCK:
        return None
    if likelihood.event_axes != (-1,) or z.requires_grad or tangents.requires_grad:
        return None
    if not concrete(z, tangents):
        return None
    return z.reshape(-1, z.shape[-1]), tangents.reshape(-1, z.shape[-1]), z.shape
