"""What a config means: whether its settings can be, and the parts a run is made of.

Everything here follows from a config, or from a config and its data; `train` runs the parts,
`plan` looks at what they would cost elsewhere.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdistill import pool, settings
from jaxdistill.condense import charfn, coreset
from jaxdistill.condense.decode import check_factor, encode
from jaxdistill.condense.dm import dm
from jaxdistill.condense.ncfm import check_objective, ncfm
from jaxdistill.condense.synthetic import real_needed
from jaxdistill.data import sources
from jaxdistill.data.augment import parse
from jaxdistill.data.dataset import Dataset, per_class_table
from jaxdistill.errors import InputError
from jaxdistill.eval import train_on
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io import artifact
from jaxdistill.method import Method
from jaxdistill.nn.convnet import ConvNet
from jaxdistill.nn.frequency_net import ReleasedSampleNet, ScaleNet
from jaxdistill.nn.resnet import ResNet18
from jaxdistill.nn.vgg import VGG11
from jaxdistill.parallel.mesh import make_mesh

# What settings may be. The upper ends only keep a slip of the keyboard from filling the memory.
_RANGES = {
    "method.ipc": (1, 10_000),
    "method.factor": (1, 64),
    "method.batch_real": (1, 10**6),
    "method.num_freqs": (1, 10**6),
    "method.ascent_steps": (1, 1000),
    "method.warmup": (0, 10**9),
    "model.depth": (1, 16),
    "model.width": (1, 2**14),
    "pool.size": (1, 1000),
    "pool.width": (1, 2**14),
    "pool.epochs": (1, 10**6),
    "pool.batch": (1, 10**6),
    "run.steps": (1, 10**9),
    "run.chunk": (1, 10**6),
    "run.checkpoint_every": (0, 10**9),
    "run.pass_size": (1, 10**6),
    "parallel.class_devices": (1, 10**6),
    "eval.seeds": (1, 1000),
    "eval.epochs": (1, 10**6),
    "eval.batch": (1, 10**6),
}
METHODS = ("ncfm", "dm", *coreset.CORESETS, "start")
ARCHITECTURES = ("convnet", "resnet18", "vgg11")

#: Where only shapes are needed, the facts about a data set do as well as the data.
Data = Dataset | sources.Facts


class Setup(NamedTuple):
    """What the stages share.

    Attributes:
        config: The resolved config.
        hash: Identifies it.
        workdir: Where everything goes.
        dataset: The data; `test` is a part of the training set if the config holds some out.
        prepare: Images to normalised images.
        should_stop: Asked by everything that takes long.
    """

    config: ml_collections.ConfigDict
    hash: str
    workdir: Path
    dataset: Dataset
    prepare: Callable
    should_stop: ShouldStop = never


class Net(NamedTuple):
    """A network as three functions of its parameters, and the length of its features."""

    init: Callable
    logits: Callable
    features: Callable
    feature_dim: int


# ---------------------------------------------------------------------------- settings


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses what is wrong whatever the data.

    Raises:
        InputError: in these cases.
    """
    for name in settings.rows(config):
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    for name in config.eval.architectures:
        if name not in ARCHITECTURES:
            raise InputError(f"unknown network {name!r}; choose from {', '.join(ARCHITECTURES)}")
    settings.check_ranges(config, _RANGES)
    if not config.eval.architectures:
        raise InputError("eval.architectures is empty; give at least one network")
    check_objective(config.method.objective, config.method.alpha, config.method.beta)
    settings.check_places(config)
    settings.check_dtypes(config, ("method.real_dtype",))
    _sampler(config.method)


def config_hash(config: ml_collections.ConfigDict) -> str:
    """Identifies what is distilled."""
    return settings.digest(identity(settings.plain(config)))


def identity(stated: dict) -> dict:
    """The settings that decide what is distilled; see `settings.identity`."""
    return settings.identity(stated, "pool")


# ---------------------------------------------------------------------------- data


def check_data(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Refuses settings that ask of the data what they cannot give.

    Raises:
        InputError: in these cases.
    """
    method = config.method
    check_factor(dataset.image_shape, method.factor)
    for strategy in (method.strategy, config.pool.strategy, config.eval.strategy):
        parse(strategy)
    wanted = {f"method.ipc={method.ipc}": method.ipc}
    if {"ncfm", "dm", "start"} & set(settings.rows(config)):
        wanted[f"method.batch_real={method.batch_real}"] = method.batch_real
        if _start_pixels(method, dataset) is None:
            start = f"a {method.start} start with ipc={method.ipc}, factor={method.factor}"
            wanted[start] = real_needed(method.start, method.ipc, method.factor)
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes)
    smallest = int(counts.argmin())
    for setting, images in wanted.items():
        if counts[smallest] < images:
            raise InputError(
                f"class {dataset.class_names[smallest]!r} has {counts[smallest]} training images,"
                f" but {setting} asks for {images}; lower it"
            )


def _start_pixels(config, data: Data) -> jax.Array | None:
    """The stored images of another artefact, if `method.start` is the path of one."""
    if not config.start.endswith(".npz"):
        return None
    distilled = artifact.load(config.start)
    per_class = config.ipc * config.factor**2
    order = np.argsort(distilled.labels, kind="stable")
    # Clipped, for a foreign label may be enormous; it then makes the counts wrong.
    labels = np.minimum(distilled.labels, data.num_classes)
    counts = np.bincount(labels, minlength=data.num_classes)
    shape = distilled.images.shape[1:]
    if shape != data.image_shape or len(counts) != data.num_classes or any(counts != per_class):
        raise InputError(
            f"{config.start} has {counts.min()} to {counts.max()} images of shape {shape} a class;"
            f" ipc={config.ipc} with factor={config.factor} starts from {per_class} of shape"
            f" {data.image_shape}"
        )
    images = distilled.images[order].reshape(-1, per_class, *shape)
    return jax.vmap(lambda x: encode(x, config.factor))(jnp.asarray(images))


# ---------------------------------------------------------------------------- networks


def _net(module: Any, image_shape: tuple[int, int, int]) -> Net:
    blank = jnp.zeros((1, *image_shape))

    def features(params, x):
        return module.apply({"params": params}, x, method="features")

    return Net(
        init=lambda key: module.init(key, blank)["params"],
        logits=lambda params, x: module.apply({"params": params}, x),
        features=features,
        feature_dim=jax.eval_shape(
            lambda key: features(module.init(key, blank)["params"], blank), jax.random.key(0)
        ).shape[-1],
    )


def convnet(config: ml_collections.ConfigDict, data: Data, width: int) -> Net:
    """The config's ConvNet for the images and classes of some data."""
    module = ConvNet(data.num_classes, config.model.depth, width, config.model.norm)
    return _net(module, data.image_shape)


def architecture(setup: Setup, name: str) -> Net:
    """One of `ARCHITECTURES` for the data of a run."""
    if name == "convnet":
        return convnet(setup.config, setup.dataset, setup.config.model.width)
    module = {"resnet18": ResNet18, "vgg11": VGG11}[name]
    return _net(module(setup.dataset.num_classes), setup.dataset.image_shape)


def judge(net: Net) -> train_on.Network:
    """A network as training and evaluation want it."""
    return train_on.Network(net.init, net.logits)


def extractors(setup: Setup) -> dict:
    """The pool of a run; see `pool.load_or_train`. Missing networks are trained first."""
    config, model = setup.config.pool, setup.config.model
    spec = {k: v for k, v in config.to_dict().items() if k not in ("dir", "size")}
    return pool.load_or_train(
        Path(config.dir) if config.dir else setup.workdir / "pool",
        config.size,
        judge(convnet(setup.config, setup.dataset, config.width)),
        setup.dataset,
        prepare=setup.prepare,
        protocol=train_on.Protocol(
            config.epochs,
            config.batch,
            config.rate,
            strategy=config.strategy,
            decay_at=(2 / 3, 5 / 6),
        ),
        chunk=setup.config.run.pass_size,
        identity=settings.digest([spec, model.depth, model.norm, setup.dataset.fingerprint()]),
        should_stop=setup.should_stop,
    )


# ---------------------------------------------------------------------------- mesh and method


def build_mesh(
    config: ml_collections.ConfigDict, data: Data, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of a run on some devices, all by default.

    As many as divide the classes evenly form the class axis, if the config says nothing else.
    """
    parallel, devices = config.parallel, jax.devices() if devices is None else devices
    by_class = parallel.class_devices
    if by_class is None:
        by_class = math.gcd(data.num_classes, len(devices)) if parallel.backend == "jit" else 1
    return make_mesh(devices, class_devices=by_class)


def _sampler(config) -> tuple[charfn.FrequencySampler, optax.GradientTransformation | None]:
    nets = {"learned": ScaleNet(), "released": ReleasedSampleNet()}
    if config.sampler == "gaussian":
        return charfn.gaussian(config.freq_scale), None
    if config.sampler not in nets:
        raise InputError(
            f"unknown sampler {config.sampler!r}; choose from gaussian, {', '.join(nets)}"
        )
    net = nets[config.sampler]
    functions = (
        lambda key, dim: net.init(key, jnp.zeros((2, dim)))["params"],
        lambda params, noise: net.apply({"params": params}, noise),
    )
    tx = optax.chain(
        optax.clip_by_global_norm(config.sampler_clip), optax.adam(config.sampler_rate)
    )
    if config.sampler == "released":
        return charfn.direct(*functions), tx
    return charfn.scale_mixture(*functions, scale=config.freq_scale, spread=config.freq_spread), tx


def images_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Of the pixels."""
    method = config.method
    return optax.adam(optax.cosine_decay_schedule(method.rate, config.run.steps, method.rate_decay))


def image_options(config: ml_collections.ConfigDict, data: Data, prepare: Callable) -> dict:
    """What the methods that learn pixels are told alike; see `build_method`."""
    method = config.method
    return {
        "prepare": prepare,
        "ipc": method.ipc,
        "factor": method.factor,
        "start": method.start,
        "pixels": _start_pixels(method, data),
        "batch_real": method.batch_real,
        "strategy": method.strategy,
        "chunk": config.run.pass_size,
        "real_dtype": method.real_dtype,
    }


def build_method(
    config: ml_collections.ConfigDict, name: str, data: Data, prepare: Callable
) -> Method:
    """The method that the config's settings describe.

    Args:
        config: See `configs/`.
        name: One of `METHODS`; `start` is NCFM, of which only the initial state is wanted.
        data: What it is for.
        prepare: Images to normalised images.
    """
    method = config.method
    if name in coreset.CORESETS:
        return coreset.CORESETS[name](method.ipc)
    net = convnet(config, data, config.pool.width)
    images_tx, common = images_optimizer(config), image_options(config, data, prepare)
    if name == "dm":
        return dm(net.features, net.init, images_tx, **common)
    sampler, sampler_tx = _sampler(method)
    return ncfm(
        net.features,
        net.logits,
        images_tx,
        sampler,
        sampler_tx,
        feature_dim=net.feature_dim,
        num_freqs=method.num_freqs,
        alpha=method.alpha,
        beta=method.beta,
        calibration=method.calibration,
        finetune_rate=method.finetune_rate,
        objective=method.objective,
        ascent_steps=method.ascent_steps,
        warmup=method.warmup,
        **common,
    )


def build_frozen(setup: Setup, name: str) -> Any:
    """What the method's steps are given besides the batch; trained first where it must be."""
    if name in ("ncfm", "start"):
        return extractors(setup)
    if name == "dm":
        return ()
    config, data = setup.config, setup.dataset
    images = jnp.asarray(data.train.images)
    features = jnp.zeros((images.shape[0], 0))
    if name != "random":
        net = convnet(config, data, config.pool.width)
        teacher = jax.tree.map(lambda x: x[0], extractors(setup)["trained"])
        features = jax.jit(
            functools.partial(
                coreset.feature_table,
                net.features,
                prepare=setup.prepare,
                chunk=config.run.pass_size,
            )
        )(teacher, images)
    index, counts = per_class_table(data.train.labels, data.num_classes)
    return coreset.Table(images, jnp.asarray(index), jnp.asarray(counts), features)
