"""The spectrum of the Fisher information, exactly, through the inner products of its columns.

F = S Sᵀ with a column of S for each example and each column of the root of its output Fisher
information (for each draw, or label). The matrix Sᵀ S of their inner products has the same non-zero
eigenvalues, and is the smaller one wherever there are fewer columns than parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn.core.dtypes import working_dtype
from fisherfn.core.errors import OptionError
from fisherfn.core.options import check_count
from fisherfn.estimators import checks
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.statistic import Frame, Statistic
from fisherfn.layers.direct import Direct
from fisherfn.layers.form import Form
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.outer import Outer
from fisherfn.likelihoods import resolve

#: Columns of S, at most: their inner products are a dense matrix.
COLUMNS_BUDGET = 16_384


class ColumnGram(Statistic):
    """The eigenvalues of the inner products of all columns."""

    def __init__(self, num_samples: int, k: int | None) -> None:
        """Expect `num_samples` draws; give the `k` largest eigenvalues, or all that can differ."""
        self.num_samples, self.k = num_samples, k
        self._chunks: dict[int, list[LeafScores]] = {}
        self._columns = 0
        self._first: int | None = None

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Keep this parameter's scores in factored form, columns as if they were examples."""
        if self._first is None:
            self._first = leaf
        if leaf == self._first:
            self._columns += scores.columns * scores.batch
            if self._columns > COLUMNS_BUDGET:
                raise OptionError(
                    f"gram_spectrum: expected at most {COLUMNS_BUDGET} columns (examples x columns "
                    f"of their output Fisher information x draws), got {self._columns} or more. "
                    "Use fisher='mc', fewer examples, or ff.linalg.lanczos on ff.linearized."
                )
        rows = LeafScores(tuple((_rows(f), v) for f, v in scores.uses), scores.shape)
        if self.num_samples > 1:
            like = rows.uses[0][0].sample()
            rows = rows.scaled(like.new_full((rows.batch,), self.num_samples**-0.5))
        self._chunks.setdefault(leaf, []).append(rows)

    def result(self, frame: Frame) -> Tensor:
        """Return the eigenvalues, largest first."""
        total: Tensor | None = None
        for i in range(len(frame.leaves)):
            gram = LeafScores.stacked(self._chunks.pop(i)).gram()
            exact = gram.to(working_dtype(gram))
            total = exact if total is None else total + exact.to(total.device)
        assert total is not None
        size = sum([leaf.numel() for leaf in frame.leaves])
        found = torch.linalg.eigvalsh((total + total.T) / 2).flip(-1).clamp_min(0.0)
        count = min(size, found.shape[0]) if self.k is None else self.k
        if count > size:
            raise OptionError(
                f"gram_spectrum: expected k= of at most {size}, the number of parameters, got "
                f"{count}. There are no more eigenvalues."
            )
        missing = max(0, count - found.shape[0])  # all others are zero
        found = torch.cat([found[:count], found.new_zeros(missing)])
        dtype = torch.promote_types(frame.leaves[0].dtype, torch.float32)
        return found.to(dtype)


def _rows(form: Form) -> Form:
    """Return the form of K·B examples with one column each."""
    k, b = form.columns, form.batch
    if k == 1:
        return form
    if isinstance(form, Outer):
        a = form.a.repeat(k, *[1] * (form.a.dim() - 1))
        return Outer(a, form.g.reshape(1, k * b, *form.g.shape[2:]))
    if isinstance(form, Lookup):
        g = form.g.reshape(1, k * b, *form.g.shape[2:])
        return Lookup(form.index.repeat(k, 1), g, form.rows)
    return Direct(form.scores().reshape(1, k * b, *form.shape))


def gram_spectrum(
    model: Any,
    likelihood: Any,
    *,
    fisher: str = "exact",
    k: int | None = None,
    num_samples: int = 1,
    unit: str = "example",
    chunk_size: int | None = None,
) -> Estimator:
    """Compute the eigenvalues of the Fisher information exactly, through its columns.

    F = S Sᵀ, with columns √(w_n/N) J_nᵀ b for each column b of the root of the output Fisher
    information (or each score); Sᵀ S has the same non-zero eigenvalues.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution.
        fisher: Whose labels: "exact", "mc", "curvature_prop" or "empirical".
        k: How many eigenvalues to give, the largest ones; by default as many as there are columns
            or parameters, whichever are fewer.
        num_samples: Draws of labels for each example, for "mc" and "curvature_prop".
        unit: What N counts: "example" or "position".
        chunk_size: Examples whose forward and backward run together; inputs and cotangents of all
            layers are kept for all columns.

    Returns:
        An estimator: called with `(params, buffers, batch, *, key=None)` it gives `[k]`
        eigenvalues, largest first, in nats² / parameter². All that are not given by default are
        zero.

    Raises:
        OptionError: an option makes no sense, or there are more columns than a matrix can have.

    Cost: one forward, a pull-back for each column of the root, the products of all pairs of
    columns, and the eigenvalues of a matrix of their number (cubic in it).

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"]
        >>> spectrum = ff.gram_spectrum(model, ff.likelihoods.categorical())
        >>> spectrum({"w": torch.zeros(1, 2)}, {}, ff.Batch(torch.tensor([[2.0], [2.0]])))
        tensor([2.0000, 0.0000])
    """
    name = "gram_spectrum"
    labels = checks.check_options(name, model, fisher, num_samples, unit, chunk_size)
    if k is not None:
        check_count(name, "k", k, 1, "It is the number of eigenvalues.")
    options = {
        "fisher": fisher,
        "k": k,
        "num_samples": num_samples,
        "unit": unit,
        "chunk_size": chunk_size,
    }
    lik = resolve(name, likelihood)
    return Estimator(name, model, lik, options, labels, lambda: ColumnGram(num_samples, k))
