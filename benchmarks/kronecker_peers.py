"""Other libraries, asked for Kronecker factors and for second moments in their eigenbasis.

`Prepared.values` gives what a library says about each block, in the units of this package: the
scores of the examples are added over positions and averaged over examples, as each library's
documentation says that its result is to be read. `A/name` and `G/name` are factors, `QA/name`,
`QG/name` and `S/name` (outputs, inputs) are bases and scales. A block `layer.weight` holds the bias
of its layer where its inputs are one more than those of the weight; elsewhere the bias has a block
`layer.bias` of its own. `rest/name` is a diagonal.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.oracle import Values
from benchmarks.prepared import NotOffered, OneBatch, Prepared, forget, no_mask, offered
from benchmarks.workloads import Workload

IGNORED = -100  # what torch's losses leave out
NO_CLASS_WEIGHTS = "no weights of classes for this kind of labels"


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        reduction: "mean" or "sum" of the loss, where a library leaves that to its users.
        class_weight: Weights of the classes, [C].
        reused: Whether a module is called several times, which some libraries want to be told.
        draws: Labels drawn for each example.
    """

    reduction: str = "mean"
    class_weight: Tensor | None = None
    reused: bool = False
    draws: int = 1


PLAIN = Options()


class ClassesSecond(nn.Module):
    """A module with its classes where torch's losses look for them, `[B, C, *positions]`."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap the module."""
        super().__init__()
        self.module = module

    def forward(self, inputs: Any) -> Tensor:
        """Return the logits."""
        logits = self.module(inputs)
        return logits if logits.dim() == 2 else logits.movedim(-1, 1)


def backpack(workload: Workload, quantity: str, options: Options = PLAIN) -> Prepared:
    """Prepare BackPACK: KFAC draws labels, KFLR is the same with all of them.

    Its factors of a convolution are documented to be larger than those of Grosse & Martens (2016)
    by the number of positions, by which they are divided here.
    """
    library = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    no_mask(workload)
    known = {
        "kfac/mc": lambda: extensions.KFAC(mc_samples=options.draws),
        "kfac/exact": extensions.KFLR,
    }
    extension = offered(known, quantity)()
    module = library.extend(copy.deepcopy(workload.module))
    criterion = library.extend(
        nn.CrossEntropyLoss(reduction=options.reduction, weight=options.class_weight)
    )
    scale = workload.positions if options.reduction == "mean" else 1 / workload.examples
    positions: dict[str, int] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(_count_positions(positions, name))

    def run() -> dict[str, list[Tensor]]:
        module.zero_grad()
        with library.backpack(extension):
            logits = module(workload.batch.inputs)
            logits = logits if workload.positions == 1 else logits.transpose(1, -1)
            criterion(logits, workload.batch.targets).backward()
        return {name: getattr(p, extension.savefield) for name, p in module.named_parameters()}

    def values(raw: dict[str, list[Tensor]]) -> Values:
        found: Values = {}
        for name, factors in raw.items():
            layer, _, kind = name.rpartition(".")
            many = positions.get(layer, 1) if kind == "weight" else 1
            found[f"G/{name}"] = factors[0] * scale / many
            found[f"A/{name}"] = factors[1] if len(factors) > 1 else _one(factors[0])
        return found

    return Prepared(run, values, lambda: forget(module, extension.savefield))


def asdl(workload: Workload, quantity: str, options: Options = PLAIN) -> Prepared:
    """Prepare ASDL: hooks on the layers that it knows; normalisation layers get their diagonal.

    `data_size`, by which it divides, is the number of labels: of positions where each has a label.
    Embeddings of indices without a batch axis, which it fails on, are left out.
    """
    library = importlib.import_module("asdl")
    structure, _, fisher = quantity.partition("/")
    kinds = {
        "empirical": library.FISHER_EMP,
        "mc": library.FISHER_MC,
        "exact": library.FISHER_EXACT,
    }
    shape = {"kfac": library.SHAPE_KRON, "ekfac": library.SHAPE_KFE}[structure]
    if fisher != "empirical":
        no_mask(workload)
        if options.class_weight is not None:
            raise NotOffered(NO_CLASS_WEIGHTS)
    module = copy.deepcopy(workload.module)
    config = library.FisherConfig(
        fisher_type=offered(kinds, fisher),
        fisher_shapes=[shape, (nn.LayerNorm, library.SHAPE_DIAG)],
        loss_type=library.LOSS_CROSS_ENTROPY,
        n_mc_samples=options.draws,
        data_size=workload.examples * workload.positions,
        ignore_modules=_unbatched(module, workload.batch.inputs),
    )
    maker = library.get_fisher_maker(module, config)
    output = maker.setup_model_call(module, workload.batch.inputs)
    flat = output.flatten(0, -2) if workload.positions > 1 else output
    maker.setup_logits_repr(flat)
    maker.setup_loss_call(
        F.cross_entropy, flat, targets_of(workload).flatten(), weight=options.class_weight
    )
    scale = workload.positions

    def values(_: Any) -> Values:
        found: Values = {}
        for prefix, layer in module.named_modules():
            got = getattr(layer, "fisher", None)
            if got is None:
                continue
            weight, bias = f"{prefix}.weight", f"{prefix}.bias"
            beside = getattr(layer, "bias", None) is not None
            if got.has_kron:
                found[f"A/{weight}"], found[f"G/{weight}"] = got.kron.A, scale * got.kron.B
                if beside:
                    found[f"A/{bias}"], found[f"G/{bias}"] = _one(got.kron.B), scale * got.kron.B
            if got.has_kfe:
                found[f"QA/{weight}"], found[f"QG/{weight}"] = got.kfe.Ua, got.kfe.Ub
                found[f"S/{weight}"] = scale * got.kfe.scale[0]
                if beside:
                    found[f"QA/{bias}"], found[f"QG/{bias}"] = _one(got.kfe.Ub), got.kfe.Ub
                    found[f"S/{bias}"] = scale * got.kfe.scale[1].unsqueeze(-1)
            if got.has_diag:
                found[f"rest/{weight}"] = scale * got.diag.weight
                found[f"rest/{bias}"] = scale * got.diag.bias
        return found

    return Prepared(maker.forward_and_backward, values, maker.zero_fisher)


def nngeometry(workload: Workload, quantity: str, options: Options = PLAIN) -> Prepared:
    """Prepare NNGeometry: hooks, one backward pass for each column."""
    metrics = importlib.import_module("nngeometry.metrics")
    objects = importlib.import_module("nngeometry.object")
    backend = importlib.import_module("nngeometry.backend").TorchHooksJacobianBackend
    structure, _, fisher = quantity.partition("/")
    if fisher != "empirical":
        no_mask(workload)
        if options.class_weight is not None:
            raise NotOffered(NO_CLASS_WEIGHTS)
    kind = {"kfac": objects.PMatKFAC, "ekfac": objects.PMatEKFAC}[structure]
    module = copy.deepcopy(workload.module)
    loader, several = OneBatch(workload), workload.positions > 1

    def log_p(x: Tensor, y: Tensor) -> Tensor:
        picked = module(x).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        if workload.batch.mask is not None:
            picked = picked * workload.batch.mask
        if options.class_weight is not None:  # a square root: scores are multiplied in pairs
            picked = picked * options.class_weight[y].sqrt()
        return picked.reshape(len(y), -1).sum(1, keepdim=True)

    def rows(*batch: Tensor) -> Tensor:
        return module(batch[0]).flatten(0, -2)

    def image(*batch: Tensor) -> Tensor:
        return module(batch[0]).movedim(-1, 1).unsqueeze(-1)

    shared = {"model": module, "loader": loader, "representation": kind}
    variant = "segmentation_logits" if several else "classif_logits"
    makers: dict[str, Callable[[], Any]] = {
        "empirical": lambda: kind(generator=backend(model=module, function=log_p), examples=loader),
        "mc": lambda: metrics.FIM_MonteCarlo(
            device=workload.device,
            variant=variant,
            trials=options.draws,
            function=image if several else None,
            **shared,
        ),
        "exact": lambda: metrics.FIM(
            device=workload.device, function=rows if several else None, **shared
        ),
    }
    make = offered(makers, fisher)

    def run() -> Any:
        matrix = make()
        if structure == "ekfac":
            matrix.update_diag(loader)
        return matrix

    def values(matrix: Any) -> Values:
        found: Values = {}
        if structure == "kfac":
            for name, (a, g) in matrix.data.items():
                found[f"A/{name}.weight"], found[f"G/{name}.weight"] = a, g
            return found
        bases, scales = matrix.data
        for name, (a, g) in bases.items():
            found[f"QA/{name}.weight"], found[f"QG/{name}.weight"] = a, g
            found[f"S/{name}.weight"] = scales[name].reshape(len(g), len(a))
        return found

    return Prepared(run, values)


def curvlinops(workload: Workload, quantity: str, options: Options = PLAIN) -> Prepared:
    """Prepare curvlinops: an operator that keeps its factors, so that each batch needs a new one.

    It takes the parameters of linear layers and two-dimensional convolutions, and refuses others.
    """
    library = importlib.import_module("curvlinops")
    structure, _, fisher = quantity.partition("/")
    make = {"kfac": library.KFACLinearOperator, "ekfac": library.EKFACLinearOperator}[structure]
    kind = offered({"mc": "mc", "empirical": "empirical", "exact": "type-2"}, fisher)
    module = ClassesSecond(copy.deepcopy(workload.module))
    known = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    params = list({id(p): p for m in known for p in m.parameters()}.values())
    criterion = nn.CrossEntropyLoss(weight=options.class_weight, reduction=options.reduction)
    data = [(workload.batch.inputs, targets_of(workload))]
    scale = workload.positions if options.reduction == "mean" else 1 / workload.examples
    seeds = itertools.count()

    def run() -> Any:
        operator = make(
            module,
            criterion,
            params,
            data,
            check_deterministic=False,
            seed=next(seeds),
            fisher_type=kind,
            mc_samples=options.draws,
            num_data=workload.examples,
            num_per_example_loss_terms=workload.positions,
            separate_weight_and_bias=False,
        )
        if structure == "kfac":
            operator.compute_kronecker_factors()
        else:
            operator.compute_eigenvalue_correction()
        return operator

    def values(operator: Any) -> Values:
        found: Values = {}
        if structure == "kfac":
            for name, a in operator._input_covariances.items():
                block = f"{name.removeprefix('module.')}.weight"
                found[f"A/{block}"] = a
                found[f"G/{block}"] = scale * operator._gradient_covariances[name]
            return found
        for name, a in operator._input_covariances_eigenvectors.items():
            block = f"{name.removeprefix('module.')}.weight"
            found[f"QA/{block}"] = a
            found[f"QG/{block}"] = operator._gradient_covariances_eigenvectors[name]
            own = operator._corrected_eigenvalues[name]
            own = next(iter(own.values())) if isinstance(own, dict) else own
            found[f"S/{block}"] = scale * own
        return found

    return Prepared(run, values)


def targets_of(workload: Workload) -> Tensor:
    """Return targets in which what does not count is marked as torch's losses want it."""
    mask, targets = workload.batch.mask, workload.batch.targets
    return targets if mask is None else targets.masked_fill(~mask, IGNORED)


def _one(like: Tensor) -> Tensor:
    """Return the input factor of a bias, whose input is always one."""
    return like.new_ones(1, 1)


def _unbatched(module: nn.Module, inputs: Any) -> list[nn.Module]:
    """Return the embeddings that are called with a single axis of indices."""
    found: list[nn.Module] = []

    def hook(layer: nn.Module, args: Any, out: Tensor) -> None:
        if args[0].dim() < 2:
            found.append(layer)

    known = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    handles = [m.register_forward_hook(hook) for m in known]
    with torch.no_grad():
        module(inputs)
    for handle in handles:
        handle.remove()
    return found


def _count_positions(found: dict[str, int], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        found[name] = out.shape[2:].numel()

    return hook
