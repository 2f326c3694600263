"""A data set held on the devices, and batches drawn there from a key.

The images stay uint8, and nothing crosses from the host after they have been uploaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PRNGKeyArray

from jaxdistill import collective
from jaxdistill.data.dataset import Split, per_class_table
from jaxdistill.errors import InputError
from jaxdistill.method import Batch, BatchSpec

# Far from the small numbers that splitting a key folds into it: other keys than those of `choose`.
_KEYS = 0x6B657973


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pixels", "counts"],
    meta_fields=["image_shape"],
)
@dataclass(frozen=True, eq=False)
class Resident:
    """A pytree of arrays whose leading axis is the class, so that devices can divide the classes.

    Attributes:
        pixels: uint8 (classes, m, H * W * C). The images, one a row: TPUs would pad a last axis of
            one or three channels to 128. Shorter classes start over up to the longest's length.
        counts: int32 (classes,). Images of each class.
        image_shape: (H, W, C).

    Programs are compiled from shapes alone, so the arrays may be those.
    """

    pixels: Any
    counts: Any
    image_shape: tuple[int, int, int]


@partial(jax.tree_util.register_dataclass, data_fields=["batches"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Window:
    """The batches of some consecutive steps, sent to the devices; see `data.stream`.

    Attributes:
        batches: What `draw` gives, with a leading axis of steps. In the program of one device, its
            part.
    """

    batches: Any


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


def check(spec: BatchSpec, data: Any, class_names: Sequence[str] | None = None) -> None:
    """Makes sure at set-up that the data can fill the batches.

    Args:
        spec: What a step wants.
        data: Where it is drawn from, a `Resident` or a `Stream`; an empty tuple where nothing is.
        class_names: For the message; the class ids by default.

    Raises:
        InputError: If the batch is empty, there are no data, or a class has too few images.
    """
    if spec.size < 1 and spec.kind != "none":
        raise InputError(f"a {spec.kind} batch of {spec.size} examples; ask for at least one")
    if spec.kind in ("keys", "none"):
        return
    if not hasattr(data, "counts"):
        raise InputError(
            f"the method takes {spec.kind} batches; give it the data to draw them from"
        )
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
    data: Resident | Window | tuple[()],
    key: PRNGKeyArray,
    part: tuple[Int32[Array, ""] | int, int] = (0, 1),
    row: Int32[Array, ""] | int = 0,
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
        row: Which of the batches of a window; key and part have had their say there.

    Returns:
        For `per_class` uint8 (classes, size, H, W, C); for `uniform` a dict of `images`, uint8
        (size, H, W, C), `labels`, int32 (size,), and `keys` (size,); for `keys` a dict of these
        alone; for `none` an empty tuple.
    """
    if spec.kind == "none":
        return ()
    if spec.kind == "per_class":
        return _images(spec, data, key, part, row)
    keys = {"keys": _slice(jax.random.split(jax.random.fold_in(key, _KEYS), spec.size), part)}
    return keys if spec.kind == "keys" else _images(spec, data, key, part, row) | keys


def _images(spec, data, key, part, row):
    if isinstance(data, Window):
        return jax.tree.map(lambda x: x[row], data.batches)
    data = jax.tree.map(jnp.asarray, data)
    labels, columns = choose(spec, data.counts, data.pixels.shape[1], key)
    labels, columns = (_slice(x, part) for x in (labels, columns))
    images = data.pixels[labels, columns].reshape(*columns.shape, *data.image_shape)
    return images if spec.kind == "per_class" else {"images": images, "labels": labels}


def choose(
    spec: BatchSpec, counts: Int32[Array, " c"], columns: int, key: PRNGKeyArray
) -> tuple[Int32[Array, "*batch"], Int32[Array, "*batch"]]:
    """Which images a batch consists of.

    Args:
        spec: What is wanted.
        counts: Images of each class.
        columns: Length of the longest class.
        key: Decides the draw.

    Returns:
        For each image its class, counted from the first in `counts`, and its position among the
        images of the class: (classes, size) for `per_class`, (size,) for `uniform`.
    """
    if spec.kind == "uniform":
        ends = jnp.cumsum(counts)
        chosen = jax.random.randint(key, (spec.size,), 0, ends[-1])
        labels = jnp.searchsorted(ends, chosen, side="right").astype(jnp.int32)
        return labels, chosen - (ends - counts)[labels]
    # The columns with the largest random marks: a draw without replacement, by partial sorting.
    classes = counts.shape[0]
    keys = collective.class_keys(key, classes)
    marks = jax.vmap(lambda k: jax.random.uniform(k, (columns,)))(keys)
    real = jnp.arange(columns) < counts[:, None]
    chosen = jax.lax.top_k(jnp.where(real, marks, -1.0), spec.size)[1]
    labels = jnp.broadcast_to(jnp.arange(classes, dtype=jnp.int32)[:, None], chosen.shape)
    return labels, chosen


def _slice(indices: Array, part: tuple[Array | int, int]) -> Array:
    index, number = part
    size = indices.shape[-1] // number
    return jax.lax.dynamic_slice_in_dim(indices, index * size, size, axis=-1)
