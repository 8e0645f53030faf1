"""In CPU memory and back: exact in float32, with its error reported in the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states.streams import STREAMS
from states.test_ema import close, folded
from torch import Tensor, nn

import fisherfn as ff
from fisherfn import io
from fisherfn.core import trees
from fisherfn.core.errors import OptionError, UnsupportedError
from fisherfn.states import ema, welford, window

NARROW = ["float32", "bfloat16", "float16"]


def narrow32(tree: Any) -> Any:
    """Entries in float32, counts as they were."""
    return trees.map(lambda x: x.float() if x.ndim else x, tree)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
@pytest.mark.parametrize("transform", [None, ema(0.5), welford(), window(2)])
def test_float32_loses_nothing(stream: Any, transform: Any) -> None:
    members = [stream(1), stream(2)]
    obj = narrow32(members[0] if transform is None else folded(transform, members)[1])
    kept = io.offload(obj)
    assert (kept.flushed, kept.error) == (0, 0)
    back = io.fetch(kept)
    close(back, obj, 0.0)
    assert [x.dtype for x in trees.leaves(back)] == [x.dtype for x in trees.leaves(obj)]
    mine = {x.data_ptr() for x in trees.leaves(obj) if x.numel()}
    assert not mine & {x.data_ptr() for x in trees.leaves(back) if x.numel()}
    again = trees.leaves(io.fetch(kept))[0]
    again.zero_()
    close(io.fetch(kept), obj, 0.0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_the_error_is_what_it_says(dtype: str, scale: float, wide: torch.dtype) -> None:
    x = ff.random.normal(ff.random.key(0), (1000,), torch.float64).square() * scale
    tree = {"a": x.to(wide), "b": torch.zeros(3, dtype=wide), "n": torch.tensor(7.0)}
    kept = io.offload(tree, dtype)
    back = io.fetch(kept)
    error = (back["a"].double() - tree["a"].double()).norm() / tree["a"].double().norm()
    torch.testing.assert_close(kept.error, error, rtol=1e-4, atol=1e-12)
    bits = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    assert error <= 2.0**-bits
    lost = ((back["a"] == 0) & (tree["a"] != 0)).double().mean()
    torch.testing.assert_close(kept.flushed, lost)
    assert kept.flushed == 0
    assert back["a"].dtype == wide
    assert torch.equal(back["b"], tree["b"])
    assert back["n"] == 7
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    assert kept.bytes == size * 1003 + 4


def test_what_float16_flushes_is_counted() -> None:
    x = torch.cat([torch.ones(50), torch.full((40,), 1e-15), torch.zeros(10)])
    kept = io.offload({"w": x}, torch.float16)
    assert kept.flushed == 40 / 90
    assert not io.fetch(kept)["w"][50:].any()
    torch.testing.assert_close(io.offload({"w": x}, "bfloat16").flushed.item(), 0.0)
    # plain float16 would have stored zeros only
    small = {"w": torch.tensor([3e-9, 1e-10])}
    assert not small["w"].half().any()
    close(io.fetch(io.offload(small, "float16")), small, 1e-3 * 3e-9)


@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=6),
    dtype=st.sampled_from(NARROW),
)
def test_any_values_come_back_finite_or_as_they_were(values: list[float], dtype: str) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    back = io.fetch(io.offload([x], dtype))[0]
    finite = x.isfinite()
    assert back[finite & (x.abs() < 3.3e38)].isfinite().all()  # 3.4e38 rounds up to infinity
    assert torch.equal(back[x.isnan()].isnan(), torch.ones(int(x.isnan().sum())).bool())
    if dtype == "float32":
        assert torch.equal(back.nan_to_num(), x.nan_to_num())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_entry_that_is_not_finite_leaves_the_others_their_scale(bad: float) -> None:
    x = torch.tensor([65520.0, 1e-3, bad])
    back = io.fetch(io.offload([x], "float16"))[0]
    # plain float16 rounds 65520 to infinity
    torch.testing.assert_close(back, x, rtol=1e-3, atol=0, equal_nan=True)


def test_scales_are_powers_of_two() -> None:
    x = torch.tensor([0.75, 0.5, 0.25]) * 1e-20
    kept = io.offload([x], "float16")
    assert torch.equal(io.fetch(kept)[0], x.double().float()) or kept.error > 0
    exact = torch.tensor([0.75, 0.5, 0.25]) * 2.0**-70
    kept = io.offload([exact], "float16")
    assert kept.error == 0
    assert torch.equal(io.fetch(kept)[0], exact)


def test_counts_and_integers_are_kept() -> None:
    _, state = folded(welford(), [STREAMS["diagonal"](i) for i in range(3)])
    back = io.fetch(io.offload(state, "bfloat16"))
    for name in ("count", "updates", "weight_sq"):
        assert torch.equal(getattr(back, name), getattr(state, name))
    assert torch.equal(back.mean.count, state.mean.count)
    narrow = {"half": torch.ones(2).half(), "i": torch.arange(3)}
    close(io.fetch(io.offload(narrow, "bfloat16")), narrow, 0.0)
    assert io.fetch(io.offload({}, "float16")) == {}


def test_offloaded_results_are_saved(tmp_path: Path) -> None:
    F = STREAMS["diagonal_stderr"](1)
    kept = io.offload(F, "float16")
    io.save(tmp_path / "kept", kept.settled())
    loaded = io.load(tmp_path / "kept")
    close(io.fetch(loaded), io.fetch(kept), 0.0)
    assert loaded.flushed == kept.flushed
    io.save(tmp_path / "whole", F)
    sizes = [(tmp_path / name).stat().st_size for name in ("kept", "whole")]
    assert sizes[0] != sizes[1]


def test_layers_are_selected_before_the_backward_pass() -> None:
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    batch = ff.Batch(torch.ones(5, 4).double())
    lik = ff.likelihoods.categorical()
    model, params, buffers = ff.functional(net)
    whole = ff.diagonal(model, lik)(params, buffers, batch)
    model, params, buffers = ff.functional(net, select=r"^2\.")
    assert list(params) == ["2.weight", "2.bias"]
    part = ff.diagonal(model, lik)(params, buffers, batch)
    assert list(part.values) == ["2.weight", "2.bias"]
    for name, x in part.values.items():
        torch.testing.assert_close(x, whole.values[name])


@pytest.mark.parametrize("dtype", ["int8", torch.float64, None, 16])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(OptionError, match=r"io.offload: expected dtype to be one of \['float32'"):
        io.offload({"w": torch.ones(1)}, dtype)


def test_only_offloaded_things_are_fetched() -> None:
    with pytest.raises(OptionError, match=r"io.fetch: expected what io.offload returned, got dict"):
        io.fetch({})  # type: ignore[arg-type]


def test_devices_that_do_not_exist_are_refused() -> None:
    with pytest.raises(OptionError, match=r"io.fetch: expected a device, got 'quantum'"):
        io.fetch(io.offload(torch.ones(2)), device="quantum")


@pytest.mark.parametrize("bad", [3, torch.nn.Linear(2, 2, device="meta")], ids=["int", "Linear"])
def test_what_holds_no_tensors_is_refused(bad: Any) -> None:
    message = f"io.offload: expected a result, .* got {type(bad).__name__} at a. Leave it out"
    with pytest.raises(UnsupportedError, match=message):
        io.offload({"b": torch.ones(2), "a": bad})


def test_inside_transformations_it_is_refused() -> None:
    def f(x: Tensor) -> Tensor:
        io.offload(x)
        return x

    with pytest.raises(UnsupportedError, match=r"io.offload: expected tensors with values"):
        torch.vmap(f)(torch.ones(2))


def test_offloaded_shows_its_loss() -> None:
    assert repr(io.offload([torch.ones(3)], "bfloat16")) == (
        "Offloaded(1 leaf, 6 bytes, flushed 0, error 0)"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NARROW)
def test_copies_from_a_gpu_do_not_wait(dtype: str) -> None:
    key = ff.random.key(0, device="cuda")
    x = {"a": ff.random.uniform(key, 1 << 24) * 1e-9, "n": torch.tensor(3, device="cuda")}
    io.offload(x, dtype).wait()  # the first call loads kernels and pins memory, and those wait
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # the GPU is busy for a while
    kept = io.offload(x, dtype)
    assert kept.event is not None
    assert not kept.event.query()  # returned before the copy has ended
    assert kept.value["a"].is_pinned()
    back = io.fetch(kept, device="cuda")
    assert back["a"].device.type == "cuda"
    want = io.fetch(io.offload({k: v.cpu() for k, v in x.items()}, dtype))
    assert torch.equal(back["a"].cpu(), want["a"])
    torch.testing.assert_close(
        kept.settled().error, io.offload(want, dtype).error, atol=1e-2, rtol=0
    )
