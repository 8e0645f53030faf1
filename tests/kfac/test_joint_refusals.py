"""Layers that cannot share a block, each refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from kfac import loops
from kfac.stacked import pair
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

import fisherfn as ff
from fisherfn.testing import assert_close

LIK = ff.likelihoods.categorical()
F = nn.functional


class Many(nn.Module):
    """Layers of all sorts, most of which read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)
        self.table = nn.Embedding(5, 4)
        self.twice, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.left = nn.Parameter(0.3 * torch.randn(4, 4))
        self.scaled = nn.Parameter(0.3 * torch.randn(3, 4))
        self.unknown = nn.Parameter(0.3 * torch.randn(4, 3))
        self.packed = nn.Parameter(0.3 * torch.randn(6, 4))
        self.head = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.twice(torch.tanh(self.twice(self.table(ids)))))
        one, two = self.packed.split(3)
        h = self.q(x) * self.k(x) + F.linear(x, one) * F.linear(x, two)
        h = h + x @ (self.scaled.T * 3.0) + torch.einsum("bti,io->bto", x, self.unknown)
        return self.head(h + (self.left @ x).sum(-1, keepdim=True))


def built(joint: Any, make: Any = ff.kfac, **options: Any) -> Any:
    model, params, buffers = ff.functional(loops.seeded(Many))
    batch = ff.Batch(torch.tensor([[0, 1, 2, 2], [4, 1, 3, 0]]))
    return make(model, LIK, joint=joint, **options)(params, buffers, batch)


def test_the_layers_that_can_are_joined() -> None:
    names = [b.name for b in built([("k.weight", "q.weight")]).blocks]
    assert "k.weight+q.weight" in names
    assert not {"k.weight", "q.weight"} & set(names)
    assert {"left", "scaled", "packed[0]", "packed[1]", "table.weight", "head.weight"} < set(names)


@pytest.mark.parametrize("make", [ff.kfac, ff.ekfac])
@pytest.mark.parametrize(
    "bad", ["q.weight", ("q.weight", "k.weight"), {"q.weight": 1}, [()], [("q.weight", 3)], None, 2]
)
def test_what_is_no_list_of_tuples_of_paths(bad: Any, make: Any) -> None:
    message = f"^{make.__name__}: expected joint= to be a list of tuples of paths of weights, got "
    with pytest.raises(ff.OptionError, match=message):
        make(lambda p, b, x: x, LIK, joint=bad)


@pytest.mark.parametrize(
    "joint", [[("q.weight", "q.weight")], [("q.weight", "k.weight"), ("q.weight",)]]
)
def test_a_weight_that_is_named_twice(joint: Any) -> None:
    message = (
        r"^kfac: expected joint= to name each weight once, got 'q\.weight' twice\. A weight is"
    )
    with pytest.raises(ff.OptionError, match=message):
        built(joint)


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": (("q.weight", "nobody"), r"name weights among \['table.*, got 'nobody'\. Use the"),
    "unknown_alone": (("nobody",), r"name weights among \[.*, got 'nobody'"),
    "bias": (("q.weight", "k.bias"), r"with a block, got 'k\.bias', the bias of a layer\. Name"),
    "reused": (
        ("q.weight", "twice.weight"),
        r"'twice\.weight', which is no weight of one layer al",
    ),
    "vector": (("q.weight", "norm.weight"), r"'norm\.weight', which is no weight .* Leave it out"),
    "general": (("q.weight", "unknown"), r"got 'unknown', which is on the general path: .* Leave"),
    "parts": (
        ("q.weight", "packed"),
        r"'packed', which is used in several parts\. Name the parts: \['packed\[0\]', 'packed",
    ),
    "other_side": (
        ("left", "packed[0]"),
        r"read their input alike, got a matrix at packed\[0\] beside a matrix at left of another",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_named(name: str) -> None:
    group, message = REFUSED[name]
    for make in (ff.kfac, ff.ekfac):
        with pytest.raises(ff.OptionError, match=f"^{make.__name__}: expected .*{message}"):
            built([group], make)


def test_weights_with_different_constants() -> None:
    with pytest.raises(
        ff.OptionError, match=r"same constant, got 3 at scaled and 1 at packed\[1\]"
    ):
        built([("packed[1]", "scaled")])


def test_weights_that_are_cut_otherwise() -> None:
    with pytest.raises(ff.OptionError, match=r"equally many blocks, got 1 at k\.weight and 3 at q"):
        built([("q.weight", "k.weight")], partition={"q.weight": 3})


def test_tables() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(5, 2), nn.Embedding(5, 3)
            self.head = nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(torch.cat([self.a(ids), self.b(ids)], -1)))

    model, params, buffers = ff.functional(loops.seeded(Tables))
    batch = ff.Batch(torch.tensor([0, 3]))
    with pytest.raises(
        ff.OptionError, match=r"multiply by a matrix in joint=, got a table at a\.we"
    ):
        ff.kfac(model, LIK, joint=[("a.weight", "b.weight")])(params, buffers, batch)
    ff.kfac(model, LIK, joint=[("a.weight",)])(params, buffers, batch)


class Windows(nn.Module):
    """Two convolutions of one image."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.a, self.b = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).mean((-1, -2)) + self.b(x).mean((-1, -2))


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.Conv2d(2, 4, 3),
        lambda: nn.Conv2d(2, 4, 2, padding=1),
        lambda: nn.Conv2d(2, 4, 2, groups=2),
        lambda: nn.ConvTranspose2d(2, 4, 2),
    ],
    ids=["kernel", "padding", "groups", "transposed"],
)
def test_convolutions_of_other_geometry(other: Callable[[], nn.Module]) -> None:
    module = loops.seeded(lambda: Windows(nn.Conv2d(2, 4, 2), other()))
    model, params, buffers = ff.functional(module)
    fim = ff.kfac(model, LIK, joint=[("a.weight", "b.weight")])
    message = r"alike, got a \w*( ?)convolution at b\.weight beside a convolution at a\.weight of"
    with pytest.raises(ff.OptionError, match=message):
        fim(params, buffers, ff.Batch(loops.normal(1, 2, 2, 4, 4)))


def test_transposed_convolutions_that_are_cut() -> None:
    found = pair("transposed")
    case = found.several
    fim = ff.kfac(case.model, LIK, joint=found.joint, partition=dict.fromkeys(found.joint[0], 2))
    message = (
        r"whole weights of transposed convolutions in joint=, got 2 blocks at layers\.q\.weight"
    )
    with pytest.raises(ff.OptionError, match=message):
        fim(*case.args)


# ---- inputs --------------------------------------------------------------------------------------


class Reading(nn.Module):
    """Two layers; the second reads what `other` makes of the input of the first."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        return self.head(torch.tanh(self.q(h).mean(1) + self.k(self.other(h)).mean(1)))


def reading(other: Callable[[Tensor], Tensor]) -> tuple[Any, Any, Any, ff.Batch]:
    model, params, buffers = ff.functional(loops.seeded(lambda: Reading(other)))
    return model, params, buffers, ff.Batch(loops.normal(1, 3, 2, 4))


JOINT = [("q.weight", "k.weight")]


@pytest.mark.parametrize(
    "other",
    [torch.cos, lambda h: h + 1e-9, lambda h: h[:, :1], lambda h: h.flip(1)],
    ids=["values", "almost", "fewer", "order"],
)
@pytest.mark.parametrize("fisher", ["exact", "forward_only"])
def test_inputs_that_differ(other: Callable[[Tensor], Tensor], fisher: str) -> None:
    model, params, buffers, batch = reading(other)
    message = (
        r"^kfac: expected the layers of one block .* got another one than at q\.weight at k\.w"
    )
    for size in (None, 1):
        fim = ff.kfac(model, LIK, joint=JOINT, fisher=fisher, chunk_size=size)
        with pytest.raises(ff.OptionError, match=message):
            fim(params, buffers, batch)
    if fisher == "exact":
        with pytest.raises(ff.OptionError, match=r"^ekfac: expected the layers of one block"):
            ff.ekfac(model, LIK, joint=JOINT)(params, buffers, batch)


@pytest.mark.parametrize(
    "other", [lambda h: h.view(-1, 2, 4), torch.clone, lambda h: h.mT.contiguous().mT]
)
def test_equal_inputs_in_other_tensors_are_the_same_where_values_are_seen(
    other: Callable[[Tensor], Tensor],
) -> None:
    model, params, buffers, batch = reading(other)
    same = reading(lambda h: h)
    got = ff.kfac(model, LIK, joint=JOINT)(params, buffers, batch)
    assert_close(got, ff.kfac(same[0], LIK, joint=JOINT)(*same[1:]))
    many = {k: torch.stack([p, 2.0 * p]) for k, p in params.items()}
    message = (
        r"^kfac: expected .* the same tensor where values are hidden, got another .* at k\.weig"
    )
    for each in (model, same[0]):
        fim = ff.kfac(each, LIK, joint=JOINT)

        def traces(p: Any, fim: Any = fim) -> Tensor:
            return fim(p, buffers, batch).trace()

        if each is model:
            with pytest.raises(ff.UnsupportedError, match=message):
                torch.vmap(traces)(many)
        else:
            assert torch.vmap(traces)(many).isfinite().all()


def test_half_precision_is_compared_by_the_tensor_not_by_its_copies() -> None:
    model, params, buffers, batch = reading(lambda h: h)
    low = {k: p.to(torch.bfloat16) for k, p in params.items()}
    few = ff.Batch(batch.inputs.to(torch.bfloat16))
    got = ff.kfac(model, LIK, joint=JOINT)(low, buffers, few)
    want = ff.kfac(model, LIK, joint=JOINT)(params, buffers, batch)
    torch.testing.assert_close(got.trace().double(), want.trace(), rtol=0.05, atol=0.0)


def test_values_that_do_not_exist_are_equal_to_themselves() -> None:
    """A position that does not exist may hold anything."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + 2.0 * self.k(x.clone())

    model, params, buffers = ff.functional(loops.seeded(Positions))
    inputs = loops.normal(1, 3, 2, 4)
    mask = torch.tensor([[True, False], [True, True], [True, False]])
    spoilt = torch.where(mask.unsqueeze(-1), inputs, torch.inf)
    fim = ff.kfac(model, LIK, joint=JOINT)
    want, got = (fim(params, buffers, ff.Batch(x, mask=mask)) for x in (inputs, spoilt))
    assert_close(got, want)
    missing = torch.where(mask.unsqueeze(-1), inputs, torch.nan)
    assert_close(fim(params, buffers, ff.Batch(missing, mask=mask)), want)


@pytest.mark.slow
def test_other_tensors_are_refused_while_compiling() -> None:
    model, params, buffers, batch = reading(torch.cos)
    fim = torch.compile(ff.kfac(model, LIK, joint=JOINT), fullgraph=True, backend="aot_eager")
    with pytest.raises(Unsupported) as caught:
        fim(params, buffers, batch)
    torch._dynamo.reset()
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, ff.UnsupportedError):
        cause = cause.__cause__ or cause.__context__
    assert "the same tensor where values are hidden" in str(cause)
