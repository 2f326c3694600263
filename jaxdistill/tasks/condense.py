"""The family that distils a data set: images in, a few synthetic images out."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill import experts, pool, release
from jaxdistill.data import sources
from jaxdistill.data.augment import normalizer, parse
from jaxdistill.data.dataset import per_class_table
from jaxdistill.data.device import resident_shapes
from jaxdistill.data.stream import stream, stream_shapes
from jaxdistill.errors import InputError
from jaxdistill.eval import train_on
from jaxdistill.interrupt import ShouldStop
from jaxdistill.io import artifact
from jaxdistill.io.files import expanded
from jaxdistill.keywords import Between, Count, Folder, Rate
from jaxdistill.nn.classifiers import CLASSIFIERS, classifier
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.settings import Data, Experiment, Parallel, Row, Run, digest
from jaxdistill.task import CondenseTask, Network, Part
from jaxdistill.tasks import (
    Loaded,
    image_facts,
    load_images,
    placed,
    placed_shapes,
    source_of,
)

ROOM = "jaxdistill.condense"
ARTEFACT = "distilled.npz"
DATASETS = sources.NAMES


class Extractor(NamedTuple):
    """The network that extracts features, or observes.

    Attributes:
        network: One of `jaxdistill.nn.classifiers.CLASSIFIERS`.
        depth: Blocks of a ConvNet, which other networks have not to choose; each halves the image.
        width: Channels.
        norm: Its normalization; see `jaxdistill.nn.norm.Norm`.
    """

    network: Literal[CLASSIFIERS] = "convnet"
    depth: Annotated[int, Between(1, 16)] = 3
    width: Annotated[int, Between(1, 2**14)] = 64
    norm: str = "instance"


class Pool(NamedTuple):
    """The feature extractors: pairs of an initial and a trained network.

    Attributes:
        dir: Where they are kept; by default `pool` in the workdir.
        size: How many.
        epochs: How long each is trained.
        batch_size: Images a step.
        learning_rate: SGD's learning rate.
        strategy: Augmentation; see `jaxdistill.data.augment`.
    """

    dir: Folder = None
    size: Annotated[int, Between(1, 1000)] = 4
    epochs: Count = 2
    batch_size: Count = 64
    learning_rate: Rate = 0.02
    strategy: str = "color_crop_flip_scale_rotate"


class Settings(NamedTuple):
    """The groups of a config of this family."""

    data: Data
    extractor: Extractor
    pool: Pool
    parallel: Parallel
    run: Run


def load(experiment: Experiment, workdir: Path, should_stop: ShouldStop) -> Loaded:
    """Reads the data, and prepares the extractors to be read or trained when they are wanted.

    Raises:
        InputError: If the data cannot be read, or the settings do not fit them.
    """
    groups = experiment.groups
    data = load_images(groups.data)
    if data.num_classes < 2:
        raise InputError(
            f"{data.name} has one class, and a set is distilled to tell classes apart; give data "
            "with two or more"
        )
    parse(groups.pool.strategy)
    normalize = normalizer(data.mean, data.std)
    network = _extractor(groups, data.num_classes, data.image_shape)
    counts = np.bincount(data.train.labels, minlength=data.num_classes)
    index, _ = per_class_table(data.train.labels, data.num_classes)
    train = data.train._asdict() | {"index": index, "counts": counts.astype(np.int32)}
    task = CondenseTask(
        data.name,
        data.num_classes,
        data.image_shape,
        tuple(zip(counts.tolist(), data.class_names, strict=True)),
        normalize,
        network,
        Part(
            _pool_shapes(groups.pool, network),
            functools.cache(
                lambda: _train_pool(groups, network, data, normalize, workdir, should_stop)
            ),
        ),
        Part(jax.tree.map(_shape, train), lambda: train),
        placed(groups.data, data),
        groups.run.microbatch,
        _distilled,
        functools.partial(_trajectories, groups, network, data, normalize, workdir, should_stop),
        functools.partial(_released, groups, data, workdir, should_stop),
    )
    return Loaded(task, data, source_of(data))


def shapes(experiment: Experiment) -> CondenseTask:
    """The task of a data set that need not be there: enough to compile a method for it.

    Raises:
        InputError: If nothing is known of the data set.
    """
    groups = experiment.groups
    facts = image_facts(groups.data)
    per_class, channels = facts.largest_class, facts.image_shape[-1]
    network = _extractor(groups, facts.num_classes, facts.image_shape)
    count = facts.images
    image = jax.ShapeDtypeStruct(facts.image_shape, jnp.uint8)
    train = {
        "images": jax.ShapeDtypeStruct((count, *facts.image_shape), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((count,), jnp.int32),
        "index": jax.ShapeDtypeStruct((facts.num_classes, per_class), jnp.int32),
        "counts": jax.ShapeDtypeStruct((facts.num_classes,), jnp.int32),
    }
    return CondenseTask(
        groups.data.name,
        facts.num_classes,
        facts.image_shape,
        ((per_class, "the largest"),) * facts.num_classes,
        # The statistics are numbers in the program; which ones changes nothing.
        normalizer((0.0,) * channels, (1.0,) * channels),
        network,
        Part(_pool_shapes(groups.pool, network)),
        Part(train),
        placed_shapes(groups.data, image, facts.num_classes, per_class, count),
        groups.run.microbatch,
        _distilled,
        functools.partial(_trajectory_shapes, network),
        functools.partial(_released_shapes, facts.num_classes),
    )


def mesh(
    experiment: Experiment, task: CondenseTask, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The devices of a run, all by default.

    As many as divide the classes evenly form the class axis, if the config says nothing else.
    """
    parallel, devices = experiment.groups.parallel, jax.devices() if devices is None else devices
    by_class = parallel.class_devices
    if by_class is None:
        by_class = math.gcd(task.num_classes, len(devices)) if parallel.backend == "jit" else 1
    return make_mesh(devices, class_devices=by_class)


def save(
    folder: Path, experiment: Experiment, loaded: Loaded, row: Row, output: PyTree, card: dict
) -> None:
    """Writes the distilled set; see `jaxdistill.io.artifact`."""
    data, images = loaded.data, np.asarray(output["images"])
    classes, per_class = images.shape[:2]
    # Where classes have budgets of their own, the images beyond them are nobody's.
    there = np.asarray(output.get("present", np.ones((classes, per_class), bool))).reshape(-1)
    ipc = row.settings.get("ipc", per_class)
    card = {
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "ipc": max(ipc) if isinstance(ipc, tuple) else ipc,
        "factor": row.settings.get("factor", 1),
        "seeds": {"condense": experiment.seed},
        "accuracies": [],
    } | card
    labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)[there]
    if "present" in output:
        card["counts"] = np.bincount(labels, minlength=classes).tolist()
    flat = images.reshape(-1, *images.shape[2:])[there]
    soft, learned = (
        None if name not in output else np.asarray(output[name]).reshape(len(there), -1)[there]
        for name in ("soft_labels", "learned_labels")
    )
    artifact.save(folder, artifact.Distilled(flat, labels, soft, card, learned))


def read(folder: Path, shapes: PyTree) -> tuple[artifact.Distilled, dict]:
    """The distilled set of a folder, and its card.

    Args:
        folder: Where it lies.
        shapes: What its method puts out.

    Raises:
        InputError: If there is none, or it is another's.
    """
    distilled = artifact.load(folder)
    classes, per_class, *shape = shapes["images"].shape
    counts = np.bincount(distilled.labels, minlength=classes)
    full = counts.max() == per_class if "present" in shapes else (counts == per_class).all()
    if len(counts) != classes or not full or distilled.images.shape[1:] != tuple(shape):
        raise InputError(
            f"{folder} holds images of shape {distilled.images.shape}, this run's are "
            f"{(classes * per_class, *shape)}; use another workdir"
        )
    return distilled, distilled.card


# ---------------------------------------------------------------------------- parts


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _extractor(groups: Settings, num_classes: int, image_shape: tuple[int, int, int]) -> Network:
    settings = groups.extractor._asdict()
    return classifier(settings.pop("network"), num_classes, image_shape, **settings)


def _pool_shapes(pool: Pool, network: Network) -> PyTree:
    one = jax.eval_shape(network.init, jax.random.key(0))
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((pool.size, *x.shape), x.dtype), one)
    return {"initial": many, "trained": many}


def _train_pool(groups, network, data, normalize, workdir, should_stop) -> PyTree:
    settings = groups.pool
    spec = {k: v for k, v in settings._asdict().items() if k not in ("dir", "size")}
    # Pools of the time when there was no choice of network stay valid.
    shape = {k: v for k, v in groups.extractor._asdict().items() if v != "convnet"}
    return pool.load_or_train(
        expanded(settings.dir) if settings.dir else workdir / "pool",
        settings.size,
        train_on.Network(network.init, network.logits),
        data,
        normalize=normalize,
        protocol=train_on.Protocol(
            settings.epochs,
            settings.batch_size,
            settings.learning_rate,
            strategy=settings.strategy,
            decay_at=(2 / 3, 5 / 6),
        ),
        microbatch=groups.run.microbatch,
        identity=digest([spec, shape, data.fingerprint()]),
        should_stop=should_stop,
    )


def _trajectory_shapes(network, settings, first, snapshots, of=stream_shapes) -> Part:
    """Streamed always: whole trajectories are too many for a device."""
    del first
    params = jax.eval_shape(network.init, jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(params))
    way = jax.ShapeDtypeStruct((snapshots, size), jnp.float32)
    number = settings.experts
    return Part(of({"trajectory": way}, 1, number, number, labelled=False))


def _trajectories(
    groups, network, data, normalize, workdir, should_stop, settings, first, snapshots
) -> Part:
    def load():
        protocol = train_on.Protocol(
            epochs=1,
            batch=settings.expert_batch_size,
            rate=settings.expert_learning_rate,
            momentum=0.0,
            weight_decay=0.0,
            strategy=settings.expert_strategy,
            decay_at=(),
        )
        found = experts.load_or_train(
            expanded(settings.expert_dir) if settings.expert_dir else workdir / "experts",
            settings.experts,
            train_on.Network(network.init, network.logits),
            data,
            epochs=settings.expert_epochs,
            normalize=normalize,
            protocol=protocol,
            microbatch=groups.run.microbatch,
            identity=digest(
                [
                    protocol,
                    settings.expert_epochs,
                    groups.extractor._asdict(),
                    data.fingerprint(),
                ]
            ),
            should_stop=should_stop,
        )
        return stream({"trajectory": found.since(first, snapshots)})

    shapes = _trajectory_shapes(network, settings, first, snapshots, resident_shapes).shapes
    return Part(shapes, functools.cache(load))


def _released_shapes(num_classes, settings, embedding, known) -> Part:
    del known
    leading = settings.releases, num_classes
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return Part({"sums": of((*leading, embedding.dim)), "counts": of(leading)})


def _released(groups, data, workdir, should_stop, settings, embedding, known) -> Part:
    def load():
        spec = {k: v for k, v in settings._asdict().items() if k != "release_dir"}
        own = digest([spec, known, groups.extractor._asdict(), data.fingerprint()])
        folder = expanded(settings.release_dir) if settings.release_dir else workdir / "released"
        told = "exact" if settings.epsilon is None else f"epsilon{settings.epsilon:g}"
        sums, counts = release.load_or_make(
            folder / f"{told}-{own}.npz",
            embedding,
            *data.train,
            num_classes=data.num_classes,
            releases=settings.releases,
            epsilon=settings.epsilon,
            delta=settings.delta,
            microbatch=groups.run.microbatch,
            should_stop=should_stop,
        )
        return {"sums": np.float32(sums), "counts": np.float32(counts)}

    shapes = _released_shapes(data.num_classes, settings, embedding, known).shapes
    return Part(shapes, functools.cache(load))


def _distilled(path: str) -> tuple[np.ndarray, np.ndarray]:
    distilled = artifact.load(path)
    return distilled.images, distilled.labels
