"""The families: what is distilled, one module each.

A family's module has its groups of settings, loads its task, or the task's shapes without data,
runs the stages that stand before a method, and saves and reads what a method puts out:

    ROOM                  the package of its methods
    ARTEFACT              the file by which a finished row is known
    DATASETS              the names of data that it knows, if there are any
    Settings              a named tuple of groups, each a named tuple of settings
    load, shapes          the task with its data, and without them
    mesh                  the devices of a run
    save, read            the artefact
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdistill.data import dataset, device, sources, stream
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.settings import Data, Experiment
from jaxdistill.task import Part


class Loaded(NamedTuple):
    """A task at hand.

    Attributes:
        task: What methods may know.
        data: The `Dataset`, of which evaluations look at the test split, or the `Target` of points.
        source: What identifies the data.
        made: What identifies that which is trained before any method: it may be trained first.
    """

    task: Any
    data: Any
    source: dict[str, Any]
    made: Callable[[], dict[str, Any]] = dict


def mesh(experiment: Experiment, task: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices of a run, all by default; they share the batch. A family may divide otherwise."""
    del experiment, task
    return make_mesh(devices)


def load_images(data: Data) -> dataset.Dataset:
    """The data set of a config; its test split is a part of the training set if some is held out.

    Raises:
        InputError: If it cannot be read.
    """
    loaded = sources.load(
        data.name, data_dir=data.data_dir, image_size=data.image_size, pad_to=data.pad_to
    )
    if data.holdout_per_class:
        return dataset.holdout(loaded, data.holdout_per_class, seed=0)
    return loaded


def source_of(data: dataset.Dataset) -> dict[str, str]:
    """What identifies a data set: hashes of both splits."""
    return {
        "source_sha256": data.train.fingerprint(),
        "test_sha256": data.test.fingerprint(),
    }


def image_facts(data: Data) -> sources.Facts:
    """What is known of a config's data set without having it.

    Raises:
        InputError: If nothing is, and it cannot be read.
    """
    facts = sources.facts(
        data.name, data_dir=data.data_dir, image_size=data.image_size, pad_to=data.pad_to
    )
    out = data.holdout_per_class
    return facts._replace(
        largest_class=facts.largest_class - out, images=facts.images - out * facts.num_classes
    )


def placed_shapes(
    settings: Data,
    example: jax.ShapeDtypeStruct,
    classes: int,
    largest: int,
    count: int,
    labelled: bool = True,
) -> Part:
    """Training examples that need not be there, where the config wants them; to compile for.

    Args:
        settings: The config's.
        example: One example.
        classes: Number of classes; one where there are no labels.
        largest: Examples of the largest class.
        count: Examples of all classes.
        labelled: Whether there are labels.
    """
    shapes = {"resident": device.resident_shapes, "streamed": stream.stream_shapes}
    of = shapes[settings.placement]
    return Part(of({"images": example}, classes, largest, count, labelled))


def placed(settings: Data, data: dataset.Dataset) -> Part:
    """The training images where the config wants them: on the devices, or on the host."""
    place = {"resident": device.resident, "streamed": stream.stream}[settings.placement]
    images, labels = data.train
    example = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
    largest = int(np.bincount(labels).max())
    return Part(
        device.resident_shapes({"images": example}, data.num_classes, largest, len(labels)),
        functools.cache(lambda: place({"images": images}, labels, data.num_classes)),
    )
