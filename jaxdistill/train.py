"""From a config to a result: distil, write the artefact, train on it, print the table.

`train` and `evaluate` are what the command line calls; a notebook calls them with the same
config. Every stage finds what an earlier start left in the workdir and goes on from there.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdistill import pool, runner
from jaxdistill.condense import charfn, coreset
from jaxdistill.condense.decode import check_factor, encode
from jaxdistill.condense.dm import dm
from jaxdistill.condense.labels import soft_labels
from jaxdistill.condense.ncfm import check_objective, ncfm
from jaxdistill.condense.synthetic import real_needed
from jaxdistill.data import device, sources, stream
from jaxdistill.data.augment import normalizer, parse
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import results, train_on
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io import artifact, checkpoint
from jaxdistill.io.files import remove_leftovers, write_files
from jaxdistill.io.writers import Progress
from jaxdistill.method import Method
from jaxdistill.nn.convnet import ConvNet
from jaxdistill.nn.frequency_net import ReleasedSampleNet, ScaleNet
from jaxdistill.nn.resnet import ResNet18
from jaxdistill.nn.vgg import VGG11
from jaxdistill.parallel import processes
from jaxdistill.parallel.backends import BACKENDS
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
PLACEMENTS = {"resident": device.resident, "streamed": stream.stream}

#: Where only shapes are needed, the facts about a data set do as well as the data.
Data = sources.Dataset | sources.Facts


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
    dataset: sources.Dataset
    prepare: Callable
    should_stop: ShouldStop = never


class Net(NamedTuple):
    """A network as three functions of its parameters, and the length of its features."""

    init: Callable
    logits: Callable
    features: Callable
    feature_dim: int


def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    should_stop: ShouldStop = never,
) -> list[dict]:
    """Distils, then evaluates. An interrupted call with the same arguments goes on.

    Args:
        config: See `configs/`.
        workdir: Gets `config.json`, `versions.json`, `metrics.jsonl`, `checkpoints/`, `pool/`,
            `artifacts/`, `baselines/` and `results.json`.
        should_stop: Asked many times; when it says yes, what was done is kept.

    Returns:
        The records of `results.json`.

    Raises:
        InputError: if the config, the data or the workdir do not fit.
        Interrupted: if `should_stop` said yes.
        OSError: if a file cannot be written.
    """
    setup = set_up(config, workdir)._replace(should_stop=should_stop)
    for name in _rows(config):
        _distil(setup, name)
    return _evaluate(setup)


def evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    should_stop: ShouldStop = never,
) -> list[dict]:
    """Evaluates what `train` left in the workdir; only what is not measured yet is run.

    The settings under `config.eval` may differ from those of the training run.

    Raises:
        InputError: if the workdir holds no artefact, or other settings than `eval` differ.
        Interrupted: if `should_stop` said yes; what is measured by then is kept.
        OSError: if a file cannot be written.
    """
    folder = Path(workdir) / "artifacts"
    if not (folder / "distilled.npz").is_file():
        raise InputError(f"{folder} holds no distilled.npz; run --mode=train in this workdir first")
    setup = set_up(config, workdir)._replace(should_stop=should_stop)
    for name in _rows(config):
        _distil(setup, name)
    return _evaluate(setup)


def _rows(config) -> list[str]:
    names = [config.method.name, *config.eval.baselines]
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------------- set-up


def _hash(tree: Any) -> str:
    text = json.dumps(tree, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _identity(settings: dict) -> dict:
    """The settings that decide what is distilled, of which a workdir holds one set.

    The evaluation may be repeated with others, and how a run is carried out (`parallel`, and
    `run` but for its length) and where data and extractors lie change nothing but the last bits.
    """
    kept = {k: v for k, v in settings.items() if k not in ("eval", "parallel")}
    pool = {k: v for k, v in settings["pool"].items() if k != "dir"}
    data = {k: v for k, v in settings["data"].items() if k != "placement"}
    return kept | {"data": data, "pool": pool, "run": {"steps": settings["run"]["steps"]}}


def plain(config: ml_collections.ConfigDict) -> dict:
    """The settings as JSON has them."""
    return json.loads(json.dumps(config.to_dict(), default=list))


def config_hash(config: ml_collections.ConfigDict) -> str:
    """Identifies what is distilled."""
    return _hash(_identity(plain(config)))


def set_up(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> Setup:
    """Checks everything that can be wrong, then makes the workdir.

    Raises:
        InputError: as `train` does.
    """
    check(config)
    workdir = Path(workdir)
    settings = plain(config)
    identity = _identity(settings)
    stored = workdir / "config.json"
    if stored.is_file():
        try:
            before = _identity(json.loads(stored.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{stored} is not a run's config ({error}); use another workdir"
            ) from error
        changed = _difference(before, identity)
        if changed:
            raise InputError(
                f"workdir {workdir} was started with another config ({changed});"
                " use another workdir, or the config it was started with"
            )
    dataset = sources.load(
        config.data.name,
        data_dir=config.data.data_dir,
        image_size=config.data.image_size,
        pad_to=config.data.pad_to,
    )
    if config.data.holdout_per_class:
        dataset = sources.holdout(dataset, config.data.holdout_per_class, seed=0)
    _check_budget(config, dataset)
    if processes.is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the workdir {workdir}: {error.strerror}") from error
        for folder in (workdir, *workdir.glob("baselines/*")):
            remove_leftovers(folder)
            remove_leftovers(folder / "artifacts")
        write_files(
            {
                stored: functools.partial(dump, settings),
                workdir / "versions.json": functools.partial(dump, _versions()),
            }
        )
    processes.wait("set up")
    return Setup(config, _hash(identity), workdir, dataset, normalizer(dataset.mean, dataset.std))


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses what is wrong whatever the data.

    Raises:
        InputError: in these cases.
    """
    for name in _rows(config):
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    for name in config.eval.architectures:
        if name not in ARCHITECTURES:
            raise InputError(f"unknown network {name!r}; choose from {', '.join(ARCHITECTURES)}")
    for path, (least, most) in _RANGES.items():
        group, name = path.split(".")
        value = config[group][name]
        if value is not None and not least <= value <= most:
            raise InputError(f"{path} is {value}; it must be between {least} and {most}")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"seed is {config.seed}; it must be between 0 and {2**32 - 1}")
    if not config.eval.architectures:
        raise InputError("eval.architectures is empty; give at least one network")
    check_objective(config.method.objective, config.method.alpha, config.method.beta)
    if config.parallel.backend not in BACKENDS:
        raise InputError(
            f"unknown backend {config.parallel.backend!r}; choose from {', '.join(BACKENDS)}"
        )
    if config.data.placement not in PLACEMENTS:
        raise InputError(
            f"data.placement is {config.data.placement!r}; choose {' or '.join(PLACEMENTS)}"
        )
    _sampler(config.method)
    if config.run.restarts < 0 or not 0 < config.run.restart_factor < 1:
        raise InputError(
            f"run.restarts is {config.run.restarts} and run.restart_factor "
            f"{config.run.restart_factor}; the first must not be negative, the second between "
            "0 and 1"
        )


def _check_budget(config, dataset: sources.Dataset) -> None:
    """Refuses what the data cannot give, before anything is written."""
    method = config.method
    check_factor(dataset.image_shape, method.factor)
    for strategy in (method.strategy, config.pool.strategy, config.eval.strategy):
        parse(strategy)
    wanted = {f"method.ipc={method.ipc}": method.ipc}
    if {"ncfm", "dm", "start"} & set(_rows(config)):
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


def _difference(before: Mapping, now: Mapping, prefix: str = "") -> str:
    """The first settings that differ, as `a.b=1, now 2`."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found.append(_difference(old, new, f"{prefix}{key}."))
        elif old != new:
            found.append(f"{prefix}{key}={old}, now {new}")
    return "; ".join(filter(None, found))


def dump(tree: Any, file: IO[bytes]) -> None:
    """Writes JSON."""
    file.write(json.dumps(tree, indent=2).encode() + b"\n")


def _versions() -> dict:
    return artifact.versions() | {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


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


def _architecture(setup: Setup, name: str) -> Net:
    if name == "convnet":
        return convnet(setup.config, setup.dataset, setup.config.model.width)
    module = {"resnet18": ResNet18, "vgg11": VGG11}[name]
    return _net(module(setup.dataset.num_classes), setup.dataset.image_shape)


def _pool(setup: Setup) -> dict:
    config, model = setup.config.pool, setup.config.model
    spec = {k: v for k, v in config.to_dict().items() if k not in ("dir", "size")}
    return pool.load_or_train(
        Path(config.dir) if config.dir else setup.workdir / "pool",
        config.size,
        _judge(convnet(setup.config, setup.dataset, config.width)),
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
        identity=_hash([spec, model.depth, model.norm, setup.dataset.fingerprint()]),
        should_stop=setup.should_stop,
    )


def _judge(net: Net) -> train_on.Network:
    return train_on.Network(net.init, net.logits)


# ---------------------------------------------------------------------------- distillation


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
    settings, run = config.method, config.run
    if name in coreset.CORESETS:
        return coreset.CORESETS[name](settings.ipc)
    net = convnet(config, data, config.pool.width)
    images_tx = optax.adam(
        optax.cosine_decay_schedule(settings.rate, run.steps, settings.rate_decay)
    )
    common = {
        "prepare": prepare,
        "ipc": settings.ipc,
        "factor": settings.factor,
        "start": settings.start,
        "pixels": _start_pixels(settings, data),
        "batch_real": settings.batch_real,
        "strategy": settings.strategy,
        "chunk": run.pass_size,
    }
    if name == "dm":
        return dm(net.features, net.init, images_tx, **common)
    sampler, sampler_tx = _sampler(settings)
    return ncfm(
        net.features,
        net.logits,
        images_tx,
        sampler,
        sampler_tx,
        feature_dim=net.feature_dim,
        num_freqs=settings.num_freqs,
        alpha=settings.alpha,
        beta=settings.beta,
        calibration=settings.calibration,
        finetune_rate=settings.finetune_rate,
        objective=settings.objective,
        ascent_steps=settings.ascent_steps,
        warmup=settings.warmup,
        **common,
    )


def build_frozen(setup: Setup, name: str) -> Any:
    """What the method's steps are given besides the batch; trained first where it must be."""
    if name in ("ncfm", "start"):
        return _pool(setup)
    if name == "dm":
        return ()
    config, data = setup.config, setup.dataset
    images = jnp.asarray(data.train.images)
    features = jnp.zeros((images.shape[0], 0))
    if name != "random":
        net = convnet(config, data, config.pool.width)
        teacher = jax.tree.map(lambda x: x[0], _pool(setup)["trained"])
        features = jax.jit(
            functools.partial(
                coreset.feature_table,
                net.features,
                prepare=setup.prepare,
                chunk=config.run.pass_size,
            )
        )(teacher, images)
    index, counts = sources.per_class_table(data.train.labels, data.num_classes)
    return coreset.Table(images, jnp.asarray(index), jnp.asarray(counts), features)


def _folder(setup: Setup, name: str) -> Path:
    main = name == setup.config.method.name
    return setup.workdir if main else setup.workdir / "baselines" / name


def _distil(setup: Setup, name: str) -> None:
    """Runs one method to its artefact; nothing is done when the artefact is there."""
    folder = _folder(setup, name)
    done = (folder / "artifacts" / "distilled.npz").is_file()
    saved = {} if done else checkpoint.newest_metadata(folder / "checkpoints")
    processes.wait(f"{name} is looked for")  # before any process writes there
    if done:
        return
    config, data = setup.config, setup.dataset
    placed = PLACEMENTS[config.data.placement](data.train, data.num_classes)
    # A coreset takes one image of each class a step.
    steps = config.method.ipc if name in coreset.CORESETS else config.run.steps
    restarts, rate_factor = saved.get("restarts", 0), saved.get("rate_factor", 1.0)
    method = build_method(_slowed(config, rate_factor), name, data, setup.prepare)
    frozen = build_frozen(setup, name)
    key = jax.random.key(config.seed)
    began = time.perf_counter(), time.process_time()
    state = None
    if name == "start":
        # The undistilled start of the same seed: what a run of NCFM has before its first step.
        state = runner.initial_state(method, data=placed, frozen=frozen, key=key)
    while state is None:
        try:
            state = runner.run(
                method,
                data=placed,
                frozen=frozen,
                key=key,
                steps=steps,
                chunk=config.run.chunk,
                mesh=build_mesh(config, data),
                backend=config.parallel.backend,
                workdir=folder,
                checkpoint_every=config.run.checkpoint_every,
                metadata={
                    "config_hash": setup.hash,
                    "method": name,
                    "restarts": restarts,
                    "rate_factor": rate_factor,
                },
                tensorboard=config.run.tensorboard,
                progress=name,
                should_stop=setup.should_stop,
            )
        except runner.Diverged as error:
            if restarts >= config.run.restarts:
                raise
            restarts, rate_factor = restarts + 1, rate_factor * config.run.restart_factor
            told = f"restart {restarts} of {config.run.restarts} with the rates x {rate_factor:.3g}"
            print(f"{name}: {error}; {told}", file=sys.stderr)
            slower = _slowed(config, rate_factor)
            method = build_method(slower, name, data, setup.prepare)
    images = processes.whole(method.output(state)["images"])
    cost = {
        "steps": 0 if name == "start" else steps,
        # Of this process: a run that went on after an interruption shows its last part.
        "wall_seconds": round(time.perf_counter() - began[0], 2),
        "cpu_seconds": round(time.process_time() - began[1], 2),
    }
    per_class = images.shape[1]
    images = images.reshape(-1, *data.image_shape)
    soft = None
    if config.eval.soft_labels:
        soft = _soft_labels(setup, _pool(setup), images)
    card = {
        "dataset": data.name,
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "method": name,
        "ipc": config.method.ipc,
        "factor": config.method.factor if name in ("ncfm", "dm", "start") else 1,
        "config_hash": setup.hash,
        "seeds": {"condense": config.seed},
        "rate_factor": rate_factor,
        "accuracies": [],
        "cost": cost,
        "provenance": {"source_sha256": data.fingerprint(), "versions": _versions()},
    }
    labels = np.repeat(np.arange(data.num_classes, dtype=np.int32), per_class)
    if processes.is_first():
        artifact.save(folder / "artifacts", artifact.Distilled(images, labels, soft, card))
    processes.wait(f"{name} is distilled")


def _slowed(config: ml_collections.ConfigDict, factor: float) -> ml_collections.ConfigDict:
    """The config with all rates of the method multiplied."""
    config = config.copy_and_resolve_references()
    for name in ("rate", "sampler_rate", "finetune_rate"):
        config.method[name] *= factor
    return config


def _soft_labels(setup: Setup, teachers: dict, images: np.ndarray) -> np.ndarray:
    net = convnet(setup.config, setup.dataset, setup.config.pool.width)
    label = jax.jit(
        functools.partial(
            soft_labels,
            net.logits,
            prepare=setup.prepare,
            temperature=setup.config.eval.temperature,
            chunk=setup.config.run.pass_size,
        )
    )
    return np.asarray(label(teachers["trained"], jnp.asarray(images)))


# ---------------------------------------------------------------------------- evaluation


def _evaluate(setup: Setup) -> list[dict]:
    """Trains fresh networks on every artefact, keeps the records, prints the table."""
    config, data = setup.config.eval, setup.dataset
    protocol = train_on.Protocol(config.epochs, config.batch, config.rate, strategy=config.strategy)
    protocol_hash = _hash([*protocol, setup.config.model.to_dict(), config.temperature])
    methods = _rows(setup.config)
    wanted = [
        results.Cell(network, method, labels, seed, protocol_hash)
        for network in config.architectures
        for method in methods
        for labels in (("hard", "soft") if config.soft_labels else ("hard",))
        for seed in range(config.seeds)
    ]
    # Once, for programs are compiled anew for other functions.
    networks = {name: _judge(_architecture(setup, name)) for name in config.architectures}
    measured = _gather(setup)
    missing = [cell for cell in wanted if cell not in measured]
    # All processes wait in here, so it is not for one that happens to need it.
    teachers = _pool(setup) if any(_lacks_labels(setup, cell) for cell in missing) else None
    # Networks that differ in their seed alone train together, and each process takes a part.
    same = [list(g) for _, g in itertools.groupby(missing, lambda c: c._replace(seed=0))]
    size = train_on.together()
    groups = processes.mine([g[i : i + size] for g in same for i in range(0, len(g), size)])
    bar = Progress(sum(map(len, groups)), 0, "evaluating") if groups else None
    for group in groups:
        try:
            network = networks[group[0].network]
            _measure(setup, network, teachers, protocol, group, measured, bar)
        except Interrupted as stop:
            kept = sum(cell in measured for cell in wanted)
            raise Interrupted(
                f"stopped while evaluating; {kept} of {len(wanted)} networks are measured"
            ) from stop
    if bar is not None:
        bar.close()
    measured = _gather(setup)
    records = [cell._asdict() | measured[cell] for cell in wanted]
    if not processes.is_first():
        return records
    for method in methods:
        _record_in_card(setup, method, [r for r in records if r["method"] == method])
    where = f"{data.name}, {config.epochs} epochs, {len(data.test.labels)} test images"
    print(f"{where}: accuracy in %, mean ± std over {config.seeds} seeds, last epoch")
    print(results.table(records))
    return records


def _results(setup: Setup) -> Path:
    """Where this process writes what it measures."""
    part = "" if processes.is_first() else f"-{jax.process_index()}"
    return setup.workdir / f"results{part}.json"


def _gather(setup: Setup) -> dict[results.Cell, dict]:
    """All that is measured, by every process of this start and of earlier ones."""
    processes.wait("results are written")
    parts = sorted(setup.workdir.glob("results-*.json"))
    measured = results.read(setup.workdir / "results.json")
    for part in parts:
        measured |= results.read(part)
    processes.wait("results are read")
    if parts and processes.is_first():
        results.write(setup.workdir / "results.json", measured)
        for part in parts:
            part.unlink()
    processes.wait("results are gathered")
    return measured


def _lacks_labels(setup: Setup, cell: results.Cell) -> bool:
    """Whether a measurement needs soft labels that the artefact does not have."""
    if cell.labels != "soft":
        return False
    return artifact.load(_folder(setup, cell.method) / "artifacts").soft_labels is None


def _measure(
    setup: Setup,
    network: train_on.Network,
    teachers: dict | None,
    protocol: train_on.Protocol,
    group: Sequence[results.Cell],
    measured: dict[results.Cell, dict],
    bar: Progress,
) -> None:
    """Trains the networks of some cells, which differ in the seed alone, and measures them."""
    data, (cell, *_) = setup.dataset, group
    distilled = artifact.load(_folder(setup, cell.method) / "artifacts")
    targets = train_on.one_hot(distilled.labels, data.num_classes)
    if cell.labels == "soft":
        soft = distilled.soft_labels
        if soft is None:
            soft = _soft_labels(setup, teachers, distilled.images)
        targets = jnp.asarray(soft)
    passes = {"prepare": setup.prepare, "chunk": setup.config.run.pass_size}
    before = bar.done
    start = time.perf_counter(), time.process_time()
    params = train_on.train_many(
        jnp.stack([jax.random.key(cell.seed) for cell in group]),
        network,
        jnp.asarray(distilled.images),
        targets,
        protocol=protocol,
        on_block=lambda part: bar.update(before + part * len(group), {}),
        should_stop=setup.should_stop,
        **passes,
    )
    test_images, test_labels = (jnp.asarray(x) for x in data.test)
    for row, cell in enumerate(group):
        one = jax.tree.map(lambda x, row=row: x[row], params)
        accuracy = train_on.accuracy(network, one, test_images, test_labels, **passes)
        measured[cell] = {
            "accuracy": accuracy,
            "images": len(distilled.labels),
            "epochs": protocol.epochs,
            # Of the networks trained together.
            "wall_seconds": round(time.perf_counter() - start[0], 2),
            "cpu_seconds": round(time.process_time() - start[1], 2),
        }
        bar.update(bar.done, {"accuracy": accuracy})
    results.write(_results(setup), measured)


def _record_in_card(setup: Setup, method: str, records: list[dict]) -> None:
    folder = _folder(setup, method) / "artifacts"
    distilled = artifact.load(folder)
    if distilled.card["accuracies"] != records:
        distilled.card["accuracies"] = records
        artifact.save(folder, distilled)
