"""The options of Kronecker estimators, listed once, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fisherfn.core.errors import OptionError
from fisherfn.core.options import check_count, is_count
from fisherfn.estimators import checks
from fisherfn.estimators.observe import FORWARD_ONLY, Labels

APPROXES = ("expand", "reduce")
BIASES = ("joint", "separate", "diagonal")


@dataclass(frozen=True)
class Settings:
    """The keyword options of `kfac` and `ekfac`, in their order, as they were given."""

    fisher: str
    approx: str
    bias: str
    partition: Mapping[str, int] | None
    joint: Sequence[Sequence[str]]
    num_samples: int
    unit: str
    widest: int
    chunk_size: int | None

    def __post_init__(self) -> None:
        """Keep copies, which nobody else can change."""
        if isinstance(self.partition, Mapping):
            object.__setattr__(self, "partition", dict(self.partition))
        if isinstance(self.joint, list | tuple):
            groups = [tuple(x) if isinstance(x, list) else x for x in self.joint]
            object.__setattr__(self, "joint", tuple(groups))

    @property
    def reduce(self) -> bool:
        """Whether rows of an example are put together first."""
        return self.approx == "reduce"

    @property
    def forward_only(self) -> bool:
        """Whether nothing is pulled back."""
        return self.fisher == FORWARD_ONLY

    def parts(self, path: str, default: int) -> int:
        """Return into how many blocks the outputs of a weight are to be cut."""
        return (self.partition or {}).get(path, default)

    def options(self) -> dict[str, Any]:
        """Return the options by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def check(self, caller: str, model: Any, *, forward_only: bool) -> Labels:
        """Return the labels that the options ask for, or raise `OptionError`."""
        asked = "empirical" if forward_only and self.forward_only else self.fisher
        labels = checks.check_options(
            caller, model, asked, self.num_samples, self.unit, self.chunk_size
        )
        for name, allowed in (("approx", APPROXES), ("bias", BIASES)):
            got = getattr(self, name)
            if got not in allowed:
                raise OptionError(
                    f"{caller}: expected {name}= to be one of {', '.join(map(repr, allowed))}, got "
                    f"{got!r}. See the documentation of {caller} for what they mean."
                )
        advice = "It is the size of the largest factor that is kept as a matrix."
        check_count(caller, "widest", self.widest, 1, advice)
        _check_partition(caller, self.partition)
        _check_joint(caller, self.joint)
        return Labels(FORWARD_ONLY, 1, self.unit) if asked != self.fisher else labels


def _check_partition(caller: str, given: Any) -> None:
    if given is None:
        return
    pairs: list[Any] = list(given.items()) if isinstance(given, Mapping) else [(None, given)]
    for path, many in pairs:
        if not (isinstance(path, str) and is_count(many)):
            raise OptionError(
                f"{caller}: expected partition= to be a dict from paths of weights to numbers of "
                f"blocks, got {given!r}. For four heads: {{'attn.q.weight': 4}}."
            )


def _check_joint(caller: str, given: Any) -> None:
    fine = isinstance(given, list | tuple) and all(
        isinstance(group, list | tuple) and group and all(isinstance(p, str) for p in group)
        for group in given
    )
    if not fine:
        raise OptionError(
            f"{caller}: expected joint= to be a list of tuples of paths of weights, got {given!r}. "
            "For one block of queries and keys: [('attn.q.weight', 'attn.k.weight')]."
        )
    seen = set()
    for path in [path for group in given for path in group]:
        if path in seen:
            raise OptionError(
                f"{caller}: expected joint= to name each weight once, got {path!r} twice. A weight "
                "is part of one block."
            )
        seen.add(path)
