"""How many steps, and how long, until K-FAC and EKFAC reach the loss at which Adam ends.

    python benchmarks/training.py                         both problems, 5 seeds
    python benchmarks/training.py --problem cnn --seeds 1

Data: the 8 x 8 digits of scikit-learn. Problems: an autoencoder (Bernoulli likelihood) and a small
convolutional network (categorical). Every method sees the same batches. Adam runs with each of
seven learning rates on the first seed; the one with the lowest loss at the end runs on all of them.
For each seed, the target is the loss on all data at which Adam ends. Clocks count the steps alone,
not the evaluations. Written: benchmarks/results/training.json, and the curves as training.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import fisherfn as ff
from benchmarks import report

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Problem:
    """A network on the digits, and how it is trained.

    Attributes:
        name: Of the problem.
        build: Makes the module; called with its weights' seed already set.
        likelihood: Of its outputs.
        labels: Whether the targets are the digits, else they are the images themselves.
        batch: Examples of a step.
        curvature: How many of them the curvature is estimated on.
        adam_steps: Length of Adam's runs.
        steps: Largest length of the others.
        options: Of `natural_gradient`.
    """

    name: str
    build: Callable[[], nn.Module]
    likelihood: Any
    labels: bool
    batch: int
    curvature: int
    adam_steps: int
    steps: int
    options: dict[str, Any]


@dataclass
class Curve:
    """Loss on all data after steps and seconds."""

    method: str
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def reached(self, target: float) -> tuple[int, float] | None:
        """Return steps and seconds at the first evaluation that is not above the target."""
        for step, seconds, loss in zip(self.steps, self.seconds, self.losses, strict=True):
            if loss <= target:
                return step, seconds
        return None


def _autoencoder() -> nn.Module:
    widths = (64, 256, 128, 32, 8, 32, 128, 256, 64)
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(n, m)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear] if i in (3, 7) else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def problems() -> dict[str, Problem]:
    """Return the problems by name."""
    bernoulli, categorical = ff.likelihoods.bernoulli(), ff.likelihoods.categorical()
    exact: dict[str, Any] = {"learning_rate": None, "momentum": "exact"}
    deep = {
        **exact,
        "damping": ff.optim.levenberg_marquardt(0.3, factor=0.9, lower=1e-3),
        "update_every": 5,
        "invert_every": 10,
    }
    small = {
        **exact,
        "damping": ff.optim.levenberg_marquardt(0.1, factor=0.9, lower=1e-7),
        "update_every": 2,
        "invert_every": 4,
    }
    found = (
        Problem("autoencoder", _autoencoder, bernoulli, False, 1797, 450, 500, 250, deep),
        Problem("cnn", _cnn, categorical, True, 1797, 450, 200, 100, small),
        # too small to measure anything, for tests
        Problem("tiny", _tiny, categorical, True, 100, 50, 20, 10, small),
    )
    return {problem.name: problem for problem in found}


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))


class Data:
    """All digits, and batches of them in an order that a seed gives."""

    def __init__(self, problem: Problem) -> None:
        """Load them; pixels are in [0, 1]."""
        from sklearn.datasets import load_digits

        inputs, digits = load_digits(return_X_y=True)
        self.inputs = torch.tensor(inputs, dtype=torch.float32) / 16
        self.targets = torch.tensor(digits) if problem.labels else self.inputs

    def batches(self, size: int, seed: int) -> Iterator[ff.Batch]:
        """Give batches without end, each epoch in an order of its own."""
        rng = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.inputs), generator=rng)
            for start in range(0, len(order) - size + 1, size):
                index = order[start : start + size]
                yield ff.Batch(self.inputs[index], self.targets[index])


def start(problem: Problem, seed: int) -> nn.Module:
    """Return the network of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return problem.build()


def loss_of(problem: Problem, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the examples."""
    if problem.labels:
        return nn.functional.cross_entropy(outputs, targets)
    entropy = nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return entropy.sum(-1).mean()


def train(
    problem: Problem,
    data: Data,
    curve: Curve,
    step: Callable[[ff.Batch], None],
    evaluate: Callable[[Tensor], Tensor],
    steps: int,
    every: int,
    target: float | None = None,
) -> Curve:
    """Take steps and write down the loss on all data now and then, until the target is reached."""
    seconds = 0.0
    batches = data.batches(problem.batch, curve.seed)
    for number in range(steps + 1):
        if number % every == 0:
            with torch.no_grad():
                loss = loss_of(problem, evaluate(data.inputs), data.targets).item()
            curve.steps.append(number)
            curve.seconds.append(seconds)
            curve.losses.append(loss)
            if target is not None and loss <= target:
                break
        batch = next(batches)
        begin = time.perf_counter()
        step(batch)
        seconds += time.perf_counter() - begin
    return curve


def adam(problem: Problem, data: Data, rate: float, seed: int, every: int) -> Curve:
    """Train with torch's Adam."""
    module = start(problem, seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)

    def step(batch: ff.Batch) -> None:
        loss = loss_of(problem, module(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    curve = Curve(f"Adam {rate:g}", seed)
    return train(problem, data, curve, step, module, problem.adam_steps, every)


def natural(
    problem: Problem, data: Data, method: str, seed: int, every: int, target: float
) -> Curve:
    """Train with the natural gradient."""
    model, params, buffers = ff.functional(start(problem, seed))
    make = {"K-FAC": ff.kfac, "EKFAC": ff.ekfac}[method]
    optimizer = ff.optim.natural_gradient(
        make(model, problem.likelihood, fisher="mc"), **problem.options
    )
    state, key = optimizer.init(params), ff.random.key(seed)

    def step(batch: ff.Batch) -> None:
        nonlocal params, state
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        loss = loss_of(problem, model(leaves, buffers, batch.inputs), batch.targets)
        found = torch.autograd.grad(loss, list(leaves.values()))
        grads = dict(zip(leaves, found, strict=True))
        params = {name: p.detach() for name, p in params.items()}
        part = ff.Batch(batch.inputs[: problem.curvature], batch.targets[: problem.curvature])
        updates, state = optimizer.update(
            grads, state, params, buffers=buffers, batch=part, key=key
        )
        params = ff.optim.apply_updates(params, updates)

    def evaluate(inputs: Tensor) -> Tensor:
        return model(params, buffers, inputs)

    return train(problem, data, Curve(method, seed), step, evaluate, problem.steps, every, target)


def compare(problem: Problem, seeds: Sequence[int], rates: Sequence[float], every: int) -> Any:
    """Run all methods on a problem; return the curves, and medians over seeds."""
    data = Data(problem)
    sweep = [adam(problem, data, rate, seeds[0], every) for rate in rates]
    ends = {rate: curve.losses[-1] for rate, curve in zip(rates, sweep, strict=True)}
    best = min(ends, key=lambda rate: ends[rate] if ends[rate] == ends[rate] else float("inf"))
    first = sweep[list(rates).index(best)]
    runs = [first, *[adam(problem, data, best, seed, every) for seed in seeds[1:]]]
    table: dict[str, Any] = {"Adam": _median([(r.steps[-1], r.seconds[-1]) for r in runs])}
    curves = list(runs)
    for method in ("K-FAC", "EKFAC"):
        found = [natural(problem, data, method, run.seed, every, run.losses[-1]) for run in runs]
        curves += found
        reached = [c.reached(r.losses[-1]) for c, r in zip(found, runs, strict=True)]
        table[method] = _median(reached)
    for row in table.values():
        for name in ("steps", "seconds"):
            row[f"{name}_of_adam"] = row[name] / table["Adam"][name] if row[name] else None
    return {
        "problem": problem.name,
        "adam_rate": best,
        "adam_ends": {f"{rate:g}": end for rate, end in ends.items()},
        "targets": [run.losses[-1] for run in runs],
        "parameters": sum(p.numel() for p in start(problem, 0).parameters()),
        "batch": problem.batch,
        "options": {name: str(value) for name, value in problem.options.items()},
        "table": table,
        "curves": [asdict(curve) for curve in curves],
    }


def _median(reached: Sequence[tuple[float, float] | None]) -> dict[str, float | None]:
    """Return medians over seeds, None where most runs do not reach the target."""
    never = (float("inf"), float("inf"))
    pairs = [never if pair is None else pair for pair in reached]
    found = [statistics.median(column) for column in zip(*pairs, strict=True)]
    known = [value if value < float("inf") else None for value in found]
    return {"steps": known[0], "seconds": known[1]}


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss over steps and over seconds, one line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {"Adam": "tab:gray", "K-FAC": "tab:blue", "EKFAC": "tab:orange"}
    for row, result in enumerate(results):
        for column, unit in enumerate(("steps", "seconds")):
            axes = figure.add_subplot(len(results), 2, 2 * row + column + 1)
            for curve in result["curves"]:
                name = curve["method"].split()[0]
                label = name if curve["seed"] == result["curves"][0]["seed"] else None
                axes.plot(curve[unit], curve["losses"], color=colours[name], label=label, lw=1)
            axes.axhline(statistics.median(result["targets"]), color="black", lw=0.5, ls="--")
            axes.set_yscale("log")
            axes.set_xlabel(unit)
            axes.set_ylabel("nats per example")
            axes.set_title(result["problem"])
            axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problem", nargs="+", choices=list(problems()), help="default: the first two"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--every", type=int, default=5, help="steps between two evaluations")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="of Adam")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--output",
        type=Path,
        default=report.ROOT / "benchmarks" / "results",
        help="folder of the results",
    )
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    results = []
    for name in asked.problem or ("autoencoder", "cnn"):
        found = compare(problems()[name], range(asked.seeds), asked.rates, asked.every)
        results.append(found)
        print(f"{name}: {found['parameters']} parameters, Adam's rate {found['adam_rate']:g}")
        for method, row in found["table"].items():
            if row["steps"] is None:
                print(f"  {method:6} does not get there")
                continue
            print(
                f"  {method:6} {row['steps']:6.0f} steps ({row['steps_of_adam']:.2f}), "
                f"{row['seconds']:6.2f} s ({row['seconds_of_adam']:.2f})"
            )
    written = {"environment": report.environment(torch.device("cpu")), "results": results}
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "training.json").write_text(json.dumps(written, indent=1) + "\n")
    plot(results, asked.output / "training.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
