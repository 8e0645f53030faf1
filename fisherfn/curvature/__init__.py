"""Representations of Fisher information matrices, with one algebra."""

from fisherfn.curvature.base import Curvature, Result
from fisherfn.curvature.block_diagonal import BlockDiagonal
from fisherfn.curvature.dense import Dense
from fisherfn.curvature.diagonal import Diagonal
from fisherfn.curvature.grouped import Grouped
from fisherfn.curvature.layout import Layout, layer_groups, leaf_groups
from fisherfn.curvature.moments import GradientMoments

__all__ = [
    "BlockDiagonal",
    "Curvature",
    "Dense",
    "Diagonal",
    "GradientMoments",
    "Grouped",
    "Layout",
    "Result",
    "layer_groups",
    "leaf_groups",
]
