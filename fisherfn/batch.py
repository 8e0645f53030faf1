"""The data of one step: inputs, targets, and what counts of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import trees
from fisherfn.core.errors import DataError, ShapeError


@dataclass(frozen=True)
class Batch:
    """Examples of one batch, with what counts, how often, and under which names.

    A pytree of torch and of optree. Every tensor in it has the examples as leading axis, size B.

    Attributes:
        inputs: What the model is called with: a tensor, a tuple (positional arguments) or a mapping
            (keyword arguments); every tensor in it is `[B, ...]`.
        targets: Observed labels, in the form the likelihood asks for; only `fisher="empirical"`,
            the scores and the loss look at them.
        mask: bool, broadcastable to the shape of `log_prob`, `[B, *positions]`: what counts. What
            is masked contributes nothing, is not counted, and its targets are not looked at.
        weights: float >= 0, `[B]` (`[B, *positions]` for `unit="position"`): multiplicities. Weight
            2 is the unit twice.
        ids: int64 `[B]`, names of the examples, `arange(B)` by default. Random labels are drawn
            from (key, id, position, sample), so they do not depend on the order or the split of a
            batch.
        positions: bool like `mask`: which positions exist in the computation (padding does not, a
            prompt does). Default: the mask.

    Example:
        >>> batch = Batch(torch.zeros(2, 3), targets=torch.tensor([0, 1]))
        >>> batch.ids is None
        True
    """

    inputs: Any
    targets: Any = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    ids: Tensor | None = None
    positions: Tensor | None = None

    @staticmethod
    def ignore(targets: Tensor, value: int | float) -> Tensor:
        """Return the mask that leaves out every target equal to `value`.

        Args:
            targets: Labels `[B, *positions]`.
            value: The label that stands for "no label", such as -100.

        Returns:
            bool tensor of the shape of `targets`, False where the target is `value`.

        Raises:
            ShapeError: `targets` is not a tensor.

        Example:
            >>> Batch.ignore(torch.tensor([[5, -100]]), -100)
            tensor([[ True, False]])
        """
        if not isinstance(targets, Tensor):
            raise ShapeError(
                f"Batch.ignore: expected targets to be a tensor, got {type(targets).__name__}. "
                "Convert them with torch.as_tensor."
            )
        return targets != value


trees.register_dataclass_node(
    Batch, ("inputs", "targets", "mask", "weights", "ids", "positions"), ()
)


def causal_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    ids: Tensor | None = None,
) -> Batch:
    """Return the batch of next-token prediction, with the shift done once, in the data.

    `targets[:, t] = input_ids[:, t + 1]`; the last position of each row, and every position whose
    next token is padding, is masked. The likelihood stays `likelihoods.categorical()`, so a label
    that is drawn from the model is scored at the very position that predicts it.

    Args:
        input_ids: int64 `[B, T]`, token ids, T >= 2.
        attention_mask: `[B, T]`, nonzero where a token is real; padding may be on either side. The
            model gets it as the keyword `attention_mask`.
        weights: float `[B]`, multiplicities of the rows.
        ids: int64 `[B]`, names of the rows.

    Returns:
        A `Batch` with `targets` and `mask` of shape `[B, T]`. Without a mask the inputs are the
        tensor itself (first positional argument of the model); with one, a mapping of keywords.

    Raises:
        ShapeError: `input_ids` is not an integer matrix, or the mask has another shape.
        DataError: rows have fewer than two tokens, so that nothing is predicted.

    Example:
        >>> batch = causal_batch(torch.tensor([[5, 6, 7]]))
        >>> batch.targets[:, :2], batch.mask
        (tensor([[6, 7]]), tensor([[ True,  True, False]]))
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        got = (
            f"{tuple(input_ids.shape)} {input_ids.dtype}"
            if isinstance(input_ids, Tensor)
            else type(input_ids).__name__
        )
        raise ShapeError(
            f"causal_batch: expected input_ids to be an integer tensor [B, T], got {got}. "
            "Pad ragged rows and pass attention_mask."
        )
    if input_ids.shape[1] < 2:
        raise DataError(
            f"causal_batch: expected rows of at least 2 tokens, got T = {input_ids.shape[1]}. "
            "A single token predicts nothing; drop such rows."
        )
    targets = torch.cat([input_ids[:, 1:], torch.zeros_like(input_ids[:, :1])], dim=1)
    last = torch.zeros_like(input_ids[:, :1], dtype=torch.bool)
    if attention_mask is None:
        mask = torch.cat([torch.ones_like(input_ids[:, 1:], dtype=torch.bool), last], dim=1)
        return Batch(input_ids, targets, mask, weights, ids)
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(
            f"causal_batch: expected attention_mask like input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}. Pass the tokenizer's own mask."
        )
    real = attention_mask != 0
    mask = torch.cat([real[:, :-1] & real[:, 1:], last], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    positions = real
    return Batch(inputs, targets, mask, weights, ids, positions)
