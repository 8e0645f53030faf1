"""Single models written in a test, and what the definition says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fisherfn as ff
import oracles
from cases.base import Built, Case, Net, Setup, normal, seeded
from fisherfn.testing import assert_close


def case(forward: Callable[..., Any], inputs: Any, **parts: Any) -> Setup:
    return Case("trap", lambda: Built(Net(forward, **parts).double(), inputs)).setup()


def part(build: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """Build a layer without moving torch's global generator."""
    with seeded(1):
        return build(*args, **options)


def two(width: int = 4) -> dict[str, nn.Module]:
    return {"a": part(nn.Linear, 4, width), "b": part(nn.Linear, width, 3)}


def x(size: int = 4) -> Tensor:
    return normal(size, 4, seed=30)


def diagonal(s: Setup, fisher: str = "empirical") -> Any:
    return ff.diagonal(s.model, s.likelihood, fisher=fisher)


def want(s: Setup, fisher: str = "empirical") -> dict[str, Tensor]:
    return oracles.unravel(oracles.diagonal(s.problem, fisher), s.problem.params)


def right_or_refused(
    run: Callable[[], Any], truth: dict[str, Tensor], reason: str = "expected"
) -> None:
    """A model that cannot be followed is an error; what never comes is another number."""
    try:
        got = run()
    except ff.FisherError as error:
        if reason not in str(error):
            raise
        return
    assert_close(got.values, truth)
