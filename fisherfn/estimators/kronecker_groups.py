"""Layers that share a block because they read one input: who they are, and what is refused.

With the input a of layers l and their cotangents g_l, the block of all is G ⊗ A, A the moment of a
and G that of (g_1, g_2, ...): K-FAC of the one layer whose weights are theirs, stacked. Whether the
inputs are one is decided anew for each chunk of examples: by the identity of the tensor that the
layers were called with, and where that differs by its values, if they can be seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fisherfn.capture.plan import Plan
from fisherfn.core.errors import OptionError, UnsupportedError, at
from fisherfn.core.modes import concrete
from fisherfn.estimators.kronecker_roles import Role, Roles
from fisherfn.estimators.kronecker_settings import Settings
from fisherfn.layers.form import Form
from fisherfn.layers.fused import equal_inputs, fused, same_shape
from fisherfn.layers.views import factor


@dataclass(frozen=True)
class Group:
    """Layers of one block.

    Attributes:
        names: What their own blocks would be called, in the order of their outputs.
        members: Leaf and number of each.
        taps: At which call of the plan each reads its input.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, int], ...]
    taps: tuple[int, ...]

    def fused(
        self, caller: str, forms: Sequence[Form], parts: int, sources: Sequence[Any], outputs: bool
    ) -> Form:
        """Return the form of all layers as one.

        Args:
            caller: On whose behalf errors are raised.
            forms: Those of the members.
            parts: Into how many blocks their outputs are cut.
            sources: For each call of the plan, a mark that is equal if the input is one object.
            outputs: Whether cotangents are needed.

        Returns:
            A form whose outputs are those of all members.

        Raises:
            OptionError: The inputs differ.
            UnsupportedError: They are different tensors whose values cannot be seen.
        """
        first = forms[0]
        for name, tap, form in zip(self.names[1:], self.taps[1:], forms[1:], strict=True):
            if not same_shape(first, form):
                self._refuse_inputs(caller, name)
            mark = sources[tap]
            if mark is not None and mark == sources[self.taps[0]]:
                continue
            if not concrete(first.sample(), form.sample()):
                raise UnsupportedError(
                    f"{caller}: expected the layers of one block of joint= to be called with the "
                    f"same tensor where values are hidden, got another one than at {self.names[0]}"
                    f"{at(name)}. Make the tensor once and hand it to all of them, or call outside "
                    "of the transformation."
                )
            if not equal_inputs(first, form):
                self._refuse_inputs(caller, name)
        return fused(forms, parts) if outputs else first

    def _refuse_inputs(self, caller: str, name: str) -> NoReturn:
        raise OptionError(
            f"{caller}: expected the layers of one block of joint= to read the same input, got "
            f"another one than at {self.names[0]}{at(name)}. Leave it out of the tuple."
        )


def groups_of(
    caller: str, settings: Settings, paths: Sequence[str], roles: Roles, plan: Plan
) -> list[Group]:
    """Return the groups that `joint=` asks for; those of a single layer are none.

    Raises:
        OptionError: They do not fit the model.
    """
    known = roles.members(paths)
    found = []
    for names in settings.joint:
        for name in names:
            if name not in known and (len(names) > 1 or name not in paths):
                _refuse_name(caller, name, paths, known, roles, plan)
        if len(names) == 1:
            continue
        members = tuple([known[name] for name in names])
        chosen = [roles.weights[leaf][number] for leaf, number in members]
        _check_alike(caller, settings, names, [paths[leaf] for leaf, _ in members], chosen)
        found.append(Group(tuple(names), members, tuple([role.tap for role in chosen])))
    return found


def _refuse_name(
    caller: str,
    name: str,
    paths: Sequence[str],
    known: Mapping[str, tuple[int, int]],
    roles: Roles,
    plan: Plan,
) -> NoReturn:
    if name not in paths:
        raise OptionError(
            f"{caller}: expected joint= to name weights among {list(known)}, got {name!r}. Use the "
            "paths of ff.tree.paths(params)."
        )
    leaf = list(paths).index(name)
    if leaf in roles.biases:
        why, advice = "the bias of a layer", "Name its weight: a bias goes with it."
    elif leaf in roles.weights:
        parts = [part for part, (other, _) in known.items() if other == leaf]
        why, advice = "which is used in several parts", f"Name the parts: {parts}."
    elif leaf in plan.general:
        why, advice = f"which is on the general path: {plan.general[leaf]}", "Leave it out."
    else:
        why = "which is no weight of one layer alone (tied or reused, or no matrix at all)"
        advice = "Leave it out: it keeps its exact diagonal."
    raise OptionError(
        f"{caller}: expected joint= to name weights with a block, got {name!r}, {why}. {advice}"
    )


def _check_alike(
    caller: str,
    settings: Settings,
    names: Sequence[str],
    paths: Sequence[str],
    roles: Sequence[Role],
) -> None:
    """Raise unless layers can be stacked."""
    first = roles[0]
    parts = [settings.parts(path, role.parts) for path, role in zip(paths, roles, strict=True)]
    for i, (name, role) in enumerate(zip(names, roles, strict=True)):
        if role.reading[0] == "table":
            raise OptionError(
                f"{caller}: expected layers that multiply by a matrix in joint=, got a table"
                f"{at(name)}. Tables read indices; leave it out of the tuple."
            )
        if role.reading != first.reading:
            raise OptionError(
                f"{caller}: expected the layers of one block of joint= to read their input alike, "
                f"got a {role.reading[0]}{at(name)} beside a {first.reading[0]}{at(names[0])} "
                "of another kind, geometry or order of axes. Leave it out of the tuple."
            )
        if parts[i] != parts[0]:
            raise OptionError(
                f"{caller}: expected the weights of one block of joint= to be cut into equally "
                f"many blocks, got {parts[i]}{at(name)} and {parts[0]}{at(names[0])}. Give them "
                "the same number in partition=; 1 leaves a weight whole."
            )
        if factor(role.view) != factor(first.view):
            raise OptionError(
                f"{caller}: expected the weights of one block of joint= to be multiplied by the "
                f"same constant, got {factor(role.view):g}{at(name)} and {factor(first.view):g}"
                f"{at(names[0])}. Leave it out of the tuple."
            )
        if settings.bias == "joint" and (role.bias is None) != (first.bias is None):
            bare = name if role.bias is None else names[0]
            raise OptionError(
                f"{caller}: expected all layers of one block of joint= to have a bias, or none of "
                f"them, got none{at(bare)}. Use bias='separate' or bias='diagonal'."
            )
        if parts[0] > 1 and role.reading[0] == "transposed convolution":
            raise OptionError(
                f"{caller}: expected whole weights of transposed convolutions in joint=, got "
                f"{parts[0]} blocks{at(name)}. Leave them out of partition= or of joint=."
            )
