"""Structural faults raise, and say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fisherfn as ff

KEY = ff.random.key(0)
LIKE = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
RANDOM = ("hutchinson", "hutchpp", "xtrace", "xdiag", "lanczos", "lobpcg", "slq", "density")


def identity(v: Any) -> Any:
    return v


def call(name: str, mv: Any = identity, like: Any = LIKE, **options: Any) -> Any:
    small: dict[str, Any] = {"lanczos": {"k": 2}, "lobpcg": {"k": 2}, "slq": {"num_steps": 3}}
    small["density"] = small["slq"]
    key = {} if name == "cg" else {"key": KEY}
    return getattr(ff.linalg, name)(mv, like, **{**small.get(name, {}), **key, **options})


EVERY = {
    "operator": (
        {"mv": torch.eye(8)},
        ff.OptionError,
        "expected mv to be a function tree -> tree, got Tensor",
    ),
    "no leaves": ({"like": {}}, ff.TreeMismatchError, "at least one tensor, got none"),
    "no tensors": ({"like": {"w": 1.0}}, ff.TreeMismatchError, "to hold tensors, got float at 'w'"),
    "integers": (
        {"like": {"w": torch.zeros(2), "n": torch.zeros(2, dtype=torch.int64)}},
        ff.ShapeError,
        "floating-point tensors, got torch.int64 at 'n'",
    ),
    "empty": ({"like": {"w": torch.zeros(0)}}, ff.ShapeError, "at least one number, got empty"),
    "other tree": (
        {"mv": lambda v: {"w": v["w"]}},
        ff.TreeMismatchError,
        r"expected mv\(v\) like v, got no leaf at b",
    ),
    "other shape": (
        {"mv": lambda v: {"w": v["w"].T, "b": v["b"]}},
        ff.TreeMismatchError,
        r"expected mv\(v\) like v, got shape \(3, 2\) at w, needs \(2, 3\)",
    ),
    "no tree": ({"mv": lambda v: None}, ff.TreeMismatchError, r"expected mv\(v\) like v"),
}


@pytest.mark.parametrize("bad", EVERY)
@pytest.mark.parametrize("name", [*RANDOM, "cg"])
def test_operators_and_trees(name: str, bad: str) -> None:
    options, error, message = EVERY[bad]
    if name == "cg" and bad in ("other tree", "other shape", "no tree"):
        options = {"like": ff.tree.ones_like(LIKE), **options}
    with pytest.raises(error, match=message) as caught:
        call(name, **options)
    own = "slq" if name == "density" else name
    assert str(caught.value).startswith(f"{own}: ")


@pytest.mark.parametrize("name", RANDOM)
def test_keys(name: str) -> None:
    with pytest.raises(ff.OptionError, match=r"expected key= for random vectors, got int"):
        call(name, key=0)
    with pytest.raises(ff.ShapeError, match=r"expected key= to be one key, int64 of shape \(2,\)"):
        call(name, key=torch.zeros(2))


TRACES = ("hutchinson", "hutchpp", "xtrace", "xdiag")


@pytest.mark.parametrize("name", TRACES)
def test_numbers_of_products(name: str) -> None:
    fewest = {"hutchinson": 1, "hutchpp": 3, "xtrace": 4, "xdiag": 4}[name]
    message = f"{name}: expected num_matvecs= to be an integer of at least {fewest}"
    for bad in (0, fewest - 1, -3, 2.5, True, "30", None):
        with pytest.raises(ff.OptionError, match=message):
            call(name, num_matvecs=bad)
    with pytest.raises(ff.OptionError, match=f"{name}: expected chunk_size= to be an integer"):
        call(name, num_matvecs=6, chunk_size=0)


@pytest.mark.parametrize("name", TRACES)
def test_kinds_of_probes(name: str) -> None:
    with pytest.raises(ff.OptionError, match=f"{name}: expected probes= to be one of 'rademacher'"):
        call(name, num_matvecs=6, probes="normal")
    for bad in (0.0, 1.5, -1, True, "half"):
        with pytest.raises(ff.OptionError, match=f"{name}: expected density= to be a number in"):
            call(name, num_matvecs=6, density=bad)
    with pytest.raises(ff.OptionError, match=f"{name}: expected density=1 for probes='sphere'"):
        call(name, num_matvecs=6, density=0.5, probes="sphere")


@pytest.mark.parametrize("name", ["hutchinson", "hutchpp", "xtrace"])
def test_targets(name: str) -> None:
    for bad in (0, -1.0, True, "1%"):
        with pytest.raises(ff.OptionError, match=f"{name}: expected target_stderr= to be a posit"):
            call(name, num_matvecs=6, target_stderr=bad)

    def inside(x: torch.Tensor) -> torch.Tensor:
        return call(name, lambda v: ff.tree.scale(v, x), num_matvecs=15, target_stderr=1e-9).value

    with pytest.raises(ff.UnsupportedError, match=f"{name}: expected no target_stderr= inside"):
        torch.vmap(inside)(torch.ones(2))


def test_lanczos_options() -> None:
    def refuse(message: str, **options: Any) -> None:
        with pytest.raises(ff.OptionError, match=message):
            call("lanczos", **options)

    refuse("lanczos: expected k= to be an integer of at least 1", k=0)
    refuse("lanczos: expected at most 8 eigenpairs, the dimensions, got 9", k=9)
    refuse("lanczos: expected at most 8 eigenpairs, the dimensions, got 10", k=5, which="both")
    refuse("lanczos: expected which= to be one of 'largest', 'smallest', 'both'", which="LM")
    refuse("lanczos: expected max_steps= of at most 8, the dimensions, got 9", max_steps=9)
    refuse("lanczos: expected max_steps= to be an integer of at least 1", max_steps=0)
    refuse("lanczos: expected tolerance= to be a number in", tolerance=1.0)
    refuse("lanczos: expected max_basis= of at least 4 for 2 eigenpairs", max_basis=3)
    refuse("lanczos: expected max_basis= to be an integer", max_basis=0.5)
    refuse("lanczos: expected block_size= to be an integer", block_size=0)
    refuse("lanczos: expected at most 8 vectors in a block, the dimensions, got 9", block_size=9)
    refuse("lanczos: expected verify= to be an integer of at least 0", verify=-1)
    with pytest.raises(ff.TreeMismatchError, match="lanczos: expected start like like"):
        call("lanczos", start={"w": torch.zeros(2, 3)})


def test_lobpcg_options() -> None:
    with pytest.raises(ff.OptionError, match="lobpcg: expected k= of at most a third of the 8 dim"):
        call("lobpcg", k=3)
    with pytest.raises(ff.OptionError, match="lobpcg: expected which= to be one of 'largest', 'sm"):
        call("lobpcg", which="both")
    mixed = {"a": torch.zeros(5), "b": torch.zeros(5, dtype=torch.float64)}
    with pytest.raises(ff.UnsupportedError, match="lobpcg: expected a tree in float32 or float64"):
        call("lobpcg", like=mixed)
    with pytest.raises(ff.UnsupportedError, match="lobpcg: expected a tree in float32 or float64"):
        call("lobpcg", like=torch.zeros(9, dtype=torch.bfloat16))


def test_quadrature_options() -> None:
    def refuse(message: str, **options: Any) -> None:
        with pytest.raises(ff.OptionError, match=message):
            call("slq", **options)

    refuse("slq: expected num_steps= of at most 8, the dimensions, got 9", num_steps=9)
    refuse("slq: expected num_steps= to be an integer of at least 1", num_steps=0)
    refuse("slq: expected num_probes= to be an integer of at least 1", num_probes=0)
    refuse("slq: expected fn= to be a function of a tensor, got str", fn="log")
    refuse("slq: expected fn to be elementwise", fn=torch.sum)
    refuse("slq: expected fn to be elementwise", fn=lambda t: 1.0)
    refuse("slq: expected damping= to be a number or a 0-d tensor", damping="small")
    refuse("slq: expected lower= to be a number or a 0-d tensor", lower=torch.zeros(2))
    refuse("slq: expected probes= to be one of", probes="signs")


def test_cg_options() -> None:
    ones = ff.tree.ones_like(LIKE)

    def refuse(message: str, **options: Any) -> None:
        with pytest.raises(ff.OptionError, match=message):
            call("cg", **{"like": ones, **options})

    refuse("cg: expected damping= to be a number or a 0-d tensor", damping=torch.ones(2))
    refuse("cg: expected damping= to be a number or a 0-d tensor", damping="0.1")
    refuse("cg: expected tolerance= to be a number of at least 0", tolerance=-1.0)
    refuse("cg: expected max_steps= to be an integer of at least 1", max_steps=0)
    refuse("cg: expected chunk_size= to be an integer of at least 1", chunk_size=0)
    refuse("cg: expected preconditioner= to be a function tree -> tree", preconditioner=1.0)
    refuse(
        "cg: expected leaves of b= with one leading axis", stacked=True, like={"w": torch.ones(())}
    )
    refuse(
        "cg: expected leaves of b= with one leading axis",
        stacked=True,
        like={"w": torch.ones(2, 3), "b": torch.ones(3, 3)},
    )
    with pytest.raises(ff.TreeMismatchError, match="cg: expected x0 like b, got shape"):
        call("cg", like=ones, x0={"w": torch.zeros(3, 2), "b": torch.zeros(2)})

    def inside(x: torch.Tensor) -> torch.Tensor:
        return ff.linalg.cg(identity, {"w": x}).value["w"]

    with pytest.raises(ff.OptionError, match="cg: expected max_steps= inside"):
        torch.vmap(inside)(torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lanczos", "lobpcg"])
def test_eigensolvers_run_eagerly(name: str) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        return call(name, lambda v: ff.tree.scale(v, x)).eigenvalues

    with pytest.raises(ff.UnsupportedError, match=f"{name}: expected to run eagerly"):
        torch.vmap(inside)(torch.ones(2))


def test_merging_needs_counts_of_one_kind() -> None:
    one = torch.tensor(1.0)
    with pytest.raises(ff.UnsupportedError, match="merge: expected estimates with a count"):
        ff.merge(ff.Estimate(one, one), ff.Estimate(one, one))
    with pytest.raises(ff.UnsupportedError, match="empty_like: expected an estimate with a count"):
        ff.empty_like(ff.Estimate(one, one))
    first = ff.Estimate(one, one, one, fisher="mc", unit="example")
    for other in (
        ff.Estimate(one, one, one, fisher="exact", unit="example"),
        ff.Estimate(one, one, one, fisher="mc", unit="position"),
    ):
        with pytest.raises(ff.OptionError, match="merge: expected two estimates with the same"):
            ff.merge(first, other)


CALLS: dict[str, Callable[[], Any]] = {name: (lambda n=name: call(n)) for name in RANDOM[4:]}


@pytest.mark.parametrize("name", CALLS)
def test_the_defaults_of_these_tests_work(name: str) -> None:
    assert CALLS[name]() is not None
