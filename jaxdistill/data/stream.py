"""A data set that stays on the host: the batches of the coming steps are sent to the devices.

For data that do not fit on the devices. The examples of a step are chosen by the same function of
the same key as from a resident set, so both give the same batches, and the step in a checkpoint
is the whole state of the stream. Grain reads ahead in threads while the devices compute.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PRNGKeyArray, PyTree

from jaxdistill.data import device
from jaxdistill.data.dataset import per_class_table
from jaxdistill.data.device import Window
from jaxdistill.method import CLASS_AXIS, DATA_AXIS, BatchSpec

_THREADS = 4


@dataclass(frozen=True, eq=False)
class Stream:
    """Examples on the host, which may be memory-mapped.

    Programs are compiled from shapes alone, so the arrays may be those.

    Attributes:
        examples: A dict, or a tree of dicts, of arrays (N, ...).
        table: int32 (classes, m). Row c lists the positions of class c, and starts over up to the
            row's length.
        counts: int32 (classes,). Examples of each class; one class where there are no labels.
        labelled: Whether the classes mean something.
    """

    examples: Any
    table: Any
    counts: Any
    labelled: bool = True


def stream(
    examples: Mapping[str, PyTree],
    labels: Int[np.ndarray, " n"] | None = None,
    num_classes: int | None = None,
) -> Stream:
    """Tabulates examples by class; the examples stay where they are.

    Args:
        examples: As `device.resident` takes them, like the rest.
        labels: Class ids (N,), where there are classes.
        num_classes: Number of classes, where there are labels.

    Raises:
        InputError: As `device.resident` does.
    """
    table, counts = per_class_table(*device.checked_labels(examples, labels, num_classes))
    return Stream(dict(examples), table, counts, labels is not None)


def stream_shapes(
    examples: Mapping[str, PyTree], classes: int, largest: int, count: int, labelled: bool = True
) -> Stream:
    """The shapes of `stream`, for programs that are compiled without the data.

    Args:
        examples: As `device.resident_shapes` takes them, like the rest.
        classes: Number of classes, 1 where there are no labels.
        largest: Examples of the largest class.
        count: Examples of all classes.
        labelled: Whether there are labels.
    """
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), dict(examples))
    table, counts = (
        jax.ShapeDtypeStruct(shape, np.int32) for shape in ((classes, largest), (classes,))
    )
    return Stream(whole, table, counts, labelled)


def window_shape(spec: BatchSpec, data: Stream, size: int = 1) -> Window:
    """The shapes of a window of some steps; those of the stream's arrays are enough."""
    shape = (len(data.counts), spec.size) if spec.kind == "per_class" else (spec.size,)
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *shape, *x.shape[1:]), x.dtype), data.examples
    )
    if spec.kind == "uniform" and data.labelled:
        batches |= {"labels": jax.ShapeDtypeStruct((size, *shape), np.int32)}
    return Window(batches)


def first_spec(spec: BatchSpec) -> PartitionSpec:
    """How `first_window` lies on the devices: each has it whole, for the classes it holds."""
    return PartitionSpec(None, CLASS_AXIS if spec.kind == "per_class" else None)


def window_spec(spec: BatchSpec) -> PartitionSpec:
    """How a `Window` lies on the devices: as the program wants its batches."""
    if spec.kind == "per_class":
        return PartitionSpec(None, CLASS_AXIS, DATA_AXIS)
    return PartitionSpec(None, (CLASS_AXIS, DATA_AXIS))


def first_window(spec: BatchSpec, data: Stream, key: PRNGKeyArray, mesh: Mesh) -> Window:
    """The batch that a method starts from, for this key."""
    source = _Source(spec, data, NamedSharding(mesh, first_spec(spec)))
    return source.window([source.read(_on_host(key))], 1)


class Windows(NamedTuple):
    """Gives windows of the number of steps asked for; see `windows`."""

    source: "_Source"
    batches: Iterator
    size: int

    def take(self, count: int) -> Window:
        """The batches of the next `count` steps, on the devices."""
        return self.source.window([next(self.batches) for _ in range(count)], self.size)


def windows(
    spec: BatchSpec, data: Stream, key: PRNGKeyArray, first: int, steps: int, size: int, mesh: Mesh
) -> Windows:
    """The batches of the steps from `first` to `steps`, in windows of up to `size`.

    Args:
        spec: What a step wants.
        data: Where it is drawn from.
        key: The root key of the run, of which the key of a step is folded.
        first: Steps done.
        steps: Length of the run.
        size: Steps in a window; a shorter one is filled up with its last batch.
        mesh: The devices.
    """
    source, host = _Source(spec, data, NamedSharding(mesh, window_spec(spec))), _on_host(key)

    def read(step):
        return source.read(jax.random.split(jax.random.fold_in(host, step))[0])

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * size)
    batches = grain.MapDataset.range(first, steps).map(read).to_iter_dataset(options)
    return Windows(source, iter(batches), size)


class _Source(NamedTuple):
    """Reads the examples that this process's devices hold, and no others."""

    spec: BatchSpec
    data: Stream
    sharding: NamedSharding

    def read(self, key: PRNGKeyArray) -> tuple[np.ndarray, PyTree]:
        """The labels of a batch, and this process's block of its examples."""
        labels, columns = _choose(self.spec, self.data.counts, self.data.table.shape[1], key)
        labels, columns = np.asarray(labels), np.asarray(columns)
        chosen = self.data.table[labels, columns]
        own = chosen[self._block(chosen.shape)]
        return labels, jax.tree.map(lambda x: x[own], self.data.examples)

    def window(self, steps: list[tuple[np.ndarray, PyTree]], size: int) -> Window:
        """Uploads the batches of some steps, the last one repeated up to `size`."""
        steps = [*steps, *[steps[-1]] * (size - len(steps))]
        labels = np.stack([labels for labels, _ in steps])
        examples = jax.tree.map(lambda *x: np.stack(x), *(examples for _, examples in steps))
        # The block begins where this process's part does.
        start = (0, *(s.start for s in self._block(labels.shape[1:])))

        def upload(block):
            rest = block.shape[labels.ndim :]
            shape, first = (*labels.shape, *rest), (*start, *(0 for _ in rest))

            def own(index):
                spans = (s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
                return block[
                    tuple(slice(a - o, b - o) for (a, b), o in zip(spans, first, strict=True))
                ]

            return jax.make_array_from_callback(shape, self.sharding, own)

        batches = jax.tree.map(upload, examples)
        if self.spec.kind == "uniform" and self.data.labelled:
            whole = jax.make_array_from_callback(labels.shape, self.sharding, lambda i: labels[i])
            batches |= {"labels": whole}
        return Window(batches)

    def _block(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The smallest block of the chosen examples of a batch that holds all of this process."""
        parts = self.sharding.addressable_devices_indices_map((1, *shape)).values()
        spans = (
            [s.indices(n)[:2] for s in axis]
            for axis, n in zip(list(zip(*parts, strict=True))[1:], shape, strict=True)
        )
        return tuple(slice(min(a for a, _ in x), max(b for _, b in x)) for x in spans)


@partial(jax.jit, static_argnums=(0, 2))
def _choose(spec, counts, columns, key):
    return device.choose(spec, counts, columns, key)


def _on_host(key: PRNGKeyArray) -> PRNGKeyArray:
    """The key on the host's own device, which is free while the others compute."""
    data = np.asarray(jax.device_get(jax.random.key_data(key)))
    try:
        place = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        place = None
    return jax.device_put(jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)), place)
