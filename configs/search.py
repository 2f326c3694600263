"""Architecture search: does a small set rank networks as the real images do?

    jaxdistill --config=search:dataset=fashion_mnist --workdir=runs/search

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    method=     dm (default), or another of `ncfm`
    baselines=  rows beside it, joined by +: random+herding (default); empty for none
    ipc=        images of each class (10)
    holdout=    training images of each class that networks are judged by (500, of digits 40)
    smoke       a run of seconds that only shows that everything works

72 ConvNets are trained on each set and on real images; see `jaxdistill.eval.search`. No test image
is looked at: a choice is made here.

    config                             hardware     what to expect
    search:dataset=fashion_mnist       2 CPU cores, hours; not run here to its end
    every other                        2 CPU cores or an accelerator; not run here to its end
"""

from jaxdistill import config as configs


def get_config(argument=None, dataset=None, method=None):
    """The recipe of a data set, a small set and a space."""
    arg = configs.parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        method="dm",
        baselines="random+herding",
        ipc=10,
        holdout=0,
        seed=0,
    )
    method = arg["method"] if method is None else method
    config = configs.based(f"ncfm:method={method}", arg, dataset, "baselines", "ipc")
    few = 40 if config.data.name == "digits" else 500
    config.data.holdout_per_class = arg["holdout"] or few
    judged = config.evals.accuracy
    config.evals = {
        "search": {
            "name": "search",
            "strategy": judged.strategy,
            # As deep as the images allow, and one less.
            "depths": (judged.depth - 1, judged.depth),
        }
    }
    if arg["smoke"]:
        config.evals.search.update(
            {
                "widths": (4, 6, 8),
                "depths": (1,),
                "norms": ("none",),
                "activations": ("relu",),
                "pools": ("avg",),
                "epochs": 4,
                "real_images": 64,
                "real_epochs": 2,
            }
        )
    return config
