"""Saving results, states and trees of tensors, loading exactly what was saved, and offloading.

Every representation and every state can be saved, whatever kind is added later: a file holds their
fields. Text in the header of a file says what it is (`describe`).
"""

from fisherfn.io.files import describe, load, save
from fisherfn.io.registry import register

__all__ = ["describe", "load", "register", "save"]
