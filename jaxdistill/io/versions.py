"""Versions of what is installed, and what it runs on, as records of a run name them."""

import importlib.metadata
import os
import platform

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxdistill")


def versions() -> dict[str, str | int]:
    """Versions of Python and of the installed libraries that decide a result, and the machine."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    """The model of the processor, which seconds on CPUs are to be read with."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            models = [line for line in lines if line.startswith("model name")]
    except OSError:  # no Linux
        models = []
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    return f"{model or platform.machine()}, {os.cpu_count()} threads"
