"""What each rank does, run as `python scenarios.py RANK WORLD FOLDER [BACKEND]`; results are files.

With nccl every rank has a GPU of its own, and all its data are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fisherfn as ff
from fisherfn.core import trees
from fisherfn.core.errors import FisherError

GPU_BACKEND = "nccl"
KEY = ff.random.key(7)
LIKELIHOOD = ff.likelihoods.categorical()


def network(width: int = 5, place: torch.device | None = None) -> tuple[Any, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)
        ).double()
    return ff.functional(net.to(place or device()))


def device() -> torch.device:
    """Return where this rank computes; outside of a group, on the CPU."""
    on_gpu = dist.is_initialized() and dist.get_backend() == GPU_BACKEND
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def batches(
    sizes: tuple[int, ...] = (2, 3, 1, 4, 2), place: torch.device | None = None
) -> list[ff.Batch]:
    place = place or device()
    x = ff.random.normal(ff.random.key(0), (sum(sizes), 4), torch.float64)
    y = torch.arange(sum(sizes)) % 3
    pairs = zip(x.to(place).split(sizes), y.to(place).split(sizes), strict=True)
    return [ff.Batch(a, b) for a, b in pairs]


def estimators() -> dict[str, Any]:
    model, params, _ = network()
    groups = ff.groups.infer(params)
    # null spaces have many bases, so that of the CPU is taken everywhere
    cpu = torch.device("cpu")
    there, values, rest = network(place=cpu)
    found = ff.ekfac(there, LIKELIHOOD, fisher="empirical")(values, rest, batches(place=cpu)[0])
    first = trees.map(lambda t: t.to(device()), found)
    mc: dict[str, Any] = {"fisher": "mc"}
    return {
        "diagonal": ff.diagonal(model, LIKELIHOOD, **mc),
        "diagonal_stderr": ff.diagonal(model, LIKELIHOOD, num_samples=3, **mc),
        "dense": ff.dense(model, LIKELIHOOD, **mc),
        "block_diagonal": ff.block_diagonal(model, LIKELIHOOD, **mc),
        "grouped": ff.grouped(model, LIKELIHOOD, groups, **mc),
        "kfac": ff.kfac(model, LIKELIHOOD, **mc),
        "ekfac": ff.ekfac(model, LIKELIHOOD, basis=first, **mc),
        "low_rank": ff.low_rank(model, LIKELIHOOD, **mc),
        "moments": ff.gradient_moments(model, LIKELIHOOD, **mc),
    }


TRANSFORMS: dict[str, Any] = {
    "ema": ff.states.ema(0.9),
    "welford": ff.states.welford(),
    "window": ff.states.window(2),
    "every": ff.states.every(2, ff.states.ema(0.5), otherwise=ff.states.welford()),
}
EXACT = ("diagonal", "grouped", "moments")


def fold(estimator: Any, data: Any, transform: Any = None) -> Any:
    """Fold batches; None if there is none."""
    data = list(data)
    if not data:
        return None
    _, params, buffers = network()
    key = KEY.to(device())
    return ff.states.accumulate(estimator, params, buffers, data, key=key, transform=transform)[1]


def results(rank: int) -> Any:
    """Every kind of result on uneven shards: three batches and two."""
    found = {}
    for name, estimator in estimators().items():
        state = fold(estimator, ff.distributed.local_batches(batches()))
        found[name] = ff.distributed.all_reduce(state)
    return found


def gated(params: Any, buffers: Any, x: torch.Tensor) -> torch.Tensor:
    """Two layers that read one tensor, and one behind them."""
    h = torch.tanh(x @ params["gate"].T) * torch.nn.functional.linear(x, params["up"])
    return h @ params["head"]


def joint(rank: int) -> Any:
    """K-FAC with a common block of two layers: its sum, and its inverse by layers."""
    sizes = {"gate": (5, 4), "up": (5, 4), "head": (5, 3)}
    params = {
        name: ff.random.normal(ff.random.key(i), shape, torch.float64).to(device())
        for i, (name, shape) in enumerate(sizes.items())
    }
    fim = ff.kfac(gated, LIKELIHOOD, joint=[("up", "gate")])
    data = list(ff.distributed.local_batches(batches()))
    F = ff.distributed.all_reduce(ff.states.accumulate(fim, params, {}, data)[1]).result
    whole = ff.states.accumulate(fim, params, {}, batches())[1].result
    return {"F": F, "whole": whole, "inverse": ff.optim.sharded_inverse(F).matrix}


def states(rank: int) -> Any:
    """Every kind of state."""
    fim = estimators()["diagonal"]
    mine = {
        name: fold(fim, ff.distributed.local_batches(batches((2, 3, 1, 4))), t)
        for name, t in TRANSFORMS.items()
    }
    kfac = estimators()["kfac"]
    for name in ("ema", "welford"):
        data = ff.distributed.local_batches(batches((2, 3, 1, 4)))
        mine[f"kfac_{name}"] = fold(kfac, data, TRANSFORMS[name])
    return {"mine": mine, "joined": ff.distributed.all_reduce(mine)}


def no_data(rank: int) -> Any:
    """Rank 1 has none."""
    found = {}
    for name, estimator in estimators().items():
        state = fold(estimator, ff.distributed.local_batches(batches((5,))))
        assert (state is None) == (rank > 0)
        found[name] = ff.distributed.all_reduce(state)
    for name, transform in TRANSFORMS.items():
        data = ff.distributed.local_batches(batches((5,)))
        found[name] = ff.distributed.all_reduce(fold(estimators()["diagonal"], data, transform))
    return found


def sharded(rank: int) -> Any:
    """Rows of each rank, and the whole again."""
    found = {}
    for name in ("diagonal", "diagonal_stderr", "moments"):
        for kind, transform in {"none": None, **TRANSFORMS}.items():
            if kind == "every" or (name != "diagonal" and kind != "none"):
                continue
            state = fold(estimators()[name], ff.distributed.local_batches(batches()), transform)
            rows = ff.distributed.all_reduce(state, sharded=True)
            found[f"{name}-{kind}"] = {
                "rows": rows,
                "whole": ff.distributed.unshard(rows),
                "wanted": ff.distributed.all_reduce(state),
            }
    return found


def traffic(rank: int) -> Any:
    """Triangles and bfloat16, with what they save and cost."""
    found = {}
    for name in ("dense", "block_diagonal", "kfac", "diagonal", "low_rank"):
        state = fold(estimators()[name], ff.distributed.local_batches(batches())).result
        for kind, options in {
            "plain": {},
            "triangular": {"triangular": True},
            "bfloat16": {"dtype": torch.bfloat16},
            "both": {"triangular": True, "dtype": torch.bfloat16},
        }.items():
            found[f"{name}-{kind}"] = list(ff.distributed.reduce(state, **options))
    return found


def _refused(make: Callable[[], Any]) -> str:
    try:
        make()
    except FisherError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refusals(rank: int) -> Any:
    """Errors that every rank has to see, whoever is to blame."""
    model, params, buffers = network(5 + rank)
    other = ff.diagonal(model, LIKELIHOOD, fisher="empirical")(params, buffers, batches()[0])
    model, params, buffers = network()

    def of(fisher: str, unit: str = "example") -> Any:
        fim = ff.diagonal(model, LIKELIHOOD, fisher=fisher, unit=unit)
        return fim(params, buffers, batches()[0], key=KEY.to(device()))

    F = of("mc")
    reduce = ff.distributed.all_reduce
    tree: Any = F.values if rank else F
    named = {"a" if rank else "b": F}
    lever = ff.states.every(2 + rank, ff.states.ema(0.5)).init(F)
    return {
        "shapes": _refused(lambda: reduce(other)),
        "kinds": _refused(lambda: reduce(of("empirical" if rank else "mc"))),
        "periods": _refused(lambda: reduce(lever)),
        "units": _refused(lambda: reduce(of("mc", "position" if rank else "example"))),
        "classes": _refused(lambda: reduce({"x": F} if rank else F)),
        "names": _refused(lambda: reduce(named)),
        "tensors": _refused(lambda: reduce(tree)),
        "nothing": _refused(lambda: reduce(None)),
        "rows": _refused(lambda: reduce(ff.dense(model, LIKELIHOOD, fisher="mc")(
            params, buffers, batches()[0], key=KEY.to(device())), sharded=True)),
        "gathered_rows": _refused(lambda: reduce(ff.low_rank(model, LIKELIHOOD, fisher="mc")(
            params, buffers, batches()[0], key=KEY.to(device())), sharded=True)),
        "dtype": _refused(lambda: reduce(F, dtype=torch.int8)),
        "both": _refused(lambda: reduce(F, dtype=torch.bfloat16, sharded=True)),
    }  # fmt: skip


def dtensors(rank: int) -> Any:
    """Parameters that are spread over ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model, params, buffers = network()
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    spread = {name: distribute_tensor(p, mesh, [Shard(0)]) for name, p in params.items()}
    fim = ff.diagonal(model, LIKELIHOOD, fisher="empirical")
    refused = _refused(lambda: fim(spread, buffers, batches()[0]))
    whole = {name: p.full_tensor() for name, p in spread.items()}
    found = fim(whole, buffers, batches()[rank])
    rows = ff.distributed.all_reduce(found, sharded=True)
    local = {name: p.to_local() for name, p in spread.items()}
    return {
        "refused": refused,
        "elsewhere": {
            "save": _refused(lambda: ff.io.save("never.safetensors", spread)),
            "offload": _refused(lambda: ff.io.offload(spread)),
            "reduce": _refused(lambda: ff.distributed.all_reduce(replace(found, values=spread))),
        },
        "solved": rows.solve(local, damping=0.1),
        "fits": all(rows.values[name].shape == p.shape for name, p in local.items()),
        "whole": ff.distributed.all_reduce(found).solve(whole, damping=0.1),
    }


SCENARIOS = (results, joint, states, no_data, sharded, traffic, refusals, dtensors)


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    backend = sys.argv[4] if len(sys.argv) > 4 else "gloo"
    torch.set_num_threads(1)
    if backend == GPU_BACKEND:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    for scenario in SCENARIOS:
        ff.io.save(folder / f"{scenario.__name__}-{rank}", scenario(rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
