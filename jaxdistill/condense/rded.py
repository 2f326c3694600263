"""RDED: crops of real images that an observer finds easy, stitched into images; nothing is learned.

Sun, Shi, Yu and Lin, "On the Diversity and Realism of Distilled Dataset: An Efficient Dataset
Distillation Paradigm" (CVPR 2024). One step looks at `mipc` images of each class: of each image the
best of some random square crops is kept, and of each class the best images. The network that scores
them is frozen: the observer.
"""

import functools
import io
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, UInt8

from jaxdistill import collective
from jaxdistill.condense.coreset import feature_table
from jaxdistill.condense.crops import boxes, cut
from jaxdistill.condense.decode import check_factor
from jaxdistill.condense.synthetic import Factor, ImagesPerClass, Logits, shared_evenly
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Count, Fraction
from jaxdistill.method import CLASS_AXIS, BatchSpec, Method
from jaxdistill.task import CondenseTask, Part, Recipe

Choice = Literal["easiest", "hardest", "medium", "random"]
"""Which crops are kept: those with the least loss, as published; with the largest; with the loss
nearest to the median; or the first ones, whatever their loss."""

_LOOKED_AT = 2048  # training images by which an observer is known


class RDEDState(NamedTuple):
    """The crops chosen.

    Attributes:
        crops: uint8 (classes, n, h, w, c), the preferred first.
        losses: Cross-entropy of the observer on them (classes, n).
    """

    crops: UInt8[Array, "classes n h w c"]
    losses: Float[Array, "classes n"]


def stitch(crops: Array, ipc: int, factor: int) -> Array:
    """Crops as images of factor x factor cells.

    Args:
        crops: (factor**2 * ipc, h, w, c), sorted. Cell q of image j, row by row, gets crop
            `q * ipc + j`, so that each image has one of every block of ranks.
        ipc: Images.
        factor: Cells per side.

    Returns:
        (ipc, factor * h, factor * w, c).
    """
    _, h, w, c = crops.shape
    cells = crops.reshape(factor, factor, ipc, h, w, c).transpose(2, 0, 3, 1, 4, 5)
    return cells.reshape(ipc, factor * h, factor * w, c)


def rded(
    logits: Logits,
    *,
    normalize: Callable[[Array], Array],
    ipc: int,
    image_shape: tuple[int, int, int],
    mipc: int = 300,
    num_crop: int = 5,
    factor: int = 1,
    choice: Choice = "easiest",
    padded: bool = True,
    jpeg: bool = False,
    microbatch: int = 128,
) -> Method:
    """Builds RDED, a method of one step. `frozen` is `{"observers": params}`, of stacked networks.

    Args:
        logits: `(params, normalized images) -> logits`, of an observer. Where there are several,
            their losses are averaged.
        normalize: Images in [0, 1] to normalized images.
        ipc: Images of each class.
        image_shape: (h, w, c) of the real images, and of those put out.
        mipc: Images of each class that are looked at.
        num_crop: Crops of each of them.
        factor: Crops per side of an image that is put out.
        choice: Which crops are kept.
        padded: Whether observers see a crop in the middle of an image of full size, surrounded by
            the mean colour, as published; else they see the crop alone, in a `factor**2`-th of the
            time, and must take images of its size.
        jpeg: Whether images are put out as they come back from a JPEG file, as in the published
            code.
        microbatch: Crops in one pass of an observer, on each device.

    Returns:
        A `Method`, whose output has `images`, float32 (classes, ipc, h, w, c) in [0, 1], and
        `losses` (classes, ipc, factor**2), those of its crops, cell by cell.

    Raises:
        InputError: If the factor does not divide the images, or there are too few to choose from.
    """
    check_factor(image_shape, factor)
    number = ipc * factor**2
    if mipc < number:
        raise InputError(
            f"{ipc} images of {factor}x{factor} crops take {number} images of each class, "
            f"mipc={mipc} are looked at; raise mipc, or lower ipc or factor"
        )
    height, width, channels = image_shape
    h, w = height // factor, width // factor
    around = [((full - part) // 2, full - part - (full - part) // 2) for full, part in
              ((height, h), (width, w))]  # fmt: skip

    def losses_of(observers, crops, labels):
        x = normalize(crops)
        if padded:
            x = jnp.pad(x, ((0, 0), *around, (0, 0)))
        each = jax.vmap(
            lambda params: optax.softmax_cross_entropy_with_integer_labels(
                logits(params, x), labels
            )
        )
        return each(observers).mean(0)

    def look(observers, images, labels, keys):
        """The crop kept of each of some images, its loss, and the mean loss of all of them."""
        squares = jax.vmap(lambda k: boxes(k, height, width, num_crop))(keys)
        part = functools.partial(cut, height=h, width=w)
        crops = jax.vmap(jax.vmap(part, (None, 0)))(images, squares) / 255.0
        # As they will be stored: what is scored is what is kept.
        crops = jnp.round(jnp.clip(crops, 0.0, 1.0) * 255.0).astype(jnp.uint8)
        flat = crops.reshape(-1, h, w, channels)
        losses = losses_of(observers, flat, jnp.repeat(labels, num_crop))
        losses = losses.reshape(-1, num_crop)
        pick = _ranks(losses, choice).argmin(1)
        each = jnp.arange(len(images))
        return crops[each, pick], losses[each, pick], losses.mean(1)

    def init(key, frozen, batch):
        del key, frozen
        classes = batch["images"].shape[0]
        return RDEDState(
            jnp.zeros((classes, number, h, w, channels), jnp.uint8),
            jnp.zeros((classes, number), jnp.float32),
        )

    def step(state, frozen, batch, key):
        images = batch["images"]
        classes, own = images.shape[:2]
        # By class and by the place in the batch, so that no number of devices changes them.
        places = collective.share()[0] * own + jnp.arange(own)
        keys = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(places))(
            collective.class_keys(key, classes)
        ).reshape(-1)
        labels = jnp.repeat(collective.class_ids(classes), own)
        # Equal passes, so that no image is looked at twice.
        at_once = _divisor(classes * own, max(1, microbatch // num_crop))
        passes = lambda x: x.reshape(-1, at_once, *x.shape[1:])  # noqa: E731
        flat = images.reshape(-1, *images.shape[2:])
        looked = lax.map(
            lambda part: look(frozen["observers"], *part),
            jax.tree.map(passes, (flat, labels, keys)),
        )
        crops, mine, means = (x.reshape(classes, own, *x.shape[2:]) for x in looked)
        losses = collective.whole_batch(mine, axis=1)
        order = jnp.argsort(_ranks(losses, choice), axis=1)[:, :number]
        # Of the crops only those chosen travel, each from the device that has it.
        place = order - collective.share()[0] * own
        here = (place >= 0) & (place < own)
        kept = jnp.take_along_axis(crops, jnp.clip(place, 0, own - 1)[..., None, None, None], 1)
        kept = jnp.where(here[..., None, None, None], kept, 0)
        chosen = RDEDState(
            collective.sum(kept.astype(jnp.int32)).astype(jnp.uint8),
            jnp.take_along_axis(losses, order, 1),
        )
        del state
        return chosen, {"chosen": chosen.losses.mean(), "crops": means.mean()}

    def output(state):
        images = jax.vmap(lambda crops: stitch(crops, ipc, factor))(state.crops)
        if jpeg:
            like = jax.ShapeDtypeStruct(images.shape, jnp.uint8)
            images = jax.pure_callback(_through_jpeg, like, images)
        losses = state.losses.reshape(-1, factor**2, ipc).transpose(0, 2, 1)
        return {"images": images.astype(jnp.float32) / 255.0, "losses": losses}

    def specs(state, mesh):
        del state, mesh
        return jax.sharding.PartitionSpec(CLASS_AXIS)

    return Method(init, step, output, BatchSpec("per_class", mipc), specs)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above another."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def _ranks(losses: Float[Array, "rows n"], choice: str) -> Float[Array, "rows n"]:
    """Numbers of which the smallest are chosen."""
    if choice == "easiest":
        return losses
    if choice == "hardest":
        return -losses
    if choice == "medium":
        middle = (losses.shape[1] - 1) // 2  # one of them, for a mean of two is as far from both
        return jnp.abs(losses - jnp.sort(losses, axis=1)[:, middle : middle + 1])
    return jnp.broadcast_to(jnp.arange(losses.shape[1], dtype=jnp.float32), losses.shape)


def _through_jpeg(images: Any) -> np.ndarray:
    from PIL import Image

    def one(image):
        file = io.BytesIO()
        Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(file, "JPEG")
        return np.asarray(Image.open(file)).reshape(image.shape)

    images = np.asarray(images)  # uint8 (..., h, w, c)
    flat = images.reshape(-1, *images.shape[-3:])
    return np.stack([one(image) for image in flat]).reshape(images.shape)


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesPerClass = 1,
    factor: Factor = 1,
    mipc: Count | None = None,
    num_crop: Annotated[int, Between(1, 1000)] = 5,
    choice: Choice = "easiest",
    padded: bool = True,
    jpeg: bool = False,
    observers: Annotated[int, Between(1, 1000)] = 1,
    least_accuracy: Fraction = 0.3,
) -> Recipe:
    """RDED with the first trained extractors as observers.

    Args:
        task: What it is for.
        ipc: Images of each class.
        factor: Crops per side of an image; published: 1 up to 64 pixels, 2 from 128.
        mipc: Images of each class that are looked at; by default 300, or those of the smallest
            class, as many as eight devices share evenly.
        num_crop: Crops of each of them.
        choice: Which crops are kept.
        padded: Whether observers see a crop surrounded by the mean colour.
        jpeg: Whether images go through a JPEG file, as in the published code.
        observers: Extractors whose losses are averaged.
        least_accuracy: The fraction of training images on which each observer must be right.

    Raises:
        InputError: If the settings do not fit each other or the task; when it is read, if an
            observer does not know the data.
    """
    smallest, name = task.smallest_class
    if mipc is None:
        mipc = shared_evenly(300, smallest)
    elif mipc > smallest:
        raise InputError(
            f"method.mipc={mipc} images of each class are asked for, but class {name!r} has "
            f"{smallest} training images; lower it to {smallest} or less"
        )
    if jpeg and task.image_shape[-1] not in (1, 3):
        raise InputError("method.jpeg goes with images of one or three channels")
    pool = jax.tree.leaves(task.extractors.shapes)
    if pool and pool[0].shape[0] < observers:
        raise InputError(
            f"method.observers={observers}, but pool.size is {pool[0].shape[0]}; raise that"
        )
    if not padded and factor > 1:
        _check_small(task, factor)
    method = rded(
        task.network.logits,
        normalize=task.normalize,
        ipc=ipc,
        image_shape=task.image_shape,
        mipc=mipc,
        num_crop=num_crop,
        factor=factor,
        choice=choice,
        padded=padded,
        jpeg=jpeg,
        microbatch=task.microbatch,
    )

    def chosen(pool: PyTree) -> PyTree:
        return {"observers": jax.tree.map(lambda x: x[:observers], pool["trained"])}

    def load() -> PyTree:
        frozen, train = chosen(task.extractors.load()), task.train.load()
        check_observers(
            task.network.logits,
            frozen["observers"],
            train["images"],
            train["labels"],
            normalize=task.normalize,
            least_accuracy=least_accuracy,
            microbatch=task.microbatch,
        )
        return frozen

    shapes = jax.eval_shape(chosen, task.extractors.shapes)
    return Recipe(method, steps=1, frozen=Part(shapes, load), rates=())


def _check_small(task: CondenseTask, factor: int) -> None:
    """Refuses observers that take no images of a crop's size.

    Raises:
        InputError: In such a case.
    """
    height, width, channels = task.image_shape
    crop = jax.ShapeDtypeStruct((1, height // factor, width // factor, channels), jnp.float32)
    one = jax.eval_shape(
        lambda pool: jax.tree.map(lambda x: x[0], pool["trained"]), task.extractors.shapes
    )
    try:
        jax.eval_shape(task.network.logits, one, crop)
    except Exception as error:  # of several kinds, by the library that the network is of
        raise InputError(
            f"method.padded=false shows crops of {crop.shape[1]}x{crop.shape[2]} alone, and this "
            f"network takes images of {height}x{width}; set method.padded=true, or take one that "
            "pools whatever is left, such as extractor.network=resnet18"
        ) from error


def check_observers(
    logits: Logits,
    observers: PyTree,
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    *,
    normalize: Callable[[Array], Array],
    least_accuracy: float = 0.3,
    microbatch: int = 128,
) -> None:
    """Makes sure that observers know the data: some thousands of the images are looked at.

    Args:
        logits: `(params, normalized images) -> logits`.
        observers: Parameters, with a leading axis of observers.
        images: The training images.
        labels: Their classes.
        normalize: Images to normalized images.
        least_accuracy: The fraction of them on which each observer must be right.
        microbatch: Images in one pass.

    Raises:
        InputError: If one does not.
    """
    some = np.unique(np.linspace(0, len(labels) - 1, _LOOKED_AT).astype(int))
    seen, known = jnp.asarray(images[some]), jnp.asarray(labels[some])

    @jax.jit
    def accuracy(observer):
        options = {"normalize": normalize, "microbatch": microbatch}
        said = feature_table(logits, observer, seen, **options)
        return (said.argmax(-1) == known).mean()

    found = np.asarray(lax.map(accuracy, observers))
    if found.min() < least_accuracy:
        raise InputError(
            f"an observer is right on {100 * found.min():.1f} % of the training images, and "
            f"least_accuracy asks for {100 * least_accuracy:.1f} %; train it longer "
            "(pool.epochs), or check that its classes are in the order of the data's: observers of "
            "other programs often have them in another"
        )
