"""A labelled image data set in host memory: what holds it, checks it, pads it and divides it.

Every reader ends in one `Dataset`: a training and a test split of equally sized images, and the
channel statistics of the training split. Small arrays on the host are the whole interface: the
device side uploads them once, so nothing here has to be fast twice.
"""

import hashlib
import math
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jaxdistill.errors import InputError
from jaxdistill.io.reading import npz_names, read_npz

_CHANNELS = (1, 3, 4)  # that pictures have
# How the arrays of a file are called: here and by MedMNIST, and by Keras.
_KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)
_CHUNK = 1 << 24  # values counted at once


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
        images: uint8, (N, H, W, C).
        labels: int32, (N,).
    """

    images: np.ndarray
    labels: np.ndarray

    def fingerprint(self) -> str:
        """Hex SHA-256 over the images, their labels and the shapes of both."""
        images, labels = self
        digest = hashlib.sha256(repr((images.shape, labels.shape)).encode())
        digest.update(np.ascontiguousarray(images))
        digest.update(np.ascontiguousarray(labels, dtype="<i4"))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image data set in host memory.

    Attributes:
        name: Where it came from, without any directory.
        train: The training split; every class occurs in it.
        test: The split that accuracies are measured on.
        class_names: One name per class id.
        mean: Per channel, in [0, 1] units, of the training images before padding.
        std: Likewise, the population standard deviation.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def fingerprint(self) -> str:
        """Hex SHA-256 of the training split; see `Split.fingerprint`."""
        return self.train.fingerprint()


def from_arrays(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    name: str,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Check arrays and make a data set of them.

    Args:
        train_images: uint8, (N, H, W, C) or, for one channel, (N, H, W).
        train_labels: Integers, (N,) or (N, 1); every class id from 0 to the largest one must occur.
        test_images: As `train_images`, with images of the same shape.
        test_labels: Integers, (N,) or (N, 1), among the training classes.
        name: Recorded in the artefact.
        class_names: One per class; the decimal class ids by default.

    Raises:
        InputError: If an array is empty, or has the wrong dtype, shape or range; also if a
            channel is constant over the training images, which cannot be normalized.
    """
    train = _check_split("training", train_images, train_labels)
    test = _check_split("test", test_images, test_labels)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            f"images of unequal size: training images are {_size(train.images[0])}, "
            f"test images {_size(test.images[0])}; set data.image_size to resize both"
        )
    # `unique` and not `bincount`: memory must not depend on how large a damaged label is.
    classes = np.unique(train.labels)
    count = len(classes)
    gaps = np.flatnonzero(classes != np.arange(count))
    if gaps.size:
        raise InputError(
            f"no training image has label {gaps[0]}, but labels go up to {classes[-1]}; "
            "number the classes 0, 1, 2 and so on without gaps"
        )
    if test.labels.max() >= count:
        raise InputError(
            f"test label {test.labels.max()} does not occur in the training labels "
            f"(0 to {count - 1}); remove those test images or add the class"
        )
    names = tuple(map(str, range(count) if class_names is None else class_names))
    if len(names) != count:
        raise InputError(f"{len(names)} class names for {count} classes; give one per class")
    for label in names:
        # A lone surrogate, as in a folder whose name is not UTF-8, cannot be written to the card.
        if {unicodedata.category(letter) for letter in label} & {"Cc", "Cs"}:
            raise InputError(f"class name {label[:200]!r} is not plain text; rename it")
    mean, std = statistics(train.images)
    return Dataset(name, train, test, names, mean, std)


def from_npz(path: Path) -> Dataset:
    """Read a data set from a NumPy file.

    Args:
        path: An `.npz` file with `train_images`, `train_labels`, `test_images`, `test_labels`, or
            `x_train`, `y_train`, `x_test`, `y_test`, as `from_arrays` takes them, and perhaps
            `class_names`.

    Raises:
        InputError: If it is missing, damaged or holds other things.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        keys = _KEYS[1] if _KEYS[1][0] in npz_names(path) else _KEYS[0]
        arrays = read_npz(path, keys, optional=("class_names",))
    except InputError as error:
        raise InputError(f"cannot read {path} as an .npz of a data set: {error}") from error
    names = arrays.pop("class_names", None)
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise InputError(f"class_names in {path} must be a one-dimensional array of strings")
    # NumPy holds numbers that are no characters, and Python breaks on them.
    if names is not None and names.size:
        codes = names.view(np.dtype(np.uint32).newbyteorder(names.dtype.byteorder))
        if codes.max() > sys.maxunicode:
            raise InputError(f"class_names in {path} are not text")
    return from_arrays(
        *(arrays[key] for key in keys),
        name=path.stem,
        class_names=None if names is None else names.tolist(),
    )


def pad(dataset: Dataset, size: int) -> Dataset:
    """Surround every image with black up to `size` by `size`, keeping the statistics.

    The statistics stay those of the bare images, so the border is one more dark region after
    normalization and does not shift the scale of the picture inside it.

    Raises:
        InputError: If the images are larger than `size` or cannot be centred in it.
    """
    height, width, _ = dataset.image_shape
    borders = []
    for side in (height, width):
        if side > size:
            raise InputError(
                f"pad_to={size} is smaller than the {height}x{width} images of {dataset.name}; "
                "raise data.pad_to or set data.image_size"
            )
        if (size - side) % 2:
            raise InputError(
                f"pad_to={size} cannot be reached from {height}x{width} images by equal borders; "
                f"choose a size that differs from {side} by an even number"
            )
        borders.append(((size - side) // 2,) * 2)

    def padded(split: Split) -> Split:
        return Split(np.pad(split.images, ((0, 0), *borders, (0, 0))), split.labels)

    return replace(dataset, train=padded(dataset.train), test=padded(dataset.test))


def holdout(dataset: Dataset, per_class: int, seed: int) -> Dataset:
    """Replace the test split by training images, to make choices on.

    Args:
        dataset: The data set; its test split is dropped unread.
        per_class: How many training images of each class move to the test slot.
        seed: The seed of `numpy.random.default_rng`, which draws them.

    Raises:
        InputError: If `per_class` is below 1 or would leave a class without training images.
    """
    images, labels = dataset.train
    counts = np.bincount(labels, minlength=dataset.num_classes)
    smallest = int(counts.argmin())
    if not 1 <= per_class < counts[smallest]:
        raise InputError(
            f"cannot hold out {per_class} images of each class: class "
            f"'{dataset.class_names[smallest]}' has {counts[smallest]} training images and must "
            f"keep one; choose between 1 and {counts[smallest] - 1}"
        )
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in range(dataset.num_classes):
        held[rng.choice(np.flatnonzero(labels == label), per_class, replace=False)] = True
    # The statistics stay: a choice made here is applied to the full training split, and must see
    # pixels on the scale they will have there. They never contained a test image.
    return replace(
        dataset,
        name=f"{dataset.name}/holdout",
        train=Split(images[~held], labels[~held]),
        test=Split(images[held], labels[held]),
    )


def class_sizes(labels: Int[np.ndarray, " n"], num_classes: int) -> Int32[np.ndarray, " c"]:
    """The number of examples of each class.

    Args:
        labels: Class ids in [0, num_classes).
        num_classes: Number of classes.

    Raises:
        InputError: If a class has no example or a label is out of range.
    """
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise InputError(f"labels must lie between 0 and {num_classes - 1}")
    counts = np.bincount(labels, minlength=num_classes)
    empty = np.flatnonzero(counts == 0)
    if empty.size:
        raise InputError(f"class {empty[0]} has no images to draw from")
    return counts.astype(np.int32)


def per_class_table(
    labels: Int[np.ndarray, " n"], num_classes: int
) -> tuple[Int32[np.ndarray, "c m"], Int32[np.ndarray, " c"]]:
    """Tabulate which examples belong to each class, in a rectangle a device can index.

    Args:
        labels: Class ids in [0, num_classes).
        num_classes: Number of rows.

    Returns:
        The table and the class sizes. Row c holds the positions of class c in ascending order
        and starts over until it is as long as the largest class. Draw the column below
        `counts[c]`, not below the row length, for every image to be equally likely.

    Raises:
        InputError: If a class has no example or a label is out of range.
    """
    counts = class_sizes(labels, num_classes)
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    columns = np.arange(counts.max())[None, :] % counts[:, None]
    return order[starts[:, None] + columns].astype(np.int32), counts


def _check_split(which: str, images: np.ndarray, labels: np.ndarray) -> Split:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"{which} images must be uint8 of shape (N, H, W, C) or (N, H, W), "
            f"not {images.dtype} of shape {images.shape}"
        )
    if images.size == 0:
        raise InputError(f"the {which} split is empty: images of shape {images.shape}")
    if images.shape[1] in _CHANNELS and images.shape[3] not in _CHANNELS:
        raise InputError(
            f"{which} images of shape {images.shape} seem to have their channels first, which "
            "would be last here: give (N, H, W, C), as np.moveaxis(images, 1, -1) makes it"
        )
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(
            f"{which} labels must be {len(images)} integers, one per image, "
            f"not {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise InputError(f"{which} labels must not be negative or exceed 32 bits")
    return Split(images, labels.astype(np.int32))


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel from integer histograms: exact until the root.

    Args:
        images: uint8 (n, h, w, c).

    Raises:
        InputError: If a channel has one value everywhere.
    """
    values = range(256)
    means, stds = [], []
    step = max(1, _CHUNK // images[0].size)
    for channel in range(images.shape[-1]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), step):
            counts += np.bincount(images[start : start + step, ..., channel].ravel(), minlength=256)
        hist = counts.tolist()
        total = sum(hist)
        first = sum(n * v for n, v in zip(hist, values, strict=True))
        second = sum(n * v * v for n, v in zip(hist, values, strict=True))
        variance = second * total - first * first
        if variance == 0:
            raise InputError(
                f"channel {channel} has the same value in every training image; "
                "it cannot be normalized: drop it"
            )
        means.append(first / total / 255)
        stds.append(math.sqrt(variance) / total / 255)
    return tuple(means), tuple(stds)


def _size(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape))
