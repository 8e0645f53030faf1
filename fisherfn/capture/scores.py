"""From cotangents to the scores of every parameter, one parameter at a time.

As soon as the backward has passed all uses of a parameter, its scores are handed over in factored
form and its cotangents can be freed; parameters on the general path follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fisherfn.capture import general
from fisherfn.capture.engines import Receiver, Run, needs_composition, size_of, start
from fisherfn.capture.plan import Plan
from fisherfn.capture.tape import forms_of
from fisherfn.core import trees
from fisherfn.core.dtypes import wide
from fisherfn.core.modes import transformed
from fisherfn.layers.direct import Direct
from fisherfn.layers.form import Form
from fisherfn.layers.leaf import LeafScores
from fisherfn.layers.memo import Budget, Memo
from fisherfn.layers.views import View

#: Takes the index of a parameter and its scores for the columns that were pulled back.
Consumer: TypeAlias = Callable[[int, LeafScores], None]

# Bytes of patches of inputs that are kept from one column to the next.
_KEPT = 64 * 2**20


class Captured:
    """A forward of a model on some examples, ready to give scores for any cotangents."""

    def __init__(
        self, model: Any, params: Any, buffers: Any, inputs: Any, plan: Plan, *, plain: bool
    ) -> None:
        """Run the forward; `plain` says that several columns will be pulled back together."""
        self.arguments = (model, params, buffers, inputs)
        self.plan = plan
        self.batch = size_of(inputs)
        self.leaves = trees.leaves(params)
        self.composed = transformed() or needs_composition(params, buffers, inputs)
        self.run: Run = start(model, params, buffers, inputs, plan, plain=plain)
        self._memos: list[Memo] = []
        self._expected = [0] * len(self.leaves)
        for tap in plan.taps:
            for use in tap.uses:
                self._expected[use.leaf] += 1

    @property
    def outputs(self) -> Any:
        """What the model returned."""
        return self.run.outputs

    def scores(
        self, cotangents: Any, consume: Consumer, *, last: bool = True, more: bool = False
    ) -> None:
        """Pull back cotangents `[K, *outputs]` and hand every parameter's scores to `consume`.

        `last` promises that this forward is not needed again; `more` says that columns are to
        follow, so that it is worth keeping what depends on the inputs alone.
        """
        if more and not self.composed and not self._memos:
            budget = Budget(_KEPT)
            self._memos = [Memo(budget) for _ in self.plan.taps]
        self.pull_only(cotangents, consume, last=last)
        self._general(cotangents, consume)
        for leaf in self.plan.unused:
            t = wide(self.leaves[leaf])
            columns = trees.leaves(cotangents)[0].shape[0]
            zero = t.new_zeros(()).expand(columns, self.batch, *t.shape)
            consume(leaf, LeafScores(((Direct(zero), ()),), tuple(t.shape)))

    def pull_only(self, cotangents: Any, consume: Consumer, *, last: bool = True) -> None:
        """Like `scores`, for the captured parameters alone."""
        columns = trees.leaves(cotangents)[0].shape[0]
        self.run.pull(cotangents, self._receiver(consume, columns if last else None), last=last)

    def _receiver(self, consume: Consumer, columns: int | None = None) -> Receiver:
        """Return what turns the cotangents of taps into scores of parameters.

        After `columns` cotangents, if that is known, the inputs of a tap are let go.
        """
        waiting: dict[int, list[tuple[Form, View]]] = {}
        arrived = [0] * len(self.leaves)
        left = [columns or 0] * len(self.plan.taps)

        def receive(index: int, g: Tensor) -> None:
            tap, kept = self.plan.taps[index], self.run.kept[index]
            left[index] -= g.shape[0]
            if columns is not None and not left[index]:
                self.run.kept[index] = ()
            with _exact_arithmetic(self.composed, g):
                for leaf, form, view in forms_of(tap, kept, g, self.batch):
                    if self._memos:
                        form = form.remembering(self._memos[index])
                    waiting.setdefault(leaf, []).append((form, view))
                    arrived[leaf] += 1
                    if arrived[leaf] == self._expected[leaf]:
                        arrived[leaf] = 0
                        shape = tuple(self.leaves[leaf].shape)
                        consume(leaf, LeafScores.of(waiting.pop(leaf), shape))

        return receive

    def inputs_only(self, consume: Consumer) -> None:
        """Hand over the captured parameters' forms with cotangents of zero; nothing is pulled."""
        receive = self._receiver(consume)
        for index in range(len(self.plan.taps)):
            receive(index, self.run.zero_cotangent(index))

    def _general(self, cotangents: Any, consume: Consumer) -> None:
        if not self.plan.general:
            return
        leaves = sorted(self.plan.general)
        found = general.scores(*self.arguments, cotangents, leaves, looped=self.plan.looped)
        for leaf, d in zip(leaves, found, strict=True):
            with _exact_arithmetic(self.composed, d):
                shape = tuple(self.leaves[leaf].shape)
                consume(leaf, LeafScores(((Direct(wide(d)), ()),), shape))


def _exact_arithmetic(composed: bool, like: Tensor) -> AbstractContextManager[None]:
    """No autocast in contractions, and no graph unless the result must be differentiable."""
    record = composed and torch.is_grad_enabled()
    device = like.device.type
    if torch.is_grad_enabled() == record and not torch.is_autocast_enabled(device):
        return nullcontext()  # as it is already, and entering costs as much as a small layer
    return _arithmetic(device, record)


@contextmanager
def _arithmetic(device: str, record: bool) -> Iterator[None]:
    with torch.autocast(device, enabled=False), torch.set_grad_enabled(record):
        yield
