"""What modules say about their parameters: the type of the module that owns one decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fisherfn.groups.heads import heads
from fisherfn.groups.spec import GroupSpec, channels, elements, rows

Shape = tuple[int, ...]
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OUT_FIRST = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Owners:
    """Which module owns each parameter, and within which module it sits."""

    def __init__(self, *modules: nn.Module) -> None:
        """Walk through modules, of which the first that has a name is asked.

        Tied parameters are found under each of their names.
        """
        self._found: dict[str, tuple[nn.Module, str, nn.Module | None, nn.Parameter]] = {}
        for module in reversed(modules):
            self._walk(module)

    def _walk(self, module: nn.Module) -> None:
        modules = dict(module.named_modules(remove_duplicate=False))
        for prefix, owner in modules.items():
            parent = modules.get(prefix.rpartition(".")[0]) if prefix else None
            own = owner.named_parameters(recurse=False, remove_duplicate=False)
            for name, p in own:
                self._found[f"{prefix}.{name}" if prefix else name] = (owner, name, parent, p)

    def __contains__(self, path: str) -> bool:
        """Return whether there is a parameter of this name."""
        return path in self._found

    def shape(self, path: str) -> Shape | None:
        """Return the shape of the module's own parameter, None if it has none yet."""
        p = self._found[path][3]
        return None if isinstance(p, nn.UninitializedParameter) else tuple(p.shape)

    def owner(self, path: str) -> str:
        """Return the class name of the module that owns a parameter."""
        return type(self._found[path][0]).__name__

    def spec(self, path: str, shape: Shape) -> GroupSpec | None:
        """Return the spec of a parameter, None if its module is not known."""
        owner, name, parent, _ = self._found[path]
        if isinstance(owner, _NORMS):
            return elements(shape)
        if len(shape) < 2:
            return None
        if name == "weight":
            if isinstance(owner, nn.Linear) and _is_output_of_attention(owner, parent):
                assert isinstance(parent, nn.MultiheadAttention)
                return heads(shape, parent.num_heads, axis=1)
            if isinstance(owner, _OUT_FIRST):
                return channels(shape)
            if isinstance(owner, _TRANSPOSED):
                return channels(shape, axis=1, blocks=owner.groups)
            if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
                return rows(shape)
            if _is_conv1d(owner):
                return channels(shape, axis=1)
        if isinstance(owner, nn.MultiheadAttention):
            return _attention(owner, name, shape)
        if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
            return channels(shape)
        return None


def _attention(owner: nn.MultiheadAttention, name: str, shape: Shape) -> GroupSpec | None:
    makers: dict[str, Callable[[], GroupSpec]] = {
        "in_proj_weight": lambda: heads(shape, owner.num_heads, layout="qkv"),
        "q_proj_weight": lambda: heads(shape, owner.num_heads),
        "k_proj_weight": lambda: heads(shape, owner.num_heads),
        "v_proj_weight": lambda: heads(shape, owner.num_heads),
        "bias_k": lambda: elements(shape),
        "bias_v": lambda: elements(shape),
    }
    return makers[name]() if name in makers else None


def _is_output_of_attention(owner: nn.Module, parent: nn.Module | None) -> bool:
    return isinstance(parent, nn.MultiheadAttention) and parent.out_proj is owner


def _is_conv1d(module: Any) -> bool:
    """Return whether this is Hugging Face's `Conv1D`, a linear layer with a transposed weight."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
