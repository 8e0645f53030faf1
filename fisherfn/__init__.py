"""Fisher information of neural networks, as pure functions on `torch.func`.

>>> import torch
>>> import fisherfn as ff
>>> model, params, buffers = ff.functional(torch.nn.Linear(3, 2))
>>> params["bias"] = torch.zeros(2)
>>> batch = ff.Batch(torch.zeros(4, 3))
>>> F = ff.diagonal(model, ff.likelihoods.categorical())(params, buffers, batch)
>>> F.values["bias"]
tensor([0.2500, 0.2500])
"""

import importlib
from typing import Any

from fisherfn import distributed as distributed
from fisherfn import groups as groups
from fisherfn import io as io
from fisherfn import likelihoods as likelihoods
from fisherfn import linalg as linalg
from fisherfn import optim as optim
from fisherfn import states as states
from fisherfn import tasks as tasks
from fisherfn.batch import Batch as Batch
from fisherfn.batch import causal_batch as causal_batch
from fisherfn.capture.public import Capture as Capture
from fisherfn.capture.public import Site as Site
from fisherfn.capture.public import capture as capture
from fisherfn.core import random as random
from fisherfn.core import trees
from fisherfn.core.errors import DataError as DataError
from fisherfn.core.errors import FisherError as FisherError
from fisherfn.core.errors import NotPositiveDefiniteError as NotPositiveDefiniteError
from fisherfn.core.errors import OptionError as OptionError
from fisherfn.core.errors import ShapeError as ShapeError
from fisherfn.core.errors import TreeMismatchError as TreeMismatchError
from fisherfn.core.errors import UnsupportedError as UnsupportedError
from fisherfn.core.merging import empty_like as empty_like
from fisherfn.core.merging import merge as merge
from fisherfn.curvature import EKFAC as EKFAC
from fisherfn.curvature import KFAC as KFAC
from fisherfn.curvature import BlockDiagonal as BlockDiagonal
from fisherfn.curvature import Dense as Dense
from fisherfn.curvature import Diagonal as Diagonal
from fisherfn.curvature import GradientMoments as GradientMoments
from fisherfn.curvature import Grouped as Grouped
from fisherfn.curvature import Implicit as Implicit
from fisherfn.curvature import LowRank as LowRank
from fisherfn.estimators.dense import block_diagonal as block_diagonal
from fisherfn.estimators.dense import dense as dense
from fisherfn.estimators.diagonal import diagonal as diagonal
from fisherfn.estimators.ekfac import ekfac as ekfac
from fisherfn.estimators.explain import explain as explain
from fisherfn.estimators.gram import gram_spectrum as gram_spectrum
from fisherfn.estimators.grouped import grouped as grouped
from fisherfn.estimators.hessian import hessian_diagonal as hessian_diagonal
from fisherfn.estimators.hessian import hessian_trace as hessian_trace
from fisherfn.estimators.hessian import hvp as hvp
from fisherfn.estimators.jacobian import by_layer as by_layer
from fisherfn.estimators.jacobian import finite_difference_vp as finite_difference_vp
from fisherfn.estimators.jacobian import layer_statistics as layer_statistics
from fisherfn.estimators.jacobian import output_jacobian as output_jacobian
from fisherfn.estimators.jacobian import output_jvp as output_jvp
from fisherfn.estimators.jacobian import output_vjp as output_vjp
from fisherfn.estimators.kfac import kfac as kfac
from fisherfn.estimators.low_rank import low_rank as low_rank
from fisherfn.estimators.moments import gradient_moments as gradient_moments
from fisherfn.estimators.per_sample import per_sample_gradients as per_sample_gradients
from fisherfn.estimators.per_sample import score_gram as score_gram
from fisherfn.estimators.per_sample import score_norms as score_norms
from fisherfn.estimators.products.fisher import empirical_vp as empirical_vp
from fisherfn.estimators.products.fisher import fisher_vp as fisher_vp
from fisherfn.estimators.products.fisher import ggn_vp as ggn_vp
from fisherfn.estimators.products.implicit import implicit as implicit
from fisherfn.estimators.products.linearized import linearized as linearized
from fisherfn.estimators.together import statistics as statistics
from fisherfn.estimators.trace import empirical_fisher_trace as empirical_fisher_trace
from fisherfn.estimators.trace import generalized_fisher_trace as generalized_fisher_trace
from fisherfn.estimators.trace import trace as trace
from fisherfn.layers.registry import register_rule as register_rule
from fisherfn.linalg.results import Estimate as Estimate
from fisherfn.linalg.results import Solution as Solution
from fisherfn.models import functional as functional

tree = trees


def __getattr__(name: str) -> Any:
    """Import `fisherfn.testing`, which needs Hypothesis, when it is asked for."""
    if name != "testing":
        raise AttributeError(f"module 'fisherfn' has no attribute {name!r}")
    return importlib.import_module("fisherfn.testing")
