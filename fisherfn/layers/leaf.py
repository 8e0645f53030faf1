"""All that a batch says about one parameter: the sum of its uses' scores.

A parameter that is used in several places has one score, the sum over the places, and it is the sum
that is squared. Uses of one form are joined; slices that do not overlap stay apart; a table that is
both looked up and multiplied by (a tied embedding) has a closed form; everything else adds the
scores of a few examples at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.layers.form import Form
from fisherfn.layers.lookup import Lookup
from fisherfn.layers.numerics import accumulate, blocks, sum_of_squares
from fisherfn.layers.outer import Outer
from fisherfn.layers.views import Reshape, View, disjoint, factor, pull


@dataclass(frozen=True)
class LeafScores:
    """Scores of one parameter, as `(form, view)` for each place where it is used."""

    uses: tuple[tuple[Form, View], ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(uses: list[tuple[Form, View]], shape: tuple[int, ...]) -> LeafScores:
        """Join the uses that have a common form."""
        joined: list[tuple[Form, View]] = []
        for form, view in uses:
            for position, (other, other_view) in enumerate(joined):
                both = other.joined(form) if view == other_view else None
                if both is not None:
                    joined[position] = (both, view)
                    break
            else:
                joined.append((form, view))
        return LeafScores(tuple(joined), shape)

    @staticmethod
    def stacked(chunks: Sequence[LeafScores]) -> LeafScores:
        """Put the scores of several chunks of examples behind each other."""
        first = chunks[0]
        if len(chunks) == 1:
            return first
        uses = []
        for i, (form, view) in enumerate(first.uses):
            uses.append((form.followed_by([c.uses[i][0] for c in chunks[1:]]), view))
        return LeafScores(tuple(uses), first.shape)

    @property
    def columns(self) -> int:
        """K."""
        return self.uses[0][0].columns

    @property
    def batch(self) -> int:
        """B."""
        return self.uses[0][0].batch

    @property
    def score_bytes(self) -> int:
        """Bytes of the score of one example, all columns."""
        size = self.columns * self.uses[0][0].sample().element_size()
        for n in self.shape:
            size *= n
        return size

    def scores(self) -> Tensor:
        """Return the scores, `[K, B, *shape]`."""
        terms = [pull(view, form.scores(), lead=2) for form, view in self.uses]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total.reshape(self.columns, self.batch, *self.shape)

    def square_sum(self, total: Tensor | None = None) -> Tensor:
        """Return `total` plus the sum over columns and examples of squared scores, `[*shape]`."""
        if len(self.uses) == 1 and not self.uses[0][1]:
            return self.uses[0][0].square_sum(total)
        if len(self.uses) == 1 and self._only_reshaped():
            form, view = self.uses[0]
            seed = None if total is None else total.reshape(form.shape)
            return pull(view, form.square_sum(seed), power=2)
        if self.separate():
            for form, view in self.uses:
                total = accumulate(total, pull(view, form.square_sum(), power=2))
        elif (pair := self.tied()) is not None:
            outer, lookup = pair
            flat = None if total is None else total.unsqueeze(0)
            total = outer.square_sum(flat)[0]
            own = (lookup.g * lookup.gathered()).sum(0)
            total = lookup.scatter(own + 2.0 * self.tied_products().sum(0), total)
        else:
            for part in self._parts():
                s = part.scores()
                total = accumulate(total, sum_of_squares(s))
        assert total is not None
        return total

    def sum(self) -> Tensor:
        """Return the sum over columns and examples of the scores, `[*shape]`."""
        total = None
        for form, view in self.uses:
            total = accumulate(total, pull(view, form.sum(), power=1).reshape(self.shape))
        assert total is not None
        return total

    def norms(self) -> Tensor:
        """Return squared norms, `[K, B]`."""
        if self.separate():
            total = None
            for form, view in self.uses:
                total = accumulate(total, form.norms() * factor(view) ** 2)
            assert total is not None
            return total
        if (pair := self.tied()) is not None:
            cross = self.tied_products().sum((-1, -2))
            return pair[0].norms() + pair[1].norms() + 2.0 * cross
        found = []
        for part in self._parts():
            s = part.scores().flatten(2)
            found.append((s * s).sum(-1))
        return torch.cat(found, dim=1)

    def gram(self) -> Tensor:
        """Return inner products of all pairs of examples, summed over columns, `[B, B]`."""
        if self.separate():
            total = None
            for form, view in self.uses:
                total = accumulate(total, form.gram() * factor(view) ** 2)
            assert total is not None
            return total
        if (pair := self.tied()) is not None:
            return self._tied_gram(*pair)
        rows = self.scores().transpose(0, 1).reshape(self.batch, -1)
        return rows @ rows.T

    def scaled(self, weight: Tensor) -> LeafScores:
        """Return the scores times `weight`, `[B]`."""
        return LeafScores(tuple((f.scaled(weight), v) for f, v in self.uses), self.shape)

    def part(self, start: int, stop: int) -> LeafScores:
        """Return the examples `start` to `stop`."""
        return LeafScores(tuple((f.part(start, stop), v) for f, v in self.uses), self.shape)

    def multiplications(self) -> int:
        """Return the multiplications of `square_sum`."""
        return sum(form.multiplications() for form, _ in self.uses)

    def _parts(self) -> Iterator[LeafScores]:
        like = self.uses[0][0].sample()
        for start, stop in blocks(self.batch, self.score_bytes, like):
            yield self.part(start, stop)

    def _only_reshaped(self) -> bool:
        return all(isinstance(step, Reshape) for step in self.uses[0][1])

    def separate(self) -> bool:
        """Whether no entry of the parameter is used in two places."""
        views = [view for _, view in self.uses]
        return all(disjoint(views[i], views[j]) for i in range(len(views)) for j in range(i))

    def tied(self) -> tuple[Outer, Lookup] | None:
        """Return both uses of a table that is looked up and multiplied by, or None."""
        if len(self.uses) != 2:
            return None
        (a, va), (b, vb) = self.uses
        if isinstance(a, Lookup):
            (a, va), (b, vb) = (b, vb), (a, va)
        if not (isinstance(a, Outer) and isinstance(b, Lookup)) or vb or a.shape[0] != 1:
            return None
        return (a, b) if len(va) == 1 and self._flat(va) else None

    def _flat(self, view: View) -> bool:
        return isinstance(view[0], Reshape) and view[0].source == self.shape

    def tied_products(self) -> Tensor:
        """Return `g_t ⊙ score_outer[index_t]`, `[K, B, T, D]`, for those rows only."""
        pair = self.tied()
        assert pair is not None
        outer, lookup = pair
        g = outer.g[:, :, 0]
        index = lookup.index.unsqueeze(1).expand(-1, g.shape[2], -1)
        picked = torch.gather(g, 3, index.expand(g.shape[0], *index.shape))
        return lookup.g * (picked.transpose(-1, -2) @ outer.a[:, 0])

    def _tied_gram(self, outer: Outer, lookup: Lookup) -> Tensor:
        b, t = lookup.index.shape
        flat = lookup.index.reshape(-1)
        cross = []
        for c in range(b):
            # rows of c's dense score at the indices of every example
            picked = outer.g[:, c, 0].index_select(-1, flat)
            rows = (picked.transpose(-1, -2) @ outer.a[c, 0]).reshape(-1, b, t, outer.shape[2])
            cross.append((rows * lookup.g).sum((0, 2, 3)))
        both = torch.stack(cross)
        return outer.gram() + lookup.gram() + both + both.T
