"""Versions of what is installed, as records of a run name them."""

import importlib.metadata
import platform

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxdistill")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
