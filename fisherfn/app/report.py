"""The files of a finished run, and nothing about how they reach the disk.

Keys that scripts written for earlier calculators read keep their names and meaning:
`layer_importance.json` is `{layer: fraction of the total}`; `component_importance.json` is
`{component: {"fisher_sum", "percentage"}}`, where percentage is a fraction; `summary.json` has
`total_parameters` (the number of tensors), `total_fisher_information`, `top_10_parameters` and
`top_10_components`. In `fisher.csv` percentage is one of a hundred. Everything else is new beside
them.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherfn.app.aggregate import (
    ModuleRow,
    Share,
    by_component,
    by_layer,
    by_module,
    by_tensor,
    fraction,
)
from fisherfn.app.output import cannot_write

DIAGONAL = {"safetensors": "fisher_diagonal.safetensors", "pt": "fisher_diagonal.pt"}


@dataclass(frozen=True)
class Report:
    """Everything that is written and printed about a diagonal, the largest first."""

    layers: list[Share]
    components: list[Share]
    tensors: list[Share]
    modules: list[ModuleRow]

    @classmethod
    def of(cls, values: Mapping[str, Tensor], granularity: int = 1) -> Report:
        """Aggregate the diagonal `values` (name to tensor)."""
        return cls(
            by_layer(values),
            by_component(values, granularity),
            by_tensor(values),
            by_module(values),
        )

    @property
    def total(self) -> float:
        """Sum of the whole diagonal, the trace of the Fisher."""
        return math.fsum(share.fisher_sum for share in self.tensors)

    def layer_importance(self) -> dict[str, float]:
        """Return `{layer: fraction}`."""
        return {share.name: fraction(share.fisher_sum, self.total) for share in self.layers}

    def component_importance(self) -> dict[str, dict[str, float]]:
        """Return `{component: {fisher_sum, percentage, fisher_mean, parameters}}`."""
        return {share.name: self._entry(share) for share in self.components}

    def summary(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return the summary; `run` holds what is known about the run besides its values."""
        return {
            "total_parameters": len(self.tensors),
            "total_fisher_information": self.total,
            "top_10_parameters": [[share.name, share.fisher_sum] for share in self.tensors[:10]],
            "top_10_components": [
                {"component": share.name, **self._entry(share)} for share in self.components[:10]
            ],
            "parameter_count": sum(share.parameters for share in self.tensors),
            "layers": {share.name: self._entry(share) for share in self.layers},
            **run,
        }

    def write(self, directory: Path, run: Mapping[str, Any]) -> None:
        """Write the JSON files and the CSV into an existing directory."""
        _write_json(directory / "layer_importance.json", self.layer_importance())
        _write_json(directory / "component_importance.json", self.component_importance())
        self.write_csv(directory / "fisher.csv")
        _write_json(directory / "summary.json", self.summary(run))

    def write_csv(self, path: Path) -> None:
        """Write one row a module, under the columns of `ModuleRow`."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(ModuleRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.modules)

    def _entry(self, share: Share) -> dict[str, float]:
        return {
            "fisher_sum": share.fisher_sum,
            "percentage": fraction(share.fisher_sum, self.total),
            "fisher_mean": share.fisher_mean,
            "parameters": share.parameters,
        }


def write_diagonal(
    path: Path, values: Mapping[str, Tensor], form: str, metadata: Mapping[str, Any]
) -> None:
    """Write `{name: float32 tensor}` as safetensors or, for `form="pt"`, by `torch.save`."""
    tensors = {
        name: value.detach().to("cpu", torch.float32).contiguous() for name, value in values.items()
    }
    if form == "pt":
        try:
            torch.save(tensors, path)
        except RuntimeError as error:  # what torch makes of a full disk
            cannot_write(path.parent, error)
        return
    from safetensors.torch import save_file

    # One entry: with more, their order, and so the file's bytes, would change from run to run.
    save_file(tensors, path, metadata={"fisherfn.fim": json.dumps(metadata)})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
