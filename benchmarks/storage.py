"""How much less the traces over groups take than a diagonal: counted, not estimated.

    python benchmarks/storage.py                                  the packaged SmolLM2, a 1.3B GPT
    python benchmarks/storage.py --model gpt-1.3b                 needs no weights

Models are built on the `meta` device, so that nothing is computed; groups are found by
`ff.groups.infer` from the module and its configuration. Results are saved as `ff.io.save` writes
them, and weighed with their headers. Factors are against a diagonal in float32, for groups in
float32 and, `factor_in_half_precision`, in two bytes. Written to benchmarks/results/storage.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import fisherfn as ff
from benchmarks import report
from fisherfn.curvature import Layout

BUCKET = 1000


def smollm2() -> nn.Module:
    """Build the packaged SmolLM2 from its own configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from fisherfn.app.packaged import packaged_model

    directory, _ = packaged_model()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


def gpt_1b3() -> nn.Module:
    """Build a GPT-2 of 24 layers of 2048 units with 16 heads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=2048, n_layer=24, n_head=16, n_positions=2048)
    with torch.device("meta"):
        return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"smollm2-135m": smollm2, "gpt-1.3b": gpt_1b3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Count what the arguments ask for; return 1 if the groups of a parameter are not known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--output",
        type=Path,
        default=report.ROOT / "benchmarks" / "results",
        help="folder of the results",
    )
    asked = parser.parse_args(arguments)
    models = [weigh(name, MODELS[name]()) for name in asked.model]
    content = {
        "schema": report.SCHEMA,
        **report.environment(torch.device("cpu")),
        "models": models,
    }
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / "storage.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(models)))
    print(f"written: {path}")
    return int(any([row["not_understood"] for model in models for row in model["rows"]]))


def weigh(name: str, module: nn.Module) -> dict[str, Any]:
    """Return the sizes of a diagonal and of each kind of groups for one model."""
    _, params, _ = ff.functional(module)
    kinds = {
        "channels, heads, rows": ff.groups.infer(params, module),
        f"the same, {BUCKET} rows of a table in a bucket": ff.groups.infer(
            params, module, bucket=BUCKET
        ),
        "layers": ff.groups.layers(params),
    }
    size = ff.tree.size(params)
    return {
        "model": name,
        "parameters": size,
        "tensors": len(params),
        "diagonal_bytes": 4 * size,
        "rows": [_row(groups, specs, params) for groups, specs in kinds.items()],
    }


def _row(groups: str, specs: Any, params: dict[str, Tensor]) -> dict[str, Any]:
    size, number = ff.tree.size(params), Counter[str]()
    values: dict[str, Tensor] = {}
    for path, spec in specs.items():
        if (spec.into or path) not in values:
            number[spec.kind] += spec.num_groups
            values[spec.into or path] = torch.zeros(spec.num_groups)
    count = torch.tensor(1.0)
    # the layout is about parameters without memory; the values are what a result would have
    layout = Layout.of(params)
    pairs = tuple([(path, spec) for path, spec in specs.items()])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grouped.safetensors"
        ff.io.save(path, ff.Grouped(values, count, layout, pairs, fisher="mc"))
        stored = path.stat().st_size
    total = sum(number.values())
    return {
        "groups": groups,
        "number": total,
        "by_kind": dict(number),
        "bytes": 4 * total,
        "file_bytes": stored,
        "factor": size / total,
        "factor_of_the_file": 4 * size / stored,
        "factor_in_half_precision": 2 * size / total,
        "not_understood": dict(getattr(specs, "unknown", {})),
    }


def table(models: Sequence[dict[str, Any]]) -> list[str]:
    """Return the sizes as text."""
    lines = []
    for model in models:
        lines.append(
            f"{model['model']}: {model['parameters']:,} parameters, a diagonal takes "
            f"{model['diagonal_bytes'] / 1e6:,.1f} MB in float32"
        )
        lines += [
            f"  {row['groups']}: {row['number']:,} groups, {row['bytes'] / 1e6:,.3f} MB "
            f"({row['file_bytes'] / 1e6:,.3f} MB as a file), {row['factor']:,.0f} times less "
            f"({row['factor_of_the_file']:,.0f} as files)"
            for row in model["rows"]
        ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
