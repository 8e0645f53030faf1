"""Running a model with the plain formula of attention in the place of the fused one.

Fused attention has no forward-mode derivative, no second derivative and no batching rule: under
`vmap` torch goes through it example by example, and says so in a warning.
"""

from __future__ import annotations

from typing import Any

from fisherfn.capture.calls import CallMode, is_attention
from fisherfn.layers import attention
from fisherfn.layers.composing import composable


class PlainAttention(CallMode):
    """Rewrites calls whose derivatives do not compose; refuses what makes outputs random."""

    def admitted(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call, the plain formula where it is fused attention."""
        if is_attention(function):
            return attention.plain_attention(*args, **kwargs)
        return self.other(function, args, kwargs)

    def other(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run any other call."""
        return composable(function, args, kwargs)(*args, **kwargs)
