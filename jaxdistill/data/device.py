"""Examples held on the devices, and batches drawn there from a key.

Examples are trees of arrays: images, captions as ids, two tokenizations of one text. Numbers stay
as they are stored, such as uint8, and nothing crosses from the host after the upload.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.data.dataset import class_sizes
from jaxdistill.errors import InputError
from jaxdistill.method import Batch, BatchSpec

# Far from the small numbers that splitting a key folds into it: other keys than those of `choose`.
_KEYS = 0x6B657973
# What `draw` puts beside the examples of a uniform batch.
_RESERVED = ("labels", "keys")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["examples", "starts", "counts"],
    meta_fields=["shapes", "largest", "labelled"],
)
@dataclass(frozen=True, eq=False)
class Resident:
    """A pytree of arrays in which the examples lie class by class, so that devices can divide them.

    Attributes:
        examples: A dict, or a tree of dicts, of arrays (shards, m, ...). A shard has the examples
            of some consecutive classes, one class after the other, filled up to the length of the
            longest shard. The numbers of an example are one axis, whatever its shape: TPUs would
            pad a last axis of one or three channels to 128.
        starts: int32 (classes,). Where each class begins in its shard.
        counts: int32 (classes,). Examples of each class; one class where there are no labels.
        shapes: The shape of one example in each array, in the order of the tree's leaves.
        largest: Examples of the largest class.
        labelled: Whether the classes mean something.

    Programs are compiled from shapes alone, so the arrays may be those.
    """

    examples: Any
    starts: Any
    counts: Any
    shapes: tuple[tuple[int, ...], ...]
    largest: int
    labelled: bool = True


@partial(jax.tree_util.register_dataclass, data_fields=["batches"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Window:
    """The batches of some consecutive steps, sent to the devices; see `data.stream`.

    Attributes:
        batches: What `draw` gives, less the keys, with a leading axis of steps. In the program of
            one device, its part.
    """

    batches: Any


def resident(
    examples: Mapping[str, PyTree],
    labels: Int[np.ndarray, " n"] | None = None,
    num_classes: int | None = None,
) -> Resident:
    """Arranges examples by class, on the host; `runner.run` uploads them.

    Args:
        examples: Arrays by name, each with a leading axis of the same N examples.
        labels: Class ids (N,), where there are classes.
        num_classes: Number of classes, where there are labels; each class must occur.

    Raises:
        InputError: If the arrays are not of one length or a name is taken, a class is empty, or a
            label is out of range.
    """
    own, classes = checked_labels(examples, labels, num_classes)
    counts, order = class_sizes(own, classes), np.argsort(own, kind="stable")

    def arrange(array):
        rows = np.asarray(array)[order]
        return (rows.reshape(len(rows), -1) if rows.ndim > 2 else rows)[None]

    shapes = tuple(x.shape[1:] for x in jax.tree.leaves(dict(examples)))
    made = jax.tree.map(arrange, dict(examples))
    starts = (np.cumsum(counts) - counts).astype(np.int32)
    return Resident(made, starts, counts, shapes, int(counts.max()), labels is not None)


def divided(data: Resident, shards: int) -> Resident:
    """The same examples in some shards of equally many classes; nothing is drawn otherwise.

    Args:
        data: In one shard; shapes alone are taken for classes of equal size.
        shards: How many; a divisor of the number of classes.
    """
    classes, (first, *_) = data.counts.shape[0], jax.tree.leaves(data.examples)
    if shards == 1:
        return data
    if isinstance(data.counts, jax.ShapeDtypeStruct):
        longest = -(-first.shape[1] // shards)

        def shape(x):
            return jax.ShapeDtypeStruct((shards, longest, *x.shape[2:]), x.dtype)

        return replace(data, examples=jax.tree.map(shape, data.examples))
    counts = np.asarray(data.counts)
    edges = np.cumsum([0, *counts])[:: classes // shards]
    longest = int(np.diff(edges).max())

    def cut(x):
        out = np.zeros((shards, longest, *x.shape[2:]), x.dtype)
        for shard, (begin, end) in enumerate(itertools.pairwise(edges)):
            out[shard, : end - begin] = x[0, begin:end]
        return out

    starts = np.asarray(data.starts) - np.repeat(edges[:-1], classes // shards)
    return replace(data, examples=jax.tree.map(cut, data.examples), starts=starts.astype(np.int32))


def resident_shapes(
    examples: Mapping[str, PyTree], classes: int, largest: int, count: int, labelled: bool = True
) -> Resident:
    """The shapes of `resident`, for programs that are compiled without the data.

    Args:
        examples: `jax.ShapeDtypeStruct`s of one example, by name.
        classes: Number of classes, 1 where there are no labels.
        largest: Examples of the largest class.
        count: Examples of all classes.
        labelled: Whether there are labels.
    """

    def arrange(x):
        shape = (math.prod(x.shape),) if len(x.shape) > 1 else x.shape
        return jax.ShapeDtypeStruct((1, count, *shape), x.dtype)

    numbers = jax.ShapeDtypeStruct((classes,), jnp.int32)
    shapes = tuple(x.shape for x in jax.tree.leaves(dict(examples)))
    made = jax.tree.map(arrange, dict(examples))
    return Resident(made, numbers, numbers, shapes, largest, labelled)


def checked_labels(
    examples: Mapping[str, PyTree],
    labels: Int[np.ndarray, " n"] | None,
    num_classes: int | None,
) -> tuple[Int[np.ndarray, " n"], int]:
    """The labels and the number of classes of examples; all are of one class where there is none.

    Raises:
        InputError: If the arrays are not of one length, or a name is taken.
    """
    lengths = {len(x) for x in jax.tree.leaves(dict(examples))}
    if labels is not None:
        lengths.add(len(labels))
    if len(lengths) != 1:
        raise InputError(
            f"examples are arrays of one length, not of {sorted(lengths) or 'none'}; give each "
            "array, and the labels, a row for every example"
        )
    if taken := [name for name in _RESERVED if name in examples]:
        raise InputError(f"examples are called {taken[0]}, which batches have beside; rename them")
    if labels is None:
        return np.zeros(*lengths, np.int32), 1
    return labels, num_classes


def check(spec: BatchSpec, data: Any, class_names: Sequence[str] | None = None) -> None:
    """Makes sure at set-up that the data can fill the batches.

    Args:
        spec: What a step wants.
        data: Where it is drawn from, a `Resident` or a `Stream`; an empty tuple where nothing is.
        class_names: For the message; the class ids by default.

    Raises:
        InputError: If the batch is empty, there are no data, there are no classes to take it from,
            or no class has that many examples.
    """
    if spec.size < 1 and spec.kind != "none":
        raise InputError(f"a {spec.kind} batch of {spec.size} examples; ask for at least one")
    if spec.kind in ("keys", "none"):
        return
    if not hasattr(data, "counts"):
        raise InputError(
            f"the method takes {spec.kind} batches; give it the data to draw them from"
        )
    if spec.kind == "per_class" and not data.labelled:
        raise InputError("the method takes examples of each class; give it data with labels")
    counts = np.asarray(data.counts)
    largest = int(counts.argmax())
    if spec.kind == "per_class" and counts[largest] < spec.size:
        name = largest if class_names is None else class_names[largest]
        raise InputError(
            f"class '{name}', the largest, has {counts[largest]} examples, the batch asks for "
            f"{spec.size} of each class; lower it to {counts[largest]} or less"
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
    alone; a class of fewer examples gives them all, again and again in one order. Those of a
    `uniform` batch are independent: an example may occur twice.

    Args:
        spec: What is wanted; see `check`.
        data: Where it is drawn from. In the program of one device, the classes it holds.
        key: Decides the draw.
        part: `(index, number)` for one of `number` equal slices of the batch that the same key
            gives as a whole. The number must divide the size.
        row: Which of the batches of a window; key and part have had their say there.

    Returns:
        For `per_class` the tree of examples, with leading axes (classes, size); for `uniform` the
        examples with a leading axis (size,), and beside them `labels`, int32 (size,), where there
        are classes, and `keys` (size,); for `keys` a dict of these alone; for `none` an empty
        tuple.
    """
    if spec.kind == "none":
        return ()
    if spec.kind == "per_class":
        return _examples(spec, data, key, part, row)
    keys = {"keys": _slice(jax.random.split(jax.random.fold_in(key, _KEYS), spec.size), part)}
    return keys if spec.kind == "keys" else _examples(spec, data, key, part, row) | keys


def _examples(spec, data, key, part, row):
    if isinstance(data, Window):
        return jax.tree.map(lambda x: x[row], data.batches)
    leaves, structure = jax.tree.flatten(data.examples)
    labels, columns = choose(spec, jnp.asarray(data.counts), data.largest, key)
    labels, columns = (_slice(x, part) for x in (labels, columns))
    places = jnp.asarray(data.starts)[labels] + columns
    drawn = [
        jnp.asarray(x)[0, places].reshape(*columns.shape, *shape)
        for x, shape in zip(leaves, data.shapes, strict=True)
    ]
    examples = jax.tree.unflatten(structure, drawn)
    return examples | {"labels": labels} if spec.kind == "uniform" and data.labelled else examples


def choose(
    spec: BatchSpec, counts: Int32[Array, " c"], columns: int, key: PRNGKeyArray
) -> tuple[Int32[Array, "*batch"], Int32[Array, "*batch"]]:
    """Which examples a batch consists of.

    Args:
        spec: What is wanted.
        counts: Examples of each class.
        columns: Length of the longest class.
        key: Decides the draw.

    Returns:
        For each example its class, counted from the first in `counts`, and its position among
        those of the class: (classes, size) for `per_class`, (size,) for `uniform`.
    """
    if spec.kind == "uniform":
        ends = jnp.cumsum(counts)
        chosen = jax.random.randint(key, (spec.size,), 0, ends[-1], jnp.int32)
        labels = jnp.searchsorted(ends, chosen, side="right").astype(jnp.int32)
        return labels, chosen - (ends - counts)[labels]
    # The columns with the largest random marks: a draw without replacement, by partial sorting.
    classes = counts.shape[0]
    keys = collective.class_keys(key, classes)
    marks = jax.vmap(lambda k: jax.random.uniform(k, (columns,), jnp.float32))(keys)
    real = jnp.arange(columns) < counts[:, None]
    chosen = jax.lax.top_k(jnp.where(real, marks, -1.0), spec.size)[1]
    # Behind the real ones, where they are too few, they begin anew.
    again = jnp.arange(spec.size) % counts[:, None]
    chosen = jnp.take_along_axis(chosen, again, axis=1)
    labels = jnp.broadcast_to(jnp.arange(classes, dtype=jnp.int32)[:, None], chosen.shape)
    return labels, chosen


def _slice(indices: Array, part: tuple[Array | int, int]) -> Array:
    index, number = part
    size = indices.shape[-1] // number
    return jax.lax.dynamic_slice_in_dim(indices, index * size, size, axis=-1)
