"""`ff.kfac` against loops over examples, positions and labels, in absolute value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kfac import loops
from kfac.layers import CASES, Product, around
from kfac.loops import Case
from torch import Tensor, nn

import fisherfn as ff
from fisherfn.estimators import kfac
from fisherfn.testing import assert_close

# Embeddings: what is read at a position is an observation of its own under either approximation.
REDUCED = [name for name in CASES if not name.startswith("embedding")]


def of_layer(F: Any, name: str = "layer.weight") -> tuple[Tensor, Tensor]:
    return F.inputs[name], F.outputs[name]


def check(case: Case, F: Any, approx: str, **options: Any) -> None:
    """Compare the factors of the layer, and its block in the dense matrix, with the loops."""
    layer = case.module.get_submodule(case.layer)
    table = isinstance(layer, nn.Embedding)
    bias = getattr(layer, "bias", None) is not None
    want = loops.factors(case, approx=approx, bias=bias, **options)
    A, G = of_layer(F)
    assert_close(G, want.G, what="G")
    assert_close(A.diag_embed() if table else A, want.A, what="A")
    assert_close(F.count.double(), torch.tensor(want.count, dtype=torch.float64))
    assert_close(F.rows["layer.weight"].double(), torch.tensor(want.rows, dtype=torch.float64))
    if table:
        return
    params = case.args[0]
    places = loops.places(params, "layer.weight")
    if isinstance(layer, Product) or places.shape[0] != want.G.shape[0] * want.G.shape[1]:
        places = places.T  # stored [in, out]
    places = places.reshape(len(want.G), want.G.shape[1], -1)
    if bias:
        own = loops.places(params, "layer.bias").reshape(len(want.G), -1, 1)
        places = torch.cat([places, own], -1)
    dense = F.to_dense()
    for group, index in enumerate(places.reshape(len(places), -1)):
        block = loops.block(want.G[group], want.A[group])
        assert_close(dense[index][:, index], block, what="block")
        outside = torch.ones(len(dense), dtype=torch.bool)
        outside[index] = False
        assert not bool(dense[index][:, outside].any())


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", CASES)
def test_expand_is_the_loop(name: str, fisher: str) -> None:
    case = CASES[name]()
    F = ff.kfac(case.model, case.likelihood, fisher=fisher)(*case.args)
    check(case, F, "expand", fisher=fisher)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", REDUCED)
def test_reduce_is_the_loop(name: str, fisher: str) -> None:
    case = CASES[name]()
    F = ff.kfac(case.model, case.likelihood, fisher=fisher, approx="reduce")(*case.args)
    check(case, F, "reduce", fisher=fisher)


MASK = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
EXISTS = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])


@pytest.mark.parametrize("unit", ["example", "position"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [None, EXISTS], ids=["mask", "positions"])
@pytest.mark.parametrize("weighted", [False, True])
def test_masks_positions_and_weights(
    unit: str, approx: str, positions: Any, weighted: bool
) -> None:
    case = CASES["linear_positions"]()
    weights = None
    if weighted:
        shape = (3,) if unit == "example" else (3, 3)
        weights = loops.normal(8, *shape).square() + 0.1
    case = replace(case, mask=MASK, positions=positions, weights=weights)
    for fisher in ("exact", "empirical"):
        options: dict[str, Any] = {"fisher": fisher, "approx": approx, "unit": unit}
        F = ff.kfac(case.model, case.likelihood, **options)(*case.args)
        check(case, F, **options)


@pytest.mark.parametrize("name", ["linear_pooled", "conv2d_groups", "depthwise", "conv1d"])
def test_layers_whose_rows_are_no_positions_of_the_output_count_by_example(name: str) -> None:
    case = CASES[name]()
    weights = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)
    case = replace(case, weights=weights)
    for approx in ("expand", "reduce"):
        F = ff.kfac(case.model, case.likelihood, approx=approx)(*case.args)
        check(case, F, approx)


@pytest.mark.parametrize("fisher", ["mc", "curvature_prop"])
@pytest.mark.parametrize("count", [64, 256])
def test_drawn_labels_are_unbiased(fisher: str, count: int) -> None:
    case = CASES["linear"]()
    fim = ff.kfac(case.model, case.likelihood, fisher=fisher)
    keys = ff.random.split(ff.random.key(11), count)
    draws = torch.stack([fim(*case.args, key=key).outputs["layer.weight"] for key in keys])
    want = loops.factors(case).G
    stderr = draws.std(0) / count**0.5
    assert bool(((draws.mean(0) - want).abs() < 5 * stderr + 1e-12).all())
    assert bool((stderr > 0).any())
    many = ff.kfac(case.model, case.likelihood, fisher=fisher, num_samples=4)
    found = many(*case.args, key=keys[0])
    assert_close(found.inputs["layer.weight"], loops.factors(case).A)


def test_several_draws_are_the_mean_of_single_ones() -> None:
    case = CASES["linear_positions"]()
    key = ff.random.key(3)
    many = ff.kfac(case.model, case.likelihood, fisher="mc", num_samples=3)(*case.args, key=key)
    chunked = ff.kfac(case.model, case.likelihood, fisher="mc", num_samples=3, chunk_size=1)
    again = chunked(*case.args, key=key)
    for name in many.outputs:
        assert_close(many.outputs[name], again.outputs[name])
        assert_close(many.inputs[name], again.inputs[name])
    one = ff.kfac(case.model, case.likelihood, fisher="mc")(*case.args, key=key)
    assert_close(many.inputs, one.inputs)
    assert not torch.equal(many.outputs["layer.weight"], one.outputs["layer.weight"])


@pytest.mark.parametrize("name", ["linear_positions", "conv2d_groups", "embedding"])
def test_forward_only_has_the_identity_for_outputs(name: str) -> None:
    case = CASES[name]()
    exact = ff.kfac(case.model, case.likelihood)(*case.args)
    F = ff.kfac(case.model, case.likelihood, fisher="forward_only")(*case.args)
    assert_close(F.inputs, exact.inputs)
    assert F.fisher == "forward_only"
    for G in F.outputs.values():
        assert torch.equal(G, torch.eye(G.shape[-1], dtype=G.dtype).expand_as(G))
    for values in F.rest.values():
        assert torch.equal(values, torch.ones_like(values))


# ---- the bias ------------------------------------------------------------------------------------


def test_a_separate_bias_has_the_output_factor_for_a_block() -> None:
    case = CASES["conv2d_groups"]()
    joint = ff.kfac(case.model, case.likelihood)(*case.args)
    apart = ff.kfac(case.model, case.likelihood, bias="separate")(*case.args)
    assert [b.name for b in apart.blocks] == [
        "layer.weight",
        "layer.bias",
        "head.weight",
        "head.bias",
    ]
    assert_close(apart.outputs["layer.bias"], joint.outputs["layer.weight"])
    assert_close(apart.inputs["layer.weight"], joint.inputs["layer.weight"][:, :-1, :-1])
    place = loops.places(case.args[0], "layer.bias")
    G = torch.block_diag(*joint.outputs["layer.weight"])
    assert_close(apart.to_dense()[place][:, place], G)
    assert_close(apart.to_dense()[place][:, place], joint.to_dense()[place][:, place])


def test_a_diagonal_bias_is_exact() -> None:
    case = CASES["linear_positions"]()
    F = ff.kfac(case.model, case.likelihood, bias="diagonal")(*case.args)
    exact = ff.diagonal(case.model, case.likelihood)(*case.args).values
    assert set(F.rest) == {"layer.bias", "head.bias"}
    for path, values in F.rest.items():
        assert_close(values, exact[path])


# ---- who has a block -----------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is read and multiplied by, a layer used twice, a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.twice = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.twice(torch.tanh(self.twice(self.table(ids)))))
        return h @ self.table.weight.T


def test_what_has_no_block_keeps_its_exact_diagonal() -> None:
    module = loops.seeded(Tied)
    model, params, buffers = ff.functional(module)
    batch = ff.Batch(torch.tensor([[0, 1], [4, 1], [2, 2]]))
    likelihood = ff.likelihoods.categorical()
    F = ff.kfac(model, likelihood)(params, buffers, batch)
    exact = ff.diagonal(model, likelihood)(params, buffers, batch).values
    assert F.blocks == ()
    assert_close(F.rest, exact)
    assert_close(F.to_dense(), torch.cat([x.reshape(-1) for x in exact.values()]).diag())


class Attention(nn.Module):
    """`nn.MultiheadAttention`, or the same from single layers."""

    def __init__(self, *, packed: bool, cross: bool) -> None:
        super().__init__()
        self.packed, self.cross = packed, cross
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        other = torch.cos(x) if self.cross else x
        if self.packed:
            h = self.attn(x, other, other, need_weights=False)[0]
        else:
            q, k, v = self.q(x), self.k(other), self.v(other)
            q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v))
            mixed = torch.softmax(q @ k.mT / 2**0.5, -1) @ v
            h = self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_queries_keys_and_values_of_attention_are_layers_of_their_own(
    cross: bool, approx: str
) -> None:
    packed: Any = loops.seeded(lambda: Attention(packed=True, cross=cross))
    single: Any = loops.seeded(lambda: Attention(packed=False, cross=cross))
    with torch.no_grad():
        packed.attn.in_proj_bias.copy_(loops.normal(4, 12))
        parts = zip(
            "qkv",
            packed.attn.in_proj_weight.chunk(3),
            packed.attn.in_proj_bias.chunk(3),
            strict=True,
        )
        for name, weight, bias in parts:
            single.get_submodule(name).weight.copy_(weight)
            single.get_submodule(name).bias.copy_(bias)
        single.out.load_state_dict(packed.attn.out_proj.state_dict())
        single.head.load_state_dict(packed.head.state_dict())
    batch = ff.Batch(loops.normal(2, 3, 3, 4))
    likelihood = ff.likelihoods.categorical()
    found = []
    for module in (packed, single):
        model, params, buffers = ff.functional(module)
        found.append(ff.kfac(model, likelihood, approx=approx)(params, buffers, batch))
    F, want = found
    if cross:
        got = [of_layer(F, f"attn.in_proj_weight[{i}]") for i in range(3)]
    else:
        A, G = of_layer(F, "attn.in_proj_weight")
        assert A.shape == (1, 5, 5)
        got = [(A, G[i : i + 1]) for i in range(3)]
    for name, (A, G) in zip("qkv", got, strict=True):
        assert_close(A, want.inputs[f"{name}.weight"])
        # the cotangents of keys add up to zero over positions
        torch.testing.assert_close(G, want.outputs[f"{name}.weight"], rtol=1e-8, atol=1e-16)
    assert_close(of_layer(F, "attn.out_proj.weight"), of_layer(want, "out.weight"))
    v = {
        name: loops.normal(i, *p.shape)
        for i, (name, p) in enumerate(ff.functional(packed)[1].items())
    }
    w = {name: torch.zeros_like(p) for name, p in ff.functional(single)[1].items()}
    for i, name in enumerate("qkv"):
        w[f"{name}.weight"] = v["attn.in_proj_weight"].chunk(3)[i]
        w[f"{name}.bias"] = v["attn.in_proj_bias"].chunk(3)[i]
    got_v, want_v = F.solve(v, damping=0.1), want.solve(w, damping=0.1)
    for i, name in enumerate("qkv"):
        assert_close(got_v["attn.in_proj_weight"].chunk(3)[i], want_v[f"{name}.weight"])
        assert_close(got_v["attn.in_proj_bias"].chunk(3)[i], want_v[f"{name}.bias"])


class LoRA(nn.Module):
    """A frozen layer with a product of two thin ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: Tensor
        self.register_buffer("frozen", 0.5 * torch.randn(3, 4))
        self.a = nn.Parameter(torch.randn(2, 4))
        self.b = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.frozen.T + 0.5 * nn.functional.linear(x @ self.a.T, self.b)


def test_adapters_have_a_block_each() -> None:
    module = loops.seeded(LoRA)
    model, params, buffers = ff.functional(module)
    x = loops.normal(1, 1, 4)
    likelihood = ff.likelihoods.categorical()
    F = ff.kfac(model, likelihood)(params, buffers, ff.Batch(x))
    assert [b.name for b in F.blocks] == ["a", "b"]
    exact = ff.block_diagonal(model, likelihood)(params, buffers, ff.Batch(x))
    assert_close(F.to_dense(), exact.to_dense())  # one datum


def test_layers_that_read_one_tensor_share_a_factor_and_its_decomposition() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    model, params, buffers = ff.functional(loops.seeded(Two))
    F = ff.kfac(model, ff.likelihoods.categorical())(
        params, buffers, ff.Batch(loops.normal(1, 5, 4))
    )
    assert F.inputs["a.weight"] is F.inputs["b.weight"]
    E = F.eigh()
    assert E.input_basis["a.weight"].data_ptr() == E.input_basis["b.weight"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_input_is_multiplied_once_also_where_values_are_hidden(
    dtype: torch.dtype, monkeypatch: Any
) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
            self.c = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sin(x)
            return self.a(h) * self.b(h) + self.c(h)

    asked = []
    true = kfac.input_moments

    def input_moments(form: Any, *args: Any, **options: Any) -> Any:
        asked.append(options["bias"])
        return true(form, *args, **options)

    monkeypatch.setattr(kfac, "input_moments", input_moments)
    model, params, buffers = ff.functional(loops.seeded(Three).to(dtype))
    batch = ff.Batch(loops.normal(1, 5, 4).to(dtype))
    fim = ff.kfac(model, ff.likelihoods.categorical())
    want = fim(params, buffers, batch)
    assert sorted(asked) == [False, True]
    many = {name: torch.stack([p, p]) for name, p in params.items()}
    got = torch.vmap(lambda p: fim(p, buffers, batch).inputs["b.weight"])(many)
    assert sorted(asked) == [False, False, True, True]
    torch.testing.assert_close(got[1], want.inputs["b.weight"])


def test_a_constant_factor_of_a_weight_scales_its_block() -> None:
    def model(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return x @ (params["w"] * 3.0)

    params = {"w": loops.normal(3, 4, 3)}
    batch = ff.Batch(loops.normal(1, 1, 4))
    likelihood = ff.likelihoods.categorical()
    F = ff.kfac(model, likelihood)(params, {}, batch)
    assert len(F.blocks) + len(F.rest) == 1
    want = ff.dense(model, likelihood)(params, {}, batch).to_dense()
    if F.blocks:
        assert_close(F.to_dense(), want)
    else:
        assert_close(F.to_dense(), want.diagonal().diag())


def test_pooled_positions_of_a_linear_layer_are_reduced_exactly() -> None:
    case = around(lambda: nn.Linear(4, 3), 3, 2, 4, pool=True)
    F = ff.kfac(case.model, case.likelihood, approx="reduce")(*case.args)
    assert F.approx == "reduce"
    assert F.rows["layer.weight"] == 3
