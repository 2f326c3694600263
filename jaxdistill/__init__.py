"""Distillation at accelerator speed: data sets, pairs, flow teachers, vision-language models.

What a program wants is here, imported on first use: `import jaxdistill` alone imports no JAX.
"""

from jaxdistill.lazy import names

__version__ = "0.2.0"

__getattr__, __all__ = names(
    __name__,
    {
        "BatchSpec": "jaxdistill.method:BatchSpec",
        "InputError": "jaxdistill.errors:InputError",
        "Interrupted": "jaxdistill.errors:Interrupted",
        "Method": "jaxdistill.method:Method",
        "Recipe": "jaxdistill.task:Recipe",
        "charfn": "jaxdistill.condense.charfn",
        "condense": "jaxdistill.condense",
        "evaluate": "jaxdistill.experiment:evaluate",
        "export_distilled": "jaxdistill.io.exports:export",
        "export_student": "jaxdistill.students:export_student",
        "flow": "jaxdistill.flow",
        "hub": "jaxdistill.hub",
        "load_config": "jaxdistill.config:load",
        "load_data": "jaxdistill.data.sources:load",
        "load_distilled": "jaxdistill.io.artifact:load",
        "load_pairs": "jaxdistill.io.pairs:load",
        "load_student": "jaxdistill.students:load_student",
        "momentum": "jaxdistill.flow.momentum",
        "nn": "jaxdistill.nn",
        "pairs": "jaxdistill.pairs",
        "resident": "jaxdistill.data.device:resident",
        "run": "jaxdistill.runner:run",
        "train": "jaxdistill.experiment:train",
        "vlm": "jaxdistill.vlm",
    },
)


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
