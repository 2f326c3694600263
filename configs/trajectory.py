"""Trajectory matching: MTT, and DATM's growing window, on any data set.

    jaxdistill --config=trajectory:dataset=fashion_mnist,ipc=1 --workdir=runs/trajectory1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    ipc=        images per class
    baselines=  rows beside it, joined by +: random+herding (default), datm, and those of `ncfm`;
                empty for none
    smoke       a run of seconds that only shows that everything works

The row `datm` learns soft labels too; its column has what the trained extractors say for the rows
without. Experts are trained first and kept in `experts/`; other runs find them there by
`--config.method.expert_dir`. Data, networks and evaluation are those of `ncfm`.

    config                               hardware
    trajectory:dataset=digits,ipc=1      2 CPU cores, minutes; not run here to its end
    every other                          2 CPU cores or an accelerator; not run here to its end
"""

from jaxdistill import config as configs


def get_config(argument=None, dataset=None):
    """The recipe of a data set and a number of images per class."""
    own = {"ipc": 1, "baselines": "random+herding"}
    return configs.derived("ncfm:method=trajectory", argument, dataset, **own)
