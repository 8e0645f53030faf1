"""The plan check: captured scores against autograd, once per plan, on a few examples.

With coefficients r and a cotangent c, both arbitrary, `Σ_b r_b score_b` from the capture must equal
the ordinary gradient of `Σ_b r_b <c_b, outputs_b>`. Rows in another order, lost taps, swapped
sites, inputs changed in place, uses that nobody saw: each shows up as a difference at the parameter
concerned, which then takes the general path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.capture import general
from fisherfn.capture.engines import EagerRun, refuse_checkpointing
from fisherfn.capture.plan import INVISIBLE, Axis, Plan, Tap, examples
from fisherfn.capture.tape import PlanMismatchError, forms_of
from fisherfn.core import trees
from fisherfn.core.errors import UnsupportedError
from fisherfn.layers.leaf import LeafScores

_LOG = logging.getLogger(__name__)
# Entries of parameters whose scores are formed twice to compare them.
_PROBED = 2**20
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def coarsest(*tensors: Any) -> torch.dtype:
    """Return the least precise dtype that takes part where these tensors meet."""
    found = {(t.dtype, t.device.type) for t in tensors if isinstance(t, Tensor)}
    autocast = {torch.get_autocast_dtype(d) for _, d in found if torch.is_autocast_enabled(d)}
    dtypes = {dtype for dtype, _ in found if dtype.is_floating_point} | autocast
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference that rounding to a dtype may explain."""
    return _TOLERANCE.get(dtype, 2e-3)


def check_examples_apart(
    outputs: tuple[Any, Any], counts: tuple[int, int], dtype: torch.dtype
) -> None:
    """Refuse models whose examples influence each other, or whose outputs are random.

    Args:
        outputs: Outputs of two runs, whose first examples are the same.
        counts: Number of examples of each.
        dtype: What the model computes in, where it is least precise.

    Raises:
        UnsupportedError: the common examples differ, or outputs do not begin with the examples.
    """
    few = min(counts)
    if not trees.leaves(outputs[0]):
        raise UnsupportedError(
            "capture: expected a model that returns a tensor, got no tensor in its outputs. Return "
            "what the likelihood needs, [B, ...]."
        )
    paths = trees.paths(outputs[0])
    for path, a, b in zip(paths, trees.leaves(outputs[0]), trees.leaves(outputs[1]), strict=True):
        bad_shape = not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dim() == 0
        if bad_shape or (a.shape[0], b.shape[0]) != counts or a.shape[1:] != b.shape[1:]:
            got = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (a, b)]
            raise UnsupportedError(
                f"capture: expected outputs with the examples as leading axis, got {got[0]} and "
                f"{got[1]} for {counts[0]} and {counts[1]} examples"
                f"{f' at {path}' if path else ''}. Return [B, ...] from the model, without "
                "reduction."
            )
        x, y = a[:few].double(), b[:few].double()
        scale = x.abs().amax().clamp_min(1e-30) if x.numel() else x.new_tensor(1.0)
        if bool(((x - y).abs().amax() if x.numel() else scale * 0) > tolerance(dtype) * scale):
            raise UnsupportedError(
                "capture: expected a deterministic model that treats examples apart, got outputs "
                "that change with the rest of the batch or from call to call. Switch off dropout, "
                "noise and batch statistics (module.eval()), and do not mix examples."
            )


def check_batch_size(model: Any, params: Any, buffers: Any, inputs: Any) -> None:
    """Refuse a model whose outputs depend on how many examples it sees.

    Args:
        model: The function `(params, buffers, inputs) -> outputs`.
        params: Its parameters.
        buffers: What else it reads.
        inputs: Inputs of B examples.

    Raises:
        UnsupportedError: an example alone gives other outputs than within the batch.
    """
    with torch.no_grad():
        together = trees.leaves(model(params, buffers, inputs))
        allowed = tolerance(coarsest(*trees.leaves(params), *together))
        for b in range(together[0].shape[0]):
            one = trees.map(lambda t, b=b: t[b : b + 1] if isinstance(t, Tensor) else t, inputs)
            for x, y in zip(trees.leaves(model(params, buffers, one)), together, strict=True):
                difference = (x[0].double() - y[b].double()).norm()
                if not bool(difference <= allowed * x[0].double().norm() + 1e-30):
                    raise UnsupportedError(
                        "capture: expected a model that treats examples apart, got one whose "
                        "outputs change with the number of examples. Remove the branch on the "
                        "batch size."
                    )


def check(model: Any, params: Any, buffers: Any, inputs: Any, plan: Plan, outputs: Any) -> Plan:
    """Return the plan with every parameter that fails the comparison on the general path."""
    count = trees.leaves(outputs)[0].shape[0]
    few = examples(inputs, count)
    leaves, structure = trees.flatten(params)
    cotangent = trees.map(_arbitrary, outputs)
    r = torch.tensor([1.0, -0.6, 0.35, 0.8][:count], dtype=torch.float64)
    reference = _reference(model, leaves, structure, buffers, few, cotangent, r)
    finite = _finite(reference)
    if not finite:
        # what is not a number shows nothing about the layers: others take its place
        for everywhere in (False, True):
            other = _with_numbers(params, buffers, few, everywhere)
            leaves = trees.leaves(other[0])
            found = _reference(model, leaves, structure, other[1], other[2], cotangent, r)
            if _finite(found):
                (params, buffers, few), reference, finite = other, found, True
                break
    unused = frozenset(
        i for i, why in plan.general.items() if why == INVISIBLE and reference[i] is None
    )
    plan = replace(
        plan,
        unused=unused,
        general={i: why for i, why in plan.general.items() if i not in unused},
    )
    failures = _failures(model, params, buffers, few, plan, cotangent, r, reference)
    tables = {u.leaf for t in plan.taps if t.axis is None for u in t.uses}
    if tables and len(failures) == len({u.leaf for t in plan.taps for u in t.uses}):
        # the model may not take tables that have been given an axis of examples
        plan = plan.without(dict.fromkeys(tables, "a table whose output has no examples"))
        failures = _failures(model, params, buffers, few, plan, cotangent, r, reference)
    if failures and any(t.axis is not None and t.axis.flat for t in plan.taps):
        inner = replace(plan, taps=tuple(_inner(t) for t in plan.taps))
        other = _failures(model, params, buffers, few, inner, cotangent, r, reference)
        rescued = set(failures) - set(other)
        if rescued:
            plan = _mixed(plan, inner, rescued)
            failures = _failures(model, params, buffers, few, plan, cotangent, r, reference)
    for leaf, why in failures.items():
        _LOG.info("parameter %s takes the general path: %s", trees.paths(params)[leaf], why)
    plan = plan.without(failures)
    if plan.general:
        plan = _probe_general(model, params, buffers, few, plan, cotangent, _largest(reference))
    return replace(plan, checked=finite)


def _finite(gradients: list[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)


def _with_numbers(params: Any, buffers: Any, inputs: Any, everywhere: bool) -> tuple[Any, ...]:
    """Return numbers in the place of NaN and infinity; -inf may be a mask, unless `everywhere`."""

    def fill(t: Any, minus: bool) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        t = t.detach()
        good = torch.isfinite(t) if minus else torch.isfinite(t) | (t == -torch.inf)
        return torch.where(good, t, 0.5 * _arbitrary(t))

    rest = [trees.map(lambda t: fill(t, everywhere), tree) for tree in (buffers, inputs)]
    return trees.map(lambda t: fill(t, True), params), *rest


def _arbitrary(t: Tensor) -> Tensor:
    """Return fixed irregular numbers like `t`."""
    n = torch.arange(t.numel(), device=t.device, dtype=torch.float64)
    return torch.sin(n * 12.9898 + 1.0).reshape(t.shape).to(t.dtype)


def _weighted(cotangent: Any, r: Tensor) -> Any:
    return trees.map(
        lambda c: c * r.to(c.device, c.dtype).reshape(-1, *[1] * (c.dim() - 1)), cotangent
    )


def _reference(
    model: Any,
    leaves: list[Tensor],
    structure: Any,
    buffers: Any,
    few: Any,
    cotangent: Any,
    r: Tensor,
) -> list[Tensor | None]:
    with torch.enable_grad():
        fresh = [t.detach().requires_grad_() for t in leaves]
        try:
            outputs = model(trees.unflatten(structure, fresh), buffers, few)
        except RuntimeError as error:
            refuse_checkpointing(error)
            raise
        # times one: a backward pass that starts with a product of matrices warns on a GPU, where
        # the thread of the engine has no context before its first kernel
        ends = [o * 1 if o.requires_grad else o for o in trees.leaves(outputs)]
    weighted = trees.leaves(_weighted(cotangent, r))
    pairs = [(o, c) for o, c in zip(ends, weighted, strict=True) if o.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    try:
        found = torch.autograd.grad(
            [o for o, _ in pairs], fresh, [c for _, c in pairs], allow_unused=True
        )
    except RuntimeError as error:
        refuse_checkpointing(error)
        raise
    return list(found)


def _failures(
    model: Any,
    params: Any,
    buffers: Any,
    few: Any,
    plan: Plan,
    cotangent: Any,
    r: Tensor,
    reference: list[Tensor | None],
) -> dict[int, str]:
    """Return, for each captured leaf whose scores differ from autograd's, why it fails."""
    leaves = trees.leaves(params)
    captured = {u.leaf for t in plan.taps for u in t.uses}
    uses: dict[int, list[Any]] = {}
    count = r.shape[0]
    arithmetic = [*leaves, *trees.leaves(cotangent)]
    try:
        run = EagerRun(model, params, buffers, few, plan, count)

        def receive(index: int, g: Tensor) -> None:
            arithmetic.append(g[:0])
            for leaf, form, view in forms_of(plan.taps[index], run.kept[index], g, count):
                uses.setdefault(leaf, []).append((form.scaled(r.to(g.device)), view))

        run.pull(trees.map(lambda c: c.unsqueeze(0), cotangent), receive, last=True)
    except (PlanMismatchError, RuntimeError, AssertionError) as error:
        if isinstance(error, RuntimeError):
            refuse_checkpointing(error)
        return dict.fromkeys(captured, f"its layers cannot be tapped ({error})")
    failures = {}
    largest, dtype = _largest(reference), coarsest(*arithmetic)
    with torch.no_grad():
        for leaf in captured:
            found = reference[leaf]
            expected = torch.zeros_like(leaves[leaf]) if found is None else found
            shape = tuple(leaves[leaf].shape)
            try:
                got = LeafScores.of(uses.pop(leaf), shape).sum()
            except RuntimeError as error:
                failures[leaf] = f"its scores cannot be contracted ({error})"
                continue
            if not _alike(got, expected, largest, dtype):
                failures[leaf] = "captured scores differ from autograd (a use that is not visible)"
    return failures


def _inner(tap: Tap) -> Tap:
    def turn(axis: Axis | None) -> Axis | None:
        return replace(axis, inner=True) if axis is not None and axis.flat else axis

    return replace(tap, axis=turn(tap.axis), kept_axes=tuple(turn(a) for a in tap.kept_axes))


def _mixed(outer: Plan, inner: Plan, rescued: set[int]) -> Plan:
    """Take the inner order at the taps whose parameters it rescued."""
    taps = [
        b if {u.leaf for u in a.uses} & rescued else a
        for a, b in zip(outer.taps, inner.taps, strict=True)
    ]
    return replace(outer, taps=tuple(taps))


def _probe_general(
    model: Any,
    params: Any,
    buffers: Any,
    few: Any,
    plan: Plan,
    cotangent: Any,
    largest: float,
) -> Plan:
    """Find out whether `vmap` can run the model example by example, and columns together."""
    # two columns that are not alike: torch has batching rules that are wrong for several
    columns = trees.map(lambda c: torch.stack([c, c.flip(-1).cos()]), cotangent)
    probed = _affordable(plan.general, trees.leaves(params))
    try:
        with torch.no_grad():
            batched = general.scores(model, params, buffers, few, columns, probed, looped=False)
            looped = general.scores(model, params, buffers, few, columns, probed, looped=True)
        dtype = coarsest(*trees.leaves((params, cotangent)))
        fits = all(_alike(a, b, largest, dtype) for a, b in zip(batched, looped, strict=True))
    except Exception as error:
        _LOG.info("the general path goes example by example: %s", error)
        fits = False
    return replace(plan, looped=not fits)


def _affordable(leaves: Iterable[int], params: list[Tensor]) -> list[int]:
    """Return the smallest of these leaves, and as many more as may have their scores compared."""
    ordered = sorted(leaves, key=lambda i: params[i].numel())
    total, chosen = 0, ordered[:1]
    for i in ordered[1:]:
        total += params[i].numel()
        if total > _PROBED:
            break
        chosen.append(i)
    return chosen


def _alike(got: Tensor, expected: Tensor, largest: float, dtype: torch.dtype) -> bool:
    difference = (got.double() - expected.double()).norm()
    # a gradient that cancels to nothing is all rounding: compare with what it is made of
    rounding = 8.0 * torch.finfo(dtype).eps * largest
    return bool(difference <= tolerance(dtype) * expected.double().norm() + rounding)


def _largest(gradients: list[Tensor | None]) -> float:
    return max((float(g.double().norm()) for g in gradients if g is not None), default=0.0)
