"""Validation at the door of every estimator: options once, arguments at each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherfn.batch import Batch
from fisherfn.core import options, trees
from fisherfn.core.errors import (
    DataError,
    OptionError,
    ShapeError,
    TreeMismatchError,
    UnsupportedError,
)
from fisherfn.core.modes import concrete, is_dtensor
from fisherfn.estimators.observe import Labels

FISHERS = ("exact", "mc", "curvature_prop", "empirical")
UNITS = ("example", "position")


def check_options(
    caller: str, model: Any, fisher: Any, num_samples: Any, unit: Any, chunk_size: Any
) -> Labels:
    """Return the labels that the options ask for, or raise `OptionError`."""
    if isinstance(model, nn.Module) or not callable(model):
        raise OptionError(
            f"{caller}: expected a function (params, buffers, inputs) -> outputs, got "
            f"{type(model).__name__}. Use model, params, buffers = functional(module)."
        )
    if fisher not in FISHERS:
        raise OptionError(
            f"{caller}: expected fisher= to be one of {', '.join(map(repr, FISHERS))}, got "
            f"{fisher!r}. 'exact' is the Fisher information of the model itself."
        )
    if unit not in UNITS:
        raise OptionError(
            f"{caller}: expected unit= to be 'example' or 'position', got {unit!r}. A row of the "
            "batch is an example; its tokens or pixels are positions."
        )
    advice = "It is the number of draws of labels for each example."
    options.check_count(caller, "num_samples", num_samples, 1, advice)
    if num_samples > 1 and fisher in ("exact", "empirical"):
        raise OptionError(
            f"{caller}: expected num_samples=1 for fisher={fisher!r}, got {num_samples}. Nothing "
            "is drawn there; use fisher='mc' or 'curvature_prop'."
        )
    check_chunk_size(caller, chunk_size)
    return Labels(fisher, num_samples, unit)


def check_chunk_size(caller: str, chunk_size: Any) -> None:
    """Raise unless `chunk_size` is None or a positive integer."""
    advice = "It is the number of examples that are processed together."
    options.check_count(caller, "chunk_size", chunk_size, 1, advice, optional=True)


def check_key(caller: str, labels: Labels, key: Any) -> None:
    """Raise unless there is a key where labels are drawn."""
    if labels.fisher not in ("mc", "curvature_prop"):
        return
    options.check_key(caller, key, f"fisher={labels.fisher!r}", "labels")


def check_params(caller: str, params: Any) -> list[Tensor]:
    """Return the leaves of the parameters, or raise if one cannot be differentiated by."""
    leaves = trees.leaves(params)
    if not leaves:
        raise TreeMismatchError(
            f"{caller}: expected params with at least one tensor, got none. Pass what functional() "
            "returned."
        )
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise TreeMismatchError(
                f"{caller}: expected params to hold tensors, got {type(leaf).__name__} at "
                f"'{trees.paths(params)[i]}'. Constants belong into the buffers or the closure."
            )
        if is_dtensor(leaf):
            raise UnsupportedError(
                f"{caller}: expected whole parameters, got a DTensor at "
                f"'{trees.paths(params)[i]}'. Gather it with .full_tensor() for the estimate; "
                "ff.distributed says how FSDP2 and tensor parallelism are meant."
            )
        _check_values(caller, "params", params, i, leaf)
        if not leaf.is_floating_point():
            raise ShapeError(
                f"{caller}: expected floating-point params, got {leaf.dtype} at "
                f"'{trees.paths(params)[i]}'. Move it to the buffers: nothing can be "
                "differentiated by integers."
            )
    return leaves


def check_batch(caller: str, batch: Any) -> int:
    """Return B, or raise unless all parts of a batch have the examples as leading axis."""
    if not isinstance(batch, Batch):
        raise ShapeError(
            f"{caller}: expected a Batch, got {type(batch).__name__}. Wrap the data: "
            "Batch(inputs, targets=...)."
        )
    size = _check_inputs(caller, batch.inputs)
    for i, leaf in enumerate(trees.leaves(batch.targets)):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != size):
            raise ShapeError(
                f"{caller}: expected targets of {size} examples, got shape {tuple(leaf.shape)} at "
                f"{_place('targets', batch.targets, i)}. Give one target, or one row of targets, "
                "an example."
            )
    _check_bool(caller, "mask", batch.mask)
    _check_bool(caller, "positions", batch.positions)
    _check_weights(caller, batch.weights)
    _check_ids(caller, batch.ids, size)
    return size


def _check_inputs(caller: str, inputs: Any) -> int:
    """Return B, or raise unless all tensors among the inputs have the examples as leading axis."""
    size: int | None = None
    for i, leaf in enumerate(trees.leaves(inputs)):
        if not isinstance(leaf, Tensor):
            continue
        _check_values(caller, "inputs", inputs, i, leaf)
        if leaf.dim() == 0:
            raise ShapeError(
                f"{caller}: expected the examples as leading axis, got a scalar at "
                f"{_place('inputs', inputs, i)}. Put constants into the buffers."
            )
        if size is not None and leaf.shape[0] != size:
            raise ShapeError(
                f"{caller}: expected {size} examples, as before, got {leaf.shape[0]} at "
                f"{_place('inputs', inputs, i)}. Every tensor in a batch has the same leading "
                "axis; constants go into the buffers."
            )
        size = leaf.shape[0]
    if size is None:
        raise ShapeError(
            f"{caller}: expected a tensor among the inputs, got none. Give a tensor, a tuple or a "
            "mapping of tensors whose leading axis is the examples."
        )
    if size == 0:
        raise DataError(f"{caller}: expected at least one example, got an empty batch. Skip it.")
    return size


def _check_ids(caller: str, ids: Any, size: int) -> None:
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or tuple(ids.shape) != (size,):
        shown = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else None
        raise ShapeError(
            f"{caller}: expected ids to be int64 of shape ({size},), got "
            f"{shown or type(ids).__name__}. They name the examples; leave them out for 0, 1, 2, "
            "..."
        )


def _check_values(caller: str, name: str, tree: Any, leaf: int, t: Tensor) -> None:
    if t.device.type == "meta":
        raise UnsupportedError(
            f"{caller}: expected tensors with values, got one on the meta device at "
            f"{_place(name, tree, leaf)}. Load the values first: a shape has no Fisher information."
        )


def _place(name: str, tree: Any, leaf: int) -> str:
    path = trees.paths(tree)[leaf]
    return f"{name}['{path}']" if path else name


def _check_bool(caller: str, name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, Tensor) or value.dtype != torch.bool):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"{caller}: expected {name} to be a bool tensor, got {got}. Write {name} != 0 if it "
            "means that; multiplicities are weights."
        )


def _check_weights(caller: str, weights: Any) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise ShapeError(
            f"{caller}: expected weights to be a floating-point tensor, got {got}. Convert them "
            "with weights.float()."
        )
    if concrete(weights) and not bool(((weights >= 0) & weights.isfinite()).all()):
        bad = (~((weights >= 0) & weights.isfinite())).nonzero()[0].tolist()
        raise DataError(
            f"{caller}: expected finite weights of at least 0, got {weights[tuple(bad)].item():g} "
            f"at weights[{', '.join(map(str, bad))}]. Weights are multiplicities; leave examples "
            "out with the mask or with weight 0."
        )


def check_devices(caller: str, batch: Batch, outputs: Any, *, targets_count: bool) -> None:
    """Raise unless what a batch says of the outputs is where the outputs are."""
    device = trees.leaves(outputs)[0].device
    for name in ("mask", "weights", "positions", *(["targets"] if targets_count else [])):
        tree = getattr(batch, name)
        for i, leaf in enumerate(trees.leaves(tree)):
            if isinstance(leaf, Tensor) and leaf.device != device:
                raise ShapeError(
                    f"{caller}: expected tensors on {device}, as the outputs are, got one on "
                    f"{leaf.device} at {_place(name, tree, i)}. Move it to that device."
                )


def check_positions(caller: str, batch: Batch, shape: tuple[int, ...], unit: str) -> None:
    """Raise unless mask, positions and weights fit the shape of `log_prob`."""
    size = trees.leaves(batch.inputs)[0].shape[0]
    if not shape or shape[0] != size:
        raise ShapeError(
            f"{caller}: expected outputs of {size} examples, got log_prob of shape {shape}. The "
            "model must keep the examples as leading axis of its outputs."
        )
    for name, value in (("mask", batch.mask), ("positions", batch.positions)):
        if value is None:
            continue
        own = tuple(value.shape)
        fits = len(own) <= len(shape) and all(
            n in (1, m) for n, m in zip(own[::-1], shape[::-1], strict=False)
        )
        if not fits:
            raise ShapeError(
                f"{caller}: expected {name} to broadcast to the shape of log_prob, {shape}, got "
                f"{own}. Its axes are [B, *positions]; a mask of examples alone is mask[:, None]."
            )
    if batch.weights is None:
        return
    allowed = [shape[:1]] if unit == "example" else [shape[:1], shape]
    if tuple(batch.weights.shape) not in allowed:
        wanted = " or ".join(str(s) for s in dict.fromkeys(allowed))
        raise ShapeError(
            f"{caller}: expected weights of shape {wanted} for unit={unit!r}, got "
            f"{tuple(batch.weights.shape)}. A weight belongs to a unit; those of positions need "
            "unit='position'."
        )
