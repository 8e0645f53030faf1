"""The laws of the contract, for every estimator, every kind of labels and both units."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fisherfn import testing

MEMBERS = list(testing.ESTIMATORS.values())

# What one member goes through on a drawn problem is a dozen calls; the number of problems is what
# there is time for, times three dozen members.
EXAMPLES = settings(max_examples=4, suppress_health_check=list(HealthCheck))


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
    strategy = (
        testing.problems(unit=member.unit, kinds=kinds)
        if law is testing.padded_positions
        else testing.problems(unit=member.unit)
    )
    law(member, data.draw(strategy))


def test_every_estimator_of_the_package_is_a_member() -> None:
    """A new estimator that does not join the table fails here."""
    import fisherfn as ff
    from fisherfn import estimators

    offered = {
        name
        for name in vars(estimators)
        if not name.startswith("_") and callable(getattr(ff, name, None))
    }
    joined = {member.transformation.__name__ for member in MEMBERS} | {"statistics", "explain"}
    functions = {
        name
        for name in offered
        if getattr(ff, name).__module__.startswith("fisherfn.estimators")
        and not isinstance(getattr(ff, name), type)
    }
    assert functions <= joined, functions - joined
