"""Options of Kronecker estimators: partitions of a layer, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kfac import loops
from kfac.layers import CASES

import fisherfn as ff
from fisherfn.testing import assert_close


@pytest.mark.parametrize("name", ["linear_positions", "conv2d_groups"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_a_partition_keeps_the_blocks_of_a_layer_apart(name: str, approx: str) -> None:
    """Three heads of one output each."""
    case = CASES[name]()
    parts = {"head.weight": 3}
    options: dict[str, Any] = {"approx": approx, "bias": "separate"}
    whole = ff.kfac(case.model, case.likelihood, **options)(*case.args)
    F = ff.kfac(case.model, case.likelihood, partition=parts, **options)(*case.args)
    G = whole.outputs["head.weight"]
    assert_close(F.outputs["head.weight"], G.diagonal(dim1=-2, dim2=-1).reshape(3, 1, 1))
    assert_close(F.inputs["head.weight"], whole.inputs["head.weight"])
    assert_close(F.outputs["layer.weight"], whole.outputs["layer.weight"])
    want, got = whole.to_dense(), F.to_dense()
    place = loops.places(case.args[0], "head.weight")
    for i, row in enumerate(place):
        for j, column in enumerate(place):
            block = want[row][:, column] if i == j else torch.zeros(len(row), len(column))
            assert_close(got[row][:, column], block)
    E = ff.ekfac(case.model, case.likelihood, partition=parts, **options)(*case.args)
    exact = ff.diagonal(case.model, case.likelihood)(*case.args).values["head.weight"]
    assert_close(E.scales["head.weight"].sum((1, 2)), exact.sum(1))


def test_partitions_are_checked() -> None:
    case = CASES["linear"]()
    bad: Any
    for bad in (4, {"head.weight": 0}, {"head.weight": True}, {3: 3}):
        with pytest.raises(ff.OptionError, match="kfac: expected partition= to be a dict from"):
            ff.kfac(case.model, case.likelihood, partition=bad)
    with pytest.raises(ff.OptionError, match=r"partition= to name weights among .* got 'heads'"):
        ff.kfac(case.model, case.likelihood, partition={"heads": 3})(*case.args)
    with pytest.raises(ff.OptionError, match=r"divide the 3 outputs of a layer, got 2 at head"):
        ff.kfac(case.model, case.likelihood, partition={"head.weight": 2})(*case.args)
    table = CASES["embedding"]()
    with pytest.raises(ff.OptionError, match=r"got 2 at layer\.weight\. A table has no partition"):
        ff.kfac(table.model, table.likelihood, partition={"layer.weight": 2})(*table.args)


@pytest.mark.parametrize("make", [ff.kfac, ff.ekfac])
def test_options_are_checked_at_once(make: Any) -> None:
    case = CASES["linear"]()
    name = make.__name__
    for options, message in (
        ({"approx": "sum"}, f"{name}: expected approx= to be one of 'expand', 'reduce', got 'sum'"),
        ({"bias": True}, f"{name}: expected bias= to be one of 'joint', 'separate', 'diagonal'"),
        ({"fisher": "true"}, f"{name}: expected fisher= to be one of"),
        ({"fisher": "exact", "num_samples": 2}, "expected num_samples=1"),
        ({"unit": "token"}, "expected unit="),
    ):
        with pytest.raises(ff.OptionError, match=message):
            make(case.model, case.likelihood, **options)
    if make is ff.ekfac:
        with pytest.raises(ff.OptionError, match="ekfac: expected fisher= to be one of"):
            make(case.model, case.likelihood, fisher="forward_only")
