"""From texts to padded batches."""

from __future__ import annotations

import pytest
import torch

import fisherfn as ff
from fisherfn.app.tokens import Samples, batch_tensors, check_tokens, tokenize

CPU = torch.device("cpu")


def encode(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_first_usable_samples_longest_first_with_their_place_as_id() -> None:
    samples = tokenize(["a bb", "alone", "a bb ccc dddd", "x", "aa b c", "never"], encode, 3, 3)
    assert samples.tokens == ((1, 2, 3), (2, 1, 1), (1, 2))
    assert samples.ids == (2, 4, 0)
    assert (samples.skipped, samples.truncated) == (2, 1)
    assert (samples.longest, samples.predictions) == (3, 5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], r"expected at least one text, got none"), (["a", "b"], r"got 2 of one token or none")],
)
def test_nothing_to_predict(texts: list[str], message: str) -> None:
    with pytest.raises(ff.DataError, match=message):
        tokenize(texts, encode, 5, 8)


def test_batches_are_padded_by_the_mask_and_not_by_the_token() -> None:
    samples = Samples(((7, 9, 9), (9, 7)), (4, 1))  # 9 is the padding token, and a real one too
    tokens, mask, ids = batch_tensors(samples, 0, 2, 9, CPU)
    assert tokens.tolist() == [[7, 9, 9], [9, 7, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert ids.tolist() == [4, 1]


def test_tokens_must_fit_the_model() -> None:
    samples = Samples(((7, 9, 9),), (0,))
    check_tokens(samples, vocabulary=10, context=3)
    check_tokens(samples, vocabulary=10, context=None)
    with pytest.raises(ff.DataError, match=r"gave token 9, the model's vocabulary ends at 8"):
        check_tokens(samples, vocabulary=9, context=None)
    with pytest.raises(
        ff.OptionError, match=r"at most 2 tokens, got a sample of 3.*--max-length 2"
    ):
        check_tokens(samples, vocabulary=10, context=2)


def test_fingerprint_sees_tokens_and_ids() -> None:
    prints = {
        Samples(tokens, ids).fingerprint()
        for tokens, ids in (
            (((1, 2), (3, 4)), (0, 1)),
            (((1, 2), (3, 5)), (0, 1)),
            (((1, 2), (3, 4)), (0, 2)),
            (((1, 2, 3), (4,)), (0, 1)),
        )
    }
    assert len(prints) == 4
