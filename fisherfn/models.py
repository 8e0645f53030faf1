"""Modules as pure functions of their parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from fisherfn.core.errors import OptionError, TreeMismatchError, UnsupportedError
from fisherfn.core.substitution import Substitution, turn

#: A tree of tensors; for modules a flat dict from qualified name to tensor.
Params: TypeAlias = Any
Model: TypeAlias = Callable[[Params, Any, Any], Any]

_NOISY = (nn.modules.dropout._DropoutNd,)
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_BATCH_COUPLED = (nn.modules.batchnorm._BatchNorm,)


class FunctionalModel:
    """A module as a pure function `(params, buffers, inputs) -> outputs`.

    Made by `functional`. Inputs are a tensor, a tuple of positional arguments or a mapping of
    keyword arguments. The module itself is only read: it supplies the code, never the values.
    """

    def __init__(
        self,
        module: nn.Module,
        output: str | int | Callable[[Any], Any] | None,
        needed: Iterable[str] = (),
    ) -> None:
        """Wrap `module`; `output` picks what the likelihood sees of its result.

        Parameters whose names are `needed` must be given in every call.
        """
        self.module = module
        self.output = output
        self.needed = frozenset(needed)
        self._suspects = [
            (name, m) for name, m in module.named_modules() if _has_training_behaviour(m)
        ]
        self._renormed = [
            (name, m)
            for name, m in module.named_modules()
            if isinstance(m, _LOOKUPS) and m.max_norm is not None
        ]
        self._scripted = [
            name for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)
        ]
        # a traced module tells no signature
        scripted = isinstance(module, torch.jit.ScriptModule)
        accepts = () if scripted else inspect.signature(module.forward).parameters
        self._constants = {"use_cache": False} if "use_cache" in accepts else {}
        self._call = Substitution(module)
        self._named = _tensors(module)

    def __call__(self, params: Params, buffers: Any, inputs: Any) -> Any:
        """Run the module's forward with these parameters and buffers."""
        self._check_training()
        self._check_lookups()
        self._check_forward_mode()
        args, kwargs = _arguments(inputs)
        kwargs = {**self._constants, **kwargs}
        state = self._state(params, buffers)
        return _pick_output(self._call(state, args, kwargs), self.output)

    def _check_lookups(self) -> None:
        for name, m in self._renormed:
            if m.max_norm is not None:
                raise UnsupportedError(
                    f"functional: expected {type(m).__name__} to read its weight only, got "
                    f"max_norm={m.max_norm} at '{name}', which rescales rows as they are read. "
                    "Rescale the weight once, and set max_norm to None."
                )

    def _check_forward_mode(self) -> None:
        if self._scripted and forward_ad._current_level >= 0:
            # not one of our own errors: products take it as torch's, and go another way
            raise NotImplementedError(
                "functional: expected no forward-mode AD, got one through the scripted module at "
                f"'{self._scripted[0]}': TorchScript drops tangents after its first calls. Use "
                "the module that was scripted."
            )

    def __repr__(self) -> str:
        """Name the module's class."""
        return f"FunctionalModel({type(self.module).__name__})"

    def _state(self, params: Any, buffers: Any) -> dict[str, Tensor]:
        for what, tree in (("params", params), ("buffers", buffers)):
            if not isinstance(tree, Mapping):
                raise TreeMismatchError(
                    f"functional: expected {what} to be a mapping from names to tensors, got "
                    f"{type(tree).__name__}. Pass what functional() returned, or a dict like it."
                )
        state = {**buffers, **params}
        if torch.compiler.is_dynamo_compiling():
            return state
        if not state.keys() <= self._named.keys():
            self._named = _tensors(self.module)  # it may have grown since
        self._check_state(state)
        return state

    def _check_state(self, state: dict[str, Tensor]) -> None:
        for name, t in state.items():
            if name not in self._named:
                raise TreeMismatchError(
                    "functional: expected names of parameters and buffers of "
                    f"{type(self.module).__name__}, got '{name}'. Nothing would read it; names "
                    f"look like '{next(iter(self._named), '')}'."
                )
            shape = self._named[name]
            if isinstance(t, Tensor) and t.shape != shape:
                raise TreeMismatchError(
                    f"functional: expected a tensor of shape {tuple(shape)}, got "
                    f"{tuple(t.shape)} at '{name}'. Pass what functional() returned, or tensors "
                    "like them; map ensembles with torch.vmap."
                )
        for name in sorted(self.needed - state.keys()):
            raise TreeMismatchError(
                f"functional: expected a tensor for every parameter, got none at '{name}'. Nothing "
                "is read from the module itself; to differentiate by some parameters alone, use "
                "functional(module, select=...)."
            )

    def _check_training(self) -> None:
        for name, module in self._suspects:
            if module.training:
                raise UnsupportedError(
                    f"functional: expected {type(module).__name__} in evaluation mode, got "
                    f"training mode at '{name}'. Its output is random or depends on the other "
                    "examples, so no per-example score exists; call module.eval() first."
                )


def functional(
    module: nn.Module,
    *,
    select: str | Callable[[str, Tensor], bool] | None = None,
    output: str | int | Callable[[Any], Any] | None = None,
) -> tuple[FunctionalModel, dict[str, Tensor], dict[str, Tensor]]:
    """Split a module into a pure function, its parameters and everything else it reads.

    Tied parameters appear once, under their first name. Parameters that do not require gradients,
    or that `select` leaves out, become constants: they are found among the buffers.

    Args:
        module: Any `nn.Module`, Hugging Face models included (their output object is reduced to the
            tensor that the likelihood needs).
        select: Which parameters to differentiate by: a regular expression searched in the qualified
            name, or a predicate `(name, tensor) -> bool`. All, by default.
        output: What of the module's result is the output: a key or index, or a function of the
            result. By default a tensor is taken as it is, and an output object gives its `logits`.

    Returns:
        `(model, params, buffers)`: the function `model(params, buffers, inputs)`, and two flat
        dicts from qualified name to (detached) tensor, sharing memory with the module.

    Raises:
        OptionError: `module` is no module, or `select` chooses nothing or is no regular expression.
        UnsupportedError: a selected parameter is not a floating-point tensor, or one of a lazy
            module has no shape yet.

    Example:
        >>> model, params, buffers = functional(nn.Linear(3, 2))
        >>> list(params), model(params, buffers, params["weight"]).shape
        (['weight', 'bias'], torch.Size([2, 2]))
    """
    if not isinstance(module, nn.Module):
        raise OptionError(
            f"functional: expected an nn.Module, got {type(module).__name__}. A plain function "
            "(params, buffers, inputs) -> outputs needs no conversion: pass it to the estimator."
        )
    chosen = _selector(select)
    params: dict[str, Tensor] = {}
    with turn(module):  # another thread may be running it
        named = list(module.named_parameters())
        held = list(module.named_buffers())
    for name, t in (*named, *held):
        if is_lazy(t):
            raise UnsupportedError(
                f"functional: expected parameters that have a shape, got none yet at '{name}' "
                f"({type(t).__name__}). Run one batch through the module first."
            )
    buffers: dict[str, Tensor] = {k: b.detach() for k, b in held}
    for name, p in named:
        wanted = chosen(name, p)
        explicit = select is not None and wanted
        if wanted and (p.requires_grad or (explicit and not p.is_floating_point())):
            if not p.is_floating_point():
                raise UnsupportedError(
                    f"functional: expected floating-point parameters, got {p.dtype} at '{name}'. "
                    "Leave it out with select=."
                )
            params[name] = p.detach()
        else:
            buffers[name] = p.detach()
    if not params:
        names = [name for name, _ in named]
        raise OptionError(
            f"functional: expected select= to leave at least one trainable parameter, got none of "
            f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). "
            "Change select=, or set requires_grad on the parameters you want."
        )
    return FunctionalModel(module, output, params), params, buffers


def _selector(
    select: str | Callable[[str, Tensor], bool] | None,
) -> Callable[[str, Tensor], bool]:
    if select is None:
        return lambda name, p: True
    if isinstance(select, str):
        try:
            pattern = re.compile(select)
        except re.error as error:
            raise OptionError(
                f"functional: expected select= to be a regular expression, got {select!r} "
                f"({error}). "
                "Escape special characters with re.escape."
            ) from None
        return lambda name, p: pattern.search(name) is not None
    if callable(select):
        return lambda name, p: bool(select(name, p))
    raise OptionError(
        f"functional: expected select= to be a regular expression or a predicate, got "
        f"{type(select).__name__}. Use for example select=r'attn' or select=lambda name, p: "
        "p.dim() > 1."
    )


def _has_training_behaviour(module: nn.Module) -> bool:
    if isinstance(module, _NOISY):
        return float(getattr(module, "p", 0.0)) > 0
    if isinstance(module, _BATCH_COUPLED):
        return True
    rate = getattr(module, "dropout", 0.0)
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and float(rate) > 0


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return tuple(inputs), {}
    return (inputs,), {}


def _pick_output(out: Any, output: str | int | Callable[[Any], Any] | None) -> Any:
    if output is None:
        if isinstance(out, Tensor) or not (isinstance(out, Mapping) or hasattr(out, "logits")):
            return out
        if "logits" in _names(out):
            return out["logits"] if isinstance(out, Mapping) else out.logits
        raise OptionError(
            f"functional: expected a tensor or an output object with logits, got "
            f"{type(out).__name__} with {', '.join(_names(out)) or 'no fields'}. "
            "Say what the likelihood sees with output=, a key or a function of the result."
        )
    if callable(output):
        return output(out)
    try:
        return out[output]
    except (KeyError, IndexError, TypeError) as error:
        raise OptionError(
            f"functional: expected the model's result to have {output!r}, got "
            f"{type(out).__name__} with {', '.join(_names(out)) or 'no fields'}. Change output=."
        ) from error


def _tensors(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of parameters and buffers, under all names of those that are tied."""
    with turn(module):
        found = {n: p.shape for n, p in module.named_parameters(remove_duplicate=False)}
        return found | {n: b.shape for n, b in module.named_buffers(remove_duplicate=False)}


def _names(out: Any) -> list[str]:
    keys: Iterable[Any] = out.keys() if isinstance(out, Mapping) else vars(out)
    return [str(k) for k in keys]
