"""What one of several processes does: a script, started by `test_sharding.py`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fisherfn as ff
from fisherfn import optim
from fisherfn.core import random, trees

LIK = ff.likelihoods.categorical()


def network() -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        )
    return ff.functional(module.double())


def data(seed: int) -> ff.Batch:
    return ff.Batch(random.normal(random.key(seed), (8, 4), torch.float64), torch.arange(8) % 3)


def run(invert: Any) -> dict[str, Any]:
    """Three steps, with factors as matrices and as rows; and the last inverse."""
    model, params, buffers = network()
    grads = trees.map(torch.ones_like, params)
    found: dict[str, Any] = {}
    for widest in (8192, 4):
        est = ff.kfac(model, LIK, fisher="empirical", widest=widest)
        opt = optim.scale_by_fisher(est, decay=0.5, invert_every=2, damping=0.1, invert=invert)
        state = opt.init(params)
        step: Any = None
        for number in range(3):
            step, state = opt.update(grads, state, params, buffers=buffers, batch=data(number))
        found[f"{widest}"] = {"step": step, "inverse": state.curvature.inverse.matrix}
    eigen = optim.scale_by_fisher(
        ff.ekfac(model, LIK, fisher="empirical"), decay=0.5, damping=0.1, invert=invert
    )
    step, _ = eigen.update(grads, eigen.init(params), params, buffers=buffers, batch=data(0))
    found["ekfac"] = step
    F = ff.dense(model, LIK)(params, buffers, data(0))
    found["dense"] = invert(F).parts[0].values
    return found


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    group = dist.new_group(list(range(world)))
    ff.io.save(folder / f"{rank}", run(functools.partial(optim.sharded_inverse, group=group)))
    dist.destroy_process_group()
