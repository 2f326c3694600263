"""Every method that makes a small data set, beside each other under one protocol.

    jaxdistill --config=leaderboard:dataset=fashion_mnist,ipc=1 --workdir=runs/leaderboard1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    ipc=        images per class
    smoke       a run of two minutes that only shows that everything works

The rows are those of `ncfm`, each as its own config has it, and RDED. All are judged by the same
networks, under hard labels first; DATM's soft labels and those of kernel regression are columns of
their own. Steps are those of the recipes, not equal seconds: `benchmarks/leaderboard.py` gives all
methods the same.

    config                             hardware     accuracy to expect
    every                              2 CPU cores or an accelerator; not run here to its end
"""

from jaxdistill import config as configs

_ROWS = "dm+gradient+dc+trajectory+datm+kernel+kip+rded+herding+k_center+start+random"


def get_config(argument=None, dataset=None):
    """The recipes of a data set and a number of images per class."""
    return configs.derived(f"ncfm:baselines={_ROWS}", argument, dataset, ipc=1)
