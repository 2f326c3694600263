"""Class-incremental learning: what distilled images are worth as a memory of classes gone by.

    jaxdistill --config=continual:dataset=fashion_mnist --workdir=runs/continual

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    method=     dm (default), or another of `ncfm`
    baselines=  rows beside it, joined by +: random+herding (default); empty for none
    ipc=        images of each class in the memory (10)
    groups=     groups that the classes come in (5)
    orders=     orders of the classes (5)
    smoke       a run of seconds that only shows that everything works

After each group a fresh network is trained on the memory alone and classifies the test images of
all classes met; see `jaxdistill.eval.continual`. Rows whose making has looked at all classes at
once, by trained extractors or by what their images compete for, are called so in the table.

    config                              hardware     accuracy to expect
    continual:dataset=digits            2 CPU cores, 5 minutes; 97.7 ± 0.3, the
                                        average of the groups (docs/downstream.md)
    every other                         2 CPU cores or an accelerator; not run here to its end
"""

from jaxdistill import config as configs


def get_config(argument=None, dataset=None, method=None):
    """The recipe of a data set, a memory and groups of classes."""
    arg = configs.parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        method="dm",
        baselines="random+herding",
        ipc=10,
        groups=5,
        orders=5,
        seed=0,
    )
    method = arg["method"] if method is None else method
    config = configs.based(f"ncfm:method={method}", arg, dataset, "baselines", "ipc")
    judged = config.evals.accuracy
    config.evals = {
        "continual": {
            "name": "continual",
            "groups": 2 if arg["smoke"] else arg["groups"],
            "orders": 2 if arg["smoke"] else arg["orders"],
            "depth": judged.depth,
            # A quarter of the published width, which is a tenth of the work.
            "width": judged.get("width", 32),
            "epochs": judged.epochs,
            "strategy": judged.strategy,
        }
    }
    return config
