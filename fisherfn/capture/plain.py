"""Running a model with the plain formula of attention in the place of the fused one.

Fused attention has no forward-mode derivative, no second derivative and no batching rule: under
`vmap` torch goes through it example by example, and says so in a warning.
"""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from fisherfn.capture.sites import is_attention, refuse_noise, rewritten
from fisherfn.layers import attention
from fisherfn.layers.bag import composable


class PlainAttention(TorchFunctionMode):
    """Rewrites calls of attention, and refuses what makes outputs random."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one call, or what takes its place."""
        return self.call(func, *args, **(kwargs or {}))

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one call, or what takes its place."""
        arguments = rewritten(function, args, kwargs)
        if arguments is not None:
            return attention.multi_head_attention(self.call, arguments)
        if is_attention(function):
            return attention.plain_attention(*args, **kwargs)
        refuse_noise(function, args, kwargs)
        return self.other(function, args, kwargs)

    def other(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run any other call."""
        return composable(function, args, kwargs)(*args, **kwargs)
