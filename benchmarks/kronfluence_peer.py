"""kronfluence, asked for Kronecker factors: see `kronecker_peers` for what is returned."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kronecker_peers import IGNORED, PLAIN, Options, targets_of
from benchmarks.oracle import Values
from benchmarks.prepared import NOT_THERE, NotOffered, Prepared
from benchmarks.workloads import Workload


def kronfluence(workload: Workload, quantity: str, options: Options = PLAIN) -> Prepared:
    """Prepare kronfluence: the functions below its `Analyzer`, which would write files.

    It averages factors over positions, and second moments in the eigenbasis over examples.
    """
    task = importlib.import_module("kronfluence.task").Task
    covariance = importlib.import_module("kronfluence.factor.covariance")
    eigen = importlib.import_module("kronfluence.factor.eigen")
    state = importlib.import_module("kronfluence.utils.state").State(
        cpu=workload.device.type == "cpu"
    )
    structure, _, fisher = quantity.partition("/")
    if fisher == "exact":
        raise NotOffered(NOT_THERE)
    if options.draws > 1:
        raise NotOffered("one draw of labels for each example")
    batch, mask = [workload.batch.inputs, targets_of(workload)], workload.batch.mask

    class Classification(task):
        """What the library wants to know about a problem."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = workload.logits(model, batch[0]).flatten(0, -2)
            targets = batch[1].flatten()
            if sample:
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1), 1).flatten()
                targets = torch.where(targets == IGNORED, targets, drawn)
            each = F.cross_entropy(logits, targets, reduction="none")
            if options.class_weight is not None:  # a square root: scores are multiplied in pairs
                each = each * options.class_weight[targets].sqrt()
            return each.sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            return mask

    class Loader:
        """One batch, as it is."""

        def __iter__(self) -> Iterator[Any]:
            return iter([batch])

        def __len__(self) -> int:
            return 1

    prepared = importlib.import_module("kronfluence.analyzer").prepare_model
    own = Classification()
    module = prepared(copy.deepcopy(workload.module), own)
    dtype = next(workload.module.parameters()).dtype
    arguments = importlib.import_module("kronfluence.arguments").FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=fisher == "empirical",
        has_shared_parameters=options.reused,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    shared = {"model": module, "state": state, "factor_args": arguments, "disable_tqdm": True}

    def run() -> Any:
        _, factors = covariance.fit_covariance_matrices_with_loader(
            task=own, loader=Loader(), **shared
        )
        if structure == "kfac":
            return factors
        bases = eigen.perform_eigendecomposition(covariance_factors=factors, **shared)
        _, scales = eigen.fit_lambda_matrices_with_loader(
            task=own, loader=Loader(), eigen_factors=bases, **shared
        )
        return bases, scales

    counted = workload.positions if mask is None else float(mask.sum()) / workload.examples

    def values(raw: Any) -> Values:
        found: Values = {}
        if structure == "kfac":
            for name, a in raw["activation_covariance"].items():
                g = raw["gradient_covariance"][name]
                found[f"A/{name}.weight"] = a / raw["num_activation_covariance_processed"][name]
                many = raw["num_gradient_covariance_processed"][name]
                found[f"G/{name}.weight"] = counted * g / many
            return found
        bases, scales = raw
        for name, a in bases["activation_eigenvectors"].items():
            found[f"QA/{name}.weight"] = a
            found[f"QG/{name}.weight"] = bases["gradient_eigenvectors"][name]
            many = scales["num_lambda_processed"][name]
            found[f"S/{name}.weight"] = scales["lambda_matrix"][name] / many
        return found

    return Prepared(run, values)
