"""Results and states over many processes, by `torch.distributed`.

Every process (rank) folds its own share of the data; `all_reduce` then gives all of them the exact
result on the data of all, as `ff.merge` would:

    state = ff.states.accumulate(fim, params, buffers, local_batches(batches), key=key)[1]
    result = all_reduce(state).result

Shares may be uneven and a rank may have no data at all (it passes None). Labels drawn from a model
are keyed by (key, id of the example): with the ids that `local_batches` gives they are those of a
single process, so Monte Carlo results agree to rounding as well. Files of clients that never meet
are merged by `merge_files`.

**Models that are spread over processes.** Estimators capture the operations of a whole model on
plain tensors, so this is data parallelism: each rank holds all parameters.

- DDP: pass the inner module (`wrapper.module`); its hooks average gradients, which no estimator
  here needs.
- FSDP2 (`fully_shard`): parameters are `DTensor`s between forward passes. Gather them for the time
  of the estimate, `{name: p.full_tensor() for name, p in params.items()}`, and keep the result cut
  like the parameters: `all_reduce(result, sharded=True)` leaves each rank the rows that `Shard(0)`
  gives it, so `solve` and `mv` work on `p.to_local()`. Where the whole model does not fit on one
  device, select layers (`ff.functional(module, select=...)`) and go through them in turn.
- Tensor parallelism: the scores of a column- or row-parallel layer are not local, since its inputs
  or cotangents are partial sums. Gather, as above.

A `DTensor` among the parameters is refused by every estimator with a message that says so, instead
of a local result that looks plausible.
"""

from fisherfn.distributed.reduce import Reduced, all_reduce, reduce
from fisherfn.distributed.sharding import local_batches, unshard
from fisherfn.distributed.together import merge_files

__all__ = ["Reduced", "all_reduce", "local_batches", "merge_files", "reduce", "unshard"]
