"""Models without forward mode, attention by its plain formula, embeddings, constants."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cases
import fisherfn as ff
import oracles
from cases import Net, normal
from fisherfn.capture.plain import PlainAttention
from fisherfn.estimators.products import fallback
from fisherfn.layers.attention import plain_attention
from fisherfn.layers.bag import plain_embedding_bag
from fisherfn.layers.composing import plain_weight_norm
from fisherfn.layers.norms import plain_instance_norm, plain_layer_norm
from fisherfn.testing import assert_close

LIK = ff.likelihoods.categorical()


def vector(params: Any, seed: int = 1) -> Any:
    return ff.tree.random_like(ff.random.key(seed), params)


def built(net: nn.Module) -> tuple[Any, Any, Any]:
    return ff.functional(net.eval())


# ---- reverse mode twice --------------------------------------------------------------------------


def lstm() -> tuple[Any, Any, Any]:
    with cases.seeded(0):
        return built(
            Net(lambda m, x: m.head(m.lstm(x)[0]), lstm=nn.LSTM(3, 4, batch_first=True),
                head=nn.Linear(4, 3))
        )  # fmt: skip


def test_float32_lstm_goes_backward_twice_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, params, buffers = lstm()
    batch = ff.Batch(normal(2, 5, 3, dtype=torch.float32))
    wide = {k: p.double() for k, p in params.items()}
    want = ff.fisher_vp(model, LIK)(wide, buffers, ff.Batch(batch.inputs.double()), vector(wide))
    v = {k: t.float() for k, t in vector(wide).items()}
    with caplog.at_level(logging.INFO, "fisherfn"):
        got = ff.fisher_vp(model, LIK)(params, buffers, batch, v)
        bound = ff.linearized(model, LIK)(params, buffers, batch)
    assert_close(got, want, rtol=1e-4)
    assert_close(bound(v), want, rtol=1e-4)
    assert bound.engine == fallback.DOUBLE
    assert "mkldnn_rnn_layer" in bound.reason
    assert any("mkldnn_rnn_layer" in r.message for r in caplog.records)
    stacked = ff.tree.map(lambda t: torch.stack([t, -t]), v)
    assert_close(bound.block(stacked)["head.bias"][1], -want["head.bias"], rtol=1e-4)
    under = torch.vmap(lambda t: ff.fisher_vp(model, LIK)(params, buffers, batch, t))(stacked)
    assert_close(under["head.bias"][0], want["head.bias"], rtol=1e-4)


def test_float32_lstm_has_a_hessian() -> None:
    model, params, buffers = lstm()
    targets = torch.arange(10).reshape(2, 5) % 3
    wide = {k: p.double() for k, p in params.items()}
    x = normal(2, 5, 3)
    want = ff.hvp(model, LIK)(wide, buffers, ff.Batch(x, targets), vector(wide))
    v = {k: t.float() for k, t in vector(wide).items()}
    batch = ff.Batch(x.float(), targets)
    got = ff.hvp(model, LIK)(params, buffers, batch, v)
    bound = ff.linearized(model, LIK, matrix="hessian")(params, buffers, batch)
    for name in want:
        size = want[name].abs().max()
        assert (got[name] - want[name]).abs().max() <= 1e-4 * size
        assert (bound(v)[name] - want[name]).abs().max() <= 1e-4 * size
    assert bound.engine == fallback.DOUBLE


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_modules_go_backward_twice_also_after_their_first_calls() -> None:
    """TorchScript forgets tangents once it has optimised a module; the product then lacks terms."""
    with cases.seeded(0):
        plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
        head = nn.Linear(5, 3).double()
    model, params, buffers = built(nn.Sequential(plain, head))
    scripted, same, _ = built(nn.Sequential(torch.jit.script(plain), head))
    batch, v = ff.Batch(normal(2, 4), torch.tensor([0, 1])), vector(params)
    for _ in range(3):  # what the module does is optimised here
        ff.diagonal(scripted, LIK)(same, buffers, batch)
    for make in (ff.fisher_vp, ff.hvp):
        want = make(model, LIK)(params, buffers, batch, v)
        assert_close(make(scripted, LIK)(same, buffers, batch, v), want, rtol=1e-12)
        over = torch.vmap(lambda t, m=make: m(scripted, LIK)(same, buffers, batch, t))
        stacked = ff.tree.map(lambda t: torch.stack([t, 2 * t]), v)
        assert_close(ff.tree.map(lambda t: t[0], over(stacked)), want, rtol=1e-12)
    for matrix, make in (("fisher", ff.fisher_vp), ("hessian", ff.hvp)):
        bound = ff.linearized(scripted, LIK, matrix=matrix)(same, buffers, batch)
        assert_close(bound(v), make(model, LIK)(params, buffers, batch, v), rtol=1e-12)
        assert bound.engine == fallback.DOUBLE
    with pytest.raises(NotImplementedError, match=r"scripted module at '0'.*drops tangents"):
        torch.func.jvp(lambda p: scripted(p, buffers, batch.inputs), (same,), (v,))


def test_no_derivative_at_all_is_an_error() -> None:
    once: Any = torch.autograd.function.once_differentiable

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return x * 2

        @staticmethod
        @once
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * 2

    model = lambda params, buffers, x: Once.apply(x @ params["w"])  # noqa: E731
    w = {"w": normal(3, 4)}
    batch = ff.Batch(normal(2, 3, seed=1), torch.tensor([0, 1]))
    for product in (ff.fisher_vp, ff.hvp):
        with pytest.raises(ff.UnsupportedError, match="forward, or backward twice, got neither"):
            product(model, LIK)(w, {}, batch, w)


class Doubled(torch.autograd.Function):
    """Without jvp, but with a backward that can be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0] * 2


def test_custom_functions_do_not_compose_without_a_forward_mode() -> None:
    model = lambda params, buffers, x: Doubled.apply(x @ params["w"])  # noqa: E731
    w, batch = {"w": normal(3, 4)}, ff.Batch(normal(2, 3, seed=1), torch.tensor([0, 1]))
    plain = lambda params, buffers, x: 2 * x @ params["w"]  # noqa: E731
    for make in (ff.fisher_vp, ff.hvp):
        product = make(model, LIK)
        assert_close(product(w, {}, batch, w), make(plain, LIK)(w, {}, batch, w), rtol=1e-12)
        with pytest.raises(ff.UnsupportedError, match=r"autograd\.Function without jvp"):
            torch.vmap(lambda t, p=product: p(w, {}, batch, {"w": t}))(w["w"].unsqueeze(0))


def test_errors_of_the_model_itself_pass_through() -> None:
    def model(params: Any, buffers: Any, x: Tensor) -> Tensor:
        raise RuntimeError("my own trouble")

    with pytest.raises(RuntimeError, match="my own trouble"):
        ff.fisher_vp(model, LIK)({"w": normal(3)}, {}, ff.Batch(normal(2, 3)), {"w": normal(3)})


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "causal", "gqa", "scale"),
    [
        (mask, causal, gqa, scale)
        for mask, causal, gqa, scale in itertools.product(
            (None, "bool", "float"), (False, True), (False, True), (None, 0.3)
        )
        if not (mask and causal)
    ],
)
def test_plain_attention_is_the_fused_one(
    mask: str | None, causal: bool, gqa: bool, scale: float | None
) -> None:
    q, k, v = normal(2, 4, 5, 3), normal(2, 4, 6, 3, seed=1), normal(2, 4, 6, 2, seed=2)
    if gqa:
        k, v = k[:, :2], v[:, :2]
    given = None
    if mask == "bool":
        given = normal(2, 1, 5, 6, seed=3) > -0.5
    elif mask == "float":
        given = normal(5, 6, seed=3)
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": gqa, "scale": scale}
    want = F.scaled_dot_product_attention(q, k, v, given, **options)
    assert_close(plain_attention(q, k, v, given, **options), want, rtol=1e-10)


def test_a_causal_gqa_model_with_a_scale_has_the_right_product() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (2, 2)).transpose(1, 2) for f in (m.k, m.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.4)
        return m.head(h.transpose(1, 2).flatten(2))

    def make() -> cases.Built:
        parts = {"q": nn.Linear(3, 8), "k": nn.Linear(3, 4), "v": nn.Linear(3, 4)}
        return cases.Built(Net(forward, **parts, head=nn.Linear(8, 3)).double(), normal(2, 4, 3))

    s = cases.Case("gqa_scale", make).setup()
    v = vector(s.params)
    want = oracles.dense(s.problem) @ ff.tree.ravel(v)[0]
    got = ff.tree.ravel(ff.fisher_vp(s.model, s.likelihood)(*s.args, v))[0]
    assert_close(got, want, rtol=1e-8)


@pytest.mark.parametrize("product", [ff.fisher_vp, ff.hvp])
def test_dropout_in_attention_is_refused(product: Any) -> None:
    def model(params: Any, buffers: Any, x: Tensor) -> Tensor:
        q = (x @ params["w"]).unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)[:, 0]

    w = {"w": normal(3, 3)}
    batch = ff.Batch(normal(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ff.UnsupportedError, match=r"dropout_p=0\.1"):
        product(model, LIK)(w, {}, batch, w)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("hints", [{}, {"is_causal": True}, {"need_weights": True}])
@pytest.mark.parametrize("padded", [False, True])
def test_plain_multi_head_attention_is_the_fused_one(
    options: dict[str, bool], hints: dict[str, bool], padded: bool
) -> None:
    with cases.seeded(0):
        attn = nn.MultiheadAttention(4, 2, batch_first=True, **options).double()
    call = {
        "attn_mask": torch.ones(3, 3, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.tensor([[False] * 3, [True] * 3]) if padded else None,
        "need_weights": False,
        **hints,
    }
    x = normal(2, 3, 4)
    want = attn(x, x, x, **call)[0]
    with PlainAttention():
        got = attn(x, x, x, **call)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_causal_hint_without_a_mask_is_refused_as_by_torch() -> None:
    with cases.seeded(0):
        attn, x = nn.MultiheadAttention(4, 2).double(), normal(3, 2, 4)
    with PlainAttention(), pytest.raises(RuntimeError, match="is_causal hint"):
        attn(x, x, x, is_causal=True, need_weights=False)


def test_example_of_padding_alone_that_is_masked_leaves_the_others_alone() -> None:
    with cases.seeded(0):
        net = cases.Net(
            lambda m, x, pad: m.head(m.attn(x, x, x, key_padding_mask=pad, need_weights=False)[0]),
            attn=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 3),
        ).double()  # fmt: skip
    model, params, buffers = built(net)
    x, pad = normal(3, 2, 4), torch.tensor([[False, False], [False, True], [True, True]])
    args = params, buffers, ff.Batch((x, pad), mask=~pad)
    v = vector(params)
    want = ff.fisher_vp(model, LIK)(params, buffers, ff.Batch((x[:2], pad[:2]), mask=~pad[:2]), v)
    assert_close(ff.fisher_vp(model, LIK)(*args, v), want, rtol=1e-10)
    assert_close(
        ff.diagonal(model, LIK)(*args).mv(v),
        ff.diagonal(model, LIK)(params, buffers, ff.Batch((x[:2], pad[:2]), mask=~pad[:2])).mv(v),
        rtol=1e-10,
    )


def test_dropout_in_multi_head_attention_is_refused() -> None:
    with cases.seeded(0):
        attn = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True).double()
    params = {k: p.detach() for k, p in attn.named_parameters()}

    def model(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(attn, params, (x, x, x))[0]

    with pytest.raises(ff.UnsupportedError, match="dropout_p"):
        ff.fisher_vp(model, LIK)(params, {}, ff.Batch(normal(2, 3, 4)), params)


# ---- functions whose two derivatives differ ------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 1, -1])
def test_plain_embedding_bag_is_the_fused_one(mode: str, padding: int | None) -> None:
    index = torch.tensor([[0, 1, 4], [1, 1, 1], [2, 4, 4]])
    weight = normal(5, 3)
    want = F.embedding_bag(index, weight, mode=mode, padding_idx=padding)
    got = plain_embedding_bag(index, weight, mode=mode, padding_idx=padding)
    assert_close(got, want, rtol=1e-12)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_diagonal_of_an_embedding_bag_has_a_derivative(mode: str) -> None:
    with cases.seeded(0):
        net = Net(lambda m, x: m.head(torch.tanh(m.bag(x))), bag=nn.EmbeddingBag(7, 4, mode=mode),
                  head=nn.Linear(4, 3)).double()  # fmt: skip
    model, params, buffers = built(net)
    batch = ff.Batch(torch.tensor([[0, 1, 4], [1, 1, 1], [2, 4, 6]]))
    diagonal = ff.diagonal(model, LIK)

    def trace(p: Any) -> Tensor:
        return diagonal(p, buffers, batch).trace()

    slope, v = torch.func.grad(trace)(params), vector(params)
    start, unravel = ff.tree.ravel(params)
    step = ff.tree.ravel(v)[0]
    want = oracles.central_difference(lambda p: trace(unravel(p)), start, step)
    assert_close(ff.tree.dot(slope, v), want, rtol=1e-7)
    assert_close(torch.func.jvp(trace, (params,), (v,))[1], want, rtol=1e-7)


def test_weighted_embedding_bag() -> None:
    index, weight, factors = torch.tensor([[0, 2], [1, 1]]), normal(4, 3), normal(2, 2, seed=1)
    want = F.embedding_bag(index, weight, mode="sum", per_sample_weights=factors)
    got = plain_embedding_bag(index, weight, mode="sum", per_sample_weights=factors)
    assert_close(got, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, w: F.embedding(i, w, max_norm=1.0), "max_norm=1.0"),
        (lambda i, w: F.embedding(i, w, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda i, w: F.embedding_bag(i.flatten(), w, i.new_tensor([0, 2])), "offsets"),
    ],
)
def test_embeddings_without_a_derivative_are_refused(call: Any, message: str) -> None:
    model = lambda params, buffers, i: call(i, params["w"])  # noqa: E731
    w = {"w": normal(4, 3)}
    index = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ff.UnsupportedError, match=message):
        ff.output_jvp(model)(w, {}, index, w)


@pytest.mark.parametrize("affine", [True, False])
def test_plain_norms_are_the_fused_ones(affine: bool) -> None:
    x = normal(2, 4, 5)
    w5, b5, w4, b4 = normal(5), normal(5, seed=1), normal(4), normal(4, seed=1)
    given = (w5, b5) if affine else (None, None)
    assert_close(plain_layer_norm(x, (5,), *given), F.layer_norm(x, (5,), *given), rtol=1e-10)
    given = (w4, b4) if affine else (None, None)
    want = F.instance_norm(x, weight=given[0], bias=given[1])
    assert_close(plain_instance_norm(x, weight=given[0], bias=given[1]), want, rtol=1e-10)
    stats = (w4, b4.square())
    want = F.instance_norm(x, *stats, use_input_stats=False)
    assert_close(plain_instance_norm(x, *stats, use_input_stats=False), want, rtol=1e-12)
    half = x.to(torch.bfloat16)
    assert plain_layer_norm(half, (5,)).dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_plain_weight_norm_is_the_fused_one(dim: int) -> None:
    v = normal(3, 4, 2)
    g = torch.norm_except_dim(normal(3, 4, 2, seed=1), 2, dim)
    assert_close(plain_weight_norm(v, g, dim), torch._weight_norm(v, g, dim), rtol=1e-12)


def test_what_a_model_computes_without_grad_is_constant_to_both_derivatives() -> None:
    def model(params: Any, buffers: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (x @ params["w"]).sin().sum(-1, keepdim=True)
        return (x @ params["w"]) * scale

    w, x = {"w": normal(3, 4)}, normal(2, 3, seed=1)
    v = vector(w)
    batch = ff.Batch(x)
    want = ff.dense(model, LIK)(w, {}, batch).mv(v)
    assert_close(ff.fisher_vp(model, LIK)(w, {}, batch, v), want, rtol=1e-10)
    assert_close(ff.linearized(model, LIK)(w, {}, batch)(v), want, rtol=1e-10)
    mapped = torch.vmap(lambda t: ff.fisher_vp(model, LIK)(w, {}, batch, {"w": t}))
    assert_close(mapped(v["w"].unsqueeze(0))["w"][0], want["w"], rtol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["script", "trace"])
def test_whole_modules_may_be_compiled_by_jit(compiler: str) -> None:
    with cases.seeded(0):
        plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = ff.Batch(normal(2, 4), torch.tensor([0, 1]))
    script = torch.jit.script(plain)
    compiled: Any = script if compiler == "script" else torch.jit.trace(plain, batch.inputs)
    model, params, buffers = built(plain)
    scripted, same, _ = built(compiled)
    moved = ff.tree.map(lambda t: t + 0.1, params)  # the values are those that are given
    assert list(same) == list(params)
    want = ff.diagonal(model, LIK)(moved, buffers, batch)
    assert_close(ff.diagonal(scripted, LIK)(moved, buffers, batch).values, want.values, rtol=1e-12)
    v = vector(params)
    product = ff.fisher_vp(model, LIK)(moved, buffers, batch, v)
    assert_close(ff.fisher_vp(scripted, LIK)(moved, buffers, batch, v), product, rtol=1e-12)
