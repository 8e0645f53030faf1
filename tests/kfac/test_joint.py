"""Layers with a common block against the one layer whose weights are theirs, stacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kfac import loops
from kfac.stacked import KINDS, MASK, Pair, block_places, draw, pair, vector
from torch import Tensor, nn

import fisherfn as ff
from fisherfn.testing import assert_close

DRAWN = {"mc": ff.random.key(3), "curvature_prop": ff.random.key(4)}
EXISTS = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])


def check(found: Pair, F: Any, want: Any) -> None:
    """Compare factors, and all entries of the matrix, those between layers included."""
    assert_close(F.inputs[found.name], want.inputs["layers.all.weight"], what="A")
    assert_close(F.outputs[found.name], want.outputs["layers.all.weight"], what="G")
    assert_close(F.rows[found.name], want.rows["layers.all.weight"])
    order = found.order
    assert_close(F.to_dense()[order][:, order], want.to_dense(), what="matrix")


@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc", "curvature_prop", "forward_only"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", KINDS)
def test_the_block_is_that_of_the_stacked_layer(name: str, approx: str, fisher: str) -> None:
    found = pair(name)
    F, want = found.both(ff.kfac, DRAWN.get(fisher), fisher=fisher, approx=approx)
    check(found, F, want)
    assert [b.name for b in F.blocks] == [found.name, "head.weight"]


@pytest.mark.parametrize("bias", ["joint", "separate", "diagonal"])
@pytest.mark.parametrize("name", ["linear_positions", "conv2d_groups", "flattened"])
def test_biases_go_with_their_weights(name: str, bias: str) -> None:
    found = pair(name)
    F, want = found.both(ff.kfac, bias=bias)
    check(found, F, want)
    if bias == "separate":
        assert F.blocks[1].name == found.name.replace("weight", "bias")
        assert F.outputs[F.blocks[1].name] is F.outputs[found.name]


@pytest.mark.parametrize("unit", ["example", "position"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [None, EXISTS], ids=["mask", "positions"])
def test_masks_positions_and_weights(unit: str, approx: str, positions: Any) -> None:
    shape = (3,) if unit == "example" else (3, 3)
    weights = loops.normal(8, *shape).square() + 0.1
    found = pair("linear_positions", mask=MASK, weights=weights, positions=positions)
    options: dict[str, Any] = {"unit": unit, "approx": approx}
    for fisher in ("exact", "empirical"):
        F, want = found.both(ff.kfac, fisher=fisher, **options)
        check(found, F, want)
        loop = loops.factors(found.one, fisher=fisher, **options)
        assert_close(F.outputs[found.name], loop.G, what="G of the loop")
        assert_close(F.inputs[found.name], loop.A, what="A of the loop")


@pytest.mark.parametrize("name", ["linear_positions", "conv2d_groups", "flattened"])
def test_chunks_and_draws(name: str) -> None:
    found = pair(name, size=5)
    options: dict[str, Any] = {"fisher": "mc", "num_samples": 3}
    F, want = found.both(ff.kfac, ff.random.key(1), chunk_size=2, **options)
    check(found, F, want)
    whole, _ = found.both(ff.kfac, ff.random.key(1), **options)
    assert_close(F.to_dense(), whole.to_dense())
    exact, want = found.both(ff.kfac, chunk_size=1)
    check(found, exact, want)


@pytest.mark.parametrize("widest", [4, 6])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_wide_factors_are_rows(widest: int, bias: str) -> None:
    """Five inputs with the bias, eight outputs together, two or four apart."""
    found = pair("linear_positions")
    F, want = found.both(ff.kfac, bias=bias, widest=widest)
    assert F.blocks[0].output_form == "rows"
    check(found, F, want)
    v = draw(found.several.args[0])
    E, _ = found.both(ff.ekfac, bias=bias, widest=widest)
    for result in (F, E):
        dense = result.to_dense()
        shifted = dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype)
        assert_close(vector(result.solve(v, damping=0.1)), torch.linalg.solve(shifted, vector(v)))
    exact = ff.diagonal(found.several.model, found.several.likelihood)(*found.several.args)
    assert_close(E.trace(), exact.trace())


@pytest.mark.parametrize("name", ["linear", "linear_without_bias"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_one_datum_is_exact_between_layers_too(name: str, fisher: str) -> None:
    found = pair(name, size=1)
    case = found.several
    F = ff.kfac(case.model, case.likelihood, fisher=fisher, joint=found.joint)(*case.args)
    exact = ff.dense(case.model, case.likelihood, fisher=fisher)(*case.args).to_dense()
    place = block_places(found)
    assert_close(F.to_dense()[place][:, place], exact[place][:, place])
    apart = ff.kfac(case.model, case.likelihood, fisher=fisher)(*case.args).to_dense()
    assert (apart[place][:, place] - exact[place][:, place]).norm() > 0.1 * exact.norm()


def test_terms_between_layers_are_in_their_places() -> None:
    found = pair("linear_positions")
    F, _ = found.both(ff.kfac)
    A, G = F.inputs[found.name][0], F.outputs[found.name][0]
    params, dense = found.several.args[0], F.to_dense()
    starts = dict(zip("qkv", (0, 2, 6), strict=True))
    for one, first in starts.items():
        rows = loops.places(params, f"layers.{one}.weight")
        for other, second in starts.items():
            columns = loops.places(params, f"layers.{other}.weight")
            shift = loops.places(params, f"layers.{other}.bias")
            for o in range(len(rows)):
                for p in range(len(columns)):
                    g = G[first + o, second + p]
                    assert_close(dense[rows[o]][:, columns[p]], g * A[:4, :4])
                    assert_close(dense[rows[o], shift[p]], g * A[:4, 4])


# ---- EKFAC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear_positions", "conv1d", "flattened"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_scales_are_the_squared_rotated_scores(name: str, bias: str) -> None:
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    found = pair(name, weights=weights)
    E, _ = found.both(ff.ekfac, fisher="empirical", bias=bias)
    case = found.several
    rows = ff.per_sample_gradients(case.model, case.likelihood)(*case.args)
    stacked: dict[str, Any] = {}
    for n in range(3):
        for k, leaf in found.stacked({k: x[n] for k, x in rows.items()}).items():
            stacked.setdefault(k, []).append(leaf)
    scores = {k: torch.stack(x) for k, x in stacked.items()}
    W = scores["layers.all.weight"]
    W = W.mT if found.kind.axis else W.flatten(2)
    b = scores["layers.all.bias"].unsqueeze(-1)

    def check_block(name: str, W: Tensor) -> None:
        turned = E.output_basis[name][0].mT @ W @ E.input_basis[name][0]
        want = (weights[:, None, None] * turned.square()).sum(0) / weights.sum()
        assert_close(E.scales[name][0], want)

    if bias == "joint":
        check_block(found.name, torch.cat([W, b], -1))
    else:
        check_block(found.name, W)
        check_block(found.name.replace("weight", "bias"), b)


def test_ekfac_is_at_least_as_near_as_kfac_and_as_separate_blocks() -> None:
    found = pair("linear_positions", size=4)
    case = found.several
    exact = ff.dense(case.model, case.likelihood)(*case.args).to_dense()
    place = block_places(found)
    distance = {}
    for name, make, joint in (
        ("E", ff.ekfac, found.joint),
        ("K", ff.kfac, found.joint),
        ("apart", ff.ekfac, ()),
    ):
        dense = make(case.model, case.likelihood, joint=joint)(*case.args).to_dense()
        distance[name] = (dense - exact)[place][:, place].norm()
    assert distance["E"] <= distance["K"] * (1 + 1e-9)
    assert distance["E"] < distance["apart"]


def test_an_earlier_basis_is_used_and_results_in_it_merge() -> None:
    found = pair("conv2d_groups", size=4)
    case = found.several
    model, lik, (params, buffers, batch) = case.model, case.likelihood, case.args
    basis = ff.kfac(model, lik, joint=found.joint)(params, buffers, batch)
    fim = ff.ekfac(model, lik, basis, joint=found.joint)
    parts = [
        fim(params, buffers, ff.Batch(batch.inputs[rows], batch.targets[rows]))
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert_close(ff.merge(*parts), fim(params, buffers, batch))
    assert fim(params, buffers, batch).basis == "given"
    with pytest.raises(ff.TreeMismatchError, match="ekfac: expected a basis for a block"):
        ff.ekfac(model, lik, basis)(params, buffers, batch)


# ---- partitions and parts of parameters ----------------------------------------------------------


@pytest.mark.parametrize("make", [ff.kfac, ff.ekfac])
@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("name", ["linear_positions", "flattened", "conv1d", "conv2d_groups"])
def test_heads_of_all_layers_go_together(name: str, bias: str, make: Any) -> None:
    """Two heads: the first half of the outputs of q, of k and of v, and the other halves.

    The groups of a convolution are two as they are.
    """
    found, case = pair(name), pair(name).several
    heads = {path: 2 // found.kind.groups for path in found.joint[0]}
    options: dict[str, Any] = {"bias": bias, "joint": found.joint}
    F = make(case.model, case.likelihood, partition=heads, **options)(*case.args)
    assert F.blocks[0].groups == 2
    if make is ff.ekfac:
        exact = ff.diagonal(case.model, case.likelihood)(*case.args)
        assert_close(F.trace(), exact.trace())
        return
    whole = ff.kfac(case.model, case.likelihood, **options)(*case.args)
    want, got = whole.to_dense(), F.to_dense()
    index = [loops.places(case.args[0], path) for path in found.joint[0]]
    cut = [i.chunk(2, found.kind.axis) for i in index]
    of_head = [torch.cat([halves[h].reshape(-1) for halves in cut]) for h in range(2)]
    for h, rows in enumerate(of_head):
        assert_close(got[rows][:, rows], want[rows][:, rows])
        assert not bool(got[rows][:, of_head[1 - h]].any())


class Packed(nn.Module):
    """Projections of attention in one tensor, cut by the model; the output has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(0.5 * torch.randn(7, 4))
        self.shift = nn.Parameter(0.5 * torch.randn(7))
        self.other = nn.Linear(4, 2)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        cut = zip(self.packed.split([3, 4]), self.shift.split([3, 4]), strict=True)
        found = [nn.functional.linear(h, w, b) for w, b in cut]
        return self.head(torch.tanh(torch.cat([*found, self.other(h)], -1)))


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_parts_of_a_parameter_join_by_their_numbers(bias: str) -> None:
    module = loops.seeded(Packed)
    model, params, buffers = ff.functional(module)
    batch = ff.Batch(loops.normal(1, 3, 4))
    lik = ff.likelihoods.categorical()
    names = ("packed[1]", "other.weight", "packed[0]")
    F = ff.kfac(model, lik, joint=[names], bias=bias)(params, buffers, batch)
    assert F.blocks[0].name == "packed[1]+other.weight+packed[0]"
    if bias == "separate":
        assert F.blocks[1].name == "shift[1]+other.bias+shift[0]"
    one = ff.Batch(batch.inputs[:1])
    F = ff.kfac(model, lik, joint=[names], bias=bias)(params, buffers, one)
    exact = ff.dense(model, lik)(params, buffers, one).to_dense()
    wanted = ("packed", "other.weight")
    place = torch.cat([loops.places(params, name).reshape(-1) for name in wanted])
    assert_close(F.to_dense()[place][:, place], exact[place][:, place])


def test_attention_joins_with_its_queries_keys_and_values_uncut() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
            self.gate, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.attn(x, x, x, need_weights=False)[0]
            return self.head(torch.tanh(h * self.gate(x)))

    model, params, buffers = ff.functional(loops.seeded(Attention))
    batch, lik = ff.Batch(loops.normal(1, 2, 3, 4)), ff.likelihoods.categorical()
    whole = {"attn.in_proj_weight": 1}
    joint = [("attn.in_proj_weight", "gate.weight")]
    F = ff.kfac(model, lik, joint=joint, partition=whole)(params, buffers, batch)
    assert F.outputs["attn.in_proj_weight+gate.weight"].shape == (1, 16, 16)
    apart = ff.kfac(model, lik, partition=whole)(params, buffers, batch)
    G = F.outputs["attn.in_proj_weight+gate.weight"][0]
    assert_close(G[:12, :12], apart.outputs["attn.in_proj_weight"][0])
    assert_close(G[12:, 12:], apart.outputs["gate.weight"][0])
    with pytest.raises(ff.OptionError, match=r"many blocks, got 1 at gate\.weight and 3 at attn"):
        ff.kfac(model, lik, joint=joint)(params, buffers, batch)


class Uneven(nn.Module):
    """As in speech models: keys have no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 2, bias=False)
        self.v, self.head = nn.Linear(4, 4), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.cat([self.q(x), self.k(x), self.v(x)], -1)))


@pytest.mark.parametrize("widest", [3, 8, 100])
def test_layers_without_a_bias_may_join_where_biases_are_apart(widest: int) -> None:
    model, params, buffers = ff.functional(loops.seeded(Uneven))
    batch, lik = ff.Batch(loops.normal(1, 6, 4)), ff.likelihoods.categorical()
    options: dict[str, Any] = {"joint": [("q.weight", "k.weight", "v.weight")], "widest": widest}
    F = ff.kfac(model, lik, bias="separate", **options)(params, buffers, batch)
    full = ff.kfac(model, lik, bias="separate", joint=options["joint"])(params, buffers, batch)
    G = full.outputs["q.weight+k.weight+v.weight"][0]
    keep = [0, 1, 2, 5, 6, 7, 8]
    place = torch.cat([loops.places(params, f"{name}.bias") for name in "qv"])
    assert_close(F.to_dense()[place][:, place], G[keep][:, keep])
    assert_close(F.to_dense(), full.to_dense())
    E = ff.ekfac(model, lik, bias="separate", **options)(params, buffers, batch)
    exact = ff.diagonal(model, lik)(params, buffers, batch)
    assert_close(E.trace(), exact.trace())
    D = ff.kfac(model, lik, bias="diagonal", **options)(params, buffers, batch)
    assert_close(D.rest["q.bias"], exact.values["q.bias"])
    with pytest.raises(ff.OptionError, match=r"have a bias, or none of them, got none at k\.weigh"):
        ff.kfac(model, lik, **options)(params, buffers, batch)
