"""A data set held on the devices, and batches drawn there from a key.

The images stay uint8, and nothing crosses from the host after they have been uploaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PRNGKeyArray, UInt8

from jaxdistill import collective
from jaxdistill.data.sources import Split, per_class_table
from jaxdistill.errors import InputError
from jaxdistill.method import Batch, BatchSpec

_Shape = jax.ShapeDtypeStruct | jax.stages.ArgInfo


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pixels", "counts"],
    meta_fields=["image_shape"],
)
@dataclass(frozen=True, eq=False)
class Resident:
    """A pytree of arrays whose leading axis is the class, so that devices can divide the classes.

    Attributes:
        pixels: The images, one a row: TPUs would pad a last axis of one or three channels to 128.
            Shorter classes start over up to the length of the longest.
        counts: Images of each class.
        image_shape: (H, W, C).

    Programs are compiled from shapes alone, so the arrays may be those, and JAX's notes on them.
    """

    pixels: UInt8[Array | np.ndarray, "c m hwc"] | _Shape
    counts: Int32[Array | np.ndarray, " c"] | _Shape
    image_shape: tuple[int, int, int]


def resident(split: Split, num_classes: int) -> Resident:
    """Arranges a split by class, on the host; `runner.run` uploads it.

    Args:
        split: Images uint8 (N, H, W, C) and labels (N,).
        num_classes: Number of classes; each must occur.

    Raises:
        InputError: If the images are not of that form, a class is empty or a label out of range.
    """
    images, labels = split
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"images must be uint8 (N, H, W, C), not {images.dtype} of shape {images.shape}"
        )
    table, counts = per_class_table(labels, num_classes)
    return Resident(images.reshape(len(images), -1)[table], counts, images.shape[1:])


def check(
    spec: BatchSpec, data: Resident | tuple[()], class_names: Sequence[str] | None = None
) -> None:
    """Makes sure at set-up that the data can fill the batches.

    Args:
        spec: What a step wants.
        data: Where it is drawn from; an empty tuple where nothing is.
        class_names: For the message; the class ids by default.

    Raises:
        InputError: If the batch is empty, there are no data, or a class has too few images.
    """
    if spec.kind == "none":
        return
    if not isinstance(data, Resident):
        raise InputError(
            f"the method takes {spec.kind} batches; give it the data to draw them from"
        )
    if spec.size < 1:
        raise InputError(f"a {spec.kind} batch of {spec.size} images; ask for at least one")
    counts = np.asarray(data.counts)
    smallest = int(counts.argmin())
    if spec.kind == "per_class" and counts[smallest] < spec.size:
        name = smallest if class_names is None else class_names[smallest]
        raise InputError(
            f"class '{name}' has {counts[smallest]} images, the batch asks for {spec.size} of "
            f"each class; lower it to {counts[smallest]} or less"
        )


def draw(
    spec: BatchSpec,
    data: Resident | tuple[()],
    key: PRNGKeyArray,
    part: tuple[Int32[Array, ""] | int, int] = (0, 1),
) -> Batch:
    """Draws a batch. Pure, and of fixed shapes, so it can be part of a compiled step.

    The draws of a class are distinct and equally likely, and depend on the key and the class
    alone. Those of a `uniform` batch are independent: an image may occur twice.

    Args:
        spec: What is wanted; see `check`.
        data: Where it is drawn from. In the program of one device, the classes it holds.
        key: Decides the draw.
        part: `(index, number)` for one of `number` equal slices of the batch that the same key
            gives as a whole. The number must divide the size.

    Returns:
        For `per_class` uint8 (classes, size, H, W, C); for `uniform` a dict of `images`, uint8
        (size, H, W, C), and `labels`, int32 (size,); for `none` an empty tuple.
    """
    if spec.kind == "none":
        return ()
    data = jax.tree.map(jnp.asarray, data)
    if spec.kind == "uniform":
        ends = jnp.cumsum(data.counts)
        chosen = _slice(jax.random.randint(key, (spec.size,), 0, ends[-1]), part)
        labels = jnp.searchsorted(ends, chosen, side="right").astype(jnp.int32)
        position = chosen - (ends - data.counts)[labels]
        return {"images": _images(data, labels, position), "labels": labels}
    # The columns with the largest random marks: a draw without replacement, by partial sorting.
    classes, columns = data.pixels.shape[:2]
    keys = collective.class_keys(key, classes)
    marks = jax.vmap(lambda k: jax.random.uniform(k, (columns,)))(keys)
    real = jnp.arange(columns) < data.counts[:, None]
    chosen = jax.lax.top_k(jnp.where(real, marks, -1.0), spec.size)[1]
    return _images(data, jnp.arange(classes)[:, None], _slice(chosen, part))


def _slice(indices: Array, part: tuple[Array | int, int]) -> Array:
    index, number = part
    size = indices.shape[-1] // number
    return jax.lax.dynamic_slice_in_dim(indices, index * size, size, axis=-1)


def _images(data: Resident, labels: Array, positions: Array) -> Array:
    return data.pixels[labels, positions].reshape(*positions.shape, *data.image_shape)
