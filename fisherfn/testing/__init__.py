"""Hypothesis strategies and reusable laws, for testing estimators and models of one's own.

Needs the extra `fisherfn[testing]`.
"""

from fisherfn.testing.laws import (
    LAWS,
    assert_close,
    batch_order,
    batch_split,
    chunk_size,
    compiled,
    derivative,
    duplication,
    ensemble,
    padded_examples,
    padded_positions,
    purity,
)
from fisherfn.testing.members import ESTIMATORS, Member
from fisherfn.testing.problem import Problem, join, pad_examples, pad_positions, take
from fisherfn.testing.strategies import (
    batches,
    keys,
    likelihoods,
    logits,
    masks,
    models,
    params,
    problems,
    shapes,
    tensors,
    trees,
    weights,
)

__all__ = [
    "ESTIMATORS",
    "LAWS",
    "Member",
    "Problem",
    "assert_close",
    "batch_order",
    "batch_split",
    "batches",
    "chunk_size",
    "compiled",
    "derivative",
    "duplication",
    "ensemble",
    "join",
    "keys",
    "likelihoods",
    "logits",
    "masks",
    "models",
    "pad_examples",
    "pad_positions",
    "padded_examples",
    "padded_positions",
    "params",
    "problems",
    "purity",
    "shapes",
    "take",
    "tensors",
    "trees",
    "weights",
]
