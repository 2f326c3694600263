"""The family that distils images with sentences: many pairs in, a few synthetic ones out."""

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill.data import captions, sources
from jaxdistill.data.augment import normalizer, parse
from jaxdistill.data.captions import CAPTIONS, HASHED, Captioned, Captions, Texts
from jaxdistill.data.dataset import statistics
from jaxdistill.errors import Diverged, InputError, Interrupted
from jaxdistill.eval import train_pairs
from jaxdistill.interrupt import ShouldStop
from jaxdistill.io import pairs, weights
from jaxdistill.io.files import expanded
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count, Folder, Natural, Rate
from jaxdistill.nn.classifiers import CLASSIFIERS
from jaxdistill.parallel import processes
from jaxdistill.settings import Experiment, Parallel, Row, Run, digest
from jaxdistill.task import PairsTask, Part
from jaxdistill.tasks import Loaded
from jaxdistill.tasks import mesh as mesh  # of this family, as of most

ROOM = "jaxdistill.pairs"
ARTEFACT = f"{pairs.NAME}.safetensors"
DATASETS = sources.NAMES


class Data(NamedTuple):
    """Where the pairs come from.

    Attributes:
        name: A labelled data set, of whose images grids with descriptions are made, or a folder
            with `captions.jsonl`; see `jaxdistill.data.captions`.
        data_dir: Where a named data set lies.
        image_size: Pixels that images are brought to.
        train: Images that are distilled; of a folder, at most so many, as for the others.
        validation: Images that settings are chosen on.
        test: Images that are retrieved.
        seed: Decides the grids.
        judge_by_validation: Whether retrieval is measured on the validation split instead, for
            choosing settings.
    """

    name: str
    data_dir: Folder = None
    image_size: Annotated[int | None, Between(1, 10**5)] = None
    train: Count = 10_000
    validation: Count = 1000
    test: Count = 1000
    seed: Natural = 0
    judge_by_validation: bool = False


class Text(NamedTuple):
    """How sentences become vectors; nothing of it is trained.

    Attributes:
        encoder: `hashed`, or the path of a `.npy` with a vector for every sentence of a folder.
        dim: Length of a vector of `hashed`.
    """

    encoder: str = HASHED
    dim: Annotated[int, Between(2, 2**20)] = 1024


class Observer(NamedTuple):
    """The towers that are trained on all pairs, by which methods look at images and texts.

    Attributes:
        dir: Where they are kept; by default `observers` in the workdir.
        size: How many.
        network: One of `jaxdistill.nn.classifiers.CLASSIFIERS`.
        depth: Blocks of the ConvNet, which the others have not to choose; each halves the image.
        width: Channels.
        norm: Its normalization; see `jaxdistill.nn.norm.Norm`.
        dim: Length of a vector of the common space.
        steps: How long each is trained.
        batch_size: Pairs a step.
        learning_rate: Adam's learning rate, which falls to zero by a cosine.
        strategy: Augmentation; see `jaxdistill.data.augment`.
    """

    dir: Folder = None
    size: Annotated[int, Between(1, 1000)] = 2
    network: Literal[CLASSIFIERS] = "convnet"
    depth: Annotated[int, Between(1, 16)] = 3
    width: Annotated[int, Between(1, 2**14)] = 64
    norm: str = "instance"
    dim: Annotated[int, Between(2, 2**14)] = 128
    steps: Count = 2000
    batch_size: Annotated[int, Between(2, 10**6)] = 128
    learning_rate: Rate = 1e-3
    strategy: str = "crop_cutout"


class Settings(NamedTuple):
    """The groups of a config of this family."""

    data: Data
    text: Text
    observer: Observer
    parallel: Parallel
    run: Run


class Retrieved(NamedTuple):
    """What evaluations look at.

    Attributes:
        train: The pairs that are distilled.
        train_texts: Their sentences as vectors.
        test: The pairs that are retrieved.
        test_texts: Their sentences as vectors.
        mean: Of each channel of the training images, on the [0, 1] scale.
        std: Their deviation.
        encoder: What identifies the encoder of the sentences.
    """

    train: Captions
    train_texts: Texts
    test: Captions
    test_texts: Texts
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encoder: dict[str, Any]


def load(experiment: Experiment, workdir: Path, should_stop: ShouldStop) -> Loaded:
    """Reads the pairs, and prepares the observers to be read or trained when they are wanted.

    Raises:
        InputError: If the data cannot be read, or the settings do not fit them.
    """
    groups = experiment.groups
    data = _read(groups.data)
    parse(groups.observer.strategy)
    judged = data.validation if groups.data.judge_by_validation else data.test
    encode = functools.partial(
        captions.encoded, encoder=groups.text.encoder, dim=groups.text.dim, count=data.sentences
    )
    texts, asked = encode(data.train), encode(judged)
    mean, std = statistics(data.train.images)
    train = {"images": data.train.images, "texts": texts.vectors, "counts": texts.counts}
    task = _task(groups, data.name, jax.tree.map(_shape, train), normalizer(mean, std))
    known = {"source_sha256": data.train.fingerprint(), "texts_sha256": texts.fingerprint()}
    tested = {"test_sha256": judged.fingerprint(), "test_texts_sha256": asked.fingerprint()}
    encoder = {"name": groups.text.encoder, "dim": task.text_dim}
    retrieved = Retrieved(data.train, texts, judged, asked, mean, std, encoder)

    @functools.cache
    def observers():
        return _observers(groups.observer, task, train, known, workdir, should_stop)

    task = task._replace(
        train=task.train._replace(load=lambda: train),
        observers=task.observers._replace(load=observers),
    )
    return Loaded(task, retrieved, known | tested)


def shapes(experiment: Experiment) -> PairsTask:
    """The task without its observers: enough to compile a method for it.

    The pairs are read or made, for their number and the most sentences of an image follow from
    them.

    Raises:
        InputError: If the data cannot be read.
    """
    groups = experiment.groups
    data = _read(groups.data)
    texts = captions.encoded(data.train, groups.text.encoder, groups.text.dim, data.sentences)
    train = {"images": data.train.images, "texts": texts.vectors, "counts": texts.counts}
    normalize = normalizer(*statistics(data.train.images))
    return _task(groups, data.name, jax.tree.map(_shape, train), normalize)


def save(
    folder: Path, experiment: Experiment, loaded: Loaded, row: Row, output: PyTree, card: dict
) -> None:
    """Writes the distilled pairs; see `jaxdistill.io.pairs`."""
    del row
    data, texts = loaded.data, np.asarray(output["texts"])
    similarity = None if "similarity" not in output else np.asarray(output["similarity"])
    card = {
        "encoder": data.encoder,
        "mean": list(data.mean),
        "std": list(data.std),
        "captions": nearest(texts, data.train, data.train_texts),
        "seeds": {"pairs": experiment.seed},
    } | card
    made = pairs.DistilledPairs(np.asarray(output["images"]), texts, similarity, card)
    pairs.save(folder, made)


def read(folder: Path, shapes: PyTree) -> tuple[pairs.DistilledPairs, dict]:
    """The distilled pairs of a folder, and their card.

    Args:
        folder: Where they lie.
        shapes: What their method puts out.

    Raises:
        InputError: If there are none, or they are another's.
    """
    made = pairs.load(folder)
    for name in ("images", "texts", "similarity"):
        have, want = (
            None if x is None else x.shape for x in (getattr(made, name), shapes.get(name))
        )
        if have != want:
            raise InputError(
                f"{folder} holds {name} of shape {have}, this run's are {want}; use another workdir"
            )
    return made, made.card


def nearest(vectors: np.ndarray, known: Captions, texts: Texts) -> list[str]:
    """The training sentence nearest to each text by its cosine, to be shown; the first of several.

    Args:
        vectors: The texts.
        known: Training pairs.
        texts: Their sentences as vectors.
    """
    own = texts.vectors / np.maximum(np.linalg.norm(texts.vectors, axis=-1, keepdims=True), 1e-12)
    most = own.shape[1]
    # Repeats are as near as what they repeat, which comes first.
    best = (vectors @ own.reshape(-1, own.shape[-1]).T).argmax(1).tolist()
    return [known.sentences[i // most][i % most % len(known.sentences[i // most])] for i in best]


# ---------------------------------------------------------------------------- parts


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _read(settings: Data) -> Captioned:
    numbers = {name: getattr(settings, name) for name in captions.SPLITS}
    own = expanded(settings.name)
    if (own / CAPTIONS).is_file():
        for name in ("seed", "data_dir"):
            if getattr(settings, name) != Data._field_defaults[name]:
                raise InputError(f"data.{name} means nothing for pairs of a folder; leave it")
        return captions.folder(own, **numbers, image_size=settings.image_size)
    images = sources.load(settings.name, data_dir=settings.data_dir, image_size=settings.image_size)
    return captions.grid(images, **numbers, seed=settings.seed)


def _task(groups: Settings, name: str, train: PyTree, normalize: Any) -> PairsTask:
    count, *shape = train["images"].shape
    settings, text_dim = groups.observer, train["texts"].shape[-1]
    kind = settings.network, settings.depth, settings.width, settings.norm
    observer = train_pairs.fresh(tuple(shape), text_dim, settings.dim, *kind)
    one = jax.eval_shape(observer.init, jax.random.key(0))
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((settings.size, *x.shape), x.dtype), one)
    return PairsTask(
        name,
        tuple(shape),
        text_dim,
        count,
        normalize,
        observer,
        Part(many),
        Part(train),
        Part(),
        groups.run.microbatch,
    )


def _observers(settings, task, train, known, workdir, should_stop) -> PyTree:
    """The observers that the folder holds, and those that are missing, trained."""
    protocol = train_pairs.Protocol(
        settings.steps,
        settings.batch_size,
        settings.learning_rate,
        strategy=settings.strategy,
    )
    folder = expanded(settings.dir) if settings.dir else workdir / "observers"
    kind = {k: v for k, v in settings._asdict().items() if k not in ("dir", "size")}
    identity = digest([kind, [*protocol], known])
    shapes = jax.eval_shape(task.towers.init, jax.random.key(0))
    names = [f"{identity}-{i}" for i in range(settings.size)]
    missing = [n for n in names if not (folder / f"{n}.safetensors").is_file()]
    processes.wait("before observers are trained")
    own = processes.mine(missing)
    bar = Progress(len(own), 0, "training observers") if own else None
    for done, name in enumerate(own):
        try:
            params = train_pairs.train(
                jax.random.key(1000 + names.index(name)),
                task.towers,
                train_pairs.Pairs(**train),
                normalize=task.normalize,
                protocol=protocol,
                on_block=lambda part, done=done: bar.update(done + part, {}),
                should_stop=should_stop,
            )
            weights.save(folder, name, jax.device_get(params), {"of": "observer"})
        except Interrupted as stop:
            raise Interrupted(
                f"stopped while training observers; {settings.size - len(missing) + done} of "
                f"{settings.size} are kept"
            ) from stop
        except Diverged as error:
            raise Diverged(f"{error}: observer.learning_rate={settings.learning_rate:g}") from error
    if bar is not None:
        bar.close()
    processes.wait("the observers are trained")
    members = []
    for name in names:
        params, _ = weights.load(folder, name)
        weights.check_shapes(str(folder / name), params, shapes)
        members.append(params)
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *members)
