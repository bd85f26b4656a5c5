"""Versions of PPF and of what its results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Name → version of PPF, Python and the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("ppf", "torch", "transformers", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree that was never installed
            found[name] = "unknown"
    return found
