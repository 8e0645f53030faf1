"""What a case is: a model with data, for the library and for the oracle at once."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fisherfn as ff
import oracles

FLOAT = torch.float64


class Net(nn.Module):
    """Parts by name, and the forward pass as a function of them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@dataclass(frozen=True)
class Built:
    """What a case's builder returns: a module, or a function with its params, and inputs."""

    model: Any
    inputs: Any
    params: dict[str, Tensor] | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    targets: Tensor | None = None


@dataclass(frozen=True)
class Setup:
    """One fresh instance of a case: the library's view and the oracle's."""

    model: Callable[..., Any]
    params: dict[str, Tensor]
    buffers: Any
    batch: ff.Batch
    likelihood: Any
    problem: oracles.Problem

    @property
    def args(self) -> tuple[Any, Any, ff.Batch]:
        return self.params, self.buffers, self.batch


@dataclass(frozen=True)
class Case:
    """A named model with its data.

    `general` names the parameters (exact names) that no rule is expected to know; `None` leaves it
    open. `rtol` is 1e-8 except where the model itself computes in a narrow type.
    """

    name: str
    build: Callable[[], Built]
    family: oracles.Family = field(default_factory=oracles.Categorical)
    general: tuple[str, ...] | None = ()
    rtol: float = 1e-8

    def __str__(self) -> str:
        return self.name

    def setup(self) -> Setup:
        return make_setup(self)


Table = dict[str, Case]


def table(*cases: Case) -> Table:
    found: Table = {}
    for case in cases:
        assert case.name not in found, case.name
        found[case.name] = case
    return found


# ---- data ----------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=FLOAT).to(dtype)


def tokens(*shape: int, high: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=generator(seed))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a module's initialisation, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def draw_targets(family: oracles.Family, outputs: Tensor, seed: int) -> Tensor:
    """Targets for outputs of a whole batch, unrelated to the model."""
    rng = generator(seed)
    if isinstance(family, oracles.Categorical):
        shape = (outputs.shape[0], *family.positions(outputs))
        return torch.randint(family.labels(outputs), shape, generator=rng)
    shape = outputs.shape
    if isinstance(family, oracles.Gaussian):
        return torch.randn(shape, generator=rng, dtype=FLOAT).to(outputs.dtype)
    high = 2 if isinstance(family, oracles.Bernoulli) else 5
    return torch.randint(high, shape, generator=rng).to(outputs.dtype)


def likelihood(family: oracles.Family) -> Any:
    """The library's likelihood for an oracle's family."""
    if isinstance(family, oracles.Categorical):
        return ff.likelihoods.categorical(
            temperature=family.temperature, class_axis=family.class_axis
        )
    if isinstance(family, oracles.Bernoulli):
        return ff.likelihoods.bernoulli(event_ndim=family.event_ndim)
    if isinstance(family, oracles.Gaussian):
        scale = family.scale
        width = torch.tensor(scale, dtype=FLOAT) if isinstance(scale, tuple) else scale
        return ff.likelihoods.gaussian(width, event_ndim=family.event_ndim)
    return ff.likelihoods.poisson(event_ndim=family.event_ndim)


# ---- assembly ------------------------------------------------------------------------------------


def call(module: nn.Module, inputs: Any) -> Tensor:
    """Call a module the way `ff.functional` promises to, and pick the logits."""
    if isinstance(inputs, Tensor):
        outputs = module(inputs)
    elif isinstance(inputs, dict):
        outputs = module(**inputs)
    else:
        outputs = module(*inputs)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def _perturb(module: nn.Module, seed: int) -> None:
    """Move every parameter off its initial value, so that no weight is one and no bias zero."""
    rng = generator(seed)
    with torch.no_grad():
        for param in module.parameters():
            noise = torch.randn(param.shape, generator=rng, dtype=FLOAT)
            param.add_(0.3 * noise.to(param.dtype))


def batch_outputs(problem: oracles.Problem) -> Tensor:
    with torch.no_grad():
        return torch.cat([problem.outputs(n) for n in range(problem.size)])


def make_setup(case: Case) -> Setup:
    seed = zlib.crc32(case.name.encode()) % 1000
    with seeded(seed):
        built = case.build()
    if built.params is None:
        module = built.model.eval()
        _perturb(module, seed + 1)
        leaves = dict(module.named_parameters())
        forward = functools.partial(call, module)
    else:
        leaves = {
            name: value.detach().clone().requires_grad_() for name, value in built.params.items()
        }
        forward = functools.partial(_call_function, built.model, leaves)
    problem = oracles.Problem(
        forward, leaves, built.inputs, case.family, None, built.mask, built.weights
    )
    targets = built.targets
    if targets is None:
        targets = draw_targets(case.family, batch_outputs(problem), seed + 2)
    problem = oracles.Problem(
        forward, leaves, built.inputs, case.family, targets, built.mask, built.weights
    )
    if built.params is None:
        model, params, buffers = ff.functional(built.model)
    else:
        model, params, buffers = built.model, built.params, {}
    batch = ff.Batch(built.inputs, targets=targets, mask=built.mask, weights=built.weights)
    return Setup(model, params, buffers, batch, likelihood(case.family), problem)


def _call_function(function: Callable[..., Any], params: dict[str, Tensor], inputs: Any) -> Tensor:
    return function(params, {}, inputs)
