"""Identities: where Kronecker blocks are exact, and how near they are everywhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kfac import loops
from kfac.layers import CASES, around
from kfac.loops import Case
from torch import Tensor, nn

import fisherfn as ff
import oracles
from fisherfn.testing import assert_close

ONE_ROW = ["linear", "linear_without_bias"]


def dense(case: Case, fisher: str = "exact") -> Tensor:
    return oracles.dense(case.problem, fisher)


def blocks(F: Any) -> dict[str, Tensor]:
    """Where the entries of each block are in a vector of all parameters."""
    return {
        b.name: place.reshape(-1)
        for b, place in zip(F.blocks, F._places(torch.device("cpu"))[0], strict=True)
    }


# ---- block = slice of dense; diagonal = diagonal of block ----------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv2d_groups", "linear_positions"])
def test_blocks_are_slices_and_diagonals_are_their_diagonals(name: str) -> None:
    case = CASES[name]()
    want = dense(case)
    B = ff.block_diagonal(case.model, case.likelihood, by="layer")(*case.args)
    D = ff.diagonal(case.model, case.likelihood)(*case.args)
    whole = B.to_dense()
    for path, leaf in case.args[0].items():
        place = loops.places(case.args[0], path).reshape(-1)
        assert_close(whole[place][:, place], want[place][:, place])
        assert_close(whole[place, place].reshape(leaf.shape), D.values[path])


# ---- K-FAC is the block --------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", ONE_ROW)
def test_one_datum_with_one_row_is_exact(name: str, fisher: str) -> None:
    case = CASES[name]()
    assert case.targets is not None
    case = replace(case, inputs=case.inputs[:1], targets=case.targets[:1])
    F = ff.kfac(case.model, case.likelihood, fisher=fisher)(*case.args)
    want = dense(case, fisher)
    got = F.to_dense()
    for place in blocks(F).values():
        assert_close(got[place][:, place], want[place][:, place])


@pytest.mark.parametrize("name", ["conv2d_groups", "depthwise", "conv1d", "conv3d"])
def test_one_datum_with_one_window_is_exact_for_each_group(name: str) -> None:
    """The wrong value for two groups that share averaged patches was 0.44 of the trace."""
    layer, width, shape = {
        "conv2d_groups": (lambda: nn.Conv2d(4, 2, (2, 3), groups=2), 2, (4, 2, 3)),
        "depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3), 3, (3, 2, 2)),
        "conv1d": (lambda: nn.Conv1d(4, 4, 3, groups=2), 4, (4, 3)),
        "conv3d": (lambda: nn.Conv3d(2, 2, (1, 2, 2), groups=2), 2, (2, 1, 2, 2)),
    }[name]
    case = around(layer, width, *shape, pool=True, channels=True)
    case = replace(case, inputs=case.inputs[:1], targets=None)
    F = ff.kfac(case.model, case.likelihood)(*case.args)
    want, got = dense(case), F.to_dense()
    for b, place in zip(F.blocks, F._places(torch.device("cpu"))[0], strict=True):
        for index in place.reshape(b.groups, -1):
            assert_close(got[index][:, index], want[index][:, index])


def linear_network(*, pool: bool, positions: bool) -> Case:
    """Three linear layers in a row, and a Gaussian around the outputs."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.layer, self.c = (
                nn.Linear(4, 3),
                nn.Linear(3, 3, bias=False),
                nn.Linear(3, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.c(self.layer(self.a(x)))
            return h.mean(1) if pool else h

    module = loops.seeded(Deep)
    inputs = loops.normal(3, 5, *((3,) if positions else ()), 4)
    scale = 0.7
    return Case(module, "layer", inputs, ff.likelihoods.gaussian(scale), oracles.Gaussian(scale))


def assert_blocks_are_exact(case: Case, approx: str) -> None:
    F = ff.kfac(case.model, case.likelihood, approx=approx)(*case.args)
    want, got = dense(case), F.to_dense()
    assert len(F.blocks) == 3
    for place in blocks(F).values():
        assert_close(got[place][:, place], want[place][:, place])


def test_linear_networks_with_a_gaussian_are_exact() -> None:
    """Martens & Grosse: the cotangents do not depend on the data."""
    for approx in ("expand", "reduce"):
        assert_blocks_are_exact(linear_network(pool=False, positions=False), approx)


def test_expand_is_exact_where_every_position_has_a_loss_of_its_own() -> None:
    """Eschenhagen et al. (2023), the expand setting: deep linear, one loss term a position."""
    assert_blocks_are_exact(linear_network(pool=False, positions=True), "expand")


def test_reduce_is_exact_where_positions_are_averaged_before_the_loss() -> None:
    """Eschenhagen et al. (2023), the reduce setting: deep linear, mean over positions, one loss."""
    assert_blocks_are_exact(linear_network(pool=True, positions=True), "reduce")


def test_each_setting_is_not_exact_in_the_other() -> None:
    for pool, approx in ((False, "reduce"), (True, "expand")):
        case = linear_network(pool=pool, positions=True)
        F = ff.kfac(case.model, case.likelihood, approx=approx)(*case.args)
        place = blocks(F)["layer.weight"]
        got, want = F.to_dense()[place][:, place], dense(case)[place][:, place]
        assert (got - want).norm() > 1e-3 * want.norm()


# ---- EKFAC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("name", [*CASES])
def test_ekfac_is_at_least_as_near_to_each_block(name: str, approx: str, bias: str) -> None:
    case = CASES[name]()
    options: dict[str, Any] = {"approx": approx, "bias": bias}
    K = ff.kfac(case.model, case.likelihood, **options)(*case.args)
    E = ff.ekfac(case.model, case.likelihood, **options)(*case.args)
    want, k, e = dense(case), K.to_dense(), E.to_dense()
    shapes = K._places(torch.device("cpu"))[0]
    for b, place in zip(K.blocks, shapes, strict=True):
        for index in place.reshape(b.groups, -1):
            exact = want[index][:, index]
            errors = [(x[index][:, index] - exact).norm() for x in (e, k)]
            assert errors[0] <= errors[1] + 1e-10 * exact.norm(), b.name
            assert_close(e[index, index].sum(), exact.trace())  # a rotation keeps the trace


@pytest.mark.parametrize("name", [*CASES])
def test_ekfac_scales_are_the_squared_rotated_scores(name: str) -> None:
    case = CASES[name]()
    E = ff.ekfac(case.model, case.likelihood, fisher="empirical")(*case.args)
    rows = oracles.rows(case.problem, "empirical")
    for b, place in zip(E.blocks, E._places(torch.device("cpu"))[0], strict=True):
        total = torch.zeros_like(E.scales[b.name])
        for score, weight in zip(rows.scores, rows.weights, strict=True):
            for r in range(b.groups):
                s = score[place[r]]
                left = E.output_basis[b.name][r]
                turned = left.T @ s
                if b.name in E.input_basis:
                    basis = E.input_basis[b.name]
                    turned = turned @ basis[r if len(basis) > 1 else 0]
                total[r] += weight * turned**2
        assert_close(E.scales[b.name], total / rows.count)


def test_ekfac_says_which_basis_it_has() -> None:
    case = CASES["linear"]()
    own = ff.ekfac(case.model, case.likelihood)(*case.args)
    K = ff.kfac(case.model, case.likelihood)(*case.args)
    given = ff.ekfac(case.model, case.likelihood, basis=K)(*case.args)
    again = ff.ekfac(case.model, case.likelihood, basis=own)(*case.args)
    assert (own.basis, given.basis, again.basis) == ("batch", "given", "given")
    assert K.eigh().basis == "factors"
    assert_close(given.to_dense(), own.to_dense())
    assert_close(again.scales, own.scales)


def test_an_old_basis_gives_the_nearest_diagonal_in_it() -> None:
    case = CASES["conv2d_groups"]()
    other = replace(case, inputs=loops.normal(77, *case.inputs.shape))
    old = ff.kfac(case.model, case.likelihood)(*other.args).eigh()
    E = ff.ekfac(case.model, case.likelihood, basis=old)(*case.args)
    want, got = dense(case), E.to_dense()
    for b, place in zip(E.blocks, E._places(torch.device("cpu"))[0], strict=True):
        for r, index in enumerate(place.reshape(b.groups, -1)):
            right = old.input_basis[b.name]
            Q = torch.kron(old.output_basis[b.name][r], right[r if len(right) > 1 else 0])
            exact = want[index][:, index]
            nearest = Q @ (Q.T @ exact @ Q).diagonal().diag() @ Q.T
            assert_close(got[index][:, index], nearest)


# ---- invariance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_natural_gradients_do_not_depend_on_affine_coordinates_of_layers(approx: str) -> None:
    """Martens & Grosse (2015), section 10: activations and outputs of a layer in other coordinates.

    With W' = M W N the layer's inputs are N⁻¹ ā and its outputs are mapped back by M⁻¹: the same
    function, and an update by the natural gradient is the same function afterwards.
    """
    x, targets = loops.normal(1, 40, 3), torch.arange(40) % 3
    generator = torch.Generator().manual_seed(2)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    M, N, c = draw(2, 2) + 2 * torch.eye(2), draw(3, 3) + 2 * torch.eye(3), draw(3)

    def plain(p: Any, buffers: Any, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(x, p["w"], p["b"]))
        return nn.functional.linear(h, p["v"], p["d"])

    def turned(p: Any, buffers: Any, x: Tensor) -> Tensor:
        inner = (x - c) @ torch.linalg.inv(N).T
        h = nn.functional.linear(inner, p["w"], p["b"]) @ torch.linalg.inv(M).T
        return nn.functional.linear(torch.tanh(h), p["v"], p["d"])

    params = {"w": draw(2, 3), "b": draw(2), "v": draw(3, 2), "d": draw(3)}
    other = dict(params)
    other["w"] = M @ params["w"] @ N
    other["b"] = M @ (params["b"] + params["w"] @ c)
    batch, likelihood = ff.Batch(x, targets), ff.likelihoods.poisson()
    assert_close(turned(other, {}, x), plain(params, {}, x))

    def updated(model: Any, p: Any) -> Tensor:
        def loss(q: Any) -> Tensor:
            return (model(q, {}, x) ** 2).mean()

        F = ff.kfac(model, likelihood, approx=approx)(p, {}, batch)
        step = F.solve(torch.func.grad(loss)(p))
        return model({name: p[name] - 0.1 * step[name] for name in p}, {}, x)

    torch.testing.assert_close(updated(turned, other), updated(plain, params), rtol=1e-7, atol=1e-9)
