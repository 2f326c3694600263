"""Images with sentences into a few pairs of an image and a text."""

from jaxdistill.lazy import submodules

__getattr__, __all__ = submodules(__name__, __path__)
