"""Options are checked before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fisherfn as ff
from fisherfn.app.options import FimOptions, resolve_device


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, r"--num-samples: expected at least 1, got 0"),
        ({"label_samples": 0}, r"--label-samples: expected at least 1, got 0"),
        ({"batch_size": -1}, r"--batch-size: expected at least 1, got -1"),
        ({"granularity": 0}, r"--granularity: expected at least 1, got 0"),
        ({"max_length": 1}, r"--max-length: expected at least 2 tokens, got 1"),
        ({"top": -1}, r"--top: expected at least 0, got -1"),
        ({"save_every": float("nan")}, r"--save-every: expected at least 0, got nan"),
        ({"seed": 2**64}, r"--seed: expected an integer of 64 bits"),
        ({"fisher": "true"}, r"--fisher: expected one of mc, exact, .*, got 'true'"),
        ({"unit": "token"}, r"--unit: expected one of example, position, got 'token'"),
        ({"dtype": "float64"}, r"--dtype: expected one of float32, .*, got 'float64'"),
        ({"format": "csv"}, r"--format: expected one of safetensors, pt, got 'csv'"),
        ({"select": "("}, r"--select: expected a regular expression, got '\('"),
        (
            {"fisher": "empirical", "label_samples": 3},
            r"--label-samples: 3 draws make sense for --fisher mc",
        ),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ff.OptionError, match=message):
        FimOptions(**options)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "meta"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(ff.OptionError, match=r"--device: "):
        resolve_device(name)
