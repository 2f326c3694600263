"""Images with sentences, distilled into a few pairs by matching covariances.

    jaxdistill --config=pairs:dataset=fashion_mnist,pairs=100 --workdir=runs/pairs

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist or another labelled set, whose images stand in
                grids of four with a sentence that says what is where; or the path of a folder
                with images and captions.jsonl
    method=     covariance (default), random, herding, k_center
    pairs=      how many pairs there are to be (100)
    baselines=  rows beside it, joined by +: random+herding (default), k_center, texts, soft; empty
                for none
    smoke       a run of seconds that only shows that everything works

Row `texts` is covariance matching that leaves its images as they are, and solves for their texts
alone, and `soft` covariance matching whose pairs say how far each text matches each image. Fresh
towers are trained on every row and on all pairs; see `jaxdistill.eval.retrieval`.

    config                  hardware
    pairs:dataset=digits    2 CPU cores, not run here to its end
    every other             2 CPU cores or an accelerator, not run here to its end
"""

import ml_collections

from jaxdistill.config import parse_argument

_CHOSEN = ("random", "herding", "k_center")


def get_config(argument=None, dataset=None, method=None):
    """The recipe of a data set and a number of pairs."""
    arg = parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        method="covariance",
        pairs=100,
        baselines="random+herding",
        seed=0,
    )
    # What the command line says of data and method goes before the argument.
    dataset = arg["dataset"] if dataset is None else dataset
    method = arg["method"] if method is None else method

    config = ml_collections.ConfigDict()
    config.family = "pairs"
    config.seed = arg["seed"]

    config.data = ml_collections.ConfigDict()
    config.data.name = dataset
    # The images of a folder may be of any size.
    config.data.image_size = 32 if dataset not in ("digits", "fashion_mnist") else None

    config.text = ml_collections.ConfigDict()
    config.observer = ml_collections.ConfigDict()

    config.run = ml_collections.ConfigDict()
    config.run.microbatch = 100

    rows = {
        "covariance": {"name": "covariance", "pairs": arg["pairs"]},
        "texts": {"name": "covariance", "pairs": arg["pairs"], "steps": 1},
        "soft": {"name": "covariance", "pairs": arg["pairs"], "soft": True},
        **{name: {"name": name, "pairs": arg["pairs"]} for name in _CHOSEN},
    }
    config.method = ml_collections.ConfigDict(rows.get(method, {"name": method}))
    config.baselines = ml_collections.ConfigDict(sort_keys=False)
    for name in filter(None, arg["baselines"].split("+")):
        config.baselines[name] = ml_collections.ConfigDict(rows.get(name, {"name": name}))

    config.evals = ml_collections.ConfigDict()
    config.evals.retrieval = ml_collections.ConfigDict()
    config.evals.retrieval.name = "retrieval"

    if arg["smoke"]:
        config.data.train, config.data.validation, config.data.test = 60, 20, 20
        config.text.dim = 64
        config.observer.size, config.observer.steps = 2, 2
        config.observer.depth = config.evals.retrieval.depth = 2
        config.observer.width = config.evals.retrieval.width = 8
        config.observer.dim = config.evals.retrieval.dim = 16
        for row in (config.method, *config.baselines.values()):
            row.pairs = min(row.get("pairs", 8), 8)
            if row.name == "covariance":
                row.steps = min(row.get("steps", 3), 3)
        config.evals.retrieval.steps, config.evals.retrieval.seeds = 3, 1
    return config
