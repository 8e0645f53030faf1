"""The weights of a model whose config and tokenizer are known."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fisherfn.app.errors import OutOfMemoryError, is_out_of_memory
from fisherfn.app.sources import Source, first_line, import_transformers
from fisherfn.core.errors import DataError, UnsupportedError


def load_weights(source: Source, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the model in evaluation mode on a device.

    Raises:
        DataError: The weights are incomplete, broken, or of other shapes than the config's.
        OutOfMemoryError: They do not fit.
    """
    transformers = import_transformers()
    try:
        with torch.random.fork_rng(devices=[]):  # missing weights are drawn, then refused
            module, info = transformers.AutoModelForCausalLM.from_pretrained(
                source.where, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(
                f"--model: the weights in {source.where} lack {', '.join(missing[:3])}{more}: the "
                "Fisher of values drawn at random says nothing. Save the whole model there."
            )
        return module.eval().to(device)
    except DataError:
        raise
    except Exception as error:
        _check_fits(error, source, device)
        what = f"cannot load the weights of {source.name}: {first_line(error)}"
        if Path(source.where).is_dir():
            raise DataError(
                f"--model: {what} The files in {source.where} may be broken."
            ) from error
        raise DataError(f"--model: {what} Check the network, or give a local directory.") from error


def _check_fits(error: Exception, source: Source, device: torch.device) -> None:
    """Say so if this is an error for want of memory."""
    if is_out_of_memory(error):
        raise OutOfMemoryError(
            f"--model: {source.name} does not fit into the memory of {device}. "
            "Use --dtype bfloat16, or --device cpu."
        ) from error


def check_causality(module: nn.Module, source: Source, device: torch.device) -> None:
    """Show the model two sequences that differ in the last token only.

    A causal model gives the same logits everywhere before it. An encoder saved under a causal name
    (BERT without `is_decoder`) does not, and its next-token Fisher would be a plausible wrong
    number.

    Raises:
        UnsupportedError: The logits before the last token differ.
        DataError: They are not finite.
        OutOfMemoryError: A pass over a few tokens does not fit.
    """
    length = min(8, source.context or 8)
    tokens = (torch.arange(length) + 1) % source.vocabulary
    other = tokens.clone()
    other[-1] = (other[-1] + 1) % source.vocabulary
    try:
        with torch.no_grad():
            inputs = torch.stack([tokens, other]).to(device)
            logits = module(inputs, use_cache=False).logits[:, :-1]
    except Exception as error:
        _check_fits(error, source, device)
        raise
    if not torch.isfinite(logits).all():
        raise DataError(
            f"--model: the logits of {source.name} are not finite in {logits.dtype}. "
            "Use --dtype float32 or bfloat16, or check the weights."
        )
    tolerance = 32 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if (logits[0] - logits[1]).abs().max() > tolerance:
        raise UnsupportedError(
            f"--model: {source.name} looks at later tokens (an encoder such as BERT, or is_decoder "
            "is not set in its config.json), so it does not predict the next one. Give a causal "
            "language model."
        )


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """Return a digest of names, shapes, dtypes and a thousand evenly spaced values of each tensor.

    It tells another model or a further training step from the same weights in a moment, whatever
    their size.
    """
    digest = hashlib.sha256()
    for name, value in params.items():
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1000)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return `{second name: first name}` of every parameter that has two: it is counted once."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied
