"""`ff.capture` and `ff.explain`: sites, rules, routes and reasons."""

from __future__ import annotations

import torch

import cases
import fisherfn as ff
import oracles
from cases.single import case, two, x
from fisherfn.layers import registry
from fisherfn.testing import assert_close

# ---- capture and explain -------------------------------------------------------------------------


def test_capture_gives_outputs_sites_and_the_pull_back() -> None:
    """Statistics of one's own: the Gram matrix of a layer's inputs, and its score from (a, g)."""
    s = case(lambda m, x: m.b(torch.tanh(m.a(x))), x(), **two())
    found = ff.capture(s.model)(s.params, s.buffers, s.batch.inputs)
    outputs = s.model(s.params, s.buffers, s.batch.inputs)
    assert_close(found.outputs, outputs)
    cotangent = s.likelihood.score(outputs, s.batch.targets)
    cotangents = found.pull_back(cotangent)
    truth = oracles.unravel(oracles.scores(s.problem), s.problem.params)
    seen = {}
    for site, g in zip(found.sites, cotangents, strict=True):
        for role, name in site.parameters.items():
            if role == "weight":
                seen[name] = torch.einsum("bo,bi->boi", g, site.input)
    assert_close(seen, {k: truth[k] for k in ("a.weight", "b.weight")})


def test_explain_names_every_parameter_its_rule_and_the_reason() -> None:
    s = cases.ALL["concatenated_weights"].setup()
    text = str(ff.explain(ff.diagonal(s.model, s.likelihood, fisher="empirical"))(*s.args))
    assert "general" in text
    for name in s.params:
        assert name in text
    mlp = cases.ALL["mlp"].setup()
    text = str(ff.explain(ff.diagonal(mlp.model, mlp.likelihood))(*mlp.args))
    for name in mlp.params:
        assert name in text
    assert "linear" in text
    assert "general" not in text.lower().replace("general path: none", "")


def test_explain_states_the_number_of_columns_of_an_exact_fisher() -> None:
    s = cases.ALL["linear_3d"].setup()  # T = 6 positions, C = 3 classes
    text = str(ff.explain(ff.diagonal(s.model, s.likelihood))(*s.args))
    assert "12" in text


def test_explain_says_that_an_unused_parameter_is_unused() -> None:
    s = cases.ALL["unused_parameter"].setup()
    text = str(ff.explain(ff.diagonal(s.model, s.likelihood))(*s.args))
    line = next(line for line in text.splitlines() if "spare" in line)
    assert "unused" in line or "not used" in line or "no use" in line


def test_every_registered_rule_has_a_case() -> None:
    """A new rule comes with a model in `cases/layers.py`, and so meets every test of the rules."""
    used: set[str] = set()
    for known in (cases.LAYERS | cases.ATTENTION).values():
        s = known.setup()
        report = ff.explain(ff.diagonal(s.model, s.likelihood, fisher="empirical"))(*s.args)
        used.update(rule for how in report.parameters.values() for rule in how.rules)
    registered = {rule.name for rule in registry._RULES.values()}
    assert registered <= used, registered - used
