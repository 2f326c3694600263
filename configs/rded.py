"""RDED: crops of real images that an observer finds easy; nothing is learned but the observer.

    jaxdistill --config=rded:dataset=fashion_mnist,ipc=10 --workdir=runs/rded10

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, mnist, cifar10, cifar100, tiny_imagenet,
                imagenette, imagenet, any other TFDS name, or a path: an image folder, IDX folder
                or .npz
    ipc=        images per class (10)
    baselines=  rows beside it, joined by +: random+cropped+hardest+medium (default); empty for none
    smoke       a run of seconds that only shows that everything works

Rows: `random` are whole images, `cropped` random crops of random images, `hardest` and `medium` the
crops that the observer finds so. All are trained on under hard labels, under one soft label an
image, and under the observer's labels of every view; see `jaxdistill.eval.relabel`.

    config                              hardware     accuracy: hard labels, the observer's
    rded:dataset=fashion_mnist,ipc=1    2 CPU cores  56.6 ± 3.0, 73.9 ± 2.3
    rded:dataset=fashion_mnist,ipc=10   2 CPU cores  70.4 ± 3.9, 81.9 ± 0.5
    rded:dataset=fashion_mnist,ipc=50   2 CPU cores  78.2 ± 0.4, 83.2 ± 0.1, after 100 epochs
    rded:dataset=digits                 2 CPU cores  run, not measured
    every other data set                accelerator  not run here
"""

import ml_collections

from jaxdistill.config import parse_argument

# On two CPU cores.
_SMALL = {
    "microbatch": 64,
    "width": 32,
    "depth": 3,
    "epochs": 3,
    "batch_size": 64,
    "learning_rate": 0.02,
    "strategy": "color_crop_flip_scale_rotate",
    "image_size": None,
    "placement": "resident",
    "network": "convnet",
    "factor": 1,
}
# On accelerators; from 128 pixels four crops make an image.
_LARGE = _SMALL | {
    "microbatch": 512,
    "width": 128,
    "epochs": 60,
    "batch_size": 128,
    "learning_rate": 0.01,
}
_RECIPES = {
    "digits": _SMALL | {"depth": 2, "epochs": 30, "strategy": "color_crop_rotate"},
    "cifar10": _LARGE,
    "cifar100": _LARGE,
    "tiny_imagenet": _LARGE | {"image_size": 64, "depth": 4},
    "imagenette/160px-v2": _LARGE | {"image_size": 128, "depth": 5, "factor": 2},
    "imagenet2012": _LARGE
    | {
        "image_size": 224,
        "placement": "streamed",
        "network": "resnet18_large",
        "microbatch": 250,
        "factor": 2,
    },
}
_TFDS = {"imagenette": "imagenette/160px-v2", "imagenet": "imagenet2012"}
# Images a step while students are trained; twice as many from a hundred classes on.
_BATCH = {1: 10, 10: 50, 50: 100}


def get_config(argument=None, dataset=None):
    """The recipe of a data set and a number of images per class."""
    arg = parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        ipc=10,
        baselines="random+cropped+hardest+medium",
        seed=0,
    )
    # What the command line says of the data goes before the argument.
    dataset = arg["dataset"] if dataset is None else dataset
    dataset = _TFDS.get(dataset, dataset)
    recipe = _RECIPES.get(dataset, _SMALL)

    config = ml_collections.ConfigDict()
    config.family = "condense"
    config.seed = arg["seed"]

    config.data = ml_collections.ConfigDict()
    config.data.name = dataset
    config.data.image_size = recipe["image_size"]
    config.data.placement = recipe["placement"]

    # The observer is the first of the pool.
    config.extractor = ml_collections.ConfigDict()
    config.extractor.network = recipe["network"]
    config.extractor.depth = recipe["depth"]
    config.extractor.width = recipe["width"]

    config.pool = ml_collections.ConfigDict()
    config.pool.size = 1
    config.pool.epochs = recipe["epochs"]
    config.pool.batch_size = recipe["batch_size"]
    config.pool.learning_rate = recipe["learning_rate"]
    config.pool.strategy = recipe["strategy"]

    config.run = ml_collections.ConfigDict()
    config.run.microbatch = recipe["microbatch"]
    config.run.chunk = 1  # RDED is one step, and baselines have few

    chosen = {"name": "rded", "ipc": arg["ipc"], "factor": recipe["factor"]}
    rows = {
        "random": {"name": "random", "ipc": arg["ipc"]},
        "cropped": chosen | {"choice": "random", "num_crop": 1, "factor": 1},
        "hardest": chosen | {"choice": "hardest"},
        "medium": chosen | {"choice": "medium"},
    }
    config.method = ml_collections.ConfigDict(chosen)
    config.baselines = ml_collections.ConfigDict(sort_keys=False)
    for name in filter(None, arg["baselines"].split("+")):
        config.baselines[name] = ml_collections.ConfigDict(rows.get(name, {"name": name}))

    config.evals = ml_collections.ConfigDict()
    config.evals.accuracy = ml_collections.ConfigDict()
    config.evals.accuracy.name = "relabel"
    config.evals.accuracy.networks = (config.extractor.network,)
    config.evals.accuracy.depth = recipe["depth"]
    config.evals.accuracy.width = recipe["width"]
    config.evals.accuracy.labels = ("hard", "soft", "teacher")
    config.evals.accuracy.batch_size = _BATCH.get(arg["ipc"], 50)
    config.evals.accuracy.factor = recipe["factor"]

    if arg["smoke"]:
        config.extractor.width = config.evals.accuracy.width = 16
        config.pool.epochs = 3
        for row in (config.method, *config.baselines.values()):
            if row.name == "rded":
                row.mipc, row.least_accuracy = 24, 0.0
        config.evals.accuracy.epochs, config.evals.accuracy.seeds = 4, 1
        config.evals.accuracy.labels = ("hard", "teacher")
    return config
