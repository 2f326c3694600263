"""What networks say of the training images while they learn half of them, and of the other half.

The images are dealt to two folds. A network learns one and is asked about it after each epoch; in
the end it is asked about the other, of which it has seen nothing. With one network a fold, every
image is judged by one that learned it and by one that did not. What they say is kept on disk, a
file a network.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from jaxdistill.condense.synthetic import in_microbatches
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.neighbours import nearest, unit
from jaxdistill.errors import Diverged, InputError, Interrupted
from jaxdistill.eval import scores, train_on
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io.files import write_files
from jaxdistill.io.reading import read_npz
from jaxdistill.io.writers import Progress
from jaxdistill.parallel import processes
from jaxdistill.pool import owed
from jaxdistill.task import Network

_SEED = 3000  # apart from those of extractors and experts


class Judgement(NamedTuple):
    """What one network says.

    Attributes:
        learned: Positions of the images that it was trained on.
        unseen: Positions of the others.
        correct: Of the learned ones after each epoch, like the next two; see `scores.Epoch`.
        margin: Their margin.
        el2n: Their error.
        probabilities: Of the unseen ones in the end, like the next two.
        gradient_norm: The norm of the last layer's gradient.
        neighbours: The unseen images whose features are nearest, the nearest first.
        square: See `scores.Moments`, as for the next two; of the unseen images.
        mean_square: The squared norm of the mean gradient of each class.
        count: Unseen images of each class.
    """

    learned: Int32[np.ndarray, " n"]
    unseen: Int32[np.ndarray, " m"]
    correct: Bool[np.ndarray, "epochs n"]
    margin: Float[np.ndarray, "epochs n"]
    el2n: Float[np.ndarray, "epochs n"]
    probabilities: Float[np.ndarray, "m c"]
    gradient_norm: Float[np.ndarray, " m"]
    neighbours: Int32[np.ndarray, "m k"]
    square: Float[np.ndarray, " c"]
    mean_square: Float[np.ndarray, " c"]
    count: Float[np.ndarray, " c"]


def folds(labels: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"]:
    """Which of two folds an image belongs to; each gets half of every class, up to an image.

    Args:
        labels: Class ids.
        seed: Of `numpy.random.default_rng`, which deals them.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % 2  # one class goes on where the one before ended
    return fold


def load_or_judge(
    folder: Path,
    runs: int,
    network: Network,
    data: Dataset,
    *,
    normalize: Callable,
    protocol: train_on.Protocol,
    microbatch: int,
    neighbours: int,
    identity: str,
    should_stop: ShouldStop = never,
) -> list[Judgement]:
    """Reads what the folder holds, and trains the networks that are missing.

    Several processes each train a part of them.

    Args:
        folder: Where judgements are kept; made when missing.
        runs: Networks of each fold; each pair of them has a split of its own.
        network: What to train.
        data: Its training split is judged.
        normalize: Images to normalized images.
        protocol: How to train.
        microbatch: Images in one pass.
        neighbours: How many of them an image gets; fewer where a fold has fewer images.
        identity: Names this kind of network, data and protocol in the file names.
        should_stop: Whether to give up the network being trained.

    Returns:
        Those of both folds of each run.

    Raises:
        Diverged: If a network did; what it says is not kept.
        InputError: If a file is damaged, or the folder cannot be written.
        Interrupted: If `should_stop` said yes; what is judged by then stays.
    """
    paths = [folder / f"{identity}-{i}.npz" for i in range(2 * runs)]
    if own := owed(paths, "judgements"):
        bar = Progress(len(own) * protocol.epochs, 0, "judging images")
        for done, i in enumerate(own):

            def on_epoch(epochs, done=done):
                bar.update(done * protocol.epochs + epochs, {})

            try:
                made = _judge(
                    i, network, data, normalize, protocol, microbatch, neighbours, on_epoch,
                    should_stop,
                )  # fmt: skip
            except Interrupted as stop:
                kept = sum(path.is_file() for path in paths)
                raise Interrupted(
                    f"stopped while judging images; {kept} of {len(paths)} networks are done"
                ) from stop
            if made is None:
                raise Diverged(
                    f"a network that was to judge the images diverged in its training; lower its "
                    f"learning rate, which is {protocol.rate:g}"
                )
            arrays = made._asdict()
            write_files({paths[i]: lambda file, arrays=arrays: np.savez(file, **arrays)})
        bar.close()
    processes.wait("the images are judged")
    return [_read(path, i, data, protocol.epochs) for i, path in enumerate(paths)]


def _fold(index: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images that a network learns, and those that it does not see."""
    fold = folds(labels, index // 2)
    return tuple(np.flatnonzero(fold == x).astype(np.int32) for x in (index % 2, 1 - index % 2))


def _judge(
    index, network, data, normalize, protocol, microbatch, neighbours, on_epoch, should_stop
) -> Judgement | None:
    images, labels = data.train
    learned, unseen = _fold(index, labels)
    trained = train_on.Network(network.init, network.logits)
    targets = train_on.one_hot(labels[learned], data.num_classes)
    seen = jnp.asarray(images[learned]), jnp.asarray(labels[learned])
    params, epochs = train_on.train_observed(
        jax.random.key(_SEED + index),
        trained,
        seen[0],
        targets,
        _observer(network, normalize, microbatch),
        seen,
        normalize=normalize,
        protocol=protocol,
        microbatch=microbatch,
        on_epoch=on_epoch,
        should_stop=should_stop,
    )
    one = jax.tree.map(lambda x: x[None], params)
    if train_on.have_diverged(one, trained, seen[0], targets, normalize=normalize)[0]:
        return None
    said = _asked(params, jnp.asarray(images[unseen]), network, normalize, microbatch)
    probabilities, features = said
    own = jnp.asarray(labels[unseen])
    near, _ = nearest(unit(features), min(neighbours, len(unseen) - 1))
    norm = scores.gradient_norm(probabilities, own, features)
    moments = jax.jit(scores.gradient_moments)(probabilities, own, features)
    return Judgement(
        learned,
        unseen,
        *epochs,
        *jax.device_get((probabilities, norm)),
        unseen[near],
        *jax.device_get(moments),
    )


@functools.cache  # a program is compiled for each function
def _observer(network: Network, normalize: Callable, microbatch: int) -> Callable:
    def observe(params, seen):
        images, labels = seen
        say = lambda part: jax.nn.softmax(network.logits(params, normalize(part)))  # noqa: E731
        return scores.epoch(in_microbatches(say, images, microbatch), labels)

    return observe


@functools.partial(jax.jit, static_argnames=("network", "normalize", "microbatch"))
def _asked(params, images, network, normalize, microbatch):
    def say(part):
        part = normalize(part)
        return jax.nn.softmax(network.logits(params, part)), network.features(params, part)

    return in_microbatches(say, images, microbatch)


def _read(path: Path, index: int, data: Dataset, epochs: int) -> Judgement:
    learned, unseen = _fold(index, data.train.labels)
    shapes = {
        "learned": learned.shape,
        "unseen": unseen.shape,
        **dict.fromkeys(("correct", "margin", "el2n"), (epochs, len(learned))),
        "probabilities": (len(unseen), data.num_classes),
        "gradient_norm": unseen.shape,
        **dict.fromkeys(("square", "mean_square", "count"), (data.num_classes,)),
    }
    dtypes = {"learned": "i4", "unseen": "i4", "neighbours": "i4", "correct": "?"}

    def check(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        kind = np.dtype(dtypes.get(name, "f4"))
        if dtype != kind or shapes.get(name, shape) != shape:
            raise InputError(f"{name} is {dtype} of shape {shape}")

    try:
        read = Judgement(**read_npz(path, Judgement._fields, check=check))
        if not (np.array_equal(read.learned, learned) and np.array_equal(read.unseen, unseen)):
            raise InputError("its images are others")
        if read.neighbours.ndim != 2 or not np.isin(read.neighbours, unseen).all():
            raise InputError("its neighbours are none of its images")
        for name, values in read._asdict().items():
            if not np.isfinite(values).all():
                raise InputError(f"{name} holds values that are not finite")
    except InputError as error:
        raise InputError(f"{path} is no judgement of this run ({error}); delete it") from error
    return read
