"""Gradient matching: DSA, and DC beside it, on any data set.

    jaxdistill --config=gradient:dataset=fashion_mnist,ipc=1 --workdir=runs/gradient1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    ipc=        images per class
    baselines=  rows beside it, joined by +: random+herding (default), dc, and those of `ncfm`;
                empty for none
    smoke       a run of seconds that only shows that everything works

The row `dc` is the same without augmentation. Data, networks and evaluation are those of `ncfm`. A
step is one change of the images; published are 1,000 times as many steps as images per class.

    config                             hardware     accuracy to expect (hard labels)
    gradient:dataset=digits,ipc=1      2 CPU cores, minutes; not run here to its end
    every other                        2 CPU cores or an accelerator; not run here to its end
"""

from jaxdistill import config as configs


def get_config(argument=None, dataset=None):
    """The recipe of a data set and a number of images per class."""
    own = {"ipc": 1, "baselines": "random+herding"}
    return configs.derived("ncfm:method=gradient", argument, dataset, **own)
