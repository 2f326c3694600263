"""Data-set distillation: many images into a few."""

from jaxdistill.lazy import submodules

__getattr__, __all__ = submodules(__name__, __path__)
