"""Other libraries, asked for diagonals and scores of single examples."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.oracle import Values
from benchmarks.prepared import NotOffered, OneBatch, Prepared, forget, no_mask, offered
from benchmarks.workloads import Workload


def vmap_grad(workload: Workload, quantity: str) -> Prepared:
    """Prepare plain torch.func: per-sample gradients by `vmap(grad)`, then squares."""
    module, batch = workload.module, workload.batch
    params = {name: p.detach() for name, p in module.named_parameters()}
    generator = torch.Generator(workload.device).manual_seed(0)

    def log_p(params: Values, x: Tensor, weights: Tensor) -> Tensor:
        out = torch.func.functional_call(module, params, (x.unsqueeze(0),))
        logits = out if isinstance(out, Tensor) else out.logits
        return (logits[0].log_softmax(-1) * weights).sum()

    all_scores = torch.func.vmap(torch.func.grad(log_p), in_dims=(None, 0, 0))

    def squares(targets: Tensor, weight: Tensor | None = None) -> Values:
        onehot = F.one_hot(targets, workload.classes).to(next(iter(params.values())).dtype)
        if batch.mask is not None:
            onehot = onehot * batch.mask.unsqueeze(-1)
        if weight is not None:
            onehot = onehot * weight
        got = all_scores(params, batch.inputs, onehot)
        return {name: g.square().sum(0) / workload.examples for name, g in got.items()}

    def probabilities() -> Tensor:
        with torch.no_grad():
            return workload.logits(module, batch.inputs).softmax(-1)

    def mc() -> Values:
        drawn = torch.multinomial(probabilities().flatten(0, -2), 1, generator=generator)
        return squares(drawn.reshape(batch.targets.shape))

    def exact() -> Values:
        if workload.positions != 1:
            raise NotOffered("one pass for each class of each position")
        p = probabilities()
        total: Values = {}
        for c in range(workload.classes):
            part = squares(torch.full_like(batch.targets, c), p[:, c : c + 1].sqrt())
            total = {name: total[name] + t if total else t for name, t in part.items()}
        return total

    runs: dict[str, Callable[[], Values]] = {
        "diagonal/empirical": lambda: squares(batch.targets),
        "diagonal/mc": mc,
        "diagonal/exact": exact,
        "per_sample_gradients": lambda: all_scores(
            params,
            batch.inputs,
            F.one_hot(batch.targets, workload.classes).to(torch.float32)
            * (1 if batch.mask is None else batch.mask.unsqueeze(-1)),
        ),
    }
    return Prepared(offered(runs, quantity), lambda values: values)


def backpack(workload: Workload, quantity: str) -> Prepared:
    """Prepare BackPACK: extensions of the backward pass of a Sequential."""
    library = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    # (extension, reduction of the loss, scale of its result)
    known = {
        "diagonal/empirical": (extensions.SumGradSquared, "sum", 1 / workload.examples),
        "diagonal/mc": (extensions.DiagGGNMC, "mean", 1.0),
        "diagonal/exact": (extensions.DiagGGNExact, "mean", 1.0),
        "per_sample_gradients": (extensions.BatchGrad, "sum", -1.0),
    }
    no_mask(workload)
    make, reduction, scale = offered(known, quantity)
    module = library.extend(copy.deepcopy(workload.module))
    loss = library.extend(nn.CrossEntropyLoss(reduction=reduction))
    extension = make()

    def run() -> Values:
        module.zero_grad()
        with library.backpack(extension):
            logits = module(workload.batch.inputs)
            logits = logits if workload.positions == 1 else logits.transpose(1, -1)
            loss(logits, workload.batch.targets).backward()
        return {name: getattr(p, extension.savefield) for name, p in module.named_parameters()}

    def values(raw: Values) -> Values:
        return {name: scale * v for name, v in raw.items()}

    return Prepared(run, values, lambda: forget(module, extension.savefield))


def asdl(workload: Workload, quantity: str) -> Prepared:
    """Prepare ASDL: hooks on the layers that it knows."""
    library = importlib.import_module("asdl")
    no_mask(workload)
    kinds = {
        "diagonal/empirical": library.FISHER_EMP,
        "diagonal/mc": library.FISHER_MC,
        "diagonal/exact": library.FISHER_EXACT,
    }
    module = copy.deepcopy(workload.module)
    config = library.FisherConfig(
        fisher_type=offered(kinds, quantity),
        fisher_shapes=[library.SHAPE_DIAG],
        loss_type=library.LOSS_CROSS_ENTROPY,
        data_size=workload.examples,
    )
    maker = library.get_fisher_maker(module, config)
    output = maker.setup_model_call(module, workload.batch.inputs)
    flat = output.flatten(0, -2) if workload.positions > 1 else output
    maker.setup_logits_repr(flat)
    maker.setup_loss_call(F.cross_entropy, flat, workload.batch.targets.flatten())

    def values(_: Any) -> Values:
        found: Values = {}
        for prefix, layer in module.named_modules():
            diag = getattr(getattr(layer, "fisher", None), "diag", None)
            for part in ("weight", "bias"):
                got = getattr(diag, part, None)
                if got is not None:
                    found[f"{prefix}.{part}"] = got
        return {name: found[name] for name, _ in module.named_parameters() if name in found}

    return Prepared(maker.forward_and_backward, values, maker.zero_fisher)


def nngeometry(workload: Workload, quantity: str) -> Prepared:
    """Prepare NNGeometry: hooks, one backward pass for each column."""
    metrics = importlib.import_module("nngeometry.metrics")
    diagonal = importlib.import_module("nngeometry.object").PMatDiag
    backend = importlib.import_module("nngeometry.backend").TorchHooksJacobianBackend
    no_mask(workload)
    module = copy.deepcopy(workload.module)
    loader = OneBatch(workload)

    def log_p(x: Tensor, y: Tensor) -> Tensor:
        return module(x).log_softmax(-1).gather(1, y.unsqueeze(1))

    shared = {"model": module, "loader": loader, "representation": diagonal}
    runs: dict[str, Callable[[], Any]] = {
        "diagonal/empirical": lambda: diagonal(
            generator=backend(model=module, function=log_p), examples=loader
        ),
        "diagonal/mc": lambda: metrics.FIM_MonteCarlo(device=workload.device, **shared),
        "diagonal/exact": lambda: metrics.FIM(device=workload.device, **shared),
    }

    def values(matrix: Any) -> Values:
        named = dict(module.named_parameters())
        parts = matrix.get_diag().split([p.numel() for p in named.values()])
        return {n: v.reshape(p.shape) for (n, p), v in zip(named.items(), parts, strict=True)}

    return Prepared(offered(runs, quantity), values)
