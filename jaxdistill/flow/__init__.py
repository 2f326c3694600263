"""Flow and diffusion teachers into students of few steps."""

from jaxdistill.lazy import submodules

__getattr__, __all__ = submodules(__name__, __path__)
