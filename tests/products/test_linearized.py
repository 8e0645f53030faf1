"""One forward pass for many products: the tape, blocks, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import cases
import fisherfn as ff
from cases import Net, normal
from fisherfn.estimators.products import fallback, linear, tape
from fisherfn.testing import assert_close

MODELS = cases.LAYERS | cases.ATTENTION | cases.LANGUAGE
KEY = ff.random.key(3)
#: Models whose forward-mode derivative does not exist; the rest must be recorded.
TWICE = {"custom_function", "straight_through"}


def stack(params: Any, count: int) -> Any:
    return ff.tree.random_like(ff.random.split(ff.random.key(1), count), params)


def one(vectors: Any, k: int) -> Any:
    return ff.tree.map(lambda t: t[k], vectors)


def close(got: Any, want: Any, rtol: float) -> None:
    a, b = (ff.tree.ravel(t)[0].double() for t in (got, want))
    assert (a - b).norm() <= rtol * b.norm() + 1e-13


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("embedding_bag",)])
def test_linearised_product_is_the_product(name: str) -> None:
    s, rtol = MODELS[name].setup(), max(1e-10, MODELS[name].rtol)
    vectors = stack(s.params, 3)
    bound = ff.linearized(s.model, s.likelihood)(*s.args)
    assert (bound.engine == fallback.DOUBLE) == (name in TWICE), bound.reason
    product = ff.fisher_vp(s.model, s.likelihood)
    want = [product(*s.args, one(vectors, k)) for k in range(3)]
    close(bound(one(vectors, 0)), want[0], rtol)
    close(bound(one(vectors, 1)), want[1], rtol)
    block = bound.block(vectors)
    for k in range(3):
        close(one(block, k), want[k], rtol)
    zero = bound(ff.tree.zeros_like(s.params))
    assert all(not t.any() for t in zero.values())


@pytest.mark.parametrize("options", [{"fisher": "mc", "num_samples": 2}, {"matrix": "hessian"}])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "encoder_layer_padding", "gpt2", "lstm"])
def test_linearised_draws_and_hessians(name: str, options: dict[str, Any]) -> None:
    s = MODELS[name].setup() if name in MODELS else cases.ALL[name].setup()
    vectors = stack(s.params, 3)
    bound = ff.linearized(s.model, s.likelihood, **options)(*s.args, key=KEY)
    hessian = "matrix" in options
    if hessian:
        product: Any = ff.hvp(s.model, s.likelihood)
    else:
        product = ff.fisher_vp(s.model, s.likelihood, **options)
    for k in range(3):
        want = product(*s.args, one(vectors, k), key=KEY)
        close(bound(one(vectors, k)), want, 1e-9)
        close(one(bound.block(vectors, chunk_size=2), k), want, 1e-9)


def test_blocks_under_vmap() -> None:
    s = MODELS["gpt2"].setup()
    vectors = stack(s.params, 3)
    bound = ff.linearized(s.model, s.likelihood)(*s.args)
    close(torch.vmap(bound)(vectors), bound.block(vectors), 1e-10)


@pytest.mark.parametrize("matrix", ["fisher", "hessian"])
@pytest.mark.parametrize("largest", [1, 2**20])
def test_large_vectors_go_one_by_one(
    largest: int, matrix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tangents leave the cache vectors do not lie side by side; the products are the same."""
    monkeypatch.setattr(linear, "_CACHE", largest)
    plays: list[int] = []
    alone = tape.Tape.play

    def play(self: tape.Tape, tangents: list[Tensor]) -> list[Tensor | None]:
        plays.append(len(tangents))
        return alone(self, tangents)

    monkeypatch.setattr(tape.Tape, "play", play)
    s = cases.LAYERS["mlp"].setup()
    bound = ff.linearized(s.model, s.likelihood, matrix=matrix)(*s.args)
    vectors = stack(s.params, 3)
    block = bound.block(vectors)
    assert len(plays) == (3 if largest == 1 else 1)
    for k in range(3):
        close(one(block, k), bound(one(vectors, k)), 1e-12)


def test_chunks_of_examples_and_batches_add_up() -> None:
    s = cases.ALL["mlp"].setup()
    v = stack(s.params, 1)
    want = ff.linearized(s.model, s.likelihood)(*s.args)
    part = ff.linearized(s.model, s.likelihood, chunk_size=2)(*s.args)
    close(part(one(v, 0)), want(one(v, 0)), 1e-12)
    close(part.block(v), want.block(v), 1e-12)
    assert_close(part.count, want.count)


def test_the_model_runs_once() -> None:
    s = cases.ALL["mlp"].setup()
    calls = []

    def model(params: Any, buffers: Any, inputs: Any) -> Tensor:
        calls.append(1)
        return s.model(params, buffers, inputs)

    make = ff.linearized(model, s.likelihood)
    make(*s.args)  # the first call also asks whether examples are treated apart
    calls.clear()
    bound = make(*s.args)
    v = one(stack(s.params, 1), 0)
    bound(v)
    bound(v)
    assert len(calls) == 1
    assert bound.engine == fallback.FORWARD
    assert bound.reason == ""


def test_arguments_are_not_written_to() -> None:
    with cases.seeded(0):
        net = Net(lambda m, x: m.head(x).mul_(2.0).relu_(), head=nn.Linear(3, 4)).double()
    model, params, buffers = ff.functional(net)
    v = one(stack(params, 1), 0)
    before = [t.clone() for t in v.values()]
    bound = ff.linearized(model, ff.likelihoods.categorical())(
        params, buffers, ff.Batch(normal(2, 3))
    )
    assert bound.engine == fallback.FORWARD
    close(bound(v), bound(v), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, v.values(), strict=True))


def test_parameters_written_to_since_are_noticed() -> None:
    s = cases.ALL["mlp"].setup()
    params = {k: t.clone() for k, t in s.params.items()}
    bound = ff.linearized(s.model, s.likelihood)(params, s.buffers, s.batch)
    next(iter(params.values())).add_(1.0)
    with pytest.raises(ff.UnsupportedError, match="written to since"):
        bound(params)


# ---- the tape itself -----------------------------------------------------------------------------


def record(function: Any, *leaves: Tensor) -> tape.Tape:
    live = linear.roots(leaves)
    return linear.record(function, live, [torch.zeros_like(p) for p in live])[1]


def test_tape_drops_what_the_result_does_not_need() -> None:
    full = record(lambda p: [p[0].sin().exp(), p[0].cos()], normal(3))
    short = record(lambda p: [p[0].sin().exp()], normal(3))
    assert len(short._steps) < len(full._steps)


def test_tape_refuses_to_write_tangents_into_constants() -> None:
    class Into(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.buffer = torch.zeros(3, dtype=torch.float64)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Tensor:
            return grads[0] * 1.0

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            return ctx.buffer.copy_(tangents[0]) * 1.0

    with pytest.raises(tape.UnrecordableError, match="into a constant"):
        record(lambda p: [Into.apply(p[0]).sin()], normal(3))
    model = lambda params, buffers, x: Into.apply(params["w"]) * x  # noqa: E731
    bound = ff.linearized(model, ff.likelihoods.categorical())(
        {"w": normal(3)}, {}, ff.Batch(normal(2, 3, seed=1))
    )
    assert bound.engine == fallback.DOUBLE
    assert "into a constant" in bound.reason


def test_tape_refuses_constants_that_change() -> None:
    def function(p: list[Tensor]) -> list[Tensor]:
        scale = torch.ones(3, dtype=torch.float64)
        out = p[0] * scale
        scale.add_(1.0)
        return [out.detach() * 0 + p[0] * scale, forward_ad.unpack_dual(p[0]).primal]

    with pytest.raises(tape.UnrecordableError, match="overwritten in place"):
        record(lambda p: [_used_then_changed(p[0]), *function(p)], normal(3))


def _used_then_changed(x: Tensor) -> Tensor:
    scale = torch.full((3,), 2.0, dtype=torch.float64)
    with torch.no_grad():
        pass
    out = x * scale
    scale.mul_(2.0)
    return out.detach() + x - x
