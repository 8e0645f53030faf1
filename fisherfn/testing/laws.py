"""What every estimator must satisfy, as functions that raise AssertionError.

A new estimator joins the table `ESTIMATORS`, a new law the table `LAWS`; each is then checked
against all of the other.

Example:
    @given(testing.problems()) def test_my_estimator(problem):
        member = testing.Member("mine", my_estimator)
        testing.batch_split(member, problem)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.core import random
from fisherfn.core import trees as algebra
from fisherfn.core.merging import merge
from fisherfn.curvature import LowRank
from fisherfn.testing.members import Member
from fisherfn.testing.problem import Problem, pad_examples, pad_positions, take

#: Results in float64 agree to this, relative to the value itself.
RTOL = 1e-8
#: ... or, where a value is itself the difference of larger ones, relative to the tensor's largest.
ATOL = 1e-11
#: ... or, where a whole tensor is zero but for rounding, relative to the largest of the result.
FLOOR = 1e-15


# ---- comparison ----------------------------------------------------------------------------------


def assert_close(got: Any, want: Any, rtol: float = RTOL, what: str = "result") -> None:
    """Compare two trees of tensors in absolute value.

    Args:
        got: A tree.
        want: A tree of the same structure.
        rtol: Largest relative difference of an entry.
        what: Named in the message.

    Raises:
        AssertionError: They differ.
    """
    if isinstance(got, LowRank) and isinstance(want, LowRank):
        # Rows in another order, or split in two, are the same matrix.
        got, want = [(F.to_dense(), F.diagonal(), F.count) for F in (got, want)]
    first, structure = algebra.flatten(got)
    second, expected = algebra.flatten(want)
    if structure != expected:
        raise AssertionError(f"{what}: expected the structure {expected}, got {structure}.")
    floor = FLOOR * max((_largest(b) for b in second), default=0.0)
    for path, a, b in zip(algebra.paths(got), first, second, strict=True):
        _assert_close_tensors(a, b, rtol, floor, f"{what} at {path!r}" if path else what)


def _largest(t: Tensor) -> float:
    return t.detach().abs().max().item() if t.numel() else 0.0


def _assert_close_tensors(got: Tensor, want: Tensor, rtol: float, floor: float, what: str) -> None:
    if got.shape != want.shape:
        raise AssertionError(f"{what}: expected shape {want.shape}, got {got.shape}.")
    loose = max(rtol / RTOL, 1.0)
    torch.testing.assert_close(
        got.detach().to(torch.float64),
        want.detach().to(torch.float64),
        rtol=rtol,
        atol=loose * max(ATOL * _largest(want), floor),
        msg=lambda text: f"{what}: {text}",
    )


# ---- what may be done to a batch -----------------------------------------------------------------


def batch_order(member: Member, problem: Problem) -> None:
    """The order of the examples does not matter.

    Args:
        member: Any estimator.
        problem: Any problem, with weights for the member's unit.
    """
    order = torch.arange(problem.size - 1, -1, -1)
    got, want = member.run(take(problem, order)), member.run(problem)
    assert_close(got, _picked(member, want, order), what=f"{member}, examples reversed")


def batch_split(member: Member, problem: Problem) -> None:
    """The result of two parts, merged, is the result of the whole.

    Args:
        member: Any estimator.
        problem: Any problem; one whose parts have nothing that counts, or of one example, is left
            out, since such a part is an error.
    """
    if member.result == "whole":
        return
    middle = problem.size // 2
    halves = torch.arange(middle), torch.arange(middle, problem.size)
    parts = [take(problem, half) for half in halves]
    if not all(counts(part, member.unit) for part in parts):
        return
    whole = member.run(problem)
    got = [member.run(part) for part in parts]
    if member.result == "joined":
        merged = _without_stderr(merge(*got))
        assert_close(merged, _without_stderr(whole), what=f"{member}, merged halves")
        return
    for part, half in zip(got, halves, strict=True):
        assert_close(part, _picked(member, whole, half), what=f"{member}, half the batch")


def padded_examples(member: Member, problem: Problem) -> None:
    """Masked examples contribute nothing and are not counted.

    Args:
        member: Any estimator.
        problem: Any problem.
    """
    want = member.run(problem)
    got = member.run(pad_examples(problem, 2))
    if member.result in ("rows", "pairs"):
        kept = torch.arange(problem.size)
        rest = torch.arange(problem.size, problem.size + 2)
        zero = _picked(member, got, rest)
        assert_close(zero, algebra.zeros_like(zero), what=f"{member}, padding's own rows")
        got = _picked(member, got, kept)
    assert_close(got, want, what=f"{member}, two masked examples more")


def padded_positions(member: Member, problem: Problem) -> None:
    """Masked positions at the end contribute nothing and are not counted.

    Args:
        member: Any estimator.
        problem: Any problem; one whose outputs look ahead is left out.
    """
    if problem.causal:
        got, want = member.run(pad_positions(problem, 2)), member.run(problem)
        assert_close(got, want, what=f"{member}, two masked positions more")


def duplication(member: Member, problem: Problem) -> None:
    """An example that comes twice, under one name, is an example of weight two.

    Args:
        member: Any estimator.
        problem: Any problem.
    """
    first = torch.zeros(1, dtype=torch.int64)
    index = torch.cat([torch.arange(problem.size), first])
    twice = take(problem, index)
    got = member.run(twice)
    if member.result in ("rows", "pairs"):
        want = _picked(member, member.run(problem), index)
        assert_close(got, want, what=f"{member}, first example twice")
        return
    heavy = take(problem, torch.arange(problem.size))
    weights = heavy.batch.weights
    assert weights is not None
    doubled = torch.cat([2.0 * weights[:1], weights[1:]])
    want = member.run(replace(heavy, batch=replace(heavy.batch, weights=doubled)))
    assert_close(got, want, what=f"{member}, first example twice")


def chunk_size(member: Member, problem: Problem) -> None:
    """How many examples are worked on at a time does not matter.

    Args:
        member: Any estimator.
        problem: Any problem.
    """
    want = member.run(problem)
    for size in (1, 2, problem.size + 3):
        got = member.run(problem, chunk_size=size)
        assert_close(got, want, what=f"{member}, chunk_size={size}")


def counts(problem: Problem, unit: str) -> bool:
    """Whether anything in the problem counts.

    Args:
        problem: Any problem.
        unit: "example" or "position".

    Returns:
        True iff the sum of the weights of what the mask keeps is positive.
    """
    if problem.size == 0:
        return False
    shape = (problem.size, *problem.positions)
    mask = problem.batch.mask
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    if unit == "example":
        kept = kept.reshape(problem.size, -1).any(1)
    weights = problem.batch.weights
    weights = torch.ones(problem.size, dtype=torch.float64) if weights is None else weights
    if weights.dim() < kept.dim():
        weights = weights.reshape(weights.shape + (1,) * (kept.dim() - weights.dim()))
    return bool((weights * kept).sum() > 0)


def _picked(member: Member, result: Any, index: Tensor) -> Any:
    """Rows (and columns) of a result that has one for each example."""
    if member.result in ("joined", "whole"):
        return result
    if member.result == "pairs":
        return algebra.map(lambda t: t[index][:, index], result)
    return algebra.map(lambda t: t[index], result)


def _without_stderr(result: Any) -> Any:
    """Drop standard errors: those of two halves are other estimates than that of the whole."""
    if getattr(result, "stderr", None) is None:
        return result
    return replace(result, stderr=None)


# ---- what may be done to a call ------------------------------------------------------------------


def purity(member: Member, problem: Problem) -> None:
    """Nothing that goes in is changed, no global random state moves, equal keys give equal results.

    Args:
        member: Any estimator.
        problem: Any problem.

    Raises:
        AssertionError: Something moved.
    """
    key = random.key(3)
    given = [*algebra.leaves(list(problem.args)), key]
    before = [(t.clone(), t._version, t.requires_grad) for t in given]
    state = torch.get_rng_state()
    first = member.run(problem, key)
    if not torch.equal(state, torch.get_rng_state()):
        raise AssertionError(f"{member}: torch's global random state moved.")
    for tensor, (value, version, wants) in zip(given, before, strict=True):
        if tensor._version != version or tensor.requires_grad != wants or tensor.grad is not None:
            raise AssertionError(f"{member}: an argument of shape {tensor.shape} was touched.")
        torch.testing.assert_close(tensor, value, rtol=0, atol=0, equal_nan=True)
    second = member.run(problem, key)
    for a, b in zip(algebra.leaves(first), algebra.leaves(second), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def compiled(member: Member, problem: Problem, backend: str = "aot_eager") -> None:
    """`torch.compile(fullgraph=True)` changes nothing but the speed.

    Args:
        member: Any estimator.
        problem: Any problem.
        backend: As in `torch.compile`.
    """
    torch._dynamo.reset()
    want = member.run(problem)
    fast = torch.compile(member.build(problem), fullgraph=True, backend=backend)
    assert_close(member.call(fast, problem), want, what=f"{member}, compiled")


def ensemble(member: Member, problem: Problem) -> None:
    """`torch.vmap` over stacked parameters is a loop over them.

    Args:
        member: Any estimator.
        problem: Any problem.
    """
    count = 3
    noise = algebra.random_like(
        random.key(1), algebra.map(lambda p: p.expand(count, *p.shape), problem.params)
    )
    stacked = algebra.map(lambda p, e: p + 0.1 * e, problem.params, noise)
    estimator = member.build(problem)

    def at(params: Any) -> Any:
        return member.call(estimator, replace(problem, params=params))

    got = torch.vmap(at)(stacked)
    loop = [at(algebra.map(lambda p, i=i: p[i], stacked)) for i in range(count)]
    leaves = [torch.stack(values) for values in zip(*map(algebra.leaves, loop), strict=True)]
    assert_close(algebra.leaves(got), leaves, what=f"{member}, vmap over params")


def derivative(member: Member, problem: Problem) -> None:
    """`torch.func.grad` of a number made from the result is its finite difference.

    Args:
        member: Any estimator.
        problem: Any problem with float64 parameters and a smooth model.
    """
    estimator = member.build(problem)
    direction = algebra.random_like(random.key(2), problem.params)
    start = algebra.leaves(member.run(problem))
    probes = [
        random.normal(random.fold_in(random.key(5), i), t.shape, t.dtype)
        for i, t in enumerate(start)
    ]

    def number(params: Any) -> Tensor:
        result = algebra.leaves(member.call(estimator, replace(problem, params=params)))
        terms = [(p * t).sum() for p, t in zip(probes, result, strict=True)]
        return torch.stack(terms).sum()

    def at(step: float) -> Tensor:
        return number(algebra.map(lambda p, d: p + step * d, problem.params, direction)).detach()

    got = algebra.dot(torch.func.grad(number)(problem.params), direction)
    h = 1e-4
    want = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    scale = torch.stack([(p * t).abs().sum() for p, t in zip(probes, start, strict=True)]).sum()
    torch.testing.assert_close(
        got, want, rtol=1e-6, atol=1e-9 * scale.item(), msg=lambda t: f"{member}, derivative: {t}"
    )


#: Laws of the batch, in the order of the contract.
LAWS: dict[str, Callable[[Member, Problem], None]] = {
    law.__name__: law
    for law in (
        batch_order,
        batch_split,
        padded_examples,
        padded_positions,
        duplication,
        chunk_size,
    )
}
