"""What the user asked for: the options of `fisherfn fim`, checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from fisherfn.app.errors import OutOfMemoryError, is_out_of_memory
from fisherfn.core.errors import OptionError

Fisher = Literal["mc", "exact", "empirical", "curvature_prop"]
Unit = Literal["example", "position"]
DType = Literal["float32", "bfloat16", "float16"]
Format = Literal["safetensors", "pt"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FimOptions:
    """The options of one run, under their public names.

    `model` and `data` are None for the packaged model and for the standard library's source.
    `csv` is where a copy of `fisher.csv` goes besides the output directory.
    """

    model: str | None = None
    data: Path | None = None
    fisher: Fisher = "mc"
    unit: Unit = "example"
    num_samples: int = 20
    label_samples: int = 1
    batch_size: int = 2
    max_length: int = 256
    device: str = "auto"
    dtype: DType = "float32"
    output: Path = Path("fisher_results")
    granularity: int = 1
    select: str | None = None
    seed: int = 0
    top: int = 20
    resume: bool = False
    save_every: float = 60.0
    format: Format = "safetensors"
    csv: Path | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("num_samples", "label_samples", "batch_size", "granularity"):
            _at_least(name, getattr(self, name), 1)
        for name in ("top", "save_every"):
            _at_least(name, getattr(self, name), 0)
        if not -(2**63) <= self.seed < 2**63:
            raise OptionError(f"--seed: expected an integer of 64 bits, got {self.seed}.")
        if self.max_length < 2:
            raise OptionError(
                f"--max-length: expected at least 2 tokens, got {self.max_length}: one token "
                "predicts nothing."
            )
        for name, kinds in (
            ("fisher", Fisher),
            ("unit", Unit),
            ("dtype", DType),
            ("format", Format),
        ):
            _one_of(name, getattr(self, name), get_args(kinds))
        if self.label_samples > 1 and self.fisher not in ("mc", "curvature_prop"):
            raise OptionError(
                f"--label-samples: {self.label_samples} draws make sense for --fisher mc and "
                f"curvature_prop, got --fisher {self.fisher}. Leave it out."
            )
        if self.select is not None:
            check_pattern(self.select)


def check_pattern(pattern: str) -> None:
    """Refuse a `--select` that is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"--select: expected a regular expression, got {pattern!r}: {error}."
        ) from error


def resolve_device(name: str) -> torch.device:
    """Return the device of that name, after a try to put a tensor on it.

    Args:
        name: `auto` (CUDA if there is one, else the CPU) or what torch calls a device.

    Returns:
        The device, with its index where it has one.

    Raises:
        OptionError: No such device here.
        OutOfMemoryError: It has no memory left for one number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise OptionError("--device: meta holds no values. Take cpu or cuda.")
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"--device: no memory is left on {name}, other programs hold it. Wait for them, or "
                "use another --device."
            ) from error
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise OptionError(
            f"--device: no device {name!r} here. This machine has: {', '.join(have)}."
        ) from error


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:  # also catches NaN
        flag = name.replace("_", "-")
        raise OptionError(f"--{flag}: expected at least {least}, got {value}.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"--{name}: expected one of {', '.join(allowed)}, got {value!r}.")
