"""Versions of what took part in a result."""

from __future__ import annotations

import importlib.metadata
import platform


def version(package: str) -> str:
    """Return the version of an installed package, or "unknown" (a source tree on the path)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    packages = ("fisherfn", "torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
