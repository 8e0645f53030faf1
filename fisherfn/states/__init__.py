"""States: what a computation remembers between steps, as tuples of tensors."""

from fisherfn.states.accumulate import AccumulateState, accumulate

__all__ = ["AccumulateState", "accumulate"]
