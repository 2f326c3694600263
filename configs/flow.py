"""Few-step students of flow teachers: ArcFlow and what it is compared with.

    jaxdistill --config=flow:dataset=fashion_mnist --workdir=runs/flow

Arguments, joined by commas behind the colon:

    dataset=    soft4 (default), ring8, grid25, checkerboard, spirals: points in the plane;
                digits, fashion_mnist, cifar10, any other TFDS name, or a path, as in `ncfm`;
                latents_imagenet, latents_1mp: shapes alone, to compile for accelerators
    method=     arcflow (default), linear, straight, gaussian, endpoint, endpoint_8x, progressive,
                ucgm, pcm, meanflow, dmd2
    baselines=  rows beside it, joined by +: linear (default); empty for none
    nfe=        network calls of the students (2)
    teacher=    the folder of a transformer of diffusers, which is read and not trained; then
                latents_imagenet needs no data, and nothing is evaluated
    smoke       a run of seconds that only shows that everything works

Anything else is an override: `--config.method.modes=4`. A teacher is trained first, or read from
`teacher.dir`, and the baselines are trained and judged beside the method.

    config                              hardware
    flow:dataset=soft4 and other points 2 CPU cores, minutes
    flow:dataset=digits                 2 CPU cores, minutes
    flow:dataset=fashion_mnist          2 CPU cores, hours
    every other data set                accelerator, not run here
"""

import ml_collections

from jaxdistill.config import parse_argument

# Points, whose exact velocity is known: learn from it, and follow it.
_POINTS = {
    "shift": 3.2,
    "model": {"network": "mlp", "patch": 1, "width": 128, "depth": 4, "heads": 1},
    "unroll": 4,
    "teacher": {"exact": True, "steps": 4000, "batch_size": 256, "learning_rate": 1e-3},
    "label_drop": 0.0,
    "modes": 16,
    "student": {"steps": 3000, "batch_size": 256, "learning_rate": 1e-3, "rank": 0},
    "decay": 0.01,
    "run": {"chunk": 50, "checkpoint_every": 1000},
    "fully_sharded": False,
    "samples": {
        "name": "points",
        "examples": 8192,
        "reference_steps": 1024,
        "batch_size": 8192,
    },
}
# Points with edges, of which there are samples alone; the network sees finer octaves of them.
_SHARP = _POINTS | {
    "model": _POINTS["model"] | {"bands": 4},
    "teacher": {"exact": False, "steps": 20_000, "batch_size": 512, "learning_rate": 1e-3},
}
# Images on two CPU cores. Of their parameters less than 5 % are trained; the heads' share grows
# with the channels.
_IMAGES = {
    "shift": 2.0,
    "model": {"network": "dit", "patch": 4, "width": 128, "depth": 6, "heads": 4},
    "unroll": 6,
    "teacher": {"steps": 4000, "batch_size": 64, "learning_rate": 1e-3},
    "label_drop": 0.1,
    "modes": 8,
    "student": {"steps": 1500, "batch_size": 64, "learning_rate": 1e-3, "rank": 2},
    "decay": 0.01,
    "run": {"chunk": 10, "checkpoint_every": 100},
    "fully_sharded": False,
    "samples": {
        "name": "images",
        "examples": 10_000,
        "paired": 1000,
        "reference_steps": 64,
        "batch_size": 250,
    },
}
_LARGE = _IMAGES | {
    "model": {"network": "dit", "patch": 2, "width": 384, "depth": 12, "heads": 6},
    "precision": {"remat": True, "dtype": "bfloat16"},
    "unroll": 1,
    "teacher": {
        "steps": 200_000,
        "batch_size": 256,
        "learning_rate": 1e-4,
        "ema_decay": 0.9999,
    },
    "student": {"steps": 15_000, "batch_size": 256, "learning_rate": 1e-4, "rank": 24},
    "decay": 1.0,
    "run": {"chunk": 10, "checkpoint_every": 1000},
    "fully_sharded": True,
}
_RECIPES = {
    "soft4": _POINTS,
    "ring8": _POINTS,
    "grid25": _POINTS,
    "checkerboard": _SHARP,
    "spirals": _SHARP | {"shift": 1.0},  # the arms part late, at little noise
    "digits": _IMAGES
    | {
        "model": {"network": "dit", "patch": 2, "width": 64, "depth": 4, "heads": 4},
        "unroll": 4,
        "student": _IMAGES["student"] | {"rank": 3},
        "samples": _IMAGES["samples"] | {"examples": 1000},
    },
    # The guidance and the rate were chosen on held-out images; see docs/results.md.
    "fashion_mnist": _IMAGES
    | {
        "teacher": _IMAGES["teacher"] | {"guidance": 1.5},
        "student": _IMAGES["student"] | {"rank": 4, "learning_rate": 1e-2},
    },
    "cifar10": _LARGE,
    "latents_imagenet": _LARGE
    | {
        "model": {"network": "dit", "patch": 2, "width": 1152, "depth": 28, "heads": 16},
        "student": _LARGE["student"] | {"rank": 64},
    },
    # Twelve billion parameters, as FLUX.1 has, on latents of a megapixel.
    "latents_1mp": _LARGE
    | {
        "shift": 3.2,
        "model": {"network": "dit", "patch": 2, "width": 3072, "depth": 70, "heads": 24},
        "precision": {"remat": True, "dtype": "bfloat16", "param_dtype": "bfloat16"},
        "label_drop": 0.0,
        "modes": 16,
        "student": _LARGE["student"] | {"batch_size": 64, "rank": 256},
    },
}
# Of these nothing can be read.
_SHAPES = ("latents_imagenet", "latents_1mp")
# Sampler and network calls, guidance left out.
_TEACHER_ROWS = (
    *(f"euler:{nfe}" for nfe in (2, 4, 8, 16, 100)),
    *(f"{sampler}:{nfe}" for sampler in ("midpoint", "dpm_solver_2m", "ucgm_s") for nfe in (4, 8)),
)


def get_config(argument=None, dataset=None, method=None):
    """The recipe of a data set and a student."""
    arg = parse_argument(
        argument,
        words=("smoke",),
        dataset="soft4",
        method="arcflow",
        baselines="linear",
        nfe=2,
        teacher="",
        seed=0,
    )
    # What the command line says of data and method goes before the argument.
    dataset = arg["dataset"] if dataset is None else dataset
    method = arg["method"] if method is None else method
    recipe = _RECIPES.get(dataset, _IMAGES)

    config = ml_collections.ConfigDict()
    config.family = "flow"
    config.seed = arg["seed"]

    config.data = ml_collections.ConfigDict()
    config.data.name = dataset

    config.path = ml_collections.ConfigDict()
    config.path.shift = recipe["shift"]

    config.model = ml_collections.ConfigDict(recipe["model"] | recipe.get("precision", {}))
    config.model.unroll = recipe["unroll"]

    config.teacher = ml_collections.ConfigDict(recipe["teacher"])
    config.teacher.label_drop = recipe["label_drop"]

    config.run = ml_collections.ConfigDict(recipe["run"])

    config.parallel = ml_collections.ConfigDict()
    config.parallel.fully_sharded = recipe["fully_sharded"]

    student = recipe["student"] | {"nfe": arg["nfe"], "learning_rate_decay": recipe["decay"]}
    modes = {"modes": recipe["modes"]}
    rows = {
        "arcflow": {"name": "arcflow", **modes},
        "straight": {"name": "straight", **modes},
        "gaussian": {"name": "gaussian", **modes},
        "endpoint_8x": {"name": "endpoint", "queries": 32},
    }

    def row(name):
        return ml_collections.ConfigDict(student | rows.get(name, {"name": name}))

    config.method = row(method)
    config.baselines = ml_collections.ConfigDict(sort_keys=False)
    for name in filter(None, arg["baselines"].split("+")):
        if name != method:
            config.baselines[name] = row(name)

    config.evals = ml_collections.ConfigDict()
    config.evals.samples = ml_collections.ConfigDict(recipe["samples"])
    config.evals.samples.nfe = (arg["nfe"],)
    config.evals.samples.teacher_rows = _TEACHER_ROWS

    if arg["teacher"]:
        precision = recipe.get("precision", {})
        config.model = ml_collections.ConfigDict({"network": "diffusers", **precision})
        config.teacher = ml_collections.ConfigDict({"dir": arg["teacher"]})
        if dataset in _SHAPES:
            config.evals = ml_collections.ConfigDict()

    if arg["smoke"]:
        if not arg["teacher"]:
            config.model.width, config.model.depth, config.model.heads = 32, 1, 2
        config.model.unroll = 1
        config.teacher.steps, config.teacher.batch_size = 20, 16
        config.run.chunk, config.run.checkpoint_every = 4, 4
        for each in (config.method, *config.baselines.values()):
            each.steps, each.batch_size = 8, 8
            each.update({"modes": 2} if "modes" in each else {})
    if arg["smoke"] and config.evals:
        config.evals.samples.examples = config.evals.samples.batch_size = 128
        config.evals.samples.reference_steps = 8
        config.evals.samples.teacher_rows = ("euler:2", "euler:4", "midpoint:2")
        if "paired" in config.evals.samples:
            config.evals.samples.paired = 128
            config.evals.samples.judge_epochs = 1
    return config
