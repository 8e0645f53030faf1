"""Heads of Hugging Face models: what belongs to a head changes this head and no other.

Each group of a projection is moved, and the model says which heads' outputs change, at the door of
the output projection. Nothing here reads the library's tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import fisherfn as ff
from cases import language
from fisherfn.groups import GroupSpec, infer

V = 11
DECODER: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "use_cache": False,
    "attn_implementation": "eager",
}


def decoder(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**DECODER | options)
        kind = {"Gemma3Text": "Gemma3"}.get(name, name)
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return make


def other(name: str, head: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        settings = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads",)}
        config = getattr(transformers, f"{name}Config")(**settings | options)
        return getattr(transformers, f"{name}For{head}")(config)

    return make


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        "vocab_size": V,
        "d_model": 8,
        "d_kv": 3,
        "d_ff": 6,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "use_cache": False,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 4,
        "relative_attention_max_distance": 6,
    }
    return T5ForConditionalGeneration(T5Config(**settings))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": decoder("Llama"),
    "llama_one_key_head": decoder("Llama", num_key_value_heads=1, tie_word_embeddings=True),
    "mistral": decoder("Mistral", head_dim=6),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3", head_dim=4),
    "gemma": decoder("Gemma", head_dim=4),
    "gemma2": decoder("Gemma2", head_dim=4),
    "gemma3": decoder("Gemma3Text", head_dim=4),
    "phi3": decoder("Phi3", pad_token_id=0),
    "gpt_neox": other("GPTNeoX", "CausalLM"),
    "opt": other("OPT", "CausalLM", ffn_dim=6, word_embed_proj_dim=8, do_layer_norm_before=True),
    "roberta": other("Roberta", "MaskedLM", pad_token_id=0),
    "gpt2": lambda: language.gpt2(n_layer=1, n_head=4, attn_implementation="eager"),
    "bert": lambda: language.bert_masked(),
    "t5": t5,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    with cases.seeded(3):
        module = MODELS[request.param]().double().eval()
        for p in module.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    return module


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def inputs(module: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    found = {"input_ids": ids}
    return found | {"decoder_input_ids": ids} if module.config.model_type == "t5" else found


@contextmanager
def head_outputs(module: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What arrives at each output projection."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def note(_: Any, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = args[0].detach()

        hooks.append(module.get_submodule(name).register_forward_pre_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def run(module: Any, changed: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    with head_outputs(module, names) as seen, torch.no_grad():
        torch.func.functional_call(module, changed, (), inputs(module), tie_weights=False)
    return seen


def outputs_of_attention(specs: Any) -> dict[str, GroupSpec]:
    """Output projections by module name: those whose heads lie along their inputs."""
    ends = (
        "o_proj.weight",
        "attn.c_proj.weight",
        "attention.output.dense.weight",
        "attention.dense.weight",
        "attn.out_proj.weight",
        ".o.weight",
    )
    return {path.rpartition(".")[0]: spec for path, spec in specs.items() if path.endswith(ends)}


def test_moving_a_head_moves_this_head_only(model: Any) -> None:
    params = parameters(model)
    specs = infer(params, model)
    assert not specs.unknown
    out = outputs_of_attention(specs)
    assert out
    base = run(model, params, list(out))
    checked = 0
    for path, spec in specs.items():
        if spec.kind != "head" or path.rpartition(".")[0] in out:
            continue
        block = path.rsplit(".", 2)[0].removesuffix(".self")
        (name,) = [n for n in out if n.startswith(block)]
        heads = out[name].num_groups
        parts = spec.parts or (("q" if spec.num_groups == heads else "kv", spec.num_groups),)
        start = 0
        for part, n in parts:
            for g in range(n):
                index = torch.as_tensor(spec.index()).expand(spec.shape)
                # not by a constant, which a softmax would not see
                step = torch.arange(index.numel(), dtype=torch.float64).reshape(spec.shape).cos()
                moved = params[path] + 0.5 * step * (index == start + g)
                seen = run(model, {**params, path: moved}, list(out))[name]
                change = (seen - base[name]).abs().reshape(5, heads, -1).amax((0, 2))
                each = heads // n
                want = [h for h in range(heads) if h // each == g]
                assert (change > 1e-9).nonzero().flatten().tolist() == want, (path, part, g)
                checked += 1
            start += n
    assert checked >= 3 * min(spec.num_groups for spec in out.values()) // 2


def test_columns_of_the_output_projection_read_their_head_only(model: Any) -> None:
    specs = infer(parameters(model), model)
    for name, spec in outputs_of_attention(specs).items():
        layer = model.get_submodule(name)
        weight = f"{name}.weight"
        axis = spec.axis
        assert axis is not None
        features = spec.shape[axis]
        for g in range(spec.num_groups):
            head = torch.zeros(spec.num_groups, features // spec.num_groups, dtype=torch.float64)
            head[g] = 1.0
            index = torch.as_tensor(spec.index()).expand(spec.shape)
            kept = model.get_parameter(weight).detach() * (index == g)
            x = head.reshape(1, 1, -1)
            with torch.no_grad():
                only = torch.func.functional_call(layer, {"weight": kept}, (x,))
                torch.testing.assert_close(only, layer(x), rtol=0, atol=0)


def test_configuration_module_and_json_agree(model: Any) -> None:
    params = parameters(model)
    by_module = infer(params, model)
    by_config = infer(params, model.config)
    by_json = infer(params, json.loads(model.config.to_json_string(use_diff=False)))
    assert dict(by_module) == dict(by_config) == dict(by_json)
    assert not by_config.unknown
    assert not by_json.unknown


def test_the_rest_of_the_model(model: Any) -> None:
    params = parameters(model)
    specs = infer(params, model)
    for path, spec in specs.items():
        if spec.kind == "row":
            table = model.get_submodule(path.rpartition(".")[0])
            assert isinstance(table, nn.Embedding)
            assert (spec.axis, spec.num_groups) == (0, table.num_embeddings)
        if spec.kind == "channel":
            # what a channel is: with its weights at zero, this output does not depend on the input
            layer = model.get_submodule(path.rpartition(".")[0])
            index = torch.as_tensor(spec.index()).expand(spec.shape)
            weight = params[path] * (index != 1)
            wide = spec.shape[1 - (spec.axis or 0)]
            x = torch.arange(2.0 * wide, dtype=torch.float64).reshape(1, 2, wide) + 1
            out = torch.func.functional_call(layer, {"weight": weight}, (x,))[0]
            same = out[0] == out[1]
            assert same.nonzero().flatten().tolist() == [1], path
        if params[path].dim() == 1:
            assert spec.kind == "element"
    assert sum(sum(spec.sizes) for spec in specs.values()) == ff.tree.size(params)


def test_an_architecture_without_a_table_is_reported() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    with cases.seeded(0):
        module = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=8, n_layer=1, n_head=2))
    params = parameters(module)
    specs = infer(params, module)
    fused = "transformer.h.0.self_attention.query_key_value.weight"
    assert specs[fused].kind == "channel"
    assert specs.unknown[fused] == (
        "heads of attention: the architecture 'bloom' has no table; kept as channels"
    )
    assert set(specs.unknown) == {fused, "transformer.h.0.self_attention.dense.weight"}
    alone = infer(params, module.config)
    assert alone[fused].kind == "tensor"
    assert alone.unknown[fused].startswith("the architecture 'bloom' has no table (there are ")
    rules = [
        (r"query_key_value\.weight", lambda t: ff.groups.heads(t.shape, 2, layout="interleaved"))
    ]
    assert infer(params, module, rules=rules)[fused].parts == (("q", 2), ("k", 2), ("v", 2))


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("Albert", {"embedding_size": 4}, ("query", "key", "value", "dense")),
        ("MPNet", {}, ("q", "k", "v", "o")),
        ("DebertaV2", {}, ("query_proj", "key_proj", "value_proj", "dense")),
        ("Electra", {"embedding_size": 4}, ("query", "key", "value", "dense")),
    ],
)
def test_heads_of_any_attention_without_a_table_are_reported(
    name: str, options: dict[str, Any], weights: tuple[str, ...]
) -> None:
    import transformers

    settings = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "use_cache")}
    settings.pop("attn_implementation")
    config = getattr(transformers, f"{name}Config")(**settings | options)
    with torch.device("meta"):
        module = getattr(transformers, f"{name}Model")(config)
    specs = infer(parameters(module), module)
    reported = {path.split(".")[-2] for path, why in specs.unknown.items() if "heads" in why}
    assert reported == set(weights)
    assert not any("intermediate" in path or "embedding" in path for path in specs.unknown)


def test_experts_are_reported() -> None:
    with cases.seeded(0):
        module = language.mixtral()
    specs = infer(parameters(module), module)
    assert specs["model.layers.0.self_attn.k_proj.weight"].kind == "head"
    assert all(".mlp." in path for path in specs.unknown)
    assert specs.unknown


def test_the_configuration_of_another_model() -> None:
    with cases.seeded(0):
        module = decoder("Llama")()
        other = decoder("Llama", num_attention_heads=8, num_key_value_heads=8, head_dim=3)().config
    message = (
        r"expected the heads of the llama configuration \(8 queries, 8 keys, 3 entries each\), got "
        r"shape \(8, 8\) at 'model.layers.0.self_attn.q_proj.weight'"
    )
    with pytest.raises(ff.ShapeError, match=message):
        infer(parameters(module), other)
    with pytest.raises(ff.OptionError, match=r"numbers of heads and hidden units, got None"):
        infer(parameters(module), {"model_type": "llama"})


def test_layers_inside_of_adapters_and_wrappers() -> None:
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 8}
    shapes = {
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": (8, 8),
        "_orig_mod.model.layers.0.self_attn.o_proj.weight": (8, 8),
    }
    specs = infer({path: torch.zeros(shape) for path, shape in shapes.items()}, config)
    assert [(spec.kind, spec.axis, spec.num_groups) for spec in specs.values()] == [
        ("head", 0, 4),
        ("head", 1, 4),
    ]


def test_the_configuration_inside_of_a_wrapper() -> None:
    with cases.seeded(0):
        module = torch.nn.DataParallel(MODELS["llama"]())
    for given in (module, ff.functional(module)[0]):
        specs = infer(parameters(module), given)
        query = specs["module.model.layers.0.self_attn.q_proj.weight"]
        assert (query.kind, query.num_groups) == ("head", 4)
        assert not specs.unknown


def test_gpt2_with_cross_attention() -> None:
    with cases.seeded(0):
        module = language.gpt2(n_layer=1, add_cross_attention=True)
    specs = infer(parameters(module), module)
    block = "transformer.h.0.crossattention"
    assert specs[f"{block}.c_attn.weight"].parts == (("k", 2), ("v", 2))
    assert (specs[f"{block}.q_attn.weight"].axis, specs[f"{block}.c_proj.weight"].axis) == (1, 0)
