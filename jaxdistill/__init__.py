"""Distillation at accelerator speed: data sets, flow teachers and vision-language models."""

import importlib

__version__ = "0.1.0"

# Pure mathematics that other programs take alone: `from jaxdistill import charfn`.
_ALONE = {"charfn": "jaxdistill.condense.charfn", "momentum": "jaxdistill.flow.momentum"}


def __getattr__(name: str):
    """Imports on first use: the package itself brings in nothing."""
    if name in _ALONE:
        return importlib.import_module(_ALONE[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
