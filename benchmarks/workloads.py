"""What is measured: a model, a batch and the loss whose gradient is the unit of cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherfn as ff
from benchmarks import models


@dataclass(frozen=True)
class Workload:
    """A problem of classification, once or at each position.

    Attributes:
        name: Its name on the command line.
        module: The model in evaluation mode, on the device.
        batch: Inputs and targets; `mask` for language models.
        classes: C, the size of the last axis of the outputs.
        sizes: What a reader needs to judge the numbers.
        smooth: Whether the gradient is continuous. If it is not, a float32 result may differ from
            a float64 one by more than rounding: a ReLU or a maximum takes the other side.
    """

    name: str
    module: nn.Module
    batch: ff.Batch
    classes: int
    sizes: dict[str, int]
    smooth: bool

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.module.parameters()).device

    @property
    def examples(self) -> int:
        """B."""
        return self.batch.targets.shape[0]

    @property
    def positions(self) -> int:
        """Positions of one example."""
        return self.batch.targets[0].numel()

    def double(self) -> Workload:
        """Return the same workload in float64."""
        inputs = self.batch.inputs
        batch = replace(
            self.batch, inputs=inputs.double() if inputs.is_floating_point() else inputs
        )
        return replace(self, module=copy.deepcopy(self.module).double(), batch=batch)

    def logits(self, module: Callable[..., Any], inputs: Any) -> Tensor:
        """Call the module as its users do."""
        out = module(**inputs) if isinstance(inputs, dict) else module(inputs)
        return out if isinstance(out, Tensor) else out.logits

    def loss(self, module: Callable[..., Any]) -> Tensor:
        """Return the ordinary training loss: the mean cross entropy of what counts."""
        targets = self.batch.targets
        if self.batch.mask is not None:
            targets = targets.masked_fill(~self.batch.mask, -100)
        logits = self.logits(module, self.batch.inputs)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def gradient(self) -> Callable[[], None]:
        """Return the unit of cost: an ordinary eager forward and backward pass."""
        params = list(self.module.parameters())

        def run() -> None:
            for p in params:
                p.grad = None
            self.loss(self.module).backward()

        return run


def _vectors(name: str, device: str, sizes: tuple[int, ...], batch: int) -> Workload:
    module = models.mlp(sizes)
    inputs, targets = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
    return _workload(name, device, module, ff.Batch(inputs, targets), sizes[-1])


def _images(name: str, device: str, module: nn.Module, batch: int) -> Workload:
    data = ff.Batch(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))
    return _workload(name, device, module, data, 10)


def _small_images(name: str, device: str) -> Workload:
    convolutions = [nn.Conv2d(3, 6, 5, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, 3), nn.ReLU()]
    module = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 3 * 3, 10))
    return _images(name, device, module, 32)


def _gpt(
    name: str,
    device: str,
    *,
    vocabulary: int = 1000,
    length: int = 64,
    batch: int = 16,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
) -> Workload:
    module = models.GPT(vocabulary, length, width, layers, heads)
    ids = torch.randint(vocabulary, (batch, length))
    return _workload(name, device, module, ff.Batch(ids, ids.roll(-1, 1)), vocabulary)


def _gpt2(name: str, device: str) -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel

    batch, length = 8, 512
    module = GPT2LMHeadModel(GPT2Config(use_cache=False))
    ids = torch.randint(module.config.vocab_size, (batch, length))
    return _workload(name, device, module, ff.causal_batch(ids), module.config.vocab_size)


def _smollm2(name: str, device: str) -> Workload:
    from transformers import AutoModelForCausalLM

    from fisherfn.app.packaged import packaged_model

    batch, length = 4, 128
    directory, _ = packaged_model()
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    module.config.use_cache = False
    ids = torch.randint(module.config.vocab_size, (batch, length))
    return _workload(name, device, module, ff.causal_batch(ids), module.config.vocab_size)


def _workload(name: str, device: str, module: nn.Module, batch: ff.Batch, classes: int) -> Workload:
    place = torch.device(device)
    batch = ff.Batch(
        batch.inputs.to(place),
        batch.targets.to(place),
        None if batch.mask is None else batch.mask.to(place),
    )
    sizes = {
        "batch": batch.targets.shape[0],
        "positions": batch.targets[0].numel(),
        "classes": classes,
        "parameters": sum(p.numel() for p in module.parameters()),
        "tensors": len(list(module.parameters())),
    }
    kinks = (nn.ReLU, nn.MaxPool2d)
    smooth = not any(isinstance(m, kinks) for m in module.modules())
    return Workload(name, module.to(place).eval(), batch, classes, sizes, smooth)


BUILDERS: dict[str, Callable[[str, str], Workload]] = {
    "tiny": lambda name, device: _vectors(name, device, (6, 5, 3), 4),
    "small_mlp": lambda name, device: _vectors(name, device, (16, 24, 24, 5), 32),
    "small_cnn": _small_images,
    "small_gpt": lambda name, device: _gpt(
        name, device, vocabulary=20, length=6, batch=8, width=8, layers=1, heads=2
    ),
    "mlp": lambda name, device: _vectors(name, device, (784, 512, 512, 10), 256),
    "cnn": lambda name, device: _images(name, device, models.cnn_3c3d(), 64),
    "gpt": _gpt,
    "smollm2": _smollm2,
    "gpt2": _gpt2,
    "resnet18": lambda name, device: _images(name, device, models.resnet18(), 256),
}
SMALL_PROBLEMS = ("small_mlp", "small_cnn", "small_gpt")  # whose matrices fit
CPU_PROBLEMS = ("mlp", "cnn", "gpt", "smollm2")
GPU_PROBLEMS = ("gpt2", "resnet18")


def build(name: str, device: str, seed: int = 0) -> Workload:
    """Build a workload from its name, the same one for the same seed."""
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return BUILDERS[name](name, device)


def train(workload: Workload, steps: int, rate: float = 1e-3) -> None:
    """Fit the batch with Adam."""
    optimizer = torch.optim.Adam(workload.module.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        workload.loss(workload.module).backward()
        optimizer.step()
