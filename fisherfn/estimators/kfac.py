"""Kronecker-factored curvature: second moments of inputs and of cotangents, layer by layer.

With inputs a and cotangents g at the rows of a layer, N units, and R rows that exist, a block is

    expand: (Σ w a aᵀ) ⊗ (Σ w g gᵀ) / (N R)        reduce: (Σ w ā āᵀ) ⊗ (Σ w ĝ ĝᵀ) / (N R)

where "reduce" takes the mean of a and the sum of g over the rows of an example first, and R counts
examples. Every other parameter keeps its exact diagonal, so that the result is about all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.core.modes import concrete, transformed
from fisherfn.curvature import KFAC, Layout
from fisherfn.curvature.kronecker import Block
from fisherfn.estimators.estimator import Estimator
from fisherfn.estimators.kronecker_settings import Settings
from fisherfn.estimators.kronecker_statistic import Beside, KroneckerStatistic, Place, existing
from fisherfn.estimators.observe import Observed
from fisherfn.estimators.statistic import Frame
from fisherfn.layers.convolution import Unfolded
from fisherfn.layers.form import Form
from fisherfn.layers.kronecker import Moments, Weights, input_moments, output_moments
from fisherfn.layers.numerics import accumulate
from fisherfn.layers.outer import Outer
from fisherfn.likelihoods import resolve


class Factors(KroneckerStatistic):
    """Sums of the second moments of inputs and cotangents."""

    def __init__(self, caller: str, settings: Settings) -> None:
        """Start empty."""
        super().__init__(caller, settings)
        self._inputs: dict[str, Moments] = {}
        self._outputs: dict[str, Tensor] = {}
        self._weights = Weights()
        self._fresh = False
        # with the inputs, whose memory nobody else can get meanwhile
        self._shared: dict[Any, tuple[Tensor | None, Moments]] = {}

    def observe(self, observed: Observed) -> None:
        """Learn which rows exist, and that the inputs of a chunk are still to be looked at."""
        self._weights = existing(self.caller, observed)
        self._fresh = True
        self._shared.clear()

    def end_pull(self) -> None:
        """Inputs stay the same for other labels."""
        self._waiting.clear()
        self._fresh = False
        self._shared.clear()

    def take_block(self, place: Place, form: Form) -> None:
        """Add the moments of one block."""
        s, b = self.settings, place.block
        if self._fresh:
            found = self._moments(place, form)
            old = self._inputs.get(b.name)
            self._inputs[b.name] = found if old is None else _plus(old, found, b.input_form)
        if s.forward_only:
            return
        keep = b.output_form == "rows"
        found = output_moments(form, reduce=s.reduce, parts=place.parts, keep_rows=keep)
        old = self._outputs.get(b.name)
        if old is not None and keep:
            self._outputs[b.name] = torch.cat([old, found], -2)
        else:
            self._outputs[b.name] = accumulate(old, found)

    def _moments(self, place: Place, form: Form) -> Moments:
        """Return the moments of the inputs; layers that read one tensor share them."""
        keep = place.block.input_form == "rows"
        source = _input(form)
        keys = [] if source is None else self._input_keys(place, form, source)
        for key in keys:
            if (key, place.biased, keep) in self._shared:
                return self._shared[key, place.biased, keep][1]
        found = input_moments(
            form, self._weights, reduce=self.settings.reduce, bias=place.biased, keep_rows=keep
        )
        for key in keys:
            self._shared[key, place.biased, keep] = source, found
        return found

    def _input_keys(self, place: Place, form: Form, source: Tensor) -> list[Any]:
        """Return what is equal for equal inputs while this chunk is looked at, as far as is seen.

        That is the tensor that the layer was called with; and, since another may look at the same
        memory, its place there.
        """
        leaf, number = place.members[0]
        role = self.roles.weights[leaf][number]
        mark = self._sources[role.tap]
        keys: list[Any] = [] if mark is None else [(mark, role.reading)]
        if concrete(source):
            kind = form.geometry if isinstance(form, Unfolded) else None
            keys.append((source.data_ptr(), source.shape, source.stride(), kind))
        return keys

    def result(self, frame: Frame) -> KFAC:
        """Return the factors, averaged."""
        blocks, inputs, outputs, rows = [], {}, {}, {}
        averages: dict[int, Tensor] = {}
        finished: dict[Any, Tensor] = {}
        for place in self.ordered():
            b = self._kept(place.block)
            moments = self._inputs[b.name]
            # layers that read one tensor have one factor, which is decomposed once
            if id(moments) not in averages:
                averages[id(moments)] = _averaged(moments, b.input_form)
            known = (id(moments), place.factor, place.biased, b.groups)
            if known not in finished:
                finished[known] = _finished(averages[id(moments)], place)
            A = finished[known]
            blocks.append(b)
            inputs[b.name], rows[b.name] = A, moments.rows.to(frame.total.dtype)
            outputs[b.name] = self._output_factor(b, A)
            beside = self.separate(place)
            if beside is not None:
                own = self._kept(beside.block)
                blocks.append(own)
                inputs[own.name], rows[own.name] = A.new_ones(1, 1, 1), rows[b.name]
                G = outputs[b.name]
                if self.settings.forward_only:
                    outputs[own.name] = _identity(own, A)
                else:
                    outputs[own.name] = G if beside.outputs is None else _restricted(G, b, beside)
        return KFAC(
            inputs,
            outputs,
            rows,
            self._diagonals(blocks),
            frame.total,
            Layout.of(frame.params),
            tuple(blocks),
            self.settings.approx,
            fisher=frame.fisher,
            unit=frame.unit,
        )

    def _output_factor(self, b: Block, like: Tensor) -> Tensor:
        """Return G, averaged over draws; the identity if nothing was pulled back."""
        if self.settings.forward_only:
            return _identity(b, like)
        G, scale = self._outputs[b.name], 1.0 / self.settings.num_samples
        if scale == 1:
            return G
        return G * (scale**0.5 if b.output_form == "rows" else scale)

    def _diagonals(self, blocks: Sequence[Block]) -> dict[str, Tensor]:
        """Return the diagonal of each leaf without a block; ones if nothing was pulled back."""
        if not self.settings.forward_only:
            return self.rest()
        covered = {path for b in blocks for path in b.paths()}
        named = zip(self.paths, self.leaves, strict=True)
        return {path: _ones(leaf) for path, leaf in named if path not in covered}

    def _kept(self, b: Block) -> Block:
        """Return a block with the form in which its output factor is kept."""
        if self.settings.forward_only and b.output_form == "rows":
            return replace(b, output_form="diagonal")  # the identity has no rows
        return b


def _identity(b: Block, like: Tensor) -> Tensor:
    """Return the output factor of a block of which nothing was pulled back."""
    if b.output_form == "diagonal":
        return like.new_ones(b.groups, b.outputs)
    eye = torch.eye(b.outputs, dtype=like.dtype, device=like.device)
    return eye.expand(b.groups, -1, -1).contiguous()


def _restricted(G: Tensor, b: Block, beside: Beside) -> Tensor:
    """Return the output factor of the layers that have a bias, in the form of their block."""
    index = torch.tensor(beside.outputs, device=G.device)
    if b.output_form == "matrix":
        return G[:, index][:, :, index]
    rows = G[..., index]
    return rows if beside.block.output_form == "rows" else rows.mT @ rows


def _input(form: Form) -> Tensor | None:
    """Return what the rows of the inputs are made of, but for those of a table."""
    if isinstance(form, Outer):
        return form.a
    return form.x if isinstance(form, Unfolded) else None


def _ones(leaf: Tensor) -> Tensor:
    return torch.ones_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))


def _plus(a: Moments, b: Moments, form: str) -> Moments:
    square = torch.cat([a.square, b.square], -2) if form == "rows" else a.square + b.square
    return Moments(square, a.rows + b.rows)


def _averaged(moments: Moments, form: str) -> Tensor:
    """Return the average over rows; sums are used up, but rows may be those of the data."""
    many = moments.rows.to(moments.square.dtype)
    scale = many.rsqrt() if form == "rows" else many.reciprocal()
    own = form != "rows" and not transformed() and not moments.square.requires_grad
    return moments.square.mul_(scale) if own else moments.square * scale


def _finished(A: Tensor, place: Place) -> Tensor:
    """Return an average with the constant factor of the weight, once for each group."""
    c, b = place.factor, place.block
    if c != 1:
        factors = A.new_full((A.shape[-1],), c)
        if place.biased:
            factors = torch.cat([factors[:-1], torch.ones_like(factors[:1])])
        A = A * (factors if b.input_form == "rows" else factors[:, None] * factors)
    if A.shape[0] not in (1, b.groups):
        A = A.repeat_interleave(b.groups // A.shape[0], 0)
    return A


def kfac(
    model: Any,
    likelihood: Any,
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
    """Estimate Kronecker-factored curvature, and the exact diagonal where there is no layer.

    Linear layers and convolutions (each group apart), products with a matrix, embeddings, and the
    projections of `nn.MultiheadAttention` (queries, keys and values apart) get a block G ⊗ A. A
    parameter that is used in several places, and every other one, gets its exact diagonal.

    Args:
        model: Function `(params, buffers, inputs) -> outputs`.
        likelihood: What turns outputs into a distribution, from `fisherfn.likelihoods`.
        fisher: Whose labels, as for `diagonal`; or "forward_only": nothing is pulled back, G is the
            identity, and so is the diagonal of parameters without a block.
        approx: What positions that share a weight are: "expand", observations of their own, or
            "reduce", parts of one, whose inputs are averaged and whose cotangents are added. The
            rows of an embedding are always observations.
        bias: "joint": an input that is always one, in the block of its weight; "separate": a block
            G of its own; "diagonal": its exact diagonal.
        partition: Into how many blocks that do not interact the outputs of a weight are cut, by its
            path: heads, for instance.
        joint: Tuples of paths of weights that share a block: layers that read the same input, such
            as queries, keys and values, or both halves of a gated layer. With the moment A of that
            input and the joint moment G of their cotangents, the block is that of one layer whose
            weights, and biases, are theirs, stacked in this order; it is called, for instance,
            "q.weight+k.weight". With `partition`, the first pieces of all form a block, and so on.
        num_samples: Draws of labels for each example.
        unit: What N counts: "example" or "position".
        widest: Factors of more rows are not formed, as for the outputs of a large vocabulary. Their
            rows are kept instead, and no matrix of that size ever exists.
        chunk_size: Examples processed together.

    Returns:
        An estimator: called with `(params, buffers, batch, *, key=None)` it gives a `KFAC`.

    Raises:
        OptionError: an option does not exist, or the combination makes no sense.

    Cost: that of `diagonal`, with products of the inputs and of the cotangents with themselves in
    place of those with each other; layers that share a block bring the products of all cotangents.

    Reference: Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored
    approximate curvature; Grosse & Martens (2016) for convolutions; Eschenhagen et al. (2023),
    Kronecker-factored approximate curvature for modern neural network architectures, section 3.

    Example:
        >>> import torch
        >>> import fisherfn as ff
        >>> model = lambda params, buffers, x: x @ params["w"].T
        >>> params = {"w": torch.zeros(2, 1, dtype=torch.float64)}
        >>> batch = ff.Batch(torch.tensor([[2.0]], dtype=torch.float64))
        >>> F = ff.kfac(model, ff.likelihoods.categorical())(params, {}, batch)
        >>> F.inputs["w"], F.outputs["w"]
        (tensor([[[4.]]], dtype=torch.float64), tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]], dtype=torch.float64))

        Two layers that read one input, in one block, with the terms between them:

        >>> gated = lambda params, buffers, x: (x @ params["gate"]) * (x @ params["up"])
        >>> params = {"gate": torch.ones(1, 1), "up": torch.ones(1, 1)}
        >>> fim = ff.kfac(gated, ff.likelihoods.gaussian(1.0), joint=[("gate", "up")])
        >>> F = fim(params, {}, ff.Batch(torch.tensor([[2.0]])))
        >>> F.inputs["gate+up"], F.outputs["gate+up"]
        (tensor([[[4.]]]), tensor([[[4., 4.],
                 [4., 4.]]]))
    """
    settings = Settings(
        fisher, approx, bias, partition, joint, num_samples, unit, widest, chunk_size
    )
    labels = settings.check("kfac", model, forward_only=True)
    lik = resolve("kfac", likelihood)

    def rebuild(found: Any, params: Any) -> KFAC:
        return KFAC.restored(found, Layout.of(params), approx, fisher=fisher, unit=unit)

    def make() -> Factors:
        return Factors("kfac", settings)

    return Estimator("kfac", model, lik, settings.options(), labels, make, rebuild)
