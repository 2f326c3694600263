"""Kernel regression: FRePo, and KIP beside it, on any data set.

    jaxdistill --config=kernel:dataset=fashion_mnist,ipc=1 --workdir=runs/kernel1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    ipc=        images per class
    baselines=  rows beside it, joined by +: random+herding (default), kip, and those of `ncfm`;
                empty for none
    smoke       a run of seconds that only shows that everything works

The row `kip` has the tangent kernel of a network of infinite width. Data, networks and evaluation
are those of `ncfm`; there is a column for networks that are regressed on labels, the learned ones
or, of rows without, hard ones.

    config                             hardware     accuracy to expect
    every                              2 CPU cores or an accelerator; not run here to its end
"""

from jaxdistill import config as configs


def get_config(argument=None, dataset=None):
    """The recipe of a data set and a number of images per class."""
    own = {"ipc": 1, "baselines": "random+herding"}
    return configs.derived("ncfm:method=kernel", argument, dataset, **own)
