"""Saving results, states and trees of tensors, loading exactly what was saved, and offloading.

Every representation and every state can be saved, whatever kind is added later: a file holds their
fields. Text in the header of a file says what it is (`describe`). `offload` keeps things in CPU
memory in a narrow dtype, and `fetch` brings them back.

To store less, compute less: `ff.functional(module, select="layers.0")` leaves out parameters before
the backward pass, `ff.grouped` sums over channels and heads without forming the diagonal.
"""

from fisherfn.io.files import describe, load, save
from fisherfn.io.offload import Offloaded, fetch, offload
from fisherfn.io.registry import register

__all__ = ["Offloaded", "describe", "fetch", "load", "offload", "register", "save"]
