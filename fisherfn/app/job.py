"""The numbers of `fisherfn fim`: what is estimated, and on which batches.

Every sample has its place in the data as id and all batches share one key, so a label drawn from
the model depends on neither batching nor on where a run was interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fisherfn as ff
from fisherfn.app.errors import OutOfMemoryError
from fisherfn.app.options import FimOptions
from fisherfn.app.processes import Processes
from fisherfn.app.tokens import Samples, batch_tensors

PLAN_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """An estimator, what it is applied to, and the samples in batches."""

    model: Any
    estimator: Any
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    key: Tensor
    samples: Samples
    options: FimOptions
    pad: int
    device: torch.device
    team: Processes = field(default_factory=Processes)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        samples: Samples,
        options: FimOptions,
        pad: int,
        device: torch.device,
        team: Processes | None = None,
    ) -> Job:
        """Set up the estimator for a causal language model in evaluation mode.

        Returns:
            The job.

        Raises:
            OptionError: No parameter is selected.
        """
        names = [name for name, _ in module.named_parameters()]
        if options.select is not None and not any(re.search(options.select, n) for n in names):
            raise ff.OptionError(
                f"--select: expected an expression that some parameter's name contains, got "
                f"{options.select!r}. There are {len(names)}, such as {', '.join(names[:3])}."
            )
        model, params, buffers = ff.functional(module, select=options.select)
        estimator = ff.diagonal(
            model,
            ff.likelihoods.categorical(),
            fisher=options.fisher,
            num_samples=options.label_samples,
            unit=options.unit,
        )
        key = ff.random.key(options.seed, device=device)
        team = team or Processes()
        return cls(model, estimator, params, buffers, key, samples, options, pad, device, team)

    @property
    def batches(self) -> int:
        """Number of batches of this process."""
        return len(self.team.own(-(-len(self.samples.tokens) // self.options.batch_size)))

    def size(self, index: int) -> tuple[int, int]:
        """Return the samples and the predicted tokens of a batch."""
        chosen = self.samples.tokens[slice(*self._span(index))]
        return len(chosen), sum(len(sample) - 1 for sample in chosen)

    def batch(self, index: int) -> ff.Batch:
        """Return the batch of that number."""
        tensors = batch_tensors(self.samples, *self._span(index), self.pad, self.device)
        tokens, mask, ids = tensors
        return ff.causal_batch(tokens, mask, ids=ids)

    def batches_from(self, index: int) -> Iterator[ff.Batch]:
        """Make the batches from that number on, one at a time."""
        return (self.batch(number) for number in range(index, self.batches))

    def prepare(self) -> None:
        """Let the library find out, and check, how the model uses its parameters.

        It does so once, in the first call, and what it finds does not depend on sizes: a few tokens
        do, at a fraction of the price of a batch.
        """
        tokens, mask, _ = batch_tensors(self.samples, 0, 2, self.pad, self.device)
        batch = ff.causal_batch(tokens[:, :PLAN_TOKENS], mask[:, :PLAN_TOKENS])
        ff.score_norms(self.model, ff.likelihoods.categorical())(self.params, self.buffers, batch)

    def estimate(self, params: Any, buffers: Any, batch: ff.Batch, *, key: Any) -> ff.Diagonal:
        """Return the Fisher diagonal of a batch.

        Raises:
            DataError: It is not finite.
        """
        result: ff.Diagonal = self.estimator(params, buffers, batch, key=key)
        sums = torch.stack([value.sum(dtype=torch.float64) for value in result.values.values()])
        bad = torch.nonzero(~torch.isfinite(sums)).flatten().tolist()
        if bad:
            cure = (
                "Use --dtype float32 or bfloat16."
                if self.options.dtype == "float16"
                else "The model's outputs or weights are not finite on these samples."
            )
            raise ff.DataError(
                f"the Fisher is not finite at {list(result.values)[bad[0]]} and {len(bad) - 1} "
                f"more of {len(sums)} tensors, on the samples {_listed(batch.ids)}. {cure}"
            )
        return result

    def out_of_memory(self, index: int) -> OutOfMemoryError:
        """Return the error to raise when a batch does not fit."""
        options, samples = self.options, self.samples.tokens[slice(*self._span(index))]
        narrower = ", or use --dtype bfloat16" if options.dtype == "float32" else ""
        return OutOfMemoryError(
            f"out of memory on {self.device} in batch {index + 1} of {self.batches} "
            f"({len(samples)} samples of up to {max(map(len, samples))} tokens). Lower "
            f"--batch-size (now {options.batch_size}) or --max-length (now {options.max_length})"
            f"{narrower}."
        )

    def _span(self, index: int) -> tuple[int, int]:
        """Return the first sample of a batch and the one after its last."""
        start = (self.team.rank + index * self.team.world) * self.options.batch_size
        return start, min(start + self.options.batch_size, len(self.samples.tokens))


def _listed(ids: Tensor | None) -> str:
    """Return the samples' places in the data, counted from 1."""
    return "" if ids is None else ", ".join(str(number + 1) for number in ids.tolist())
