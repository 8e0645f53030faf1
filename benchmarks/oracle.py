"""What every quantity should be, from its definition, one example at a time.

The score of an example is the gradient of the sum of its log-probabilities. Only torch is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.workloads import Workload

Values = dict[str, Tensor]


def scores(workload: Workload, targets: Tensor) -> Iterator[Values]:
    """Yield the score of each example for these targets `[B, *positions]`."""
    for n, log_p in _log_probabilities(workload):
        picked = log_p.gather(-1, targets[n].unsqueeze(-1)).squeeze(-1)
        yield _gradient(workload, _counted(workload, n, picked))


def per_sample_gradients(workload: Workload, targets: Tensor) -> Values:
    """Return all scores, each `[B, *shape]`."""
    rows = list(scores(workload, targets))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def diagonal(workload: Workload, targets: Tensor) -> Values:
    """Return the mean of the squared scores."""
    total: Values = {}
    for row in scores(workload, targets):
        total = {name: total.get(name, 0) + g * g for name, g in row.items()}
    return {name: t / workload.examples for name, t in total.items()}


def exact_diagonal(workload: Workload, targets: Tensor) -> Values:
    """Return the expectation over the model's own labels of the squared scores, class by class."""
    del targets  # the expectation runs over all labels
    if workload.positions != 1:
        raise ValueError("exact_diagonal: the loop over labels is affordable for one position only")
    total = {name: torch.zeros_like(p) for name, p in workload.module.named_parameters()}
    for _, log_p in _log_probabilities(workload):
        for c in range(workload.classes):
            row = _gradient(workload, log_p[..., c].sum(), keep=True)
            p = log_p[..., c].exp().sum().detach()
            total = {name: total[name] + p * g * g for name, g in row.items()}
    return {name: t.detach() / workload.examples for name, t in total.items()}


def moments(workload: Workload, targets: Tensor) -> Values:
    """Return mean and mean square of the scores, as `mean/name` and `square/name`."""
    mean: Values = {}
    for row in scores(workload, targets):
        mean = {name: mean.get(name, 0) + g for name, g in row.items()}
    square = diagonal(workload, targets)
    return {
        **{f"mean/{name}": t / workload.examples for name, t in mean.items()},
        **{f"square/{name}": t for name, t in square.items()},
    }


def norms(workload: Workload, targets: Tensor) -> Values:
    """Return the squared norms of the scores, `[B]`, under the name `norms`."""
    rows = [sum(g.square().sum() for g in row.values()) for row in scores(workload, targets)]
    return {"norms": torch.stack([torch.as_tensor(row) for row in rows])}


def gram(workload: Workload, targets: Tensor) -> Values:
    """Return the inner products of the scores, `[B, B]`, under the name `gram`."""
    params = list(workload.module.parameters())
    matrix = params[0].new_empty(workload.examples, sum(p.numel() for p in params))
    for n, row in enumerate(scores(workload, targets)):
        matrix[n] = torch.cat([g.flatten() for g in row.values()])
    return {"gram": matrix @ matrix.T}


def drawn_labels(workload: Workload, draws: int, seed: int) -> Iterator[Tensor]:
    """Yield labels `[B, *positions]` that are drawn from the model here."""
    generator = torch.Generator(workload.device).manual_seed(seed)
    with torch.no_grad():
        p = workload.logits(workload.module, workload.batch.inputs).softmax(-1)
    for _ in range(draws):
        labels = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
        yield labels.reshape(workload.batch.targets.shape)


def drawn_traces(workload: Workload, draws: int, seed: int) -> list[float]:
    """Return traces of Monte-Carlo Fisher diagonals, for labels drawn here."""
    labels = drawn_labels(workload, draws, seed)
    return [trace(diagonal(workload, targets)) for targets in labels]


def trace(values: Values) -> float:
    """Return the sum of all entries."""
    return float(sum(t.double().sum() for t in values.values()))


def worst_error(got: Values, wanted: Values) -> float:
    """Return the largest deviation of any tensor, relative to that tensor's largest entry.

    Args:
        got: What was computed.
        wanted: What the definition says.

    Returns:
        The error; infinite where names or shapes differ or a value is not finite.
    """
    if got.keys() != wanted.keys():
        return float("inf")
    largest = max(float(w.abs().max()) for w in wanted.values())
    worst = 0.0
    for name, want in wanted.items():
        have = got[name]
        if have.shape != want.shape or not have.isfinite().all():
            return float("inf")
        scale = max(float(want.abs().max()), 1e-12 * largest)
        worst = max(worst, float((have.double() - want).abs().max()) / scale)
    return worst


def distance(got: Values, wanted: Values) -> float:
    """Return the distance of two trees relative to the norm of the second."""
    if got.keys() != wanted.keys():
        return float("inf")
    square = sum(float((got[n].double() - w.double()).square().sum()) for n, w in wanted.items())
    norm = sum(float(w.double().square().sum()) for w in wanted.values())
    return (square / norm) ** 0.5


def _log_probabilities(workload: Workload) -> Iterator[tuple[int, Tensor]]:
    for n in range(workload.examples):
        inputs = workload.batch.inputs[n : n + 1]
        yield n, workload.logits(workload.module, inputs)[0].log_softmax(-1)


def _counted(workload: Workload, n: int, log_p: Tensor) -> Tensor:
    mask = workload.batch.mask
    return (log_p if mask is None else log_p[mask[n]]).sum()


def _gradient(workload: Workload, log_p: Tensor, keep: bool = False) -> Values:
    named = dict(workload.module.named_parameters())
    grads = torch.autograd.grad(log_p, list(named.values()), retain_graph=keep)
    return dict(zip(named, grads, strict=True))
