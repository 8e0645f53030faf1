"""Representations of Fisher information matrices, with one algebra."""

from fisherfn.curvature.base import Curvature, Result
from fisherfn.curvature.block_diagonal import BlockDiagonal
from fisherfn.curvature.dense import Dense
from fisherfn.curvature.diagonal import Diagonal
from fisherfn.curvature.ekfac import EKFAC
from fisherfn.curvature.grouped import Grouped
from fisherfn.curvature.implicit import Implicit
from fisherfn.curvature.kfac import KFAC
from fisherfn.curvature.layout import Layout, layer_groups, leaf_groups
from fisherfn.curvature.low_rank import LowRank
from fisherfn.curvature.moments import GradientMoments

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Curvature",
    "Dense",
    "Diagonal",
    "GradientMoments",
    "Grouped",
    "Implicit",
    "Layout",
    "LowRank",
    "Result",
    "layer_groups",
    "leaf_groups",
]
