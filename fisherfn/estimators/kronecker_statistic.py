"""What statistics about Kronecker blocks share: who is who, and which rows exist."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherfn.capture.plan import Plan
from fisherfn.core import trees
from fisherfn.core.errors import DataError, OptionError, at
from fisherfn.core.modes import concrete
from fisherfn.curvature.kronecker import Block, Layer, Piece
from fisherfn.estimators.kronecker_groups import Group, groups_of
from fisherfn.estimators.kronecker_roles import Role, Roles, named, steps_of
from fisherfn.estimators.kronecker_settings import Settings
from fisherfn.estimators.observe import Observed
from fisherfn.estimators.statistic import Statistic
from fisherfn.layers.form import Form
from fisherfn.layers.kronecker import Weights
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.views import View, factor, with_plain_sizes


@dataclass(frozen=True)
class Place:
    """What is static about one block: what it is about, and how its forms are read.

    Attributes:
        block: Its description.
        members: Leaf and number of the use of each of its weights.
        parts: Into how many blocks the outputs of each group are cut.
        factor: What its weights are multiplied by.
    """

    block: Block
    members: tuple[tuple[int, int], ...]
    parts: int
    factor: float

    @property
    def biased(self) -> bool:
        """Whether the inputs get a column of ones, for the bias."""
        return self.block.bias is not None


@dataclass(frozen=True)
class Beside:
    """The block of the biases of a place, apart from that of its weights.

    Attributes:
        block: Its description.
        members: Those of the place's members that have a bias.
        outputs: Which outputs of the place these have; None: all of them.
    """

    block: Block
    members: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...] | None


class KroneckerStatistic(Statistic):
    """Base of the statistics about Kronecker blocks: who is who among the parameters."""

    def __init__(self, caller: str, settings: Settings) -> None:
        """Start empty; errors are raised on behalf of `caller`."""
        self.caller = caller
        self.settings = settings
        self.paths: list[str] = []
        self.leaves: list[Tensor] = []
        self.roles = Roles({}, frozenset())
        self.places: dict[tuple[tuple[int, int], ...], Place] = {}
        self._groups: dict[tuple[int, int], Group] = {}
        self._arrived: dict[Group, dict[tuple[int, int], tuple[Form, View]]] = {}
        self._sources: Sequence[Any] = ()
        self._rest: dict[int, Tensor] = {}
        self._waiting: dict[int, LeafScores] = {}

    def begin(self, params: Any) -> None:
        """Learn paths and shapes."""
        self.paths = trees.unique_paths(self.caller, params)
        self.leaves = trees.leaves(params)
        for path in self.settings.partition or {}:
            if path not in self.paths:
                raise OptionError(
                    f"{self.caller}: expected partition= to name weights among {self.paths}, got "
                    f"{path!r}. Use the paths of ff.tree.paths(params)."
                )

    def plan(self, plan: Plan) -> None:
        """Learn which parameters have blocks."""
        self.roles = Roles.of(plan, self.leaves)
        if self.settings.joint:
            groups = groups_of(self.caller, self.settings, self.paths, self.roles, plan)
            self._groups = {member: group for group in groups for member in group.members}

    def sources(self, marks: Sequence[Any]) -> None:
        """Learn which layers were called with one tensor."""
        self._sources = marks

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Hand the uses of a weight on; add squares of what has no block."""
        if leaf in self.roles.weights:
            for form, view in scores.uses:
                role = self.roles.role(leaf, view)
                member = leaf, role.number or 0
                group = self._groups.get(member)
                if group is None:
                    self.take_block(self._place(((member, form, view),)), form)
                else:
                    self._take_member(group, member, form, view)
        elif leaf not in self.roles.biases or self.settings.bias == "diagonal":
            self._rest[leaf] = scores.square_sum(self._rest.get(leaf))
        elif self.settings.bias == "separate":
            self._waiting[leaf] = scores

    def _take_member(self, group: Group, member: tuple[int, int], form: Form, view: View) -> None:
        """Keep the scores of a layer until all of its block are there."""
        arrived = self._arrived.setdefault(group, {})
        arrived[member] = form, view
        if len(arrived) < len(group.members):
            return
        del self._arrived[group]
        layers = tuple([(m, *arrived[m]) for m in group.members])
        place = self._place(layers)
        forms = [form for _, form, _ in layers]
        pulled = not self.settings.forward_only
        joint = group.fused(self.caller, forms, place.parts, self._sources, pulled)
        self.take_block(place, joint)

    @abstractmethod
    def take_block(self, place: Place, form: Form) -> None:
        """Receive the scores of one block."""

    def take_bias(self, block: Block, scores: Tensor) -> None:
        """Receive the scores `[K, B, R, O]` of the biases that have a block of their own."""
        return

    def end_pull(self) -> None:
        """Hand on the biases, now that the blocks of their weights are known."""
        waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        for place in self.ordered():
            beside = self.separate(place)
            if beside is None:
                continue
            found = []
            for (leaf, number), layer in zip(beside.members, beside.block.layers, strict=True):
                bias = self.roles.weights[leaf][number].bias
                assert bias is not None
                take = torch.func.vmap(torch.func.vmap(layer.weight.take))
                found.append(take(waiting[bias.leaf].scores())[..., 0])
            self.take_bias(beside.block, found[0] if len(found) == 1 else torch.cat(found, -1))

    def _place(self, layers: tuple[tuple[tuple[int, int], Form, View], ...]) -> Place:
        """Return the block of some layers, given the form and the view of each."""
        members = tuple([member for member, _, _ in layers])
        if members not in self.places:
            own = [self._new_place(member, form, view) for member, form, view in layers]
            self.places[members] = own[0] if len(own) == 1 else self._joined(own)
        return self.places[members]

    def _joined(self, own: Sequence[Place]) -> Place:
        """Return the block of several layers, from those that each would have."""
        blocks = [place.block for place in own]
        outputs = sum([b.outputs for b in blocks])
        block = replace(
            blocks[0],
            name="+".join([b.name for b in blocks]),
            outputs=outputs,
            output_form="rows" if outputs > self.settings.widest else "matrix",
            beside=tuple([Layer(b.weight, b.bias, b.outputs) for b in blocks[1:]]),
        )
        members = tuple([member for place in own for member in place.members])
        return replace(own[0], block=block, members=members)

    def _new_place(self, member: tuple[int, int], form: Form, view: View) -> Place:
        role = self.roles.weights[member[0]][member[1]]
        path, s = self.paths[member[0]], self.settings
        # sizes of parameters stay, also where the compiler would make symbols of them
        shape, view = tuple(int(n) for n in form.shape), with_plain_sizes(view)
        if isinstance(form, Lookup):
            rows, outputs = shape
            groups, inputs = 1, rows
            steps = (
                *steps_of(view, shape),
                ("permute", (1, 0)),
                ("reshape", (outputs, rows), (1, outputs, rows)),
            )
        else:
            groups, outputs, inputs = shape
            steps = steps_of(view, shape)
        parts = self._parts(path, role, form, outputs)
        if parts > 1:
            cut = (groups * parts, outputs // parts, inputs)
            steps = (*steps, ("reshape", shape, cut))
            groups, outputs = cut[:2]
        bias = None
        if role.bias is not None and s.bias == "joint":
            column = _column(role.bias.view, (groups, outputs, 1))
            bias = Piece(self.paths[role.bias.leaf], column)
            inputs += 1
        block = Block(
            named(path, role),
            Piece(path, steps),
            bias,
            groups,
            outputs,
            inputs,
            "rows" if outputs > s.widest else "matrix",
            "diagonal" if isinstance(form, Lookup) else "rows" if inputs > s.widest else "matrix",
        )
        return Place(block, (member,), parts, factor(view))

    def _parts(self, path: str, role: Role, form: Form, outputs: int) -> int:
        """Return into how many blocks the outputs are cut."""
        parts = self.settings.parts(path, role.parts)
        if parts > 1 and (isinstance(form, Lookup) or outputs % parts):
            raise OptionError(
                f"{self.caller}: expected partition= to divide the {outputs} outputs of a layer, "
                f"got {parts}{at(path)}. A table has no partition; heads have one size."
            )
        return parts

    def ordered(self) -> list[Place]:
        """Return the places in the order of the parameters, by the first of several layers."""
        return [self.places[key] for key in sorted(self.places, key=min)]

    def separate(self, place: Place) -> Beside | None:
        """Return the block of the biases apart from their weights, if there are any."""
        if self.settings.bias != "separate":
            return None
        b, start = place.block, 0
        members, layers, names, outputs = [], [], [], []
        for member, layer in zip(place.members, b.layers, strict=True):
            bias = self.roles.weights[member[0]][member[1]].bias
            if bias is not None:
                path = self.paths[bias.leaf]
                column = _column(bias.view, (b.groups, layer.outputs, 1))
                members.append(member)
                layers.append(Layer(Piece(path, column), None, layer.outputs))
                names.append(named(path, bias))
                outputs += range(start, start + layer.outputs)
            start += layer.outputs
        if not members:
            return None
        many = len(outputs)
        form = "rows" if many > self.settings.widest else "matrix"
        block = Block(
            "+".join(names),
            layers[0].weight,
            None,
            b.groups,
            many,
            1,
            form,
            beside=tuple(layers[1:]),
        )
        return Beside(block, tuple(members), None if many == b.outputs else tuple(outputs))

    def blocks(self) -> list[Block]:
        """Return all blocks in the order of the parameters, biases behind their weights."""
        found = []
        for place in self.ordered():
            found.append(place.block)
            beside = self.separate(place)
            if beside is not None:
                found.append(beside.block)
        return found

    def rest(self) -> dict[str, Tensor]:
        """Return the diagonals of everything without a block, averaged over draws."""
        scale = 1.0 / self.settings.num_samples
        found = {}
        for i in sorted(self._rest):
            found[self.paths[i]] = self._rest[i] * scale if scale != 1 else self._rest[i]
        return found


def _column(view: View, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """Return the steps from a bias to a column of matrices."""
    size = shape[0] * shape[1]
    return (*steps_of(view, (size,)), ("reshape", (size,), shape))


def existing(caller: str, observed: Observed) -> Weights:
    """Return how often each position of a chunk's outputs counts as a row of the inputs.

    Raises:
        DataError: A position counts that is said not to exist.
    """
    counted, positions, given = observed.counted, observed.positions, observed.given
    mask = counted.mask
    if not counted.masked and positions is None and given is None:
        return Weights()
    if positions is None:
        exists = mask
    else:
        if concrete(mask, positions) and bool((mask & ~positions).any()):
            bad = (mask & ~positions).nonzero()[0].tolist()
            raise DataError(
                f"{caller}: expected positions to hold wherever the mask does, got a position that "
                f"counts and does not exist at {bad}. Positions are all places of the computation; "
                "the mask says which of them are scored."
            )
        exists = positions | mask
    live = mask.reshape(mask.shape[0], -1).any(-1).reshape(-1, *[1] * (mask.dim() - 1))
    dtype = counted.weights.dtype
    each = (exists & live).to(dtype)
    if given is not None:
        w = given.to(dtype)
        each = torch.where(exists & live, w.reshape(*w.shape, *[1] * (mask.dim() - w.dim())), 0.0)
    batch = mask.shape[0]
    return Weights(each.reshape(batch, -1), exists.to(dtype).reshape(batch, -1))
