"""Which groups are found, from modules, from rules and from names; what is not, is said."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import cases
import fisherfn as ff
from fisherfn.groups import GroupSpec, infer


def params_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def short(spec: GroupSpec) -> tuple[str, int | None, int]:
    return spec.kind, spec.axis, spec.num_groups


MODULES: dict[str, tuple[Any, dict[str, tuple[str, int | None, int]]]] = {
    "linear": (
        lambda: nn.Linear(3, 2),
        {"weight": ("channel", 0, 2), "bias": ("element", None, 2)},
    ),
    "bilinear": (
        lambda: nn.Bilinear(3, 4, 2),
        {"weight": ("channel", 0, 2), "bias": ("element", None, 2)},
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), {"weight": ("channel", 0, 6)}),
    "conv2d_grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
        {"weight": ("channel", 0, 6)},
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, bias=False), {"weight": ("channel", 0, 6)}),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, bias=False),
        {"weight": ("channel", 1, 6)},
    ),
    "transposed_grouped": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False),
        {"weight": ("channel", 1, 6)},
    ),
    "embedding": (lambda: nn.Embedding(7, 3), {"weight": ("row", 0, 7)}),
    "embedding_bag": (lambda: nn.EmbeddingBag(7, 3), {"weight": ("row", 0, 7)}),
    "layer_norm": (
        lambda: nn.LayerNorm([2, 3]),
        {"weight": ("element", None, 6), "bias": ("element", None, 6)},
    ),
    "rms_norm": (lambda: nn.RMSNorm(3), {"weight": ("element", None, 3)}),
    "batch_norm": (
        lambda: nn.BatchNorm2d(3),
        {"weight": ("element", None, 3), "bias": ("element", None, 3)},
    ),
    "prelu": (lambda: nn.PReLU(3), {"weight": ("element", None, 3)}),
    "lstm": (
        lambda: nn.LSTM(3, 2, bias=False),
        {"weight_ih_l0": ("channel", 0, 8), "weight_hh_l0": ("channel", 0, 8)},
    ),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, bias=False),
        {"in_proj_weight": ("head", 0, 6), "out_proj.weight": ("head", 1, 2)},
    ),
    "attention_other_sizes": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False, add_bias_kv=True),
        {
            "q_proj_weight": ("head", 0, 2),
            "k_proj_weight": ("head", 0, 2),
            "v_proj_weight": ("head", 0, 2),
            "bias_k": ("element", None, 4),
            "bias_v": ("element", None, 4),
            "out_proj.weight": ("head", 1, 2),
        },
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch(name: str) -> None:
    make, want = MODULES[name]
    with cases.seeded(0):
        module = make()
    found = infer(params_of(module), module)
    assert {path: short(spec) for path, spec in found.items()} == want
    assert not found.unknown
    assert all(spec.source.startswith(("module", "at most")) for spec in found.values())


def test_a_grouped_transposed_convolution_has_all_its_output_channels() -> None:
    with cases.seeded(0):
        layer = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
    spec = infer(params_of(layer), layer)["weight"]
    x = torch.ones(1, 4, 5)
    base = layer(x)
    for g in range(6):
        weight = layer.weight.detach().clone()
        weight[torch.as_tensor(spec.index()).expand(spec.shape) == g] += 1.0
        changed = torch.func.functional_call(layer, {"weight": weight}, (x,)) != base
        assert changed.any(-1)[0].nonzero().flatten().tolist() == [g]


def test_tied_parameters_are_found_under_their_first_name() -> None:
    with cases.seeded(0):
        net = nn.ModuleDict({"table": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
    net["head"].weight = net["table"].weight
    _, params, _ = ff.functional(net)
    assert {path: short(spec) for path, spec in infer(params, net).items()} == {
        "table.weight": ("row", 0, 7)
    }


def test_a_functional_model_is_a_module_too() -> None:
    with cases.seeded(0):
        net = nn.ConvTranspose1d(4, 6, 3)
    model, params, _ = ff.functional(net)
    assert dict(infer(params, model)) == dict(infer(params, net))


class Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.nn.DataParallel])
def test_modules_in_a_wrapper_are_found_by_either_name(wrap: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        net = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.MultiheadAttention(4, 2))
    params = {name: p.detach() for name, p in net.named_parameters()}
    want = infer(params, net)
    wrapped = wrap(net)
    assert dict(infer(params, wrapped)) == dict(want)
    outer = {f"module.{name}": p for name, p in params.items()}
    found = infer(outer, wrapped)
    assert {name.removeprefix("module."): spec for name, spec in found.items()} == dict(want)
    assert not found.unknown


def test_buckets_and_means() -> None:
    with cases.seeded(0):
        net = nn.Embedding(7, 3)
    spec = infer(params_of(net), net, bucket=3, reduction="mean")["weight"]
    assert (spec.kind, spec.sizes, spec.reduction) == ("bucket", (9, 9, 3), "mean")


def test_meta_parameters_are_enough() -> None:
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    assert infer(dict(net.named_parameters()), net)["weight"].num_groups == 2


# ---- rules ---------------------------------------------------------------------------------------


def test_the_first_rule_that_fits_decides() -> None:
    with cases.seeded(0):
        net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    params = params_of(net)
    rules = [
        (r"^0\.weight$", lambda t: ff.groups.heads(t.shape, 3)),
        (lambda path, t: t.dim() == 1, "tensor"),
        (r"weight", "row"),
    ]
    found = infer(params, net, rules=rules)
    assert {path: short(spec) for path, spec in found.items()} == {
        "0.weight": ("head", 0, 3),
        "0.bias": ("tensor", None, 1),
        "1.weight": ("row", 0, 4),
        "1.bias": ("tensor", None, 1),
    }
    given = ff.groups.whole((6, 4)).renamed(into="together")
    assert infer(params, net, rules={r"0\.weight": given})["0.weight"] == given


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([("(", "row")], ff.OptionError, r"expected a regular expression in rules="),
        ([(3, "row")], ff.OptionError, r"a regular expression or a predicate in rules=, got int"),
        ([("w", "head")], ff.OptionError, r"got 'head'. Heads need their number"),
        (["w"], ff.OptionError, r"expected rules= to hold pairs \(where, what\), got 'w'"),
        ([("weight", lambda t: 3)], ff.OptionError, r"a rule to give a GroupSpec, got int at"),
        (
            [("weight", ff.groups.whole((1, 1)))],
            ff.TreeMismatchError,
            r"a rule's spec of shape \(2, 3\), got \(1, 1\) at 'weight'",
        ),
    ],
)
def test_bad_rules(rules: Any, error: type[Exception], message: str) -> None:
    with cases.seeded(0):
        net = nn.Linear(3, 2)
    with pytest.raises(error, match=message):
        infer(params_of(net), net, rules=rules)


# ---- names alone ---------------------------------------------------------------------------------


def test_by_names_and_shapes_alone() -> None:
    shapes = {
        "fc.weight": (4, 3),
        "fc.bias": (4,),
        "conv.weight": (4, 3, 2, 2),
        "embed_tokens.weight": (9, 3),
        "norm.weight": (3,),
        "scale": (),
    }
    found = infer({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert {path: short(spec) for path, spec in found.items()} == {
        "fc.weight": ("channel", 0, 4),
        "fc.bias": ("element", None, 4),
        "conv.weight": ("channel", 0, 4),
        "embed_tokens.weight": ("row", 0, 9),
        "norm.weight": ("element", None, 3),
        "scale": ("element", None, 1),
    }
    assert not found.unknown
    assert found["fc.weight"].source == "convention [out, in, ...]"


def test_what_is_not_understood_is_reported_and_not_guessed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = {
        "w": torch.zeros(3, 4),
        "h.0.attn.c_attn.weight": torch.zeros(4, 12),
        "layers.0.self_attn.q_proj.weight": torch.zeros(6, 4),
    }
    with caplog.at_level(logging.WARNING, "fisherfn.groups"):
        found = infer(params)
    assert found["w"].kind == found["h.0.attn.c_attn.weight"].kind == "tensor"
    assert found["layers.0.self_attn.q_proj.weight"].kind == "channel"
    assert found.unknown == {
        "w": "no name of a torch layer; pass the module",
        "h.0.attn.c_attn.weight": (
            "may be stored transposed; pass the module or the configuration"
        ),
        "layers.0.self_attn.q_proj.weight": (
            "heads of attention: no configuration; kept as channels"
        ),
    }
    assert [record.getMessage() for record in caplog.records] == [
        f"groups.infer: not understood: {path}: {why}" for path, why in found.unknown.items()
    ]
    text = str(found)
    assert "not understood: w: no name of a torch layer; pass the module" in text
    assert repr(found) == "Inferred(3 parameters, 8 groups, 3 not understood)"


def test_parameters_of_unknown_modules_are_reported() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4))
            self.bias = nn.Parameter(torch.zeros(3))

    net = Own()
    found = infer({**params_of(net), "other": torch.zeros(2, 2)}, net)
    assert found.unknown == {
        "weight": "a parameter of Own, whose layout is not known",
        "other": "a parameter of no module, whose layout is not known",
    }
    assert [spec.kind for spec in found.values()] == ["tensor", "element", "tensor"]


def test_nested_parameters_have_paths() -> None:
    found = infer({"layer": {"fc.weight": torch.zeros(4, 3)}, "rest": [torch.zeros(2)]})
    assert list(found) == ["layer/fc.weight", "rest/0"]


def test_bad_input() -> None:
    with cases.seeded(0):
        net = nn.Linear(3, 2)
    params = params_of(net)
    with pytest.raises(ff.OptionError, match=r"a module or a configuration .* got str"):
        infer(params, "llama")
    with pytest.raises(ff.OptionError, match=r"reduction to be one of .* got 'max'"):
        infer(params, net, reduction="max")
    with pytest.raises(ff.TreeMismatchError, match=r"shape \(2, 3\), as in the module, got \(3,"):
        infer({"weight": torch.zeros(3, 3)}, net)
    with pytest.raises(ff.TreeMismatchError, match=r"params to hold tensors, got int at 'weight'"):
        infer({"weight": 3}, net)
    for bucket in (0, 2.0, True):
        with pytest.raises(ff.OptionError, match=r"infer: expected bucket to be an integer"):
            infer(params, net, bucket=bucket)  # type: ignore[arg-type]


def test_what_was_inferred_can_be_sent_to_another_process() -> None:
    specs = infer({"weight": torch.ones(3, 2), "table": torch.ones(2, 2, 2, 2, 2, 2)})
    for twin in (copy.deepcopy(specs), pickle.loads(pickle.dumps(specs))):
        assert dict(twin) == dict(specs)
        assert twin.unknown == specs.unknown
