"""Few-step students of flow teachers: ArcFlow and what it is compared with.

    jaxdistill --config=flow:dataset=fashion_mnist --workdir=runs/flow

Arguments, joined by commas behind the colon:

    dataset=    soft4 (default), ring8, checkerboard, spirals: points in the plane;
                digits, fashion_mnist, cifar10, any other TFDS name, or a path, as in `ncfm`;
                latents_imagenet, latents_1mp: shapes alone, to compile for accelerators
    method=     arcflow (default), linear, straight, gaussian, endpoint, endpoint_8x, progressive
    calls=      network calls of the student (2)
    smoke       a run of seconds that only shows that everything works

Anything else is an override: `--config.method.modes=4`. A teacher is trained first, or read from
`teacher.dir`, and the students of `eval.baselines` are trained and judged beside the method.

    config                              hardware
    flow:dataset=soft4 and other points 2 CPU cores, minutes
    flow:dataset=digits                 2 CPU cores, minutes
    flow:dataset=fashion_mnist          2 CPU cores, hours
    every other data set                accelerator, not run here
"""

import ml_collections

from jaxdistill.config import parse_argument

_POINTS = ("soft4", "ring8", "checkerboard", "spirals")
_IMAGES = {
    # Of the DiT, and of the adapters: less than 5 % of the parameters are trained.
    "digits": {"patch": 2, "width": 64, "depth": 4, "heads": 4, "rank": 3},
    "fashion_mnist": {"patch": 4, "width": 128, "depth": 6, "heads": 4, "rank": 4},
    "cifar10": {"patch": 2, "width": 384, "depth": 12, "heads": 6, "rank": 24},
    "latents_imagenet": {"patch": 2, "width": 1152, "depth": 28, "heads": 16, "rank": 64},
    # Twelve billion parameters, as FLUX.1 has, on latents of a megapixel.
    "latents_1mp": {"patch": 2, "width": 3072, "depth": 70, "heads": 24, "rank": 256},
}
# Others may have more channels, of which the heads' share of the parameters grows.
_OTHER = {"patch": 4, "width": 128, "depth": 6, "heads": 4, "rank": 2}
_LARGE = ("cifar10", "latents_imagenet", "latents_1mp")


def get_config(argument=None):
    """The recipe of a data set and a student."""
    arg = parse_argument(
        argument, words=("smoke",), dataset="soft4", method="arcflow", calls=2, seed=0
    )
    dataset = arg["dataset"]
    points, large = dataset in _POINTS, dataset in _LARGE
    sharp = dataset in ("checkerboard", "spirals")  # laws with edges, known by samples alone
    shape = _IMAGES.get(dataset, _OTHER)

    config = ml_collections.ConfigDict()
    config.family = "flow"
    config.seed = arg["seed"]

    config.data = ml_collections.ConfigDict()
    config.data.name = dataset
    config.data.data_dir = ml_collections.config_dict.placeholder(str)
    config.data.image_size = ml_collections.config_dict.placeholder(int)
    config.data.pad_to = ml_collections.config_dict.placeholder(int)
    config.data.placement = "resident"  # or streamed
    config.data.holdout_per_class = 0  # judge by so many training images instead of the test set

    # Noise levels are t = m r / (1 + (m - 1) r) of even raw times r.
    config.shift = 3.2 if points or dataset == "latents_1mp" else 2.0
    if dataset == "spirals":  # whose arms part late, at little noise
        config.shift = 1.0

    config.model = ml_collections.ConfigDict()
    config.model.network = "mlp" if points else "dit"  # or unet
    config.model.patch = 1 if points else shape["patch"]
    config.model.width = 128 if points else shape["width"]
    config.model.depth = 4 if points else shape["depth"]
    config.model.bands = 4 if sharp else 0  # octaves of sines and cosines of a point's place
    config.model.heads = 1 if points else shape["heads"]
    config.model.widths = (32, 64, 96)  # of the UNet's levels
    config.model.unroll = 1 if large else config.model.depth  # blocks compiled side by side
    config.model.remat = large
    config.model.dtype = "bfloat16" if large else "float32"
    huge = dataset == "latents_1mp"
    config.model.param_dtype = "bfloat16" if huge else "float32"

    config.teacher = ml_collections.ConfigDict()
    # A folder with teacher.safetensors; by default one in the workdir, where it is trained.
    config.teacher.dir = ml_collections.config_dict.placeholder(str)
    # Learn from the exact velocity, and follow it; only where it is known: soft4 and ring8.
    config.teacher.exact = dataset in ("soft4", "ring8")
    config.teacher.steps = 200_000 if large else (20_000 if sharp else 4000)
    config.teacher.batch = 512 if sharp else (256 if points or large else 64)
    config.teacher.rate = 1e-4 if large else 1e-3
    config.teacher.decay = 0.9999 if large else 0.999  # of the moving average
    config.teacher.label_drop = 0.0 if points or huge else 0.1
    # Above 1 the teacher takes two calls for a velocity, and the student learns it in one. This
    # and the students' rate on Fashion-MNIST were chosen on held-out images, see docs/results.md.
    config.teacher.guidance = 1.5 if dataset == "fashion_mnist" else 1.0

    config.method = ml_collections.ConfigDict()
    config.method.name = arg["method"]
    config.method.calls = arg["calls"]
    config.method.elastic = ()  # numbers of calls to serve at once, such as (1, 2, 3, 4, 8)
    config.method.last = 1.0  # length of the last segment over that of the others
    config.method.modes = 16 if points or huge else 8
    config.method.log_gamma = (-1.6094, 1.3863)  # at the start, evenly spaced: gamma 0.2 to 4
    config.method.unit = "time"  # of gamma's exponent; or step, the fraction of the segment
    config.method.queries = 4  # teacher calls in a segment
    config.method.window = 3 / 128
    config.method.teacher_share = 0.3  # part of the training in which the teacher leads, fading
    config.method.drop = 0.0  # share of modes left out on the way
    config.method.from_data = False  # start segments from noised data instead of noise
    config.method.first_calls = 16  # progressive: of the first round's teacher
    config.method.substeps = 16  # gaussian: of a move
    # Adapters of this rank on the layers whose paths fit; 0 trains the whole network.
    config.method.rank = 0 if points else shape["rank"]
    config.method.alpha = float(config.method.rank)
    config.method.targets = ("(up|down)$",)
    config.method.batch = 64 if huge else (256 if points or large else 64)
    config.method.rate = 1e-4 if large else (1e-2 if dataset == "fashion_mnist" else 1e-3)
    config.method.gamma_rate = 0.1  # of the gammas' layer, over `rate`
    config.method.rate_decay = 1.0 if large else 0.01  # final rate over initial rate, by a cosine
    config.method.warmup = 100
    config.method.clip = 50.0
    config.method.ema_power = 7.0

    config.run = ml_collections.ConfigDict()
    config.run.steps = 15_000 if large else (3000 if points else 1500)
    config.run.chunk = 50 if points else 10
    config.run.checkpoint_every = 1000 if points or large else 100
    config.run.tensorboard = False
    # A run that diverges goes back to its last checkpoint, this many times, and each time its
    # rate is multiplied by the factor.
    config.run.restarts = 0
    config.run.restart_factor = 0.3

    config.parallel = ml_collections.ConfigDict()
    config.parallel.backend = "jit"  # or pmap
    config.parallel.fully_sharded = large  # split parameters over all devices

    config.eval = ml_collections.ConfigDict()
    config.eval.baselines = ("linear",)
    config.eval.calls = (arg["calls"],)  # of the students; others show how elastic they are
    config.eval.teacher_rows = (  # sampler and network calls, guidance left out
        *(f"euler:{calls}" for calls in (2, 4, 8, 16, 100)),
        *(f"{sampler}:{calls}" for sampler in ("midpoint", "dpm_solver_2m") for calls in (4, 8)),
    )
    config.eval.examples = 8192 if points else (10_000 if dataset != "digits" else 1000)
    config.eval.paired = 8192 if points else 1000  # examples with the reference's noise
    config.eval.reference_steps = 1024 if points else 64  # rk4 on points, midpoint on images
    config.eval.batch = 8192 if points else 250
    config.eval.judge_epochs = 5
    config.eval.judge_dir = ml_collections.config_dict.placeholder(str)  # default: in the workdir

    if arg["smoke"]:
        config.model.width, config.model.depth, config.model.heads = 32, 1, 2
        config.model.unroll = 1
        config.teacher.steps, config.teacher.batch = 20, 16
        config.method.modes, config.method.batch = 2, 8
        config.method.elastic = ()
        config.run.steps, config.run.chunk, config.run.checkpoint_every = 8, 4, 4
        config.eval.examples = config.eval.paired = config.eval.batch = 128
        config.eval.reference_steps = 8
        config.eval.teacher_rows = ("euler:2", "euler:4", "midpoint:2")
        config.eval.judge_epochs = 1
    return config.lock()
