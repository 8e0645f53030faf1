"""Kronecker blocks of small models as dense matrices, from their definition.

With inputs a and cotangents g at the rows of a layer, on examples n of weight w_n, N = Σ w_n, and
R = Σ w_n (rows of example n), the block of each group of channels is

    K-FAC: (1/R) Σ w a aᵀ ⊗ (1/N) Σ w p g gᵀ    with a one appended to a where the layer has a bias

where the labels are the observed ones with p = 1, or all of them by their probability p. Several
calls of a layer are further rows. Rows of positions that do not count are none. Nothing is shared
with the package, and no example or label with another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import Workload

LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class Reading:
    """How the definition is read where libraries differ.

    Attributes:
        power: To which power weights enter the factors of outputs.
        weighted_inputs: Whether weights enter the factors of inputs.
        all_rows: Whether rows of positions that do not count are rows of inputs.
        apart: Whether each observed label has a score of its own.
    """

    power: int = 1
    weighted_inputs: bool = True
    all_rows: bool = False
    apart: bool = False


PLAIN = Reading()


@dataclass
class Layer:
    """What is known of one layer: factors of each group, and the scores of all labels.

    Attributes:
        bias: Whether the last input is the one of the bias.
        A: The factors of inputs, [groups, I, I].
        G: The factors of outputs, [groups, O, O].
        scores: Weights, and scores `[groups, O, I]`.
    """

    bias: bool
    A: Tensor
    G: Tensor
    scores: list[tuple[float, Tensor]] = field(default_factory=list)

    def kfac(self) -> Tensor:
        """Return the block, the rows of the weight one after the other."""
        return dense(self.A, self.G)

    def diagonal(self) -> Tensor:
        """Return the mean square of the scores, [outputs, inputs]."""
        squares = [w * s.square() for w, s in self.scores]
        return torch.stack(squares).sum(0).flatten(0, 1)

    def ekfac(self, QA: Tensor, QG: Tensor) -> Tensor:
        """Return the block that is nearest to the second moment of the scores in a basis."""
        S = sum(w * (QG.mT @ s @ QA).square() for w, s in self.scores)
        return spectral(QA, QG, torch.as_tensor(S))

    def part(self, kind: str) -> Layer:
        """Return the layer without its bias, or its bias alone."""
        chosen = slice(None, -1) if kind == "weight" else slice(-1, None)
        scores = [(w, s[..., chosen]) for w, s in self.scores]
        return Layer(False, self.A[:, chosen, chosen], self.G, scores)


def layers(workload: Workload, fisher: str, reading: Reading = PLAIN) -> dict[str, Layer]:
    """Return every layer by name, for "empirical" or "exact" labels."""
    known = {n: m for n, m in workload.module.named_modules() if isinstance(m, LAYERS)}
    weights = workload.batch.weights
    each = [1.0] * workload.examples if weights is None else weights.tolist()
    total, found = sum(each), {}
    rows = dict.fromkeys(known, 0.0)
    for n, w in enumerate(each):
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in known}
        handles = [m.register_forward_hook(_remember(calls[name])) for name, m in known.items()]
        inputs = workload.batch.inputs[n : n + 1]
        log_p = workload.logits(workload.module, inputs)[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        mask = None if workload.batch.mask is None else workload.batch.mask[n]
        keep = None if reading.all_rows else mask
        for name, module in known.items():
            a = [_inputs(module, x.detach()) for x, _ in calls[name]]
            if keep is not None:
                a = [x[:, keep] if x.shape[1] == len(keep) else x for x in a]
            kept = torch.cat(a, 1)
            share = w if reading.weighted_inputs else 1.0
            rows[name] += share * kept.shape[1]
            square = share * kept.mT @ kept
            if name not in found:
                bias = getattr(module, "bias", None) is not None
                found[name] = Layer(bias, torch.zeros_like(square), torch.zeros(()))
            found[name].A = found[name].A + square
        outputs = [(name, i, out) for name in known for i, (_, out) in enumerate(calls[name])]
        for score, p in _scores(log_p, workload.batch.targets[n], mask, fisher, reading.apart):
            grads = torch.autograd.grad(score, [o for *_, o in outputs], retain_graph=True)
            sums: dict[str, Tensor] = {}
            for (name, i, _), g in zip(outputs, grads, strict=True):
                columns = _columns(known[name], g)
                a = _inputs(known[name], calls[name][i][0].detach())
                share = w**reading.power * p / total
                found[name].G = found[name].G + share * columns.mT @ columns
                sums[name] = sums.get(name, 0) + columns.mT @ a.to(columns.dtype)
            for name, s in sums.items():
                found[name].scores.append((w**reading.power * p / total, s))
    for name, layer in found.items():
        layer.A = layer.A / rows[name]
    return found


def dense(A: Tensor, G: Tensor) -> Tensor:
    """Return the block of factors `[groups, I, I]` and `[groups, O, O]`."""
    many = max(len(A), len(G))
    pairs = zip(A.expand(many, -1, -1), G.expand(many, -1, -1), strict=True)
    return torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for a, g in pairs))


def spectral(QA: Tensor, QG: Tensor, S: Tensor) -> Tensor:
    """Return the block of bases `[groups, I, I]`, `[groups, O, O]` and scales `[groups, O, I]`."""
    blocks = []
    for a, g, s in zip(QA.expand(len(S), -1, -1), QG, S, strict=True):
        Q = torch.kron(g.contiguous(), a.contiguous())
        blocks.append(Q * s.flatten() @ Q.T)
    return torch.block_diag(*blocks)


def _scores(
    log_p: Tensor, labels: Tensor, mask: Tensor | None, fisher: str, apart: bool
) -> Iterator[tuple[Tensor, float]]:
    """Yield log-probabilities, and the weights that they have, of one example."""
    log_p, labels = log_p.reshape(-1, log_p.shape[-1]), labels.reshape(-1)
    if mask is not None:
        log_p, labels = log_p[mask.reshape(-1)], labels[mask.reshape(-1)]
    if fisher == "empirical":
        picked = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
        yield from ((x, 1.0) for x in (picked if apart else picked.sum().unsqueeze(0)))
        return
    # labels are drawn independently, and the score of each has mean zero: cross terms vanish
    yield from ((x, float(x.detach().exp())) for x in log_p.flatten())


def _remember(calls: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        calls.append((args[0], out))

    return hook


def _inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of one example, [groups, rows, I]."""
    if isinstance(layer, nn.Embedding):
        rows = F.one_hot(x.reshape(1, -1), layer.num_embeddings).double()
    elif isinstance(layer, nn.Conv2d):
        padding = layer.padding if isinstance(layer.padding, tuple) else 0
        cut = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
        rows = cut.reshape(layer.groups, -1, cut.shape[-1]).mT
    else:
        rows = x.reshape(1, -1, x.shape[-1])
    if getattr(layer, "bias", None) is not None:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    return rows


def _columns(layer: nn.Module, g: Tensor) -> Tensor:
    """Return the cotangents of one example, [groups, rows, O]."""
    if isinstance(layer, nn.Conv2d):
        return g.reshape(layer.groups, -1, g.shape[2:].numel()).mT
    return g.reshape(1, -1, g.shape[-1])
