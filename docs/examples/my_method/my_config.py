"""The digits by a method outside the package, beside real images chosen at random.

    PYTHONPATH=docs/examples/my_method jaxdistill \
        --config=docs/examples/my_method/my_config.py --workdir=runs/mine

A minute on two CPU cores.
"""

import ml_collections


def get_config(argument=None):
    """Two images a class; every setting that is not said here has its default."""
    del argument
    config = ml_collections.ConfigDict()
    config.family = "condense"
    config.data = {"name": "digits"}
    config.method = {"name": "my_method", "ipc": 2}
    config.baselines = {"random": {"name": "random", "ipc": 2}}
    config.evals = {"accuracy": {"name": "classify", "depth": 2, "epochs": 100, "seeds": 2}}
    return config
