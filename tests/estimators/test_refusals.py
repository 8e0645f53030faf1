"""Options, keys, likelihoods, parameters and models that make no sense: an error that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import fisherfn as ff
from cases import Net, normal
from cases.small import MEMBERS, B, C, problem
from fisherfn import testing


@pytest.fixture(autouse=True)
def seeded_layers() -> Iterator[None]:
    """Layers are initialised in the tests themselves."""
    with cases.seeded(0):
        yield


# ---- keys and options ----------------------------------------------------------------------------


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.keyed], ids=str)
def test_missing_key(member: testing.Member) -> None:
    p = problem()
    with pytest.raises(ff.FisherError, match=r"key.*ff\.random\.key|key.*random\.key\("):
        member.build(p)(*p.args)


@pytest.mark.parametrize(
    "key",
    [0, torch.Generator(), torch.zeros(3, dtype=torch.int64), torch.zeros(2)],
    ids=["int", "generator", "long", "float"],
)
def test_keys_of_another_kind(key: Any) -> None:
    p = problem()
    with pytest.raises(ff.FisherError, match="key"):
        ff.diagonal(p.model, p.likelihood, fisher="mc")(*p.args, key=key)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "fisher": ({"fisher": "true"}, r"fisher.*'exact'.*'mc'.*'curvature_prop'.*'empirical'.*'true'"),
    "fisher_none": ({"fisher": None}, r"fisher"),
    "unit": ({"unit": "token"}, r"unit.*'example'.*'position'.*'token'"),
    "num_samples_zero": ({"fisher": "mc", "num_samples": 0}, r"num_samples.*0"),
    "num_samples_float": ({"fisher": "mc", "num_samples": 1.5}, r"num_samples.*1\.5"),
    "num_samples_bool": ({"fisher": "mc", "num_samples": True}, r"num_samples.*True"),
    "num_samples_exact": ({"fisher": "exact", "num_samples": 2}, r"num_samples"),
    "num_samples_empirical": ({"fisher": "empirical", "num_samples": 2}, r"num_samples"),
    "chunk_size_zero": ({"chunk_size": 0}, r"chunk_size.*0"),
    "chunk_size_negative": ({"chunk_size": -1}, r"chunk_size.*-1"),
    "chunk_size_float": ({"chunk_size": 2.0}, r"chunk_size.*2\.0"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("transformation", [ff.diagonal, ff.dense, ff.block_diagonal])
def test_bad_options_are_refused_when_the_estimator_is_made(
    transformation: Callable[..., Any], option: str
) -> None:
    options, message = OPTIONS[option]
    p = problem()
    with pytest.raises(ff.OptionError, match=message):
        transformation(p.model, p.likelihood, **options)


@pytest.mark.parametrize(
    "transformation",
    [ff.per_sample_gradients, ff.score_norms, ff.score_gram, ff.gradient_moments],
)
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bad_chunk_size(transformation: Callable[..., Any], value: Any) -> None:
    p = problem()
    with pytest.raises(ff.OptionError, match="chunk_size"):
        transformation(p.model, p.likelihood, chunk_size=value)


def test_unknown_options_are_type_errors_as_in_python() -> None:
    p = problem()
    with pytest.raises(TypeError, match="chunksize"):
        ff.diagonal(p.model, p.likelihood, chunksize=3)  # type: ignore[call-arg]


LOSSES: dict[str, tuple[Any, str]] = {
    "mse": (nn.MSELoss(), r"gaussian\(scale"),
    "mse_function": (nn.functional.mse_loss, r"gaussian\(scale"),
    "cross_entropy": (nn.CrossEntropyLoss(), r"categorical"),
    "bce": (nn.BCEWithLogitsLoss(), r"bernoulli"),
    "poisson": (nn.PoissonNLLLoss(), r"poisson"),
    "nothing": (None, r"likelihood"),
    "a_name": ("categorical", r"'categorical'.*likelihoods"),
    "not_called": (ff.likelihoods.categorical, r"Call it: likelihoods\.categorical\("),
    "a_function": (lambda outputs, targets: outputs.sum(), r"custom"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("member", [*MEMBERS[:4], MEMBERS[5]], ids=str)
def test_a_loss_is_no_likelihood(member: testing.Member, loss: str) -> None:
    value, message = LOSSES[loss]
    p = problem()
    with pytest.raises(ff.FisherError, match=message):
        member.transformation(p.model, value, **member.options)


@pytest.mark.parametrize("model", [None, 3, "gpt2"], ids=repr)
def test_a_model_is_a_function(model: Any) -> None:
    with pytest.raises(ff.FisherError, match=r"model"):
        ff.diagonal(model, ff.likelihoods.categorical())


def test_a_module_is_not_yet_a_model() -> None:
    with pytest.raises(ff.FisherError, match=r"functional\("):
        ff.diagonal(nn.Linear(2, 2), ff.likelihoods.categorical())


def test_batch_must_be_a_batch() -> None:
    p = problem()
    with pytest.raises(ff.FisherError, match=r"Batch"):
        ff.diagonal(p.model, p.likelihood)(p.params, p.buffers, p.batch.inputs)


# ---- parameters ----------------------------------------------------------------------------------


def test_integer_parameter() -> None:
    p = problem()
    params = {**p.params, "2.bias": torch.zeros(C, dtype=torch.int64)}
    with pytest.raises(ff.FisherError, match=r"2\.bias"):
        ff.diagonal(p.model, p.likelihood)(params, p.buffers, p.batch)


def test_integer_parameter_of_a_module() -> None:
    module = nn.Linear(2, 2)
    module.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    _, params, _ = ff.functional(module)
    assert "counts" not in params
    with pytest.raises(ff.FisherError, match=r"counts"):
        ff.functional(module, select="counts")


def test_parameters_of_a_module_that_never_ran() -> None:
    with pytest.raises(ff.UnsupportedError, match=r"functional.*'1\.weight'.*Run one batch"):
        ff.functional(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(3)))
    with pytest.raises(ff.UnsupportedError, match=r"functional.*'1\.running_mean'.*Run one batch"):
        ff.functional(nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d(affine=False)))


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_parameters_without_values(member: testing.Member) -> None:
    p = problem()
    p.params["0.weight"] = torch.empty_like(p.params["0.weight"], device="meta")
    with pytest.raises(ff.UnsupportedError, match=r"meta device at params\['0\.weight'\]"):
        member.run(p)


@pytest.mark.parametrize("params", [{}, None, {"w": 1.0}, []], ids=repr)
def test_params_without_tensors(params: Any) -> None:
    p = problem()
    with pytest.raises(ff.FisherError, match=r"params"):
        ff.diagonal(lambda params, buffers, inputs: inputs, p.likelihood)(
            params, p.buffers, p.batch
        )


def test_complex_parameter() -> None:
    def model(params: dict[str, Tensor], buffers: object, inputs: Tensor) -> Tensor:
        return (inputs.to(torch.complex128) @ params["w"]).real

    with pytest.raises(ff.FisherError, match=r"complex.*w|w.*complex"):
        ff.diagonal(model, ff.likelihoods.categorical())(
            {"w": torch.zeros(4, 3, dtype=torch.complex128)}, {}, problem().batch
        )


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Dropout(0.1), "Dropout"),
        (nn.Dropout1d(0.1), "Dropout"),
        (nn.BatchNorm1d(5), "BatchNorm"),
        (nn.BatchNorm1d(5, track_running_stats=False), "BatchNorm"),
    ],
)
def test_training_mode(layer: nn.Module, name: str) -> None:
    module = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)).double().train()
    batch = ff.Batch(normal(B, 4))
    model, params, buffers = ff.functional(module)
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(ff.UnsupportedError, match=name) as caught,
    ):
        ff.diagonal(model, ff.likelihoods.categorical())(params, buffers, batch)
    assert "eval()" in str(caught.value)


def test_dropout_that_never_drops_is_fine_in_training_mode() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.0), nn.Linear(5, 3)).double().train()
    model, params, buffers = ff.functional(module)
    assert (
        ff.diagonal(model, ff.likelihoods.categorical())(
            params, buffers, ff.Batch(normal(B, 4))
        ).trace()
        > 0
    )


OUTPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "tuple": lambda m, x: (m.a(x), x),
    "none": lambda m, x: None,
    "scalar": lambda m, x: m.a(x).sum(),
    "integers": lambda m, x: m.a(x).argmax(-1, keepdim=True),
    "one_class_too_few": lambda m, x: m.a(x)[..., :1],
    "pooled_batch": lambda m, x: m.a(x).mean(0, keepdim=True),
}


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_bad_outputs(outputs: str) -> None:
    module = Net(OUTPUTS[outputs], a=nn.Linear(4, 3)).double()
    model, params, buffers = ff.functional(module)
    with pytest.raises(ff.FisherError, match=r"(?i)output|logits|classes"):
        ff.diagonal(model, ff.likelihoods.categorical())(params, buffers, ff.Batch(normal(B, 4)))


def test_an_error_of_the_model_is_the_models_own() -> None:
    """Not swallowed, not turned into the general path, not blamed on the library."""
    p = problem()
    with pytest.raises(RuntimeError, match=r"shape|size") as caught:
        ff.diagonal(p.model, p.likelihood)(p.params, p.buffers, ff.Batch(normal(B, 7)))
    assert not isinstance(caught.value, ff.FisherError)


@pytest.mark.parametrize("transformation", [ff.diagonal, ff.dense, ff.block_diagonal])
def test_an_exact_fisher_of_too_many_columns(transformation: Callable[..., Any]) -> None:
    """50k columns are an error that names the other kinds, before any work is done."""

    def model(params: Tensor, buffers: object, inputs: Tensor) -> Tensor:
        return inputs.unsqueeze(-1) * params

    params = torch.ones(50_000)
    batch = ff.Batch(torch.ones(1, 2))
    estimator = transformation(model, ff.likelihoods.categorical())
    with pytest.raises(ff.FisherError, match=r"pull-backs") as caught:
        estimator(params, {}, batch)
    for kind in ("mc", "curvature_prop", "empirical"):
        assert kind in str(caught.value)
    assert any(number in str(caught.value) for number in ("99998", "99,998", "99_998"))


def test_a_dense_matrix_that_could_never_be_held() -> None:
    def model(params: Tensor, buffers: object, inputs: Tensor) -> Tensor:
        return inputs @ params

    with pytest.raises(ff.FisherError, match=r"(?i)dense.*(GiB|TiB|bytes|entries|parameters)"):
        ff.dense(model, ff.likelihoods.gaussian(1.0))(
            torch.ones(1000, 1000), {}, ff.Batch(torch.ones(2, 1000))
        )


def test_custom_likelihood_without_what_is_asked_of_it() -> None:
    p = problem()
    custom = ff.likelihoods.custom(lambda outputs, targets: -(outputs - targets).square().sum(-1))
    with pytest.raises(ff.FisherError, match="sample"):
        ff.diagonal(p.model, custom, fisher="mc")(*p.args, key=ff.random.key(0))


# ---- statistics, merge, units --------------------------------------------------------------------


def test_statistics_of_nothing_or_of_strangers() -> None:
    p = problem()
    wrong: Any = "diagonal"
    with pytest.raises(ff.FisherError, match="statistics"):
        ff.statistics()
    with pytest.raises(ff.FisherError, match="statistics"):
        ff.statistics(a=ff.diagonal(p.model, p.likelihood), b=wrong)
    with pytest.raises(ff.FisherError, match=r"statistics.*model"):
        ff.statistics(
            a=ff.diagonal(p.model, p.likelihood), b=ff.diagonal(problem().model, p.likelihood)
        )
    with pytest.raises(ff.FisherError, match=r"statistics.*likelihood"):
        ff.statistics(
            a=ff.diagonal(p.model, p.likelihood),
            b=ff.diagonal(p.model, ff.likelihoods.gaussian(1.0)),
        )


def test_a_loss_is_a_mean_over_examples() -> None:
    p = problem()
    by_position = ff.diagonal(p.model, p.likelihood, fisher="empirical", unit="position")
    weights = torch.ones(p.batch.targets.shape)
    batch = dataclasses.replace(p.batch, weights=weights)
    both = ff.statistics(diag=by_position, loss=True, gradient=True)
    with pytest.raises(
        ff.OptionError, match=r"statistics.*\[B\], for loss and gradient, got shape"
    ):
        both(p.params, p.buffers, batch)
    assert ff.statistics(diag=by_position)(p.params, p.buffers, batch)["diag"].trace() > 0


def test_merging_other_kinds_or_units() -> None:
    p = problem()
    exact = ff.diagonal(p.model, p.likelihood)(*p.args)
    empirical = ff.diagonal(p.model, p.likelihood, fisher="empirical")(*p.args)
    positions = ff.diagonal(p.model, p.likelihood, unit="position")(*p.args)
    dense = ff.dense(p.model, p.likelihood)(*p.args)
    with pytest.raises(ff.FisherError, match=r"merge.*exact.*empirical"):
        ff.merge(exact, empirical)
    with pytest.raises(ff.FisherError, match=r"merge.*example.*position"):
        ff.merge(exact, positions)
    with pytest.raises(ff.FisherError, match=r"merge.*Diagonal.*Dense"):
        ff.merge(exact, dense)


def test_explain_of_something_else() -> None:
    wrong: Any = lambda params, buffers, batch: None  # noqa: E731
    with pytest.raises(ff.FisherError, match="explain"):
        ff.explain(wrong)


def test_testing_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package says which extra to install."""
    import builtins
    import sys

    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "hypothesis":
            raise ModuleNotFoundError("No module named 'hypothesis'", name="hypothesis")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("fisherfn.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"fisherfn\[testing\]"):
        __import__("fisherfn.testing.strategies")
