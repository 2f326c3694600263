"""NCFM and its baselines on any data set.

    jaxdistill --config=ncfm:dataset=fashion_mnist,ipc=1 --workdir=runs/fashion1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, mnist, cifar10, cifar100, tiny_imagenet,
                imagenette, any other TFDS name, or a path: an image folder, IDX folder or .npz
    ipc=        images per class; recipes exist for 1, 10 and 50
    method=     ncfm (default), dm, random, herding, k_center, start
    sampler=    gaussian (default), learned, released: the law of NCFM's frequencies
    smoke       a run of seconds that only shows that everything works

Anything else is an override: `--config.method.calibration=1.0`.

    config                              hardware     accuracy to expect (hard labels)
    ncfm:dataset=digits,ipc=1           2 CPU cores  90.2 ± 0.9
    ncfm:dataset=fashion_mnist,ipc=1    2 CPU cores  79.9 ± 0.1
    the same, --config.run.steps=2000   2 CPU cores  81.0 ± 0.4; 7 CPU minutes to distil
    ncfm:dataset=fashion_mnist,ipc=10   2 CPU cores  81.8 ± 0.2 after 100 epochs, not 300
    the same, --config.run.steps=2000   2 CPU cores  84.3 ± 0.1; 22 CPU minutes to distil
    every other data set, and ipc=50    accelerator  not run here
"""

import ml_collections

from jaxdistill.config import parse_argument

# Where a data set differs from the defaults below.
_DATA = {
    "digits": {"depth": 2, "factor": 1, "strategy": "color_crop_cutout_scale_rotate"},
    "mnist": {"strategy": "color_crop_cutout_scale_rotate", "rate": 0.2},
    "fashion_mnist": {"rate": 0.2, "calibration": 10.0},
    "cifar10": {},
    "cifar100": {},
    "tiny_imagenet": {"image_size": 64, "depth": 4},
    "imagenette": {"image_size": 128, "depth": 5},
}
# Meant for an accelerator; with the real images per class and step, of those that there are.
# Multiples of 64 are shared evenly by as many devices.
_LARGE = {"cifar10": 1024, "cifar100": 448, "tiny_imagenet": 448, "imagenette": 512}
_TFDS = {"imagenette": "imagenette/160px-v2"}


def get_config(argument=None):
    """The recipe of a data set and a number of images per class."""
    arg = parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        ipc=1,
        method="ncfm",
        sampler="gaussian",
        seed=0,
    )
    dataset, ipc = arg["dataset"], arg["ipc"]
    data = _DATA.get(dataset, {})
    large = dataset in _LARGE
    small = dataset == "digits"

    config = ml_collections.ConfigDict()
    config.seed = arg["seed"]

    config.data = ml_collections.ConfigDict()
    config.data.name = _TFDS.get(dataset, dataset)
    config.data.data_dir = ml_collections.config_dict.placeholder(str)
    config.data.image_size = ml_collections.config_dict.placeholder(int)
    config.data.pad_to = ml_collections.config_dict.placeholder(int)
    if "image_size" in data:
        config.data.image_size = data["image_size"]
    # resident: on the devices; streamed: on the host, for data that do not fit on the devices
    config.data.placement = "resident"
    # Images of each class moved from training to a validation set, on which the accuracies are
    # then measured instead of the test set. For choosing settings.
    config.data.holdout_per_class = 0

    config.model = ml_collections.ConfigDict()
    config.model.depth = data.get("depth", 3)
    config.model.width = 128
    config.model.norm = "instance"

    # The extractors: pairs of an initial and a trained network.
    config.pool = ml_collections.ConfigDict()
    config.pool.dir = ml_collections.config_dict.placeholder(str)  # default: in the workdir
    config.pool.size = 20 if large else 4
    config.pool.width = 128 if large else 64
    config.pool.epochs = 60 if large else (30 if small else 2)
    config.pool.batch = 128 if large else 64
    config.pool.rate = 0.01 if large else 0.02
    config.pool.strategy = "color_crop_rotate" if small else "color_crop_flip_scale_rotate"

    config.method = ml_collections.ConfigDict()
    config.method.name = arg["method"]
    config.method.ipc = ipc
    config.method.factor = data.get("factor", 2)
    config.method.start = "tiled"  # or random, noise, or the path of a distilled.npz
    config.method.rate = data.get("rate", 0.02)
    config.method.rate_decay = 0.05  # final rate over initial rate, by a cosine
    config.method.batch_real = _LARGE.get(dataset, 64)
    # Of the network on the real images. Accelerators wait for memory there, CPUs gain nothing.
    config.method.real_dtype = "bfloat16" if large else "float32"
    config.method.strategy = "color_crop_cutout"
    # NCFM only
    config.method.num_freqs = 4096 if large else 512
    config.method.alpha = 0.5
    config.method.beta = 0.5
    config.method.calibration = data.get("calibration", 0.0)
    config.method.finetune_rate = 0.0
    config.method.sampler = arg["sampler"]
    config.method.freq_scale = 2.0
    config.method.sampler_rate = 3e-4
    config.method.sampler_clip = 1.0
    config.method.freq_spread = 1.5  # a learned scale stays within freq_scale / and * this
    config.method.objective = "ratio"  # or gap, excess
    config.method.ascent_steps = 1
    config.method.warmup = 100

    config.run = ml_collections.ConfigDict()
    config.run.steps = 20_000 if large else (300 if small else {1: 400, 10: 150}.get(ipc, 100))
    config.run.chunk = 100 if large else 10
    config.run.checkpoint_every = 1000 if large else 100
    config.run.tensorboard = False
    # A run that diverges goes back to its last checkpoint, this many times, and each time the
    # rates under `method` are multiplied by the factor.
    config.run.restarts = 0
    config.run.restart_factor = 0.3
    # Images in one pass of a network, on each device. Small passes stay in a CPU's cache;
    # accelerators want large ones, as far as memory goes: the same number of pixels a pass.
    config.run.pass_size = 256 * 32**2 // data.get("image_size", 32) ** 2 if large else 16

    config.parallel = ml_collections.ConfigDict()
    config.parallel.backend = "jit"  # or pmap
    # Devices over which the classes are split, the others share the batch; default: the most
    # that divide the classes evenly.
    config.parallel.class_devices = ml_collections.config_dict.placeholder(int)

    config.eval = ml_collections.ConfigDict()
    config.eval.baselines = ("random", "herding")
    config.eval.architectures = ("convnet",)
    config.eval.seeds = 3
    config.eval.epochs = 1000 if ipc == 1 else 300
    config.eval.batch = 256
    config.eval.rate = 0.01
    config.eval.strategy = data.get("strategy", "color_crop_cutout_flip_scale_rotate")
    config.eval.soft_labels = False
    config.eval.temperature = 1.0

    if arg["smoke"]:
        config.model.width = config.pool.width = 16
        config.pool.size = config.pool.epochs = 1
        config.method.batch_real = config.method.num_freqs = 16
        config.run.steps, config.run.chunk, config.run.checkpoint_every = 4, 2, 2
        config.eval.epochs, config.eval.seeds = 20, 2
    return config.lock()
