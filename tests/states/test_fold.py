"""Folding with transforms: resuming, stopping, and batches that are not finite."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from states.test_ema import close, folded

from fisherfn import io
from fisherfn.batch import Batch
from fisherfn.core import random, trees
from fisherfn.core.errors import DataError, OptionError
from fisherfn.core.merging import merge
from fisherfn.curvature import Diagonal
from fisherfn.states import (
    AccumulateState,
    EveryPair,
    Transform,
    accumulate,
    ema,
    every,
    stderr,
    welford,
    window,
)
from fisherfn.states.finite import first_bad_leaf

ROOT = Path(__file__).resolve().parents[2]
PARAMS = {"w": torch.zeros(3, dtype=torch.float64)}
KEY = random.key(11)
TRANSFORMS = {
    "none": None,
    "ema": ema(0.9),
    "welford": welford(),
    "window": window(2),
    "every": every(2, ema(0.5), otherwise=welford()),
}


def squares(kind: str = "mc") -> Any:
    def estimator(params: Any, buffers: Any, batch: Batch, *, key: Any = None) -> Diagonal:
        assert batch.ids is not None
        noise = random.normal(random.fold_in(KEY if key is None else key, batch.ids), (3,))
        scores = batch.inputs * noise.double()
        n = torch.tensor(len(scores), dtype=torch.float64)
        return Diagonal({"w": scores.square().mean(0)}, n, fisher=kind)

    return estimator


def data(n: int, seed: int = 0) -> torch.Tensor:
    return random.normal(random.key(seed), (n, 3), torch.float64)


def batches(sizes: list[int]) -> list[Batch]:
    return [Batch(part) for part in data(sum(sizes)).split(sizes)]


def identical(a: Any, b: Any) -> None:
    assert trees.structure(a) == trees.structure(b)
    assert all(
        torch.equal(x, y) or (x.isnan() == y.isnan()).all()
        for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True)
    )


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_resumed_from_a_file_is_uninterrupted_to_the_last_bit(
    tmp_path: Path, transform: Transform | None
) -> None:
    every_batch = batches([2, 3, 1, 4])
    want, end = accumulate(squares(), PARAMS, {}, every_batch, transform=transform)
    for stop in (1, 3):
        _, state = accumulate(squares(), PARAMS, {}, every_batch[:stop], transform=transform)
        io.save(tmp_path / "state", state)
        result, again = accumulate(
            squares(),
            PARAMS,
            {},
            every_batch[stop:],
            transform=transform,
            state=io.load(tmp_path / "state"),
        )
        identical((result, again), (want, end))
    assert (end.batches, end.examples, end.units) == (4, 10, 10)


@pytest.mark.parametrize("name", ["ema", "welford", "window"])
def test_a_transform_sees_every_result(name: str) -> None:
    transform, sizes = TRANSFORMS[name], [2, 3, 1]
    assert transform is not None
    members, seen = [], 0
    for batch in batches(sizes):
        ids = torch.arange(len(batch.inputs)) + seen
        members.append(squares()(PARAMS, {}, Batch(batch.inputs, ids=ids)))
        seen += len(ids)
    want, _ = folded(transform, members)
    got, state = accumulate(squares(), PARAMS, {}, batches(sizes), state=transform)
    close(got, want, 0.0)
    close(transform.read(state.result), want, 0.0)


def test_welford_has_the_plain_result_as_its_mean() -> None:
    plain, _ = accumulate(squares(), PARAMS, {}, batches([2, 3, 1]))
    mean, _ = accumulate(squares(), PARAMS, {}, batches([2, 3, 1]), transform=welford())
    close(mean, plain)


def test_a_pair_of_estimators_takes_turns() -> None:
    calls: list[str] = []

    def counting(kind: str) -> Any:
        def estimator(*args: Any, key: Any = None) -> Diagonal:
            calls.append(kind)
            return squares(kind)(*args, key=key)

        return estimator

    lever = every(3, ema(0.5), otherwise=ema(0.5))
    pair = (counting("mc"), counting("empirical"))
    result, state = accumulate(pair, PARAMS, {}, batches([2] * 7), transform=lever)
    # the cheap one is called once more, to learn what its results look like
    assert calls == [
        "mc",
        "empirical",
        "empirical",
        "empirical",
        "mc",
        "empirical",
        "empirical",
        "mc",
    ]
    assert isinstance(result, EveryPair)
    assert (result.every.fisher, result.otherwise.fisher) == ("mc", "empirical")
    half, first = accumulate(pair, PARAMS, {}, batches([2] * 7)[:2], transform=lever)
    again, _ = accumulate(pair, PARAMS, {}, batches([2] * 7)[2:], transform=lever, state=first)
    identical(again, result)
    for transform in (None, ema(0.5)):
        with pytest.raises(OptionError, match=r"accumulate: expected one estimator, got a pair"):
            accumulate(pair, PARAMS, {}, batches([2]), transform=transform)
    del half, state


def test_units_are_a_limit() -> None:
    taken: list[int] = []

    def stream() -> Iterator[Batch]:
        for i, batch in enumerate(batches([2, 3, 4, 5])):
            taken.append(i)
            yield batch

    result, state = accumulate(squares(), PARAMS, {}, stream(), max_units=5)
    assert (state.units, result.count, taken) == (5, 5, [0, 1])
    again, after = accumulate(squares(), PARAMS, {}, stream(), max_units=5, state=state)
    assert again is result
    assert (after.batches, taken) == (2, [0, 1])  # nothing more is taken from the stream


def test_it_stops_when_the_standard_error_is_small_enough() -> None:
    calls: list[float] = []

    def watch(state: AccumulateState) -> None:
        moments = state.result
        if moments.updates > 1:
            error = trees.norm(stderr(moments)) / trees.norm(moments.mean.values)
            calls.append(float(error))

    sizes = [8] * 200
    _, state = accumulate(squares(), PARAMS, {}, batches(sizes), target_stderr=0.1, on_update=watch)
    assert 8 <= state.batches < 200
    assert calls[-1] <= 0.1
    assert all(error > 0.1 for error in calls[6:-1])
    resumed, after = accumulate(squares(), PARAMS, {}, batches([8]), target_stderr=0.1, state=state)
    assert after is state  # good enough already
    del resumed


def broken(where: int, value: float = float("nan")) -> list[Batch]:
    found = batches([2, 3, 1, 4])
    inputs = found[where].inputs.clone()
    inputs[0, 1] = value
    found[where] = Batch(inputs)
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("transform", [None, welford()])
def test_a_batch_that_is_not_finite_is_named(value: float, transform: Any) -> None:
    message = (
        r"accumulate: expected finite results, got values/w \(1 of 3 entries, the first is "
        r"(nan|inf)\) in batch number 2 \(ids 5\)\. .*on_nonfinite='skip'; clipping"
    )
    seen: list[AccumulateState] = []
    with pytest.raises(DataError, match=message):
        accumulate(
            squares(), PARAMS, {}, broken(2, value), transform=transform, on_update=seen.append
        )
    assert seen[-1].batches == 2  # what was finished is safe


def test_a_batch_that_is_not_finite_is_skipped_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for where in (0, 2, 3):
        with caplog.at_level(logging.WARNING, logger="fisherfn"):
            result, state = accumulate(squares(), PARAMS, {}, broken(where), on_nonfinite="skip")
        assert f"in batch number {where} (ids" in caplog.text
        parts, seen = [], 0
        for i, batch in enumerate(batches([2, 3, 1, 4])):
            ids = torch.arange(len(batch.inputs)) + seen
            seen += len(ids)  # the numbers of a skipped batch are not used again
            if i != where:
                parts.append(squares()(PARAMS, {}, Batch(batch.inputs, ids=ids)))
        want = merge(merge(parts[0], parts[1]), parts[2])
        close(result, want, 0.0)
        assert (state.skipped, state.batches, state.examples) == (1, 4, 10)
        assert state.units == want.count


def test_if_all_are_skipped_there_is_no_result(tmp_path: Path) -> None:
    bad = [Batch(torch.full((2, 3), torch.nan).double())]
    states: list[AccumulateState] = []
    with pytest.raises(DataError, match="with a finite result, got 1: 1 were all skipped"):
        accumulate(squares(), PARAMS, {}, bad, on_nonfinite="skip", on_update=states.append)
    io.save(tmp_path / "state", states[0])
    result, state = accumulate(
        squares(), PARAMS, {}, batches([2]), state=io.load(tmp_path / "state")
    )
    assert (state.batches, state.skipped) == (2, 1)
    joined = merge(states[0], state)
    close(joined.result, result, 0.0)
    assert joined.skipped == 2
    close(merge(state, states[0]).result, result, 0.0)


def test_nobody_looks_unless_asked() -> None:
    result, state = accumulate(squares(), PARAMS, {}, broken(1), on_nonfinite=None)
    assert result.values["w"].isnan().any()
    assert state.skipped == 0


def test_a_sum_that_overflows_is_no_reason_to_complain() -> None:
    large = torch.full((1000,), 1e38)
    assert not large.sum().isfinite()
    assert first_bad_leaf({"a": large, "b": torch.tensor([1])}) is None
    assert first_bad_leaf(torch.tensor(float("-inf"))) == (
        "the root (1 of 1 entries, the first is -inf)"
    )
    assert first_bad_leaf({}) is None


@pytest.mark.parametrize("first", TRANSFORMS)
@pytest.mark.parametrize("second", TRANSFORMS)
def test_states_of_another_transform_are_refused(first: str, second: str) -> None:
    _, state = accumulate(squares(), PARAMS, {}, batches([2]), transform=TRANSFORMS[first])
    if first == second:
        return
    with pytest.raises(OptionError, match=r"accumulate: expected a state folded with the same tr"):
        accumulate(squares(), PARAMS, {}, batches([2]), transform=TRANSFORMS[second], state=state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_units": 0}, "expected max_units to be a positive number, got 0"),
        ({"max_units": "3"}, "expected max_units to be a positive number, got '3'"),
        ({"target_stderr": -1.0}, r"expected target_stderr to be a positive number, got -1\.0"),
        (
            {"target_stderr": 0.1, "transform": ema(0.5)},
            r"expected transform=states.welford\(\) with target",
        ),
        ({"on_nonfinite": "clip"}, "expected on_nonfinite to be one of .* got 'clip'"),
        ({"transform": 3}, "expected transform to be one of ff.states, got int"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match="accumulate: " + message):
        accumulate(squares(), PARAMS, {}, batches([2]), **options)


KILLED = """
import sys, time
sys.path[:0] = ["tests"]
from states.test_fold import *
def slow(*args, key=None):
    time.sleep(0.05)
    return squares()(*args, key=key)
def save(state):
    io.save(sys.argv[1], state)
    print(int(state.batches), flush=True)
accumulate(slow, PARAMS, {}, batches([2] * 100), transform=welford(), on_update=save)
"""


def test_a_killed_fold_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        while "7" not in process.stdout.readline():
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    state = io.load(path)
    done = int(state.batches)
    assert 7 <= done < 100
    result, end = accumulate(
        squares(), PARAMS, {}, batches([2] * 100)[done:], transform=welford(), state=state
    )
    want = accumulate(squares(), PARAMS, {}, batches([2] * 100), transform=welford())
    identical((result, end), want)
