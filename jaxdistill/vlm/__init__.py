"""Large language and vision-language models into small ones."""

from jaxdistill.lazy import submodules

__getattr__, __all__ = submodules(__name__, __path__)
