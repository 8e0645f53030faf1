"""Folding an estimator over batches: equal to one batch, resumable, and clear about bad input."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisherfn import io
from fisherfn.batch import Batch
from fisherfn.core import random, trees
from fisherfn.core.errors import DataError, FisherError, OptionError, UnsupportedError
from fisherfn.core.merging import empty_like, merge
from fisherfn.curvature import Dense, Diagonal, Layout
from fisherfn.estimators.diagonal import diagonal
from fisherfn.likelihoods import categorical
from fisherfn.states import AccumulateState, accumulate

PARAMS = {"w": torch.zeros(3, dtype=torch.float64)}
KEY = random.key(11)


def noisy(params: Any, buffers: Any, batch: Batch, *, key: Tensor | None = None) -> Any:
    """Squares of the inputs times random numbers of each example, as a Monte Carlo estimator."""
    del buffers
    keep = torch.ones(len(batch.inputs)) if batch.mask is None else batch.mask
    assert batch.ids is not None
    noise = 1.0 if key is None else random.normal(random.fold_in(key, batch.ids), (3,)).double()
    scores = batch.inputs * noise * keep[:, None]
    n = keep.sum().double()
    return {
        "diagonal": Diagonal({"w": scores.square().sum(0) / n}, n, fisher="mc"),
        "dense": Dense(scores.T @ scores / n, n, Layout.of(params), fisher="mc"),
    }


def data(n: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), (n, 3), torch.float64)


def cut(x: Tensor, sizes: list[int]) -> list[Batch]:
    return [Batch(part) for part in x.split(sizes)]


def same(a: Any, b: Any, tol: float = 1e-12) -> None:
    assert trees.structure(a) == trees.structure(b)
    for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), random_labels=st.booleans())
def test_batches_together_are_one_batch(sizes: list[int], random_labels: bool) -> None:
    x, key = data(sum(sizes)), KEY if random_labels else None
    result, state = accumulate(noisy, PARAMS, {}, cut(x, sizes), key=key)
    whole = noisy(PARAMS, {}, Batch(x, ids=torch.arange(len(x))), key=key)
    same(result, whole)
    assert state.result is result
    assert (state.batches, state.examples) == (len(sizes), len(x))


def test_masked_rows_are_not_counted_but_keep_their_number() -> None:
    x = data(6)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    batches = [Batch(a, mask=m) for a, m in zip(x.split(2), mask.split(2), strict=True)]
    result, state = accumulate(noisy, PARAMS, {}, batches, key=KEY)
    same(result, noisy(PARAMS, {}, Batch(x, mask=mask, ids=torch.arange(6)), key=KEY))
    assert state.examples == 6
    assert result["dense"].count == 4


def test_two_batches_do_not_repeat_each_others_labels() -> None:
    seen: list[Tensor] = []

    def spy(params: Any, buffers: Any, batch: Batch, *, key: Tensor | None = None) -> Any:
        assert batch.ids is not None
        seen.append(batch.ids)
        return noisy(params, buffers, batch, key=key)

    own = torch.tensor([100, 7])
    batches = [*cut(data(5), [2, 3]), Batch(data(2), ids=own), Batch(data(1))]
    accumulate(spy, PARAMS, {}, batches)
    assert [ids.tolist() for ids in seen] == [[0, 1], [2, 3, 4], [100, 7], [7]]
    assert all(ids.dtype == torch.int64 for ids in seen)
    assert batches[0].ids is None  # the caller's batch is not touched


@given(stop=st.integers(1, 4))
def test_resumed_is_uninterrupted_to_the_last_bit(stop: int) -> None:
    batches = cut(data(11), [2, 3, 1, 4, 1])
    want, end = accumulate(noisy, PARAMS, {}, batches, key=KEY)
    _, state = accumulate(noisy, PARAMS, {}, batches[:stop], key=KEY)
    kept = [x.clone() for x in trees.leaves(state)]
    result, again = accumulate(noisy, PARAMS, {}, iter(batches[stop:]), state=state, key=KEY)
    for a, b in zip(trees.leaves((result, again)), trees.leaves((want, end)), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(kept, trees.leaves(state), strict=True))


def test_resumed_from_a_file(tmp_path: Any) -> None:
    batches = cut(data(6), [2, 2, 2])
    want, _ = accumulate(noisy, PARAMS, {}, batches, key=KEY)
    path = tmp_path / "state.safetensors"

    def interrupted() -> Iterator[Batch]:
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accumulate(
            noisy, PARAMS, {}, interrupted(), key=KEY, on_update=lambda state: io.save(path, state)
        )
    state = io.load(path)
    result, _ = accumulate(noisy, PARAMS, {}, batches[int(state.batches) :], state=state, key=KEY)
    for a, b in zip(trees.leaves(result), trees.leaves(want), strict=True):
        assert torch.equal(a, b)


def test_nothing_left_to_do_gives_the_state_back() -> None:
    result, state = accumulate(noisy, PARAMS, {}, cut(data(2), [2]))
    again, after = accumulate(noisy, PARAMS, {}, [], state=state)
    assert again is result
    assert after is state


def test_states_merge() -> None:
    batches = cut(data(7), [2, 3, 2])
    for i, batch in enumerate(batches):
        rows = len(batch.inputs)
        batches[i] = Batch(batch.inputs, ids=torch.arange(rows) + 10 * i)
    whole, state = accumulate(noisy, PARAMS, {}, batches, key=KEY)
    _, a = accumulate(noisy, PARAMS, {}, batches[:1], key=KEY)
    _, b = accumulate(noisy, PARAMS, {}, batches[1:], key=KEY)
    same(merge(a, b), state)
    same(merge(a, b).result, whole)
    same(merge(a, empty_like(a)), a)
    assert empty_like(a).examples == 0


def test_inputs_may_be_tuples_and_mappings() -> None:
    def count(params: Any, buffers: Any, batch: Batch, *, key: Tensor | None = None) -> Any:
        assert batch.ids is not None
        return Diagonal({"w": batch.ids.double().mean().expand(3)}, float(len(batch.ids)))  # type: ignore[arg-type]

    for wrap in (lambda x: (x, x), lambda x: {"x": x, "scale": None}):
        batches = [Batch(wrap(part)) for part in data(6).split(2)]
        result, _ = accumulate(count, PARAMS, {}, batches)
        assert torch.equal(result.values["w"], torch.full((3,), 2.5, dtype=torch.float64))


def test_the_whole_fold_is_differentiable() -> None:
    def f(x: Tensor) -> Tensor:
        return accumulate(noisy, PARAMS, {}, cut(x, [2, 2]))[0]["diagonal"].trace()

    torch.testing.assert_close(torch.func.grad(f)(data(4)), 2 * data(4) / 4)


# --- progress -------------------------------------------------------------------------------------


def test_progress_function_knows_the_total_where_there_is_one() -> None:
    batches, calls = cut(data(6), [2, 2, 2]), []
    report = lambda done, total: calls.append((done, total))  # noqa: E731
    _, state = accumulate(noisy, PARAMS, {}, batches[:1], progress=report)
    accumulate(noisy, PARAMS, {}, batches[1:], state=state, progress=report)
    accumulate(noisy, PARAMS, {}, iter(batches), progress=report)
    assert calls == [(1, 1), (2, 3), (3, 3), (1, None), (2, None), (3, None)]


def test_on_update_sees_every_state() -> None:
    seen: list[AccumulateState] = []
    _, last = accumulate(noisy, PARAMS, {}, cut(data(4), [2, 2]), on_update=seen.append)
    assert [int(state.batches) for state in seen] == [1, 2]
    assert seen[-1] is last


def test_bar_is_written_to_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    accumulate(noisy, PARAMS, {}, cut(data(4), [2, 2]), progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert shown.out == ""


def test_bar_without_rich_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UnsupportedError, match=r'progress=True, got none.*pip install "fisherfn\[app'
    ):
        accumulate(noisy, PARAMS, {}, cut(data(4), [2, 2]), progress=True)


# --- bad input ------------------------------------------------------------------------------------


class Odd(NamedTuple):
    x: Any


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, DataError, "expected at least one batch, got none. A generator"),
        ({"batches": iter([])}, DataError, "expected at least one batch, got none"),
        ({"batches": Batch(data(2))}, DataError, "expected an iterable of batches, got Batch"),
        ({"batches": 3}, DataError, "expected an iterable of batches, got int"),
        ({"batches": [data(2)]}, DataError, "of type ff.Batch, got Tensor as number 0"),
        ({"batches": [Batch(data(2)), (data(2),)]}, DataError, "got tuple as number 1. Wrap it"),
        ({"batches": [Batch(torch.tensor(1.0))]}, DataError, "examples as leading axis, got no"),
        ({"estimator": 3}, OptionError, "accumulate: expected an estimator, got int"),
        ({"state": Odd(1)}, OptionError, "expected state from an earlier call, got Odd"),
        ({"progress": 3}, OptionError, "expected progress to be True, False or a function, got 3"),
        ({"on_update": 3}, OptionError, "expected on_update to be a function, got 3"),
        (
            {"estimator": lambda p, b, batch, key=None: {"x": batch.inputs}},
            UnsupportedError,
            "accumulate: expected results that can be merged .* got Tensor at x",
        ),
    ],
)
def test_bad_input_is_refused(change: Any, error: type[FisherError], message: str) -> None:
    arguments: dict[str, Any] = {"estimator": noisy, "batches": [Batch(data(2))], **change}
    estimator, batches = arguments.pop("estimator"), arguments.pop("batches")
    with pytest.raises(error, match=message):
        accumulate(estimator, PARAMS, {}, batches, **arguments)


def test_counts_go_beyond_what_float32_can_count() -> None:
    model = lambda params, buffers, x: x @ params["w"]  # noqa: E731
    fim = diagonal(model, categorical())
    params = {"w": torch.zeros(1, 2)}
    large = [Batch(torch.ones(2, 1), weights=torch.tensor([2.0**24, 1.0]))]
    ones = [Batch(torch.ones(1, 1)) for _ in range(3)]
    result, state = accumulate(fim, params, {}, large + ones)
    assert result.count == state.units == 2**24 + 4
    assert result.values["w"].dtype == torch.float32
