"""NCFM and its baselines on any data set.

    jaxdistill --config=ncfm:dataset=fashion_mnist,ipc=1 --workdir=runs/fashion1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, mnist, cifar10, cifar100, tiny_imagenet,
                imagenette, any other TFDS name, or a path: an image folder, IDX folder or .npz
    ipc=        images per class; recipes exist for 1, 10 and 50
    method=     ncfm (default), dm, gradient, dc, trajectory, datm, kernel, kip, rded,
                released, random, herding, k_center, start
    baselines=  rows beside it, joined by +: random+herding (default); empty for none
    sampler=    gaussian (default), learned, released: the distribution of NCFM's frequencies
    smoke       a run of seconds that only shows that everything works

Anything else is an override: `--config.method.calibration=1.0`. A path with a comma in it is given
as `--config.data.name=PATH`.

    config                              hardware     accuracy to expect (hard labels)
    ncfm:dataset=digits,ipc=1           2 CPU cores  90.2 ± 0.9
    ncfm:dataset=fashion_mnist,ipc=1    2 CPU cores  79.9 ± 0.1
    the same, --config.method.steps=2000  2 CPU cores  81.0 ± 0.4; 7 CPU minutes to distil
    ncfm:dataset=fashion_mnist,ipc=10   2 CPU cores  81.8 ± 0.2 after 100 epochs, not 300
    the same, --config.method.steps=2000  2 CPU cores  84.3 ± 0.1; 22 CPU minutes to distil
    every other data set, and ipc=50    accelerator  not run here
"""

import ml_collections

from jaxdistill.config import parse_argument

# On two CPU cores.
_SMALL = {
    "microbatch": 16,
    "chunk": 10,
    "checkpoint_every": 100,
    "batch_real": 64,
    "real_dtype": "float32",
    "num_freqs": 512,
    "pool_size": 4,
    "pool_epochs": 2,
    "pool_batch_size": 64,
    "pool_learning_rate": 0.02,
    "pool_strategy": "color_crop_flip_scale_rotate",
    "width": 64,
    "image_size": None,
    "depth": 3,
    "factor": 2,
    "learning_rate": 0.02,
    "calibration": 0.0,
    "strategy": "color_crop_cutout_flip_scale_rotate",
}
# On accelerators, which want large passes: the same number of pixels in each, whatever the size
# of the images. Batches of multiples of 64 are shared evenly by as many devices.
_LARGE = _SMALL | {
    "microbatch": 256,
    "chunk": 100,
    "checkpoint_every": 1000,
    "batch_real": 448,
    "real_dtype": "bfloat16",
    "num_freqs": 4096,
    "pool_size": 20,
    "pool_epochs": 60,
    "pool_batch_size": 128,
    "pool_learning_rate": 0.01,
    "width": 128,
    "steps": 20_000,
}
_DIGITS = _SMALL | {
    "depth": 2,
    "factor": 1,
    "steps": 300,
    "pool_epochs": 30,
    "pool_strategy": "color_crop_rotate",
    "strategy": "color_crop_cutout_scale_rotate",
}
_RECIPES = {
    "digits": _DIGITS,
    "mnist": _SMALL | {"learning_rate": 0.2, "strategy": "color_crop_cutout_scale_rotate"},
    "fashion_mnist": _SMALL | {"learning_rate": 0.2, "calibration": 10.0},
    "cifar10": _LARGE | {"batch_real": 1024},
    "cifar100": _LARGE,
    "tiny_imagenet": _LARGE | {"image_size": 64, "depth": 4, "microbatch": 64},
    "imagenette/160px-v2": _LARGE
    | {"image_size": 128, "depth": 5, "microbatch": 16, "batch_real": 512},
}
_TFDS = {"imagenette": "imagenette/160px-v2"}
# Where the recipe of a data set does not say; fewer steps for more images, which take longer.
_STEPS = {1: 400, 10: 150}
# Of the data's pixels; gradient matching's published rate is of normalized ones.
_VARIANCES = {"digits": 0.14, "mnist": 0.095, "fashion_mnist": 0.125, "cifar10": 0.06}


def get_config(argument=None, dataset=None, method=None):
    """The recipe of a data set and a number of images per class."""
    arg = parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        ipc=1,
        method="ncfm",
        baselines="random+herding",
        sampler="gaussian",
        seed=0,
    )
    # What the command line says of data and method goes before the argument.
    dataset = arg["dataset"] if dataset is None else dataset
    dataset = _TFDS.get(dataset, dataset)
    method = arg["method"] if method is None else method
    ipc = arg["ipc"]
    recipe = _RECIPES.get(dataset, _SMALL)

    config = ml_collections.ConfigDict()
    config.family = "condense"
    config.seed = arg["seed"]

    config.data = ml_collections.ConfigDict()
    config.data.name = dataset
    config.data.image_size = recipe["image_size"]

    # The extractors: pairs of an initial and a trained network.
    config.extractor = ml_collections.ConfigDict()
    config.extractor.depth = recipe["depth"]
    config.extractor.width = recipe["width"]

    config.pool = ml_collections.ConfigDict()
    config.pool.size = recipe["pool_size"]
    config.pool.epochs = recipe["pool_epochs"]
    config.pool.batch_size = recipe["pool_batch_size"]
    config.pool.learning_rate = recipe["pool_learning_rate"]
    config.pool.strategy = recipe["pool_strategy"]

    config.run = ml_collections.ConfigDict()
    config.run.chunk = recipe["chunk"]
    config.run.checkpoint_every = recipe["checkpoint_every"]
    config.run.microbatch = recipe["microbatch"]

    coreset = {"ipc": ipc}
    start = coreset | {"factor": recipe["factor"], "batch_real": recipe["batch_real"]}
    learned = start | {
        "start": "tiled",
        "steps": recipe.get("steps", _STEPS.get(ipc, 100)),
        "learning_rate": recipe["learning_rate"],
        "real_dtype": recipe["real_dtype"],
        "strategy": "color_crop_cutout",
    }
    ncfm = learned | {
        "num_freqs": recipe["num_freqs"],
        "calibration": recipe["calibration"],
        "sampler": arg["sampler"],
    }
    steps = {"steps": recipe.get("steps", _STEPS.get(ipc, 100)), "strategy": recipe["strategy"]}
    gradient = coreset | steps | {"learning_rate": 0.1 * _VARIANCES.get(dataset, 0.1)}
    gradient |= {"batch_real": recipe["batch_real"]}
    trajectory = coreset | steps | {"expert_strategy": recipe["strategy"]}
    if recipe["pool_size"] < 10:  # on CPUs
        trajectory |= {"experts": 5, "expert_batch_size": 64, "unroll": 10}
    else:
        trajectory |= {"experts": 100, "expert_epochs": 50, "start_until": 20}
    datm = trajectory | {"name": "trajectory", "learn_labels": True}
    kernel = coreset | {"steps": steps["steps"]}
    if recipe["pool_size"] < 10:
        kernel |= {"learning_rate": 0.003, "batch_real": 256}
    released = coreset | {"factor": recipe["factor"]}
    rows = {
        "ncfm": ncfm,
        "dm": learned,
        "gradient": gradient,
        "dc": {"name": "gradient", **gradient, "strategy": "none"},
        "trajectory": trajectory,
        "datm": datm,
        "kernel": kernel,
        "kip": {"name": "kernel", **kernel, "kernel": "tangent"},
        "released": released,
        "start": start,
    }

    def row(name):
        return ml_collections.ConfigDict({"name": name} | rows.get(name, coreset))

    config.method = row(method)
    config.baselines = ml_collections.ConfigDict(sort_keys=False)
    for name in filter(None, arg["baselines"].split("+")):
        if name != method:
            config.baselines[name] = row(name)

    config.evals = ml_collections.ConfigDict()
    config.evals.accuracy = ml_collections.ConfigDict()
    config.evals.accuracy.name = "classify"
    config.evals.accuracy.networks = ("convnet",)
    config.evals.accuracy.depth = recipe["depth"]
    config.evals.accuracy.epochs = 1000 if ipc == 1 else 300
    config.evals.accuracy.strategy = recipe["strategy"]
    # Beside hard ones, for every row, where one of them learns such labels.
    chosen = {method, *arg["baselines"].split("+")}
    config.evals.accuracy.soft_labels = "datm" in chosen
    config.evals.accuracy.learned_labels = bool(chosen & {"kernel", "kip"})

    if arg["smoke"]:
        config.extractor.width = config.evals.accuracy.width = 16
        config.pool.size = config.pool.epochs = 1
        config.run.chunk, config.run.checkpoint_every = 2, 2
        config.evals.accuracy.epochs, config.evals.accuracy.seeds = 20, 2
        smaller = {"steps": 4, "batch_real": 16, "num_freqs": 16}
        for each in (config.method, *config.baselines.values()):
            each.update({name: value for name, value in smaller.items() if name in each})
            if each.name == "kernel" and each.get("kernel") != "tangent":
                each.networks = each.network_steps = 2
            if each.name == "gradient":
                each.outer_steps = each.inner_epochs = 2
            if each.name == "released":
                each.steps, each.num_freqs, each.releases = 4, 16, 2
            if each.name == "trajectory":  # as many as devices there might be
                each.experts = each.batch_experts = 8
                each.expert_epochs, each.start_until, each.unroll = 2, 0, 2
    return config
