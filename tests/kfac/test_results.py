"""What can be asked of Kronecker results, and what is refused: damping, sums, merging, files."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kfac import loops
from kfac.layers import CASES, around
from torch import Tensor, nn

import fisherfn as ff
from fisherfn.core import trees
from fisherfn.testing import assert_close


def vector(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)])


def results(name: str = "conv2d_groups", **options: Any) -> tuple[Any, Any, Any]:
    """K-FAC and EKFAC of a case, and a vector."""
    case = CASES[name]()
    K = ff.kfac(case.model, case.likelihood, **options)(*case.args)
    E = ff.ekfac(case.model, case.likelihood, **options)(*case.args)
    params = case.args[0]
    return K, E, {k: loops.normal(i, *p.shape) for i, (k, p) in enumerate(params.items())}


# ---- damping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["conv2d_groups", "embedding", "linear_positions"])
def test_damping_is_added_to_the_matrix(name: str, which: int) -> None:
    *Fs, v = results(name)
    F, x = Fs[which], vector(v)
    dense = F.to_dense()
    for damping in (1e-4, torch.tensor(0.3)):
        shifted = dense + float(damping) * torch.eye(len(dense), dtype=dense.dtype)
        torch.testing.assert_close(
            vector(F.solve(v, damping=damping)),
            torch.linalg.solve(shifted, x),
            rtol=1e-7,
            atol=1e-9,
        )
        torch.testing.assert_close(
            F.logdet(damping=damping), torch.logdet(shifted), rtol=1e-7, atol=1e-9
        )
        values, vectors = torch.linalg.eigh(shifted)
        root = vectors @ (values**-0.5 * (vectors.T @ x))
        torch.testing.assert_close(
            vector(F.pow(v, -0.5, damping=damping)), root, rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("which", [0, 1], ids=["kfac", "ekfac"])
def test_relative_damping_is_in_units_of_the_mean_eigenvalue(which: int) -> None:
    *Fs, v = results()
    F = Fs[which]
    mean = F.trace() / F.layout.size
    assert_close(F.eigenvalues().mean(), mean)
    assert_close(
        F.solve(v, damping=0.1, relative=True), F.solve(v, damping=0.1 * float(mean)), rtol=1e-6
    )
    assert_close(
        F.logdet(damping=0.1, relative=True), F.logdet(damping=0.1 * float(mean)), rtol=1e-6
    )
    scaled = 100.0 * F
    assert_close(
        trees.scale(scaled.solve(v, damping=0.1, relative=True), 100.0),
        F.solve(v, damping=0.1, relative=True),
    )
    with pytest.raises(ff.OptionError, match="expected damping >= 0"):
        F.solve(v, damping=-0.1, relative=True)


@pytest.mark.parametrize("which", [0, 1], ids=["kfac", "ekfac"])
def test_relative_damping_of_what_is_not_a_number_names_the_layer(which: int) -> None:
    *Fs, v = results()
    field = ("inputs", "scales")[which]
    name = Fs[which].blocks[-1].name
    parts = {**getattr(Fs[which], field)}
    parts[name] = torch.full_like(parts[name], torch.nan)
    F = replace(Fs[which], **{field: parts})
    with pytest.raises(ff.NotPositiveDefiniteError, match=f"NaN at {name} with damping"):
        F.solve(v, damping=0.1, relative=True)


def test_factored_damping_is_that_of_both_factors() -> None:
    K, _, v = results("linear")
    damping = 0.05
    dense = []
    for b in K.blocks:
        A, G = K.inputs[b.name][0], K.outputs[b.name][0]
        pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
        root = math.sqrt(damping)
        A = A + pi * root * torch.eye(len(A), dtype=A.dtype)
        G = G + root / pi * torch.eye(len(G), dtype=G.dtype)
        dense.append(torch.linalg.inv(torch.kron(G, A)))
    got = K.solve(v, damping=damping, factored=True)
    for b, inverse in zip(K.blocks, dense, strict=True):
        assert b.bias is not None
        W = torch.cat([v[b.weight.path], v[b.bias.path].unsqueeze(1)], 1)
        want = (inverse @ W.reshape(-1)).reshape(W.shape)
        assert_close(got[b.weight.path], want[:, :-1])
        assert_close(got[b.bias.path], want[:, -1])


def test_a_decomposition_is_made_once_and_used_for_everything() -> None:
    K, _, v = results()
    E = K.eigh()
    assert_close(E.to_dense(), K.to_dense())
    for damping in (0.01, 1.0):
        assert_close(E.solve(v, damping=damping), K.solve(v, damping=damping))
        assert_close(E.logdet(damping=damping), K.logdet(damping=damping))
        key = ff.random.key(2)
        assert_close(E.sample(key, damping=damping), K.sample(key, damping=damping))
    assert_close(E.eigenvalues(), K.eigenvalues())


def test_a_decomposition_leaves_out_a_large_null_space() -> None:
    case = around(lambda: nn.Linear(90, 70), 70, 90, pool=False)
    K = ff.kfac(case.model, case.likelihood)(*case.args)
    E, full = K.eigh(), K.eigh(thin=False)
    assert E.input_basis["layer.weight"].shape == (1, 91, 3)
    assert full.input_basis["layer.weight"].shape == (1, 91, 91)
    assert E.blocks[0].input_form == "rows"
    params = case.args[0]
    v = {k: loops.normal(i, *p.shape) for i, (k, p) in enumerate(params.items())}
    for damping in (1e-3, 1.0):
        assert_close(E.solve(v, damping=damping), full.solve(v, damping=damping))
        assert_close(E.logdet(damping=damping), full.logdet(damping=damping))
    torch.testing.assert_close(E.eigenvalues(), full.eigenvalues(), rtol=1e-9, atol=1e-12)
    own = ff.ekfac(case.model, case.likelihood)(*case.args)
    assert own.blocks[0].input_form == "rows"
    exact = ff.diagonal(case.model, case.likelihood)(*case.args)
    assert_close(own.trace(), exact.trace())
    with pytest.raises(ff.NotPositiveDefiniteError, match=r"at layer\.weight with damping 0"):
        own.solve(v)


# ---- numbers, sums, merging ----------------------------------------------------------------------


def test_multiples_and_sums_of_one_result() -> None:
    K, E, _ = results()
    for F in (K, E):
        dense = F.to_dense()
        assert_close((2.0 * F + 3.0 * F).to_dense(), 5.0 * dense)
        assert_close((F * -0.5).to_dense(), -0.5 * dense)
    # equal inputs: the outputs add
    twice = replace(K, outputs=trees.scale(K.outputs, 2.0), rest=trees.scale(K.rest, 2.0))
    assert_close((K + twice).to_dense(), 3.0 * K.to_dense())


def test_a_sum_of_different_blocks_is_refused() -> None:
    K, E, _ = results()
    other = replace(
        K, inputs=trees.map(lambda x: x.square(), K.inputs), outputs=trees.scale(K.outputs, 2.0)
    )
    with pytest.raises(ff.OptionError, match=r"F \+ G: expected blocks that agree .* at layer"):
        _ = K + other
    compiled = torch.compile(lambda a, b: (a + b).trace(), fullgraph=True, backend="eager")
    assert bool(compiled(K, other).isnan())
    assert_close(compiled(K, 3.0 * K), 4.0 * K.trace())
    torch._dynamo.reset()
    turned = replace(E, output_basis=trees.map(lambda q: q.flip(-1), E.output_basis))
    with pytest.raises(ff.OptionError, match="expected two results in the same bases, got others"):
        _ = E + turned
    with pytest.raises(ff.OptionError, match="merge: expected two results in the same bases"):
        ff.merge(E, turned)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_merged_is_the_result_on_all_the_data(approx: str) -> None:
    case = CASES["linear_positions"]()
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    case = replace(case, mask=mask, weights=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    fim = ff.kfac(case.model, case.likelihood, approx=approx)
    params, buffers, batch = case.args
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        fields = {
            f.name: getattr(batch, f.name)[rows]
            for f in dataclasses.fields(batch)
            if getattr(batch, f.name) is not None
        }
        parts.append(fim(params, buffers, ff.Batch(**fields)))
    whole = fim(params, buffers, batch)
    merged = ff.merge(*parts)
    assert_close(merged, whole)
    assert_close(ff.merge(whole, ff.empty_like(whole)), whole)
    # a mean of the matrices themselves is something else
    mean = sum(float(F.count) * F.to_dense() for F in parts) / float(whole.count)
    assert (mean - whole.to_dense()).norm() > 1e-6 * whole.to_dense().norm()


def test_results_of_other_approximations_or_models_do_not_join() -> None:
    case = CASES["linear_positions"]()
    expand = ff.kfac(case.model, case.likelihood)(*case.args)
    reduce = ff.kfac(case.model, case.likelihood, approx="reduce")(*case.args)
    with pytest.raises(ff.OptionError, match="two results with the same approx, got 'expand'"):
        ff.merge(expand, reduce)
    apart = ff.kfac(case.model, case.likelihood, bias="separate")(*case.args)
    with pytest.raises(ff.TreeMismatchError, match="two results with the same blocks"):
        ff.merge(expand, apart)
    other, _, v = results("linear_without_bias")
    with pytest.raises(ff.TreeMismatchError, match="merge: expected the second params like"):
        ff.merge(expand, other)
    with pytest.raises(ff.TreeMismatchError, match=r"KFAC\.solve: expected v like params"):
        expand.solve(v, damping=0.1)
    with pytest.raises(ff.OptionError, match="two results of one class, got KFAC and EKFAC"):
        ff.merge(expand, expand.eigh())


def test_results_are_saved_and_loaded(tmp_path: Path) -> None:
    K, E, v = results("embedding")
    for F in (K, E, K.eigh()):
        ff.io.save(tmp_path / "F.safetensors", F)
        again = ff.io.load(tmp_path / "F.safetensors")
        assert type(again) is type(F)
        assert again.blocks == F.blocks
        assert trees.structure(again) == trees.structure(F)
        for a, b in zip(trees.leaves(again), trees.leaves(F), strict=True):
            assert torch.equal(a, b)
        assert_close(again.solve(v, damping=0.1), F.solve(v, damping=0.1))


# ---- compiled, several at once -------------------------------------------------------------------


def test_compiled_ekfac_of_its_own_batch_is_the_same_matrix() -> None:
    case = CASES["linear"]()
    fim = ff.ekfac(case.model, case.likelihood)
    compiled = torch.compile(fim, fullgraph=True, backend="aot_eager")
    got, want = compiled(*case.args), fim(*case.args)
    torch._dynamo.reset()
    assert (got.basis, got.fisher, got.unit, got.blocks) == (
        "batch",
        "exact",
        "example",
        want.blocks,
    )
    assert_close(got.to_dense(), want.to_dense())


def test_statistics_share_a_pass_and_take_a_second_where_one_needs_it() -> None:
    case = CASES["linear_positions"]()
    model, lik, key = case.model, case.likelihood, ff.random.key(1)
    single: dict[str, Any] = {
        "kfac": ff.kfac(model, lik, fisher="mc"),
        "ekfac": ff.ekfac(model, lik, fisher="mc"),
        "diagonal": ff.diagonal(model, lik, fisher="mc"),
    }
    found = ff.statistics(loss=True, **single)(*case.args, key=key)
    assert set(found) == {*single, "loss"}
    for name, fim in single.items():
        want = fim(*case.args, key=key)
        assert type(found[name]) is type(want)
        assert_close(found[name].to_dense(), want.to_dense())


# ---- bad input -----------------------------------------------------------------------------------


def test_singular_factors_without_damping_are_named() -> None:
    K, E, v = results("linear")
    for F in (K, E, K.eigh()):
        for ask in (
            lambda F: F.solve(v),
            lambda F: F.logdet(),
            lambda F: F.sample(ff.random.key(0)),
            lambda F: F.pow(v, -0.5),
            lambda F: F.pow(v, -1),
        ):
            with pytest.raises(ff.NotPositiveDefiniteError, match=r"singular.* at \w+\.weight"):
                ask(F)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_factor_that_is_not_finite_is_named(side: str, bad: float) -> None:
    K, _, v = results("linear")
    factors = dict(getattr(K, side))
    factors["head.weight"] = factors["head.weight"] * bad
    F = replace(K, **{side: factors})
    asks = {
        "solve": lambda F: F.solve(v, damping=0.1),
        "factored": lambda F: F.solve(v, damping=0.1, factored=True),
        "logdet": lambda F: F.logdet(damping=0.1),
        "sample": lambda F: F.sample(ff.random.key(0), damping=0.1),
        "decomposed": lambda F: F.eigh().solve(v, damping=0.1),
    }
    for ask in asks.values():
        with pytest.raises(ff.NotPositiveDefiniteError, match=r"NaN at head\.weight"):
            ask(F)
    assert not bool(F.trace().isfinite())
    assert not bool(F.eigenvalues().isfinite().all())


def test_half_precision_that_overflows_is_named_and_what_does_not_is_right() -> None:
    layers = lambda: nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(2)])  # noqa: E731
    module: Any = loops.seeded(layers).half()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[300.0, 0.0], [0.0, 300.0]]))
        module[1].weight.copy_(torch.tensor([[1e-4, 0.0], [0.0, 1e-4]]))
    model, params, buffers = ff.functional(module)
    fim = ff.kfac(model, ff.likelihoods.gaussian(1.0))
    # 300 squared is beyond the range of float16, not beyond that of the factor
    F = fim(params, buffers, ff.Batch(torch.ones(1, 2, dtype=torch.float16)))
    assert F.inputs["1.weight"].dtype == torch.float32
    torch.testing.assert_close(F.inputs["1.weight"], torch.full((1, 2, 2), 9e4))
    F = fim(params, buffers, ff.Batch(torch.full((1, 2), 1e3, dtype=torch.float16)))
    with pytest.raises(ff.NotPositiveDefiniteError, match=r"NaN at 1\.weight"):
        F.solve(params, damping=1.0)


def test_a_batch_in_which_nothing_counts_is_refused() -> None:
    case = CASES["linear_positions"]()
    params, buffers, batch = case.args
    batch = replace(batch, mask=torch.zeros(3, 3, dtype=torch.bool))
    for make in (ff.kfac, ff.ekfac):
        with pytest.raises(ff.DataError, match="expected at least one unit to count"):
            make(case.model, case.likelihood)(params, buffers, batch)


def test_a_position_that_counts_exists() -> None:
    case = CASES["linear_positions"]()
    params, buffers, batch = case.args
    exists = torch.ones(3, 3, dtype=torch.bool)
    exists[1, 2] = False
    batch = replace(batch, mask=torch.ones(3, 3, dtype=torch.bool), positions=exists)
    for make in (ff.kfac, ff.ekfac):
        message = rf"^{make.__name__}: expected positions to hold .* at \[1, 2\]"
        with pytest.raises(ff.DataError, match=message):
            make(case.model, case.likelihood)(params, buffers, batch)


def test_a_basis_of_another_model_is_refused() -> None:
    case, other = CASES["linear"](), CASES["linear_without_bias"]()
    basis = ff.kfac(other.model, other.likelihood)(*other.args)
    with pytest.raises(ff.TreeMismatchError, match=r"ekfac: expected a basis for a block of 1 x 3"):
        ff.ekfac(case.model, case.likelihood, basis=basis)(*case.args)
    larger = CASES["conv2d_groups"]()
    basis = ff.kfac(larger.model, larger.likelihood, bias="separate")(*larger.args)
    apart = ff.ekfac(larger.model, larger.likelihood, basis=basis, bias="diagonal")
    with pytest.raises(ff.TreeMismatchError, match=r"got one more at \w+\.bias"):
        apart(*larger.args)
    with pytest.raises(ff.OptionError, match="ekfac: expected basis= to be a KFAC, an EKFAC"):
        ff.ekfac(case.model, case.likelihood, basis=case.args[0])


def test_fields_that_do_not_fit_are_refused() -> None:
    K, E, _ = results("linear")
    with pytest.raises(ff.TreeMismatchError, match="KFAC: expected an output factor for each"):
        replace(K, outputs={})
    with pytest.raises(ff.ShapeError, match=r"expected the input factor of shape .* at layer"):
        replace(K, inputs={**K.inputs, "layer.weight": torch.eye(3)[None]})
    with pytest.raises(ff.OptionError, match="cover each leaf of the parameters once"):
        replace(K, rest={"layer.bias": torch.ones(3)})
    with pytest.raises(ff.OptionError, match=r"cover each leaf .* at layer"):
        replace(K, blocks=K.blocks[1:])
    with pytest.raises(ff.OptionError, match="EKFAC: expected a basis of inputs for each"):
        replace(E, input_basis={})
    with pytest.raises(ff.ShapeError, match=r"EKFAC: expected the scales of shape"):
        replace(E, scales=trees.map(lambda x: x[..., :1], E.scales))
    mixed, _, _ = results("linear", bias="diagonal")
    with pytest.raises(ff.ShapeError, match=r"expected the diagonal to be like the parameter"):
        replace(mixed, rest={**mixed.rest, "layer.bias": torch.ones(7)})
