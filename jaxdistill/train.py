"""From a config to a result: distil, write the artefact, train on it, print the table.

`train` and `evaluate` are what the command line calls; a notebook calls them with the same
config. Every stage finds what an earlier start left in the workdir and goes on from there.
"""

import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from jaxdistill.data import device, sources
from jaxdistill.data.augment import normalizer, parse
from jaxdistill.errors import InputError
from jaxdistill.eval import results, train_on
from jaxdistill.interrupt import ShouldStop, never, wait
from jaxdistill.io import artifact, checkpoint
from jaxdistill.io.files import remove_leftovers, write_files
from jaxdistill.io.writers import Progress
from jaxdistill.method import Method
from jaxdistill.nn.convnet import ConvNet
from jaxdistill.nn.frequency_net import ReleasedSampleNet, ScaleNet
from jaxdistill.nn.resnet import ResNet18
from jaxdistill.nn.vgg import VGG11
from jaxdistill.parallel.backends import BACKENDS
from jaxdistill.parallel.mesh import make_mesh

METHODS = ("ncfm", "dm", *coreset.CORESETS, "start")
ARCHITECTURES = ("convnet", "resnet18", "vgg11")


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
    setup = _set_up(config, workdir)._replace(should_stop=should_stop)
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
    setup = _set_up(config, workdir)._replace(should_stop=should_stop)
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


def _identity(plain: dict) -> dict:
    """The settings that decide what is distilled, of which a workdir holds one set.

    The evaluation may be repeated with others, and how a run is carried out (`parallel`, and
    `run` but for its length) and where its extractors lie change nothing but the last bits.
    """
    kept = {k: v for k, v in plain.items() if k not in ("eval", "parallel")}
    pool = {k: v for k, v in plain["pool"].items() if k != "dir"}
    return kept | {"pool": pool, "run": {"steps": plain["run"]["steps"]}}


def _set_up(config, workdir) -> Setup:
    _check(config)
    workdir = Path(workdir)
    plain = json.loads(json.dumps(config.to_dict(), default=list))
    identity = _identity(plain)
    config_hash = _hash(identity)
    stored = workdir / "config.json"
    if stored.is_file():
        try:
            before = _identity(json.loads(stored.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
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
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the workdir {workdir}: {error.strerror}") from error
    for folder in (workdir, *workdir.glob("baselines/*")):
        remove_leftovers(folder)
        remove_leftovers(folder / "artifacts")
    write_files(
        {
            stored: functools.partial(_dump, plain),
            workdir / "versions.json": functools.partial(_dump, _versions()),
        }
    )
    return Setup(config, config_hash, workdir, dataset, normalizer(dataset.mean, dataset.std))


def _check(config) -> None:
    for name in _rows(config):
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    for name in config.eval.architectures:
        if name not in ARCHITECTURES:
            raise InputError(f"unknown network {name!r}; choose from {', '.join(ARCHITECTURES)}")
    for key in ("ipc", "factor"):
        if config.method[key] < 1:
            raise InputError(f"method.{key} is {config.method[key]}; it must be at least 1")
    check_objective(config.method.objective, config.method.alpha, config.method.beta)
    if config.parallel.backend not in BACKENDS:
        raise InputError(
            f"unknown backend {config.parallel.backend!r}; choose from {', '.join(BACKENDS)}"
        )
    _sampler(config.method)
    if config.eval.seeds < 1:
        raise InputError(f"eval.seeds is {config.eval.seeds}; it must be at least 1")
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


def _dump(tree: Any, file) -> None:
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


def _convnet(setup: Setup, width: int) -> Net:
    model, data = setup.config.model, setup.dataset
    return _net(ConvNet(data.num_classes, model.depth, width, model.norm), data.image_shape)


def _architecture(setup: Setup, name: str) -> Net:
    if name == "convnet":
        return _convnet(setup, setup.config.model.width)
    module = {"resnet18": ResNet18, "vgg11": VGG11}[name]
    return _net(module(setup.dataset.num_classes), setup.dataset.image_shape)


def _pool(setup: Setup) -> dict:
    config, model = setup.config.pool, setup.config.model
    spec = {k: v for k, v in config.to_dict().items() if k not in ("dir", "size")}
    return pool.load_or_train(
        Path(config.dir) if config.dir else setup.workdir / "pool",
        config.size,
        _judge(_convnet(setup, config.width)),
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


class _Job(NamedTuple):
    method: Method
    frozen: Any
    steps: int


def _mesh(setup: Setup) -> Mesh:
    """All devices. As many as divide the classes evenly form the class axis, if not told."""
    parallel, classes = setup.config.parallel, setup.dataset.num_classes
    by_class = parallel.class_devices
    if by_class is None:
        by_class = math.gcd(classes, jax.device_count()) if parallel.backend == "jit" else 1
    return make_mesh(class_devices=by_class)


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


def _start_pixels(config, dataset: sources.Dataset) -> jax.Array | None:
    """The stored images of another artefact, if `method.start` is the path of one."""
    if not config.start.endswith(".npz"):
        return None
    distilled = artifact.load(config.start)
    per_class = config.ipc * config.factor**2
    order = np.argsort(distilled.labels, kind="stable")
    counts = np.bincount(distilled.labels, minlength=dataset.num_classes)
    shape = distilled.images.shape[1:]
    if (
        shape != dataset.image_shape
        or len(counts) != dataset.num_classes
        or any(counts != per_class)
    ):
        raise InputError(
            f"{config.start} has {counts.min()} to {counts.max()} images of shape {shape} a class;"
            f" ipc={config.ipc} with factor={config.factor} starts from {per_class} of shape"
            f" {dataset.image_shape}"
        )
    images = distilled.images[order].reshape(-1, per_class, *shape)
    return jax.vmap(lambda x: encode(x, config.factor))(jnp.asarray(images))


def _job(setup: Setup, name: str) -> _Job:
    config, data = setup.config.method, setup.dataset
    pass_size, steps = setup.config.run.pass_size, setup.config.run.steps
    net = _convnet(setup, setup.config.pool.width)
    common = {
        "prepare": setup.prepare,
        "ipc": config.ipc,
        "factor": config.factor,
        "start": config.start,
        "pixels": _start_pixels(config, data),
        "batch_real": config.batch_real,
        "strategy": config.strategy,
        "chunk": pass_size,
    }
    images_tx = optax.adam(optax.cosine_decay_schedule(config.rate, steps, config.rate_decay))
    if name == "dm":
        return _Job(dm(net.features, net.init, images_tx, **common), (), steps)
    if name in ("ncfm", "start"):
        sampler, sampler_tx = _sampler(config)
        method = ncfm(
            net.features,
            net.logits,
            images_tx,
            sampler,
            sampler_tx,
            feature_dim=net.feature_dim,
            num_freqs=config.num_freqs,
            alpha=config.alpha,
            beta=config.beta,
            calibration=config.calibration,
            finetune_rate=config.finetune_rate,
            objective=config.objective,
            ascent_steps=config.ascent_steps,
            warmup=config.warmup,
            **common,
        )
        return _Job(method, _pool(setup), steps)
    images = jnp.asarray(data.train.images)
    features = jnp.zeros((images.shape[0], 0))
    if name != "random":
        teacher = jax.tree.map(lambda x: x[0], _pool(setup)["trained"])
        features = jax.jit(
            functools.partial(
                coreset.feature_table, net.features, prepare=setup.prepare, chunk=pass_size
            )
        )(teacher, images)
    index, counts = sources.per_class_table(data.train.labels, data.num_classes)
    table = coreset.Table(images, jnp.asarray(index), jnp.asarray(counts), features)
    return _Job(coreset.CORESETS[name](config.ipc), table, config.ipc)


def _folder(setup: Setup, name: str) -> Path:
    main = name == setup.config.method.name
    return setup.workdir if main else setup.workdir / "baselines" / name


def _distil(setup: Setup, name: str) -> None:
    """Runs one method to its artefact; nothing is done when the artefact is there."""
    folder = _folder(setup, name)
    if (folder / "artifacts" / "distilled.npz").is_file():
        return
    config, data = setup.config, setup.dataset
    resident = device.resident(data.train, data.num_classes)
    saved = checkpoint.newest_metadata(folder / "checkpoints")
    restarts, rate_factor = saved.get("restarts", 0), saved.get("rate_factor", 1.0)
    job = _job(_slowed(setup, rate_factor), name)
    key = jax.random.key(config.seed)
    began = time.perf_counter(), time.process_time()
    state = None
    if name == "start":
        # The undistilled start of the same seed: what a run of NCFM has before its first step.
        state = runner.initial_state(job.method, data=resident, frozen=job.frozen, key=key)
    while state is None:
        try:
            state = runner.run(
                job.method,
                data=resident,
                frozen=job.frozen,
                key=key,
                steps=job.steps,
                chunk=config.run.chunk,
                mesh=_mesh(setup),
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
            job = _job(_slowed(setup, rate_factor), name)
    images = np.asarray(job.method.output(state)["images"], np.float32)
    cost = {
        "steps": 0 if name == "start" else job.steps,
        # Of this process: a run that went on after an interruption shows its last part.
        "wall_seconds": round(time.perf_counter() - began[0], 2),
        "cpu_seconds": round(time.process_time() - began[1], 2),
    }
    per_class = images.shape[1]
    images = images.reshape(-1, *data.image_shape)
    soft = None
    if config.eval.soft_labels:
        soft = _soft_labels(setup, images)
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
    artifact.save(folder / "artifacts", artifact.Distilled(images, labels, soft, card))


def _slowed(setup: Setup, rate_factor: float) -> Setup:
    """The set-up with all rates of the method multiplied."""
    config = setup.config.copy_and_resolve_references()
    for name in ("rate", "sampler_rate", "finetune_rate"):
        config.method[name] *= rate_factor
    return setup._replace(config=config)


def _soft_labels(setup: Setup, images: np.ndarray) -> np.ndarray:
    net = _convnet(setup, setup.config.pool.width)
    label = jax.jit(
        functools.partial(
            soft_labels,
            net.logits,
            prepare=setup.prepare,
            temperature=setup.config.eval.temperature,
            chunk=setup.config.run.pass_size,
        )
    )
    return np.asarray(label(_pool(setup)["trained"], jnp.asarray(images)))


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
    path = setup.workdir / "results.json"
    measured = results.read(path)
    missing = [cell for cell in wanted if cell not in measured]
    networks = {name: _judge(_architecture(setup, name)) for name in config.architectures}
    test_images, test_labels = (jnp.asarray(x) for x in data.test)
    bar = Progress(len(wanted), len(wanted) - len(missing), "evaluating") if missing else None
    for number, cell in enumerate(missing, len(wanted) - len(missing) + 1):
        distilled = artifact.load(_folder(setup, cell.method) / "artifacts")
        targets = train_on.one_hot(distilled.labels, data.num_classes)
        if cell.labels == "soft":
            soft = distilled.soft_labels
            targets = jnp.asarray(_soft_labels(setup, distilled.images) if soft is None else soft)
        passes = {"prepare": setup.prepare, "chunk": setup.config.run.pass_size}
        network = networks[cell.network]
        start = time.perf_counter(), time.process_time()
        params = train_on.train(
            jax.random.key(cell.seed),
            network,
            jnp.asarray(distilled.images),
            targets,
            protocol=protocol,
            **passes,
        )
        told = f"stopped while evaluating; {number - 1} of {len(wanted)} networks are measured"
        wait(params, setup.should_stop, told)
        accuracy = train_on.accuracy(network, params, test_images, test_labels, **passes)
        measured[cell] = {
            "accuracy": accuracy,
            "images": len(distilled.labels),
            "epochs": config.epochs,
            "wall_seconds": round(time.perf_counter() - start[0], 2),
            "cpu_seconds": round(time.process_time() - start[1], 2),
        }
        results.write(path, measured)
        bar.update(number, {"accuracy": accuracy})
    if bar is not None:
        bar.close()
    records = [cell._asdict() | measured[cell] for cell in wanted]
    for method in methods:
        _record_in_card(setup, method, [r for r in records if r["method"] == method])
    where = f"{data.name}, {config.epochs} epochs, {len(data.test.labels)} test images"
    print(f"{where}: accuracy in %, mean ± std over {config.seeds} seeds, last epoch")
    print(results.table(records))
    return records


def _record_in_card(setup: Setup, method: str, records: list[dict]) -> None:
    folder = _folder(setup, method) / "artifacts"
    distilled = artifact.load(folder)
    if distilled.card["accuracies"] != records:
        distilled.card["accuracies"] = records
        artifact.save(folder, distilled)
