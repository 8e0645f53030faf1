"""The numbers of `fisherfn fim`: a Fisher diagonal, one batch after the other.

Every sample has its place in the data as id and all batches share one key, so a label drawn from
the model depends on neither batching nor on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fisherfn as ff
from fisherfn.app.errors import OutOfMemoryError, is_out_of_memory
from fisherfn.app.options import FimOptions
from fisherfn.app.tokens import Samples, batch_tensors
from fisherfn.core.errors import DataError
from fisherfn.curvature import Diagonal


@dataclass(frozen=True)
class Job:
    """All that a batch needs: the estimator, what it is applied to, and the samples."""

    estimator: Any
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    key: Tensor
    samples: Samples
    options: FimOptions
    pad: int
    device: torch.device

    @classmethod
    def of(
        cls,
        module: nn.Module,
        samples: Samples,
        options: FimOptions,
        pad: int,
        device: torch.device,
    ) -> Job:
        """Set up the estimator for a causal language model in evaluation mode."""
        model, params, buffers = ff.functional(module, select=options.select)
        estimator = ff.diagonal(
            model,
            ff.likelihoods.categorical(),
            fisher=options.fisher,
            num_samples=options.label_samples,
            unit=options.unit,
        )
        key = ff.random.key(options.seed, device=device)
        return cls(estimator, params, buffers, key, samples, options, pad, device)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.samples.tokens) // self.options.batch_size)

    def span(self, index: int) -> tuple[int, int]:
        """Return the first sample of a batch and the one after its last."""
        start = index * self.options.batch_size
        return start, min(start + self.options.batch_size, len(self.samples.tokens))

    def work(self, index: int) -> tuple[int, int]:
        """Return the samples and the predicted tokens of a batch."""
        chosen = self.samples.tokens[slice(*self.span(index))]
        return len(chosen), sum(len(sample) - 1 for sample in chosen)

    def compute(self, index: int) -> Diagonal:
        """Return the Fisher diagonal of one batch.

        Raises:
            OutOfMemoryError: Naming the options to lower.
            DataError: The result is not finite.
        """
        start, stop = self.span(index)
        try:
            tokens, mask, ids = batch_tensors(self.samples, start, stop, self.pad, self.device)
            batch = replace(ff.causal_batch(tokens, mask), ids=ids)
            result = self.estimator(self.params, self.buffers, batch, key=self.key)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(index) from error
        self._check_finite(result.values, index)
        return result

    def add(self, total: Diagonal | None, new: Diagonal, index: int) -> Diagonal:
        """Return the diagonal of all samples so far."""
        try:
            return new if total is None else ff.merge(total, new)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(index) from error

    def _out_of_memory(self, index: int) -> OutOfMemoryError:
        options, samples = self.options, self.samples.tokens[slice(*self.span(index))]
        narrower = ", or use --dtype bfloat16" if options.dtype == "float32" else ""
        return OutOfMemoryError(
            f"out of memory on {self.device} in batch {index + 1} of {self.batches} "
            f"({len(samples)} samples of up to {max(map(len, samples))} tokens). Lower "
            f"--batch-size (now {options.batch_size}) or --max-length (now "
            f"{options.max_length}){narrower}."
        )

    def _check_finite(self, values: Mapping[str, Tensor], index: int) -> None:
        sums = torch.stack([value.sum(dtype=torch.float64) for value in values.values()])
        bad = torch.nonzero(~torch.isfinite(sums)).flatten().tolist()
        if not bad:
            return
        name = list(values)[bad[0]]
        cure = (
            "Use --dtype float32 or bfloat16."
            if self.options.dtype == "float16"
            else ("The model's outputs or weights are not finite on these samples.")
        )
        raise DataError(
            f"the Fisher is not finite in batch {index + 1} of {self.batches}, at {name} and "
            f"{len(bad) - 1} more of {len(values)} tensors. {cure}"
        )


def to_tensors(total: Diagonal) -> dict[str, Tensor]:
    """Return a diagonal as flat named tensors, for a checkpoint."""
    tensors = {f"values/{name}": value for name, value in total.values.items()}
    if total.stderr is not None:
        tensors |= {f"stderr/{name}": value for name, value in total.stderr.items()}
    return tensors | {"count": total.count}


def from_tensors(
    tensors: Mapping[str, Tensor], options: FimOptions, device: torch.device
) -> Diagonal:
    """Undo `to_tensors`, to the bit."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value.to(device)
            for name, value in tensors.items()
            if name.startswith(prefix)
        }

    return Diagonal(
        part("values/"),
        tensors["count"].to(device),
        part("stderr/") or None,
        fisher=options.fisher,
        unit=options.unit,
    )
