"""Labelled image data sets by name or by path, and what is known of them beforehand."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.data import cifar, folders, idx, shards, splits, tables, tfds
from jaxdistill.data.dataset import Dataset, from_arrays, from_npz, pad
from jaxdistill.data.resize import resize_all
from jaxdistill.errors import InputError
from jaxdistill.io.files import expanded
from jaxdistill.io.reading import one_line

DIGITS_TRAIN_ROWS = 1437
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

StrPath = str | os.PathLike[str]


class Facts(NamedTuple):
    """What the programs of a run depend on of a data set.

    Attributes:
        num_classes: Number of classes.
        image_shape: Height, width and channels.
        largest_class: Training images of the largest class.
        images: Training images of all classes.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    largest_class: int
    images: int


# As published. The images of Imagenette and ImageNet differ in size.
_FACTS = {
    "digits": Facts(10, (8, 8, 1), 146, DIGITS_TRAIN_ROWS),
    "mnist": Facts(10, (28, 28, 1), 6742, 60_000),
    "fashion_mnist": Facts(10, (28, 28, 1), 6000, 60_000),
    "cifar10": Facts(10, (32, 32, 3), 5000, 50_000),
    "cifar100": Facts(100, (32, 32, 3), 500, 50_000),
    "tiny_imagenet": Facts(200, (64, 64, 3), 500, 100_000),
    "imagenette/160px-v2": Facts(10, (0, 0, 3), 993, 9469),
    "imagenet2012": Facts(1000, (0, 0, 3), 1300, 1_281_167),
}
NAMES = tuple(_FACTS)
"""Data sets that are known by name; TFDS has others."""


def load(
    name: StrPath,
    *,
    data_dir: StrPath | None = None,
    image_size: int | None = None,
    pad_to: int | None = None,
) -> Dataset:
    """Load a data set by name or by path.

    Args:
        name: `digits` (embedded in scikit-learn), `fashion_mnist` (from `data_dir`, from the
            Debian package `dataset-fashion-mnist`, or from TFDS), `tiny_imagenet` (from
            `data_dir`), another TFDS name, or a path: an image folder with
            `train/<class>/*.png|jpg|jpeg` and `test/<class>/*`, a folder of IDX files, of CIFAR's
            binary files, of WebDataset shards or of Hugging Face's Parquet or Arrow files, or an
            `.npz` file with `train_images`, `train_labels`, `test_images`,
            `test_labels` and perhaps `class_names`, or `generated`, which a generator has left in
            `data_dir`. A name without a path separator is never taken for a folder.
        data_dir: Where a named data set lies, as IDX files, CIFAR's binary ones, shards or tables,
            or as TFDS keeps it, which has a default of its own.
        image_size: Resize so that the shorter side has this many pixels (bilinear with
            antialiasing), then crop the centre square. Needed when images differ in size.
        pad_to: Surround the images with black up to this height and width. Statistics are taken
            before padding.

    Raises:
        InputError: If the data set is missing, damaged or not usable as it is.
    """
    for key, value in (("image_size", image_size), ("pad_to", pad_to)):
        if value is not None and value < 1:
            raise InputError(f"data.{key} must be at least 1, not {value}")
    try:
        dataset = _read(name, None if data_dir is None else expanded(data_dir), image_size)
        if image_size is not None and dataset.image_shape[:2] != (image_size, image_size):
            dataset = from_arrays(
                resize_all(dataset.train.images, image_size),
                dataset.train.labels,
                resize_all(dataset.test.images, image_size),
                dataset.test.labels,
                name=dataset.name,
                class_names=dataset.class_names,
            )
        return dataset if pad_to is None else pad(dataset, pad_to)
    # Folders that may not be listed, names no file system takes, more than fits.
    except (OSError, MemoryError) as error:
        raise InputError(f"cannot read data set {_shown(name)}: {one_line(error)}") from error


def facts(
    name: StrPath,
    *,
    data_dir: StrPath | None = None,
    image_size: int | None = None,
    pad_to: int | None = None,
) -> Facts:
    """What is known of a data set without having it; others than the usual ones are loaded.

    Args:
        name: As for `load`, like the rest.
        data_dir: Where it lies, if it must be loaded.
        image_size: The size that images are brought to.
        pad_to: The size that they are padded to.

    Raises:
        InputError: If the data set must be loaded and cannot be.
    """
    known = _FACTS.get(str(name))
    if known is None or (image_size is None and 0 in known.image_shape):
        dataset = load(name, data_dir=data_dir, image_size=image_size, pad_to=pad_to)
        labels = dataset.train.labels
        largest = int(np.bincount(labels).max())
        return Facts(dataset.num_classes, dataset.image_shape, largest, len(labels))
    height, width, channels = known.image_shape
    size = pad_to or image_size
    return known._replace(image_shape=(size or height, size or width, channels))


def _read(name: StrPath, data_dir: Path | None, image_size: int | None) -> Dataset:
    if name == "digits":
        return _read_digits()
    if name == "generated":
        if data_dir is None:
            raise InputError(
                "generated images are made by the run of config.generator; give it, or the folder "
                "that they lie in as data.data_dir"
            )
        return from_npz(data_dir / "generated.npz")
    if data_dir is not None and (data := _read_packed(data_dir, str(name), image_size)):
        return data
    if name == "fashion_mnist":
        return _read_fashion_mnist(data_dir, image_size)
    if name == "tiny_imagenet":
        return folders.read_tiny_imagenet(data_dir, image_size)
    if data_dir is not None and idx.lies_in(data_dir):
        return idx.read(data_dir, str(name))
    if data_dir is not None and (form := cifar.form_in(data_dir)) == name:
        return cifar.read(data_dir, form)
    path = expanded(name)
    if any(ord(letter) < 32 for letter in str(path)):
        raise InputError(f"no data set is called {_shown(name)}; check the name")
    if path.suffix == ".npz":
        return from_npz(path)
    if isinstance(name, str):
        bare = "/" not in name and os.sep not in name
        # TFDS writes a configuration after a slash ("imagenette/160px-v2").
        if bare or (not path.exists() and tfds.is_builtin(name.split("/")[0])):
            return tfds.read(name, data_dir, image_size)
    return _read_folder(path, image_size)


def _read_digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    n = DIGITS_TRAIN_ROWS
    return from_arrays(images[:n], digits.target[:n], images[n:], digits.target[n:], name="digits")


def _read_fashion_mnist(data_dir: Path | None, image_size: int | None) -> Dataset:
    folder = DEBIAN_FASHION_MNIST if data_dir is None else data_dir
    if idx.lies_in(folder):
        return idx.read(folder, "fashion_mnist", FASHION_MNIST_CLASSES)
    return tfds.read(
        "fashion_mnist",
        data_dir,
        image_size,
        other_ways="or install the Debian package dataset-fashion-mnist, "
        "or set data.data_dir to a folder with its four IDX files",
    )


def _read_folder(path: Path, image_size: int | None) -> Dataset:
    if path.suffix in _PACKED and path.is_file():
        raise InputError(
            f"{path} is a part of one split; give the folder with it, as train{path.suffix} or "
            f"train-*{path.suffix}, and with test{path.suffix} or test-*{path.suffix}"
        )
    if not path.is_dir():
        raise InputError(f"no such folder: {path}; give an existing folder, an .npz or a name")
    if idx.lies_in(path):
        return idx.read(path, path.resolve().name)
    if form := cifar.form_in(path):
        return cifar.read(path, form)
    if cifar.is_pickled(path):
        raise InputError(
            f"{path} holds CIFAR as pickles, which are never read; download its binary version, "
            "or convert it to an .npz with train_images, train_labels, test_images, test_labels"
        )
    if data := _read_packed(path, path.resolve().name, image_size):
        return data
    if (path / "train").is_dir():
        return folders.read(path, image_size)
    raise InputError(
        f"{path} is no data set: expected train/<class>/*.png|jpg|jpeg and test/<class>/*, "
        "the IDX files train-images-idx3-ubyte[.gz] and so on, CIFAR's binary files, or "
        f"train-* and test-* that end in {', '.join(_PACKED)}"
    )


_PACKED = {shards.SUFFIX: shards.read} | dict.fromkeys(tables.SUFFIXES, tables.read)


def _read_packed(folder: Path, name: str, image_size: int | None) -> Dataset | None:
    """What shards or tables in a folder hold, if there are any."""
    files = splits.find(folder, tuple(_PACKED))
    return None if files is None else _PACKED[files.suffix](files, name, image_size)


def _shown(name: StrPath) -> str:
    return repr(str(name)[:200])
