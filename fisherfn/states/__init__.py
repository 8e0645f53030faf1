"""States: what a computation remembers between steps, as tuples of tensors.

| transform | reading | remembers |
|---|---|---|
| `ema(decay)` | debiased exponential average | the average and a clock for each cell |
| `welford()` | weighted mean; `variance`, `stderr`, `interval` read more | mean and spread |
| `window(size)` | mean of the last members | the members |
| `every(n, a, otherwise=b)` | both readings | two states and the step |

Each is a `Transform`: `init(like)`, `update(new, state, weight=None) -> (reading, state)`,
`read(state)`, on any tree of tensors and results. `accumulate` folds an estimator over batches with
any of them. States are saved by `ff.io.save`, joined by `ff.merge` and over processes by
`ff.distributed.all_reduce`.
"""

from fisherfn.states.accumulate import AccumulateState, accumulate
from fisherfn.states.ema import EmaState, ema
from fisherfn.states.every import EveryPair, EveryState, due, every
from fisherfn.states.interval import Interval, interval
from fisherfn.states.transform import Transform
from fisherfn.states.welford import WelfordState, effective_updates, stderr, variance, welford
from fisherfn.states.window import WindowState, window

__all__ = [
    "AccumulateState",
    "EmaState",
    "EveryPair",
    "EveryState",
    "Interval",
    "Transform",
    "WelfordState",
    "WindowState",
    "accumulate",
    "due",
    "effective_updates",
    "ema",
    "every",
    "interval",
    "stderr",
    "variance",
    "welford",
    "window",
]
