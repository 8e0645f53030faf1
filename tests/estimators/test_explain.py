"""`ff.capture` and `ff.explain`: sites, rules, routes and reasons."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import fisherfn as ff
import oracles
from cases import normal
from cases.single import case, diagonal, two, want, x
from fisherfn.layers import registry
from fisherfn.layers.outer import Outer
from fisherfn.testing import assert_close

# ---- capture and explain -------------------------------------------------------------------------


def test_capture_gives_outputs_sites_and_the_pull_back() -> None:
    """Statistics of one's own: scores and a K-FAC factor from what `capture` hands out."""
    s = case(lambda m, x: m.b(torch.tanh(m.a(x))), x(), **two())
    found = ff.capture(s.model)(s.params, s.buffers, s.batch.inputs)
    outputs = s.model(s.params, s.buffers, s.batch.inputs)
    assert_close(found.outputs, outputs)
    assert [(site.rule, dict(site.params)) for site in found.sites] == [
        ("linear", {"a.weight": "weight", "a.bias": "bias"}),
        ("linear", {"b.weight": "weight", "b.bias": "bias"}),
    ]
    (first,) = found.sites[0].inputs
    assert_close(first, s.batch.inputs)
    pulled = found.pullback(s.likelihood.score(outputs, s.batch.targets))
    scores = oracles.scores(s.problem)
    truth = oracles.unravel(scores, s.problem.params)
    assert list(pulled) == list(s.params)
    for name, leaf in pulled.items():
        assert_close(leaf.scores()[0], truth[name], what=name)
        assert_close(leaf.square_sum(), truth[name].square().sum(0), what=name)
        assert_close(leaf.norms()[0], truth[name].flatten(1).square().sum(1), what=name)
        flat = truth[name].flatten(1)
        assert_close(leaf.gram(), flat @ flat.mT, what=name)
        assert_close(leaf.sum(), truth[name].sum(0), what=name)
    (form, _), *rest = pulled["b.weight"].uses
    assert not rest
    assert isinstance(form, Outer)
    hidden = torch.tanh(s.batch.inputs @ s.params["a.weight"].mT + s.params["a.bias"])
    assert_close(form.a.reshape(hidden.shape), hidden)


def test_capture_pulls_back_again_and_again() -> None:
    """The pull-back is linear, and may be used more than once."""
    s = case(lambda m, x: m.b(torch.tanh(m.a(x))), x(), **two())
    found = ff.capture(s.model)(s.params, s.buffers, s.batch.inputs)
    one, two_ = normal(4, 3, seed=1), normal(4, 3, seed=2)
    both = found.pullback(one + 2.0 * two_)
    first, second = found.pullback(one), found.pullback(two_)
    for name, leaf in both.items():
        assert_close(leaf.scores(), first[name].scores() + 2.0 * second[name].scores())


def test_capture_reports_the_general_path_and_answers_there_too() -> None:
    s = cases.ALL["concatenated_weights"].setup()
    found = ff.capture(s.model)(s.params, s.buffers, s.batch.inputs)
    assert set(found.general) == {"a", "b"}
    pulled = found.pullback(s.likelihood.score(found.outputs, s.batch.targets))
    truth = oracles.unravel(oracles.scores(s.problem), s.problem.params)
    for name, leaf in pulled.items():
        assert_close(leaf.scores()[0], truth[name], what=name)


def test_capture_refuses_cotangents_of_another_shape() -> None:
    s = case(lambda m, x: m.b(torch.tanh(m.a(x))), x(), **two())
    found = ff.capture(s.model)(s.params, s.buffers, s.batch.inputs)
    with pytest.raises(ff.FisherError, match=r"cotangents.*\(4, 2\).*\(4, 3\)"):
        found.pullback(torch.zeros(4, 2, dtype=torch.float64))


def test_a_rule_of_ones_own() -> None:
    """A new layer is one function and one registered rule; every estimator picks it up."""
    name = "scale, for the test"
    rule = registry.rule_for(torch.mul)
    assert rule is not None

    def twice(x: Tensor, scale: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x, scale)):
            return torch.overrides.handle_torch_function(twice, (x, scale), x, scale)
        return 2.0 * x * scale

    def match(call: registry.Call) -> registry.Match | None:
        found = rule.match(call)
        if found is None:
            return None
        return registry.Match(
            found.kept, tuple(registry.Role(r.argument, Doubled(r.builder)) for r in found.roles)
        )

    ff.register_rule([twice], ("input", "other"), match, name=name)
    try:
        s = case(lambda m, x: m.b(torch.tanh(twice(x, m.s))), x(), s=normal(4), b=two()["b"])
        report = ff.explain(diagonal(s))(*s.args)
        assert not report.general, str(report)
        assert report.rows[0].rule == name
        assert_close(diagonal(s)(*s.args).values, want(s))
        with pytest.raises(ff.OptionError, match=name):
            ff.register_rule([twice], ("input", "other"), match, name="another")
    finally:
        registry._RULES.pop(twice)


@dataclasses.dataclass(frozen=True)
class Doubled:
    """The form of a rule whose output is twice that of another."""

    inner: Any

    def accepts(self, axis: int, rank: int) -> bool:
        return self.inner.accepts(axis, rank)

    def __call__(self, kept: Any, g: Tensor, axis: int) -> Any:
        return self.inner(kept, 2.0 * g, axis)


def test_explain_names_every_parameter_its_rule_and_the_reason() -> None:
    s = cases.ALL["concatenated_weights"].setup()
    report = ff.explain(ff.diagonal(s.model, s.likelihood, fisher="empirical"))(*s.args)
    assert set(report.general) == {"a", "b"}
    assert all("cat" in row.reason for row in report.rows)
    for name in s.params:
        assert name in str(report)
    assert "general path" in str(report)
    assert "cat" in str(report)


def test_explain_of_layers_with_rules() -> None:
    s = cases.ALL["mlp"].setup()
    report = ff.explain(ff.diagonal(s.model, s.likelihood))(*s.args)
    assert [row.path for row in report.rows] == list(s.params)
    assert all("linear" in row.uses[0] for row in report.rows)
    assert all(row.multiplications > 0 for row in report.rows)
    assert report.general == ()
    assert report.checked
    size, width = s.batch.inputs.shape[0], 5 * 4
    assert report.rows[0].multiplications >= size * width  # one product for each entry and example


def test_explain_shows_every_use_of_a_tied_parameter() -> None:
    s = cases.ALL["tied_embedding_and_head"].setup()
    report = ff.explain(ff.diagonal(s.model, s.likelihood))(*s.args)
    row = report.rows[0]
    assert row.path == "embed.weight"
    assert len(row.uses) == 2
    assert "embedding" in row.rule
    assert "linear" in row.rule


def test_explain_states_the_number_of_pull_backs() -> None:
    s = cases.ALL["linear_3d"].setup()  # T = 6 positions, C = 3 classes
    report = ff.explain(ff.diagonal(s.model, s.likelihood))(*s.args)
    assert report.columns == 12
    assert "12 pull-back" in str(report)
    several = ff.explain(ff.diagonal(s.model, s.likelihood, fisher="mc", num_samples=7))(*s.args)
    assert several.columns * several.num_samples == 7
    assert "7 pull-back" in str(several)


def test_explain_says_that_an_unused_parameter_is_unused() -> None:
    s = cases.ALL["unused_parameter"].setup()
    text = str(ff.explain(ff.diagonal(s.model, s.likelihood))(*s.args))
    line = next(line for line in text.splitlines() if "spare" in line)
    assert "unused" in line


def test_explain_of_statistics() -> None:
    s = cases.ALL["mlp"].setup()
    several = ff.statistics(
        a=ff.diagonal(s.model, s.likelihood), b=ff.diagonal(s.model, s.likelihood, fisher="mc")
    )
    report = ff.explain(several)(*s.args)
    assert report.columns == 3  # C - 1 and one draw
    assert "statistics" in str(report)


def test_every_registered_rule_has_a_case() -> None:
    """A new rule comes with a model in `cases`, and so meets every test of the rules."""
    used: set[str] = set()
    for known in (cases.LAYERS | cases.ATTENTION).values():
        s = known.setup()
        report = ff.explain(ff.diagonal(s.model, s.likelihood, fisher="empirical"))(*s.args)
        used.update(use.split(" #")[0] for row in report.rows for use in row.uses)
    registered = {rule.name for rule in registry._RULES.values()}
    assert registered <= used, registered - used


def test_capture_needs_parameters() -> None:
    with pytest.raises(ff.TreeMismatchError, match=r"^capture: expected params with at least one"):
        ff.capture(lambda params, buffers, x: x)({}, {}, torch.ones(2, 1))
