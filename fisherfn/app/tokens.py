"""From texts to padded batches of token ids, the longest samples first.

Samples are padded on the right up to the longest of their batch, and the attention mask, never the
identity of a token, says what is padding: an end-of-text token inside a sample counts like any
other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.core.errors import DataError, OptionError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Samples:
    """The token ids of every sample that predicts something.

    `ids[n]` is the place of sample n among the non-blank samples of the data: random labels are
    drawn from it, so that they depend neither on batching nor on what was skipped.
    """

    tokens: tuple[tuple[int, ...], ...]
    ids: tuple[int, ...]
    skipped: int = 0
    truncated: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(map(len, self.tokens))

    @property
    def predictions(self) -> int:
        """Tokens that are predicted: all but the first of each sample."""
        return sum(len(sample) - 1 for sample in self.tokens)

    def fingerprint(self) -> str:
        """Return a digest of the ids and the tokens."""
        digest = hashlib.sha256()
        for number, sample in zip(self.ids, self.tokens, strict=True):
            digest.update(f"{number}:{sample}\n".encode())
        return digest.hexdigest()


def tokenize(texts: Iterable[str], encode: Encode, num_samples: int, max_length: int) -> Samples:
    """Take the first `num_samples` texts that hold at least two tokens.

    Args:
        texts: Samples, none blank.
        encode: The tokenizer, special tokens included.
        num_samples: How many to take; fewer if there are fewer.
        max_length: Tokens kept of each.

    Returns:
        The samples.

    Raises:
        DataError: No text at all, or none with two tokens.
    """
    tokens: list[tuple[int, ...]] = []
    ids: list[int] = []
    skipped = truncated = 0
    for number, text in enumerate(texts):
        sample = encode(text)
        if len(sample) < 2:
            skipped += 1
            continue
        truncated += len(sample) > max_length
        tokens.append(tuple(sample[:max_length]))
        ids.append(number)
        if len(tokens) == num_samples:
            break
    if not tokens and not skipped:
        raise DataError("--data: expected at least one text, got none: the file is empty or blank.")
    if not tokens:
        raise DataError(
            f"--data: expected texts of two tokens or more, got {skipped} of one token or none, "
            "which predict nothing."
        )
    # The longest first: batches need little padding, and memory runs out at once or never.
    order = sorted(range(len(tokens)), key=lambda n: -len(tokens[n]))
    return Samples(
        tuple(tokens[n] for n in order), tuple(ids[n] for n in order), skipped, truncated
    )


def check_tokens(samples: Samples, vocabulary: int, context: int | None) -> None:
    """Refuse tokens that the model has no row for, and samples longer than it can read.

    Raises:
        DataError: A token id beyond the vocabulary: tokenizer and model do not belong together.
        OptionError: A sample longer than the model's context.
    """
    largest = max(max(sample) for sample in samples.tokens)
    if largest >= vocabulary:
        raise DataError(
            f"--model: the tokenizer gave token {largest}, the model's vocabulary ends at "
            f"{vocabulary - 1}. They do not belong together."
        )
    if context is not None and samples.longest > context:
        raise OptionError(
            f"--max-length: the model reads at most {context} tokens, got a sample of "
            f"{samples.longest}. Use --max-length {context}."
        )


def batch_tensors(
    samples: Samples, start: int, stop: int, pad: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids [B, T], attention mask [B, T] and ids [B] of the samples in a range."""
    chosen = samples.tokens[start:stop]
    width = max(map(len, chosen))
    tokens = torch.full((len(chosen), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(chosen), width, dtype=torch.int64)
    for row, sample in enumerate(chosen):
        tokens[row, : len(sample)] = torch.tensor(sample, dtype=torch.int64)
        mask[row, : len(sample)] = 1
    ids = torch.tensor(samples.ids[start:stop], dtype=torch.int64)
    return tokens.to(device), mask.to(device), ids.to(device)
