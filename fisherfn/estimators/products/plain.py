"""The model as a function that can be differentiated forward, backward and in batches.

Fused attention has no forward-mode derivative, no second derivative and no batched pull-back;
inside a product its plain formula takes its place, and so for embeddings, whose two derivatives
differ. What makes outputs random is refused, and what the model computes under `torch.no_grad` is a
constant to the forward mode too, as it is to the reverse mode.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fisherfn.capture.plain import PlainAttention
from fisherfn.core import trees
from fisherfn.core.errors import OptionError, TreeMismatchError, at
from fisherfn.estimators.products.lookups import REWRITTEN
from fisherfn.layers.composing import ALWAYS, COMPOSED

#: Tensors in, tensors out: what is differentiated.
Function: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
Select: TypeAlias = "str | Callable[[str, Tensor], bool] | None"


class Plain(PlainAttention):
    """Runs a model with plain attention, without randomness.

    Attributes:
        rewritten: What takes the place of other functions; more where results have to compose.
    """

    def __init__(self, *, compose: bool = False) -> None:
        """Rewrite what has no usable derivative, or, to `compose`, no second or third one."""
        super().__init__()
        self.rewritten = REWRITTEN | ALWAYS | (COMPOSED if compose else {})

    def other(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that is not attention, or what takes its place."""
        function = self.rewritten.get(function, function)
        if not torch.is_grad_enabled() and forward_ad._is_fwd_grad_enabled():
            # no_grad does not reach the forward mode; without this J and its transpose would differ
            with forward_ad._set_fwd_grad_enabled(False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Chosen:
    """The parameters that a product is about, and the way between them and the whole tree.

    Attributes:
        params: The whole tree.
        indices: Which of its leaves are differentiated by.
        paths: Their paths.
        whole: Whether that is all of them; then trees are like params, else dicts by path.
    """

    params: Any
    indices: tuple[int, ...]
    paths: tuple[str, ...]
    whole: bool

    @staticmethod
    def of(caller: str, params: Any, select: Select) -> Chosen:
        """Choose the leaves of `params` that `select` names."""
        paths, leaves = trees.paths(params), trees.leaves(params)
        if select is None:
            return Chosen(params, tuple(range(len(leaves))), tuple(paths), True)
        wanted = [
            re.search(select, path) is not None if isinstance(select, str) else select(path, leaf)
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        indices = tuple(i for i, chosen in enumerate(wanted) if chosen)
        if not indices:
            raise OptionError(
                f"{caller}: expected select= to choose at least one parameter, got none of "
                f"{len(paths)} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}). "
                "Change select=."
            )
        return Chosen(params, indices, tuple(paths[i] for i in indices), False)

    @property
    def leaves(self) -> list[Tensor]:
        """The chosen tensors."""
        every = trees.leaves(self.params)
        return [every[i] for i in self.indices]

    @property
    def template(self) -> Any:
        """The tree that tangents and results are like."""
        return self.params if self.whole else dict(zip(self.paths, self.leaves, strict=True))

    def restore(self, leaves: Sequence[Any]) -> Any:
        """Return a tree like `template` with these leaves."""
        if self.whole:
            return trees.unflatten(trees.structure(self.params), leaves)
        return dict(zip(self.paths, leaves, strict=True))

    def filled(self, leaves: Sequence[Tensor]) -> Any:
        """Return the whole tree of parameters with these in the place of the chosen ones."""
        every = trees.leaves(self.params)
        for index, leaf in zip(self.indices, leaves, strict=True):
            every[index] = leaf
        return trees.unflatten(trees.structure(self.params), every)

    def vectors(
        self, caller: str, tree: Any, name: str = "tangents", lead: tuple[int, ...] = ()
    ) -> list[Tensor]:
        """Return the leaves of a tree of vectors, checked, in the dtypes of the parameters."""
        template = self.template
        like_name = "params" if self.whole else "the selected params"
        if lead:
            like_name = f"{like_name} with a leading axis"
            meta = trees.map(lambda p: torch.empty((*lead, *p.shape), device="meta"), template)
        else:
            meta = template
        trees.check_like(caller, name, tree, meta, like_name=like_name)
        found = trees.leaves(trees.map(lambda _, t: t, template, tree))
        ready = []
        for path, t, p in zip(self.paths, found, self.leaves, strict=True):
            if not t.is_floating_point():
                raise TreeMismatchError(
                    f"{caller}: expected floating-point {name}, got {t.dtype}{at(path)}. Convert "
                    "them with .to(torch.float32)."
                )
            ready.append(t.to(p.device, p.dtype))
        return ready


def check_select(caller: str, select: Any) -> None:
    """Raise unless `select` is None, a regular expression or a predicate."""
    if isinstance(select, str):
        try:
            re.compile(select)
        except re.error as error:
            raise OptionError(
                f"{caller}: expected select= to be a regular expression, got {select!r} ({error}). "
                "Escape special characters with re.escape."
            ) from None
    elif select is not None and not (callable(select) and not inspect.isclass(select)):
        raise OptionError(
            f"{caller}: expected select= to be a regular expression or a predicate, got "
            f"{type(select).__name__}. Use for example select=r'head' or "
            "select=lambda path, tensor: tensor.dim() > 1."
        )


class Flat:
    """The outputs of a model as a list of tensors, as a function of the chosen parameters."""

    def __init__(
        self,
        model: Any,
        chosen: Chosen,
        buffers: Any,
        inputs: Any,
        check: Callable[[Any], None],
        *,
        compose: bool,
    ) -> None:
        """Fix everything but the chosen parameters; `check` sees the outputs first."""
        self._compose = compose
        self.model, self.chosen, self._check = model, chosen, check
        self._buffers, self._inputs = buffers, inputs
        self.structure: Any = None

    def __call__(self, leaves: list[Tensor]) -> list[Tensor]:
        """Run the model."""
        with torch.enable_grad(), Plain(compose=self._compose):
            outputs = self.model(self.chosen.filled(leaves), self._buffers, self._inputs)
        self._check(outputs)
        found, self.structure = trees.flatten(outputs)
        return found

    def restore(self, leaves: Sequence[Any]) -> Any:
        """Return a tree like the outputs."""
        return trees.unflatten(self.structure, leaves)
