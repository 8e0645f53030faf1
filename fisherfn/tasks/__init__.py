"""What is known about several tasks: states by task, with anchors.

For those who come from a collector class, what each of its calls becomes. `F` is a result, `fim` an
estimator, `average` a transform of `ff.states`, `store` a `TaskStore`.

`FisherCollector`

    reduction="param"             fim = ff.diagonal(model, lik, fisher="empirical")
    reduction="group"             fim = ff.grouped(model, lik, ff.groups.infer(params, module))
    storage="gpu"                 nothing: results stay where they are computed
    storage="cpu", "cpu_fp16"     ff.io.offload(F, "float32"), ff.io.offload(F, "float16")
    ema_decay=0.99                average = ff.states.ema(0.99)
    collect_fisher(mode="ema"),   F = fim(params, buffers, batch)
      update_fisher_ema           reading, state = average.update(F, state)
                                  store = store.put(task, state)
    update_fisher_welford         the same with average = ff.states.welford(), or
                                  ff.states.accumulate(fim, params, buffers, batches)
    compute_oneshot_fisher        store = store.put(task, fim(params, buffers, batch))
    get_bias_corrected_fisher     store.reading(task): readings are always free of bias
    get_group_fisher              store.leaf(task, path), an exact path, never a substring
    get_metadata,                 F.count, F.unit, F.groups; state.updates, state.count
      get_sample_count, ...
    get_fisher_confidence_        ff.states.interval(state, level=0.95), over independent updates
      interval
    validate_fisher_computation   ff.states.accumulate(..., on_nonfinite="raise")
    clear_fisher(task), ()        store.clear(task), store.clear(): a new store
    use_ewc, "{task}_ref_{p}"     store.put(task, state, anchor=params), store.anchor(task)
    smart_fisher_mode(purpose)    choose the transform where the state is made

`AdvancedFisherCollector`

    collect_true_fisher           ff.diagonal(model, lik, fisher="mc", num_samples=n), called with
                                  key=: labels are drawn where they are scored
    ... every 100 steps           ff.states.every(100, a, otherwise=b)
    get_kfac_natural_gradient     ff.kfac(model, lik)(params, buffers, batch).solve(grad, damping=c)
    compute_capacity_metrics,     F.trace(), F.logdet(damping=c), F.frobenius(), F.eigenvalues(),
      analyze_fisher_spectrum     ff.linalg.lanczos
    collect_per_sample_gradients  ff.per_sample_gradients, or none: squares need no scores in memory

Compatibility mixin

    expansion to parameters       ff.groups.expand, which inverts ff.groups.reduce
    get_task_fisher_dict          store.reading(task).diagonal()
    migrate_old_fisher_keys       TaskStore.from_flat(flat), store.to_flat(), with the keys
                                  {task}|{param}|{group}
    estimate_fisher_diagonal(     ff.functional(module, select="^layers.0"), which selects before
      layers_prefix=)             the backward pass, then ff.diagonal

Two habits are not carried over, because they give wrong numbers: squaring the gradient of a mean
(a batch that is duplicated then has half the Fisher information), and correcting a bias that is not
there (a first update that is then read a hundred times too large).
"""

from fisherfn.tasks.store import TaskStore

__all__ = ["TaskStore"]
