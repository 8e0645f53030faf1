"""Optimizers made of curvature: pure pairs `init` / `update`, which chain with torchopt's."""

from fisherfn.optim.damping import Jeffreys, LevenbergMarquardt, jeffreys, levenberg_marquardt
from fisherfn.optim.inverse import Inverse, invert
from fisherfn.optim.natural_gradient import NaturalGradientState, natural_gradient
from fisherfn.optim.scale_by_fisher import ScaleByFisherState, scale_by_fisher
from fisherfn.optim.sharding import sharded_inverse
from fisherfn.optim.stream import CurvatureState
from fisherfn.optim.transform import GradientTransform, apply_updates, chain

__all__ = [
    "CurvatureState",
    "GradientTransform",
    "Inverse",
    "Jeffreys",
    "LevenbergMarquardt",
    "NaturalGradientState",
    "ScaleByFisherState",
    "apply_updates",
    "chain",
    "invert",
    "jeffreys",
    "levenberg_marquardt",
    "natural_gradient",
    "scale_by_fisher",
    "sharded_inverse",
]
