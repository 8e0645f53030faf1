"""What statistics about Kronecker blocks share: who is who, and which rows exist."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfn.capture.plan import Plan
from fisherfn.core import trees
from fisherfn.core.errors import DataError, OptionError
from fisherfn.core.modes import concrete
from fisherfn.curvature.common import at
from fisherfn.curvature.kronecker import Block, Piece
from fisherfn.estimators.kronecker_roles import Role, Roles, steps_of
from fisherfn.estimators.observe import Observed
from fisherfn.estimators.statistic import Statistic
from fisherfn.layers.form import Form
from fisherfn.layers.kronecker import Weights
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.views import View, factor, with_plain_sizes


@dataclass(frozen=True)
class Settings:
    """The options of a Kronecker estimator that decide what is accumulated."""

    approx: str = "expand"
    bias: str = "joint"
    widest: int = 8192
    partition: tuple[tuple[str, int], ...] = ()
    fisher: str = "exact"
    num_samples: int = 1

    @property
    def reduce(self) -> bool:
        """Whether rows of an example are put together first."""
        return self.approx == "reduce"


@dataclass(frozen=True)
class Place:
    """What is static about one use of a weight: its block, and how its forms are read."""

    block: Block
    leaf: int
    number: int
    parts: int
    factor: float

    @property
    def joint(self) -> bool:
        """Whether the inputs get a column of ones, for the bias."""
        return self.block.bias is not None


class KroneckerStatistic(Statistic):
    """Base of the statistics about Kronecker blocks: who is who among the parameters."""

    def __init__(self, settings: Settings) -> None:
        """Start empty."""
        self.settings = settings
        self.paths: list[str] = []
        self.leaves: list[Tensor] = []
        self.roles = Roles({}, frozenset())
        self.places: dict[tuple[int, int], Place] = {}
        self._rest: dict[int, Tensor] = {}
        self._waiting: dict[int, LeafScores] = {}

    def begin(self, params: Any) -> None:
        """Learn paths and shapes."""
        self.paths, self.leaves = trees.paths(params), trees.leaves(params)
        for path, _ in self.settings.partition:
            if path not in self.paths:
                raise OptionError(
                    f"kfac: expected partition= to name weights among {self.paths}, got {path!r}. "
                    "Use the paths of ff.tree.paths(params)."
                )

    def plan(self, plan: Plan) -> None:
        """Learn which parameters have blocks."""
        self.roles = Roles.of(plan, self.leaves)

    def take(self, leaf: int, scores: LeafScores, root_weights: Tensor) -> None:
        """Hand the uses of a weight on; add squares of what has no block."""
        if leaf in self.roles.weights:
            for form, view in scores.uses:
                place = self._place(leaf, form, view)
                self.take_block(place, form)
        elif leaf not in self.roles.biases or self.settings.bias == "diagonal":
            self._rest[leaf] = scores.square_sum(self._rest.get(leaf))
        elif self.settings.bias == "separate":
            self._waiting[leaf] = scores

    @abstractmethod
    def take_block(self, place: Place, form: Form) -> None:
        """Receive the scores of one block."""

    def take_bias(self, place: Place, scores: Tensor) -> None:
        """Receive the scores `[K, B, R, O]` of a bias that has a block of its own."""
        return

    def end_pull(self) -> None:
        """Hand on the biases, now that the blocks of their weights are known."""
        waiting, self._waiting = self._waiting, {}
        for place in self.ordered():
            role = self.roles.weights[place.leaf][place.number]
            if role.bias is None or role.bias[0] not in waiting:
                continue
            b, leaf = place.block, role.bias[0]
            steps = _column(role.bias[1], (b.groups, b.outputs, 1))
            part = Piece(self.paths[leaf], steps)
            scores = waiting[leaf].scores()
            self.take_bias(place, torch.func.vmap(torch.func.vmap(part.take))(scores)[..., 0])

    def _place(self, leaf: int, form: Form, view: View) -> Place:
        role = self.roles.role(leaf, view)
        key = leaf, role.number or 0
        if key not in self.places:
            self.places[key] = self._new_place(leaf, role, form, view)
        return self.places[key]

    def _new_place(self, leaf: int, role: Role, form: Form, view: View) -> Place:
        path, s = self.paths[leaf], self.settings
        name = path if role.number is None else f"{path}[{role.number}]"
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
            other, bias_view = role.bias
            column = (groups, outputs, 1)
            bias = Piece(self.paths[other], _column(bias_view, column))
            inputs += 1
        block = Block(
            name,
            Piece(path, steps),
            bias,
            groups,
            outputs,
            inputs,
            "rows" if outputs > s.widest else "matrix",
            "diagonal" if isinstance(form, Lookup) else "rows" if inputs > s.widest else "matrix",
        )
        return Place(block, leaf, role.number or 0, parts, factor(view))

    def _parts(self, path: str, role: Role, form: Form, outputs: int) -> int:
        """Return into how many blocks the outputs are cut."""
        parts = dict(self.settings.partition).get(path, role.parts)
        if parts > 1 and (isinstance(form, Lookup) or outputs % parts):
            raise OptionError(
                f"kfac: expected partition= to divide the {outputs} outputs of a layer, got "
                f"{parts}{at(path)}. A table has no partition; heads have one size."
            )
        return parts

    def ordered(self) -> list[Place]:
        """Return the places in the order of the parameters."""
        return [self.places[key] for key in sorted(self.places)]

    def separate(self, place: Place) -> Block | None:
        """Return the block of a bias apart from its weight, if it has one."""
        if self.settings.bias != "separate":
            return None
        role = self.roles.weights[place.leaf][place.number]
        if role.bias is None:
            return None
        other, view = role.bias
        b = place.block
        column = (b.groups, b.outputs, 1)
        path = self.paths[other]
        name = path if role.number is None else f"{path}[{role.number}]"
        return Block(name, Piece(path, _column(view, column)), None, *column, b.output_form)

    def blocks(self) -> list[Block]:
        """Return all blocks in the order of the parameters, biases behind their weights."""
        found = []
        for place in self.ordered():
            found.append(place.block)
            beside = self.separate(place)
            if beside is not None:
                found.append(beside)
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


def existing(observed: Observed) -> Weights:
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
                f"kfac: expected positions to hold wherever the mask does, got a position that "
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
