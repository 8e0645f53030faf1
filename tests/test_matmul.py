"""Products of matrices by the faster library: every layout, eager, compiled, transformed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kfac.layers import CASES
from torch import Tensor
from torch.autograd import forward_ad

import cases
import fisherfn as ff
from fisherfn.core import matmul
from fisherfn.core.matmul import product, row_product, stacked_product, summed_product
from fisherfn.estimators.products.linear import load_forward_mode
from fisherfn.testing import assert_close

Products = list[tuple[int, ...]]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t,
    "columns": lambda t: t.T.contiguous().T,
    "gaps": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "gaps_in_columns": lambda t: torch.cat([t, t], 0).T.contiguous().T[: t.shape[0]],
    "every_other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "one_row": lambda t: t[:1].expand(t.shape),
    "one_column": lambda t: t[:, :1].expand(t.shape),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}
layouts = st.sampled_from(list(LAYOUTS))
sizes = st.integers(1, 7)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3, 4), (2, 3, 4), (1, 1, 1), (4, 1, 3), (3, 4, 1)])
def test_every_layout(
    left: str, right: str, shape: tuple[int, int, int], fast_products: Products
) -> None:
    m, k, n = shape
    x, y = LAYOUTS[left](numbers(m, k)), LAYOUTS[right](numbers(k, n, seed=1))
    assert_close(product(x, y), x @ y)
    assert len(fast_products) == 1


@given(
    lead=st.sampled_from([(), (1,), (3,), (1, 1), (2, 1)]),
    other=st.sampled_from([(), (1,), (1, 1)]),
    m=sizes,
    k=sizes,
    n=sizes,
)
def test_stacks(lead: tuple[int, ...], other: tuple[int, ...], m: int, k: int, n: int) -> None:
    for a, b in ((lead, other), (other, lead), (lead, lead)):
        x, y = numbers(*a, m, k), numbers(*b, k, n, seed=1)
        assert_close(stacked_product(x, y), x @ y)


@pytest.mark.parametrize("r", [1, 3])
def test_stacks_go_there_too(r: int, fast_products: Products) -> None:
    x, y = numbers(r, 4, 5), numbers(r, 5, 2, seed=1)
    assert_close(stacked_product(x, y), x @ y)
    assert len(fast_products) == r


FAST = matmul.dense_product() is not None
SIZES = [(128, 128, 128), (300, 17, 2000), (16, 1024, 131), (2000, 80, 16), (513, 257, 100)]


@pytest.mark.parametrize("left", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("right", ["rows", "columns", "gaps", "gaps_in_columns"])
@pytest.mark.parametrize("shape", SIZES)
def test_the_library_itself(left: str, right: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    x, y = LAYOUTS[left](numbers(m, k)), LAYOUTS[right](numbers(k, n, seed=1))
    narrow = LAYOUTS[left](x.float()), LAYOUTS[right](y.float())
    assert matmul.quick(narrow[0], m, k, n) == FAST
    found = product(*narrow)
    assert found.dtype == torch.float32
    scale = x.norm(dim=1, keepdim=True) * y.norm(dim=0, keepdim=True)
    assert float(((found - x @ y).abs() / scale).max()) < 1e-6


def test_what_is_not_finite_stays_so() -> None:
    x, y = numbers(128, 128, dtype=torch.float32), numbers(128, 128, seed=1, dtype=torch.float32)
    x[3, 5], x[7, 1] = torch.nan, torch.inf
    found = product(x, y)
    assert bool(found[3].isnan().all())
    assert bool(found[7].isinf().all())
    assert bool(found[[i for i in range(128) if i not in (3, 7)]].isfinite().all())


@pytest.mark.skipif(not FAST, reason="torch has no faster library on this processor")
@pytest.mark.parametrize(
    ("m", "k", "n", "dtype"),
    [
        (64, 64, 64, torch.float32),
        (8, 2**10, 2**10, torch.float32),
        (256, 256, 256, torch.float64),
        (256, 256, 256, torch.bfloat16),
    ],
)
def test_where_it_does_not_pay(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    assert not matmul.quick(torch.ones(m, k, dtype=dtype), m, k, n)


def test_it_can_be_switched_off(fast_products: Products) -> None:
    x = numbers(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its precision is set along, the old way
        with torch.backends.mkldnn.flags(enabled=False):
            assert_close(product(x, x), x @ x)
    assert not fast_products


@given(r=st.integers(1, 2), n=st.integers(1, 40), m=sizes, k=sizes)
def test_sums_over_rows(r: int, n: int, m: int, k: int) -> None:
    x, y = numbers(r, n, m), numbers(r, n, k, seed=1)
    assert_close(summed_product(x, y), x.mT @ y)
    assert_close(row_product(x[0], x[0].T), x[0] @ x[0].T)


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize(("m", "k"), [(3, 5), (5, 3)])
@pytest.mark.parametrize("n", [7, 8, 9, 64, 65])
@pytest.mark.parametrize("by_columns", [False, True])
def test_data_is_brought_to_few_sizes(
    r: int, m: int, k: int, n: int, by_columns: bool, fast_products: Products
) -> None:
    x, y = numbers(r, n, m), numbers(r, n, k, seed=1)
    if by_columns:
        x, y = x.mT.contiguous().mT, y.mT.contiguous().mT
    assert_close(summed_product(x, y), x.mT @ y)
    assert len(fast_products) == r
    assert by_columns or {size[1] for size in fast_products} == {matmul.rounded(n)}
    fast_products.clear()
    assert_close(row_product(x[0], y[0].T.repeat(m, 1)[:m]), x[0] @ y[0].T.repeat(m, 1)[:m])
    assert [size[0] for size in fast_products] == [matmul.rounded(n)]


@given(n=st.integers(1, 10**7))
def test_rounded_sizes(n: int) -> None:
    found = matmul.rounded(n)
    assert n <= found < n + max(8, n / 8 + 1)
    assert matmul.rounded(found) == found


def test_there_are_few_rounded_sizes() -> None:
    assert len({matmul.rounded(n) for n in range(16, 2049)}) < 60


def test_other_kinds_of_tensors_go_the_ordinary_way(fast_products: Products) -> None:
    x = numbers(4, 4)
    assert_close(product(x.to_sparse(), x), x @ x)
    assert_close(product(x, torch._efficientzerotensor((4, 4), dtype=x.dtype)), 0.0 * x)
    assert not fast_products


def test_derivatives_in_forward_mode_go_the_ordinary_way(fast_products: Products) -> None:
    load_forward_mode()
    case = CASES["linear_positions"]()
    for make in (ff.kfac, ff.ekfac):
        F = make(case.model, case.likelihood, fisher="empirical")(*case.args)
        v, t = (ff.tree.random_like(ff.random.key(i), case.args[0]) for i in (1, 2))
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(v[name], t[name]) for name in v}
            tangent = forward_ad.unpack_dual(F.quadratic(dual)).tangent
        assert tangent is not None
        assert_close(tangent, 2.0 * ff.tree.dot(F.mv(v), t))


@pytest.mark.parametrize("make", [ff.kfac, ff.ekfac])
def test_results_as_arguments_of_code_for_any_size(make: Callable[..., Any]) -> None:
    torch.compiler.reset()
    case = CASES["linear"]()
    F = make(case.model, case.likelihood, fisher="empirical")(*case.args)
    v = ff.tree.random_like(ff.random.key(1), case.args[0])
    compiled = torch.compile(
        lambda F, v: (F.mv(v), F.solve(v, damping=0.1)),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    assert_close(compiled(F, v), (F.mv(v), F.solve(v, damping=0.1)))


def test_derivatives_go_the_ordinary_way(fast_products: Products) -> None:
    x, y = numbers(4, 3), numbers(3, 5, seed=1)
    live = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(product(live, y).sum(), live)
    assert_close(slope, y.sum(1).expand(4, 3))
    assert_close(torch.func.grad(lambda x: product(x, y).sum())(x), slope)
    assert_close(torch.vmap(product)(x[None], y[None])[0], x @ y)
    assert not fast_products
    with torch.no_grad():
        product(live, y)
    assert len(fast_products) == 1


def test_the_compiler_itself_sees_an_ordinary_product(fast_products: Products) -> None:
    torch.compiler.reset()
    x, y = numbers(6, 3), numbers(3, 5, seed=1)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, y), x @ y)
    assert not fast_products


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by torch, importing inductor
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_estimators_contain_it(backend: str, fast_products: Products) -> None:
    torch.compiler.reset()
    s = cases.ALL["mlp"].setup()
    for make in (ff.diagonal, ff.kfac):
        estimator = make(s.model, s.likelihood, fisher="empirical")
        want = estimator(*s.args).to_dense()
        fast_products.clear()
        found = torch.compile(estimator, fullgraph=True, backend=backend)(*s.args)
        assert_close(found.to_dense(), want)
        assert fast_products


def test_compiled_estimators_have_derivatives(fast_products: Products) -> None:
    torch.compiler.reset()
    s = cases.ALL["mlp"].setup()
    params, buffers, batch = s.args
    diagonal = ff.diagonal(s.model, s.likelihood, fisher="empirical")

    def trace(params: dict[str, Tensor]) -> Tensor:
        return diagonal(params, buffers, batch).trace()

    want = torch.func.grad(trace)(params)
    inside = torch.compile(torch.func.grad(trace), fullgraph=True, backend="aot_eager")
    assert_close(inside(params), want)
    live = {name: p.clone().requires_grad_() for name, p in params.items()}
    value = torch.compile(trace, fullgraph=True, backend="aot_eager")(live)
    found = torch.autograd.grad(value, list(live.values()))
    assert_close(dict(zip(live, found, strict=True)), want)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    many = torch.compile(torch.vmap(trace), fullgraph=True, backend="aot_eager")(stacked)
    assert_close(many[0], trace(params))
