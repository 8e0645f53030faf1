"""Where there is no forward mode: what says so, and when reverse mode twice may take its place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fisherfn.core.errors import FisherError, UnsupportedError

_LOG = logging.getLogger(__name__)

FORWARD = "forward mode"
DOUBLE = "reverse mode twice"
# The last: under autocast torch's rules for norms give tangents of another dtype than the values. A
# model with such a mistake of its own raises again where reverse mode runs it.
_SAYS = ("forward ad", "forward mode ad", "forward-mode ad", "jvp", "to have the same dtype")


def no_forward_mode(error: Exception, *, compose: bool = False) -> str:
    """Return why there is no forward-mode derivative, or raise the error if that is not it.

    Args:
        error: What the forward mode raised.
        compose: The result has to compose. There a custom function may lose its own backward
            without a word, so it needs a forward mode.

    Returns:
        The reason.

    Raises:
        UnsupportedError: a custom function that would have to compose.
    """
    text = str(error)
    known = isinstance(error, (NotImplementedError, RuntimeError))
    if isinstance(error, FisherError) or not known or not any(s in text.lower() for s in _SAYS):
        raise error
    reason = text.split("\n")[0].split(". ")[0]
    if compose and "autograd.function" in text.lower():
        raise UnsupportedError(
            "fisher_vp: expected a model with a forward mode inside torch.compile, torch.vmap and "
            "torch.func, got an autograd.Function without jvp. Give it setup_context and jvp "
            "staticmethods, or call the product outside of the transformation."
        ) from error
    _LOG.info("no forward-mode derivative, using %s: %s", DOUBLE, reason)
    return reason


def no_derivative(error: Exception | str, reason: str) -> UnsupportedError:
    """Return the error that says why there is neither of the two derivatives."""
    first = f" ({reason})" if reason else ""
    return UnsupportedError(
        f"fisher_vp: expected a model that can be differentiated forward, or backward twice, got "
        f"neither{first}: {str(error).splitlines()[0]}. Write the operation with plain torch "
        "operations, or leave its parameters out with select=."
    )


def check_twice(tensors: Sequence[Tensor | None], reason: str) -> None:
    """Raise if a backward pass was recorded that cannot be differentiated.

    autograd ends the graph of such a pass in a node that raises when it is reached. It is not
    reached where nothing wanted lies behind it, and the derivative then looks like zero.

    Args:
        tensors: What the backward pass has computed.
        reason: Why there is no forward mode.

    Raises:
        UnsupportedError: the graph has such a node.
    """
    waiting: list[Any] = [t.grad_fn for t in tensors if t is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().split("::")[-1] in ("Error", "DelayedError"):
            error = no_derivative("a backward marked with once_differentiable", reason)
            raise UnsupportedError(str(error))
        waiting.extend(following for following, _ in node.next_functions)
