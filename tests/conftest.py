"""Settings shared by all tests: no test may move a global random state, and Hypothesis behaves."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first example of a test pays for imports and compilation
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "repeatable", hypothesis.settings.get_profile("default"), derandomize=True, print_blob=True
)
# the same examples at each run, on each machine; "default" looks for others
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Tests are made of small float64 operations, for which threads only add noise.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _global_rng() -> dict[str, object]:
    state: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state(legacy=True)),  # noqa: NPY002  the global state is the point
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        state["torch.cuda"] = [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
    return state


@pytest.fixture(autouse=True)
def global_rng_untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which a global random state is not what it was.

    A test that needs random weights builds them inside `torch.random.fork_rng(devices=[])`, or is
    marked `moves_global_rng`.
    """
    if request.node.get_closest_marker("moves_global_rng"):
        yield
        return
    before = _global_rng()
    yield
    after = _global_rng()
    moved = [name for name in before if before[name] != after[name]]
    if moved:
        pytest.fail(
            f"the global random state of {', '.join(moved)} moved. The library never draws from "
            "it; if the test itself does, wrap that in torch.random.fork_rng(devices=[])."
        )


@pytest.fixture
def fast_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Send every product that may go to the faster library there, of any size and in float64 too.

    In its place stands the definition, which also asserts what that library asks of its operands.
    Gives the sizes of the products that were made.
    """
    from fisherfn.core import matmul
    from fisherfn.layers import outer, symmetric

    made: list[tuple[int, ...]] = []

    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        assert x.stride(1) == 1 or x.shape[1] == 1, "rows of the left factor have gaps"
        assert w.is_contiguous() or w.T.is_contiguous(), "the right factor has gaps"
        assert x.dim() == w.dim() == 2
        made.append((x.shape[0], x.shape[1], w.shape[0]))
        return x @ w.T

    monkeypatch.setattr(matmul, "dense_product", lambda: multiply)
    monkeypatch.setattr(matmul, "_MULTIPLICATIONS", 0)
    monkeypatch.setattr(matmul, "_NARROW", 1)
    monkeypatch.setattr(matmul, "_DTYPES", (torch.float32, torch.float64))
    monkeypatch.setattr(outer, "_QUICK", 0)
    monkeypatch.setattr(symmetric, "_BAND", 2)
    return made
