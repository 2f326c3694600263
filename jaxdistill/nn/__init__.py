"""Networks: the only modules of the package that import `flax.linen`."""

from jaxdistill.lazy import submodules

__getattr__, __all__ = submodules(__name__, __path__)
