"""What can be asked of results with joint blocks: algebra, streams, files, transformations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kfac.stacked import MASK, draw, pair, vector

import fisherfn as ff
from fisherfn import states
from fisherfn.core import trees
from fisherfn.testing import assert_close


@pytest.mark.parametrize("make", [ff.kfac, ff.ekfac])
def test_everything_that_is_asked_is_answered_for_the_matrix(make: Any) -> None:
    found = pair("conv2d_groups", size=4)
    F, _ = found.both(make)
    v = draw(found.several.args[0])
    x, dense = vector(v), F.to_dense()
    shifted = dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype)
    values, vectors = torch.linalg.eigh(shifted)
    assert_close(vector(F.mv(v)), dense @ x)
    assert_close(vector(F.solve(v, damping=0.1)), torch.linalg.solve(shifted, x))
    root = vectors @ (values**-0.5 * (vectors.T @ x))
    assert_close(vector(F.pow(v, -0.5, damping=0.1)), root)
    assert_close(F.quadratic(v), x @ dense @ x)
    assert_close(F.trace(), dense.trace())
    assert_close(F.frobenius(), dense.norm())
    assert_close(F.logdet(damping=0.1), torch.logdet(shifted))
    assert_close(vector(F.diagonal()), dense.diagonal())
    torch.testing.assert_close(F.eigenvalues() + 0.1, values.flip(0), rtol=1e-9, atol=1e-12)
    assert_close((2.0 * F + F).to_dense(), 3.0 * dense)
    key = ff.random.key(7)
    z = trees.random_like(key, v)
    assert_close(
        vector(F.sample(key, damping=0.1)), vectors @ (values**-0.5 * (vectors.T @ vector(z)))
    )


def test_factored_damping_is_that_of_the_joint_factors() -> None:
    found = pair("linear")
    F, want = found.both(ff.kfac)
    v = draw(found.several.args[0])
    got = F.solve(v, damping=0.05, factored=True)
    assert_close(found.stacked(got), want.solve(found.stacked(v), damping=0.05, factored=True))


def test_streams_and_files(tmp_path: Path) -> None:
    found = pair("linear_positions", size=4)
    case = found.several
    fim = ff.kfac(case.model, case.likelihood, joint=found.joint)
    params, buffers, batch = case.args
    batches = [
        ff.Batch(batch.inputs[rows], batch.targets[rows]) for rows in (slice(0, 1), slice(1, 4))
    ]
    parts = [fim(params, buffers, part) for part in batches]
    whole = fim(params, buffers, batch)
    assert_close(ff.merge(*parts), whole)
    assert_close(ff.merge(ff.empty_like(whole), whole), whole)
    folded, _ = states.accumulate(fim, params, buffers, batches)
    assert_close(folded, whole)
    for average in (states.ema(0.5), states.welford()):
        first, state = average.update(parts[0], average.init(parts[0]))
        reading, state = average.update(parts[1], state)
        assert trees.structure(first) == trees.structure(reading)
        mean = reading.mean if hasattr(reading, "mean") else reading
        a, b = (p.outputs[found.name] for p in parts)
        G = mean.outputs[found.name]
        share = ((G - a) * (b - a)).sum() / ((b - a) * (b - a)).sum()
        assert_close(G, a + share * (b - a))
        assert 0.1 < float(share) < 0.9
    for F in (whole, whole.eigh()):
        ff.io.save(tmp_path / "F.safetensors", F)
        again = ff.io.load(tmp_path / "F.safetensors")
        assert again.blocks == F.blocks
        assert_close(again, F)
    other = ff.kfac(case.model, case.likelihood, joint=[found.joint[0][::-1]])
    with pytest.raises(ff.TreeMismatchError, match="two results with the same blocks"):
        ff.merge(whole, other(params, buffers, batch))


@pytest.mark.parametrize("make", [ff.kfac, ff.ekfac])
def test_a_step_of_the_natural_gradient(make: Any) -> None:
    found = pair("linear_positions")
    case = found.several
    params, buffers, batch = case.args
    fim = make(case.model, case.likelihood, joint=found.joint)
    opt = ff.optim.natural_gradient(fim, learning_rate=0.3, damping=0.05, decay=0.0)
    grads = draw(params)
    step, _ = opt.update(grads, opt.init(params), params, buffers=buffers, batch=batch)
    dense = fim(params, buffers, batch).to_dense()
    eye = torch.eye(len(dense), dtype=dense.dtype)
    assert_close(vector(step), -0.3 * torch.linalg.solve(dense + 0.05 * eye, vector(grads)))


@pytest.mark.parametrize("name", ["linear_positions", "conv2d_groups"])
def test_for_several_parameters_at_once_and_its_derivative(name: str) -> None:
    found = pair(name)
    case = found.several
    params, buffers, batch = case.args
    for make in (ff.kfac, ff.ekfac):
        fim = make(case.model, case.likelihood, joint=found.joint)
        many = {k: torch.stack([p, 0.5 * p, p - 0.1]) for k, p in params.items()}
        got = torch.vmap(lambda p, f=fim: f(p, buffers, batch).trace())(many)
        want = [fim({k: p[i] for k, p in many.items()}, buffers, batch).trace() for i in range(3)]
        assert_close(got, torch.stack(want))
    joint = ff.kfac(case.model, case.likelihood, joint=found.joint)
    single = ff.kfac(found.one.model, found.one.likelihood)
    slope = torch.func.grad(lambda p: joint(p, buffers, batch).frobenius())(params)
    other = found.one.args
    want = torch.func.grad(lambda p: single(p, *other[1:]).frobenius())(other[0])
    assert_close(found.stacked(slope), want)


@pytest.mark.parametrize("make", [ff.kfac, pytest.param(ff.ekfac, marks=pytest.mark.slow)])
def test_compiled(make: Any) -> None:
    found = pair("linear", mask=MASK[:, 0])
    case = found.several
    fim = make(case.model, case.likelihood, joint=found.joint)
    got = torch.compile(fim, fullgraph=True, backend="aot_eager")(*case.args)
    torch._dynamo.reset()
    want = fim(*case.args)
    assert got.blocks == want.blocks
    assert_close(got.to_dense(), want.to_dense())


@pytest.mark.slow
def test_compiled_algebra() -> None:
    found = pair("conv2d_groups")
    F, _ = found.both(ff.kfac, bias="separate")
    v = draw(found.several.args[0])

    def ask(F: Any, v: Any) -> Any:
        return F.solve(v, damping=0.1), F.to_dense(), F.diagonal(), ff.merge(F, 2 * F)

    got = torch.compile(ask, fullgraph=True, backend="eager")(F, v)
    torch._dynamo.reset()
    assert_close(got, ask(F, v))


def test_beside_others_and_explained() -> None:
    found = pair("linear_positions")
    case = found.several
    model, lik, key = case.model, case.likelihood, ff.random.key(1)
    single: dict[str, Any] = {
        "joint": ff.kfac(model, lik, fisher="mc", joint=found.joint),
        "apart": ff.kfac(model, lik, fisher="mc"),
        "ekfac": ff.ekfac(model, lik, fisher="mc", joint=found.joint),
    }
    together = ff.statistics(**single)(*case.args, key=key)
    for name, fim in single.items():
        want = fim(*case.args, key=key)
        assert together[name].blocks == want.blocks
        assert_close(together[name].to_dense(), want.to_dense())
    rows = ff.explain(single["joint"])(*case.args).rows
    assert [row.rule for row in rows] == ["linear", "shift"] * 4


def test_a_single_layer_is_what_it_is_without() -> None:
    found = pair("linear_positions")
    case = found.several
    plain = ff.kfac(case.model, case.likelihood)(*case.args)
    names = [("layers.q.weight",), ("head.bias",)]
    F = ff.kfac(case.model, case.likelihood, joint=names)(*case.args)
    assert F.blocks == plain.blocks
    assert_close(F, plain)


def test_options_are_kept_as_they_were_given() -> None:
    case = pair("linear").several
    joint: list[Any] = [["layers.q.weight", "layers.k.weight"]]
    fim = ff.kfac(case.model, case.likelihood, joint=joint)
    joint[0].append("layers.v.weight")
    assert fim.options["joint"] == (("layers.q.weight", "layers.k.weight"),)
    assert list(fim.options) == [
        "fisher",
        "approx",
        "bias",
        "partition",
        "joint",
        "num_samples",
        "unit",
        "widest",
        "chunk_size",
    ]
