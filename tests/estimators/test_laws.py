"""The laws of the contract, for every estimator, every kind of labels and both units."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherfn as ff
from fisherfn import testing

MEMBERS = list(testing.ESTIMATORS.values())

# What one member goes through on a drawn problem is a dozen calls; the number of problems is what
# there is time for, times three dozen members.
EXAMPLES = settings(max_examples=4)


@pytest.mark.parametrize("law", testing.LAWS.values(), ids=testing.LAWS.keys())
@pytest.mark.parametrize("member", MEMBERS, ids=str)
@EXAMPLES
@given(data=st.data())
def test_law(
    member: testing.Member,
    law: Callable[[testing.Member, testing.Problem], None],
    data: st.DataObject,
) -> None:
    kinds = ("positionwise", "grid", "sequence", "tied", "reuse", "unknown")
    if "kfac" in member.name:  # one position more is one use more: a tied weight has no block
        kinds = tuple(kind for kind in kinds if kind != "reuse")
    if member.kinds:
        strategy = testing.problems(unit=member.unit, kinds=member.kinds)
    elif law is testing.padded_positions:
        strategy = testing.problems(unit=member.unit, kinds=kinds)
    else:
        strategy = testing.problems(unit=member.unit)
    law(member, data.draw(strategy))


def test_every_estimator_of_the_package_is_a_member() -> None:
    """A new estimator that does not join the table fails here.

    Products take a tangent besides; `implicit` makes matrices of them, and those have joined.
    """
    with_tangents = ("products", "hessian", "jacobian")
    offered = {
        name
        for name, thing in vars(ff).items()
        if inspect.isfunction(thing)
        and thing.__module__.startswith("fisherfn.estimators.")
        and thing.__module__.split(".")[2] not in with_tangents
    }
    joined = {member.transformation.__name__ for member in MEMBERS}
    assert offered - {"statistics", "explain"} <= joined
    assert {"diagonal", "dense", "score_norms"} <= offered
