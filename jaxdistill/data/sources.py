"""Labelled image data sets, read once into host memory as uint8.

Every source ends in one `Dataset`: a training and a test split of equally sized images, and the
channel statistics of the training split. Small arrays on the host are the whole interface: the
device side uploads them once, so nothing here has to be fast twice.
"""

import gzip
import hashlib
import importlib.util
import math
import os
import struct
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32
from PIL import Image

from jaxdistill.errors import InputError
from jaxdistill.io.reading import inflation_limit, one_line, read_npz

DIGITS_TRAIN_ROWS = 1437
MAX_PIXELS = 64_000_000
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

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_READ_CHUNK = 1 << 24
_OTHER_WAYS = "or give the path of an image folder, an IDX folder or an .npz file"

StrPath = str | os.PathLike[str]


class Facts(NamedTuple):
    """What the programs of a run depend on of a data set.

    Attributes:
        num_classes: Number of classes.
        image_shape: Height, width and channels.
        largest_class: Training images of the largest class.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    largest_class: int


# As published. The images of Imagenette differ in size.
_FACTS = {
    "digits": Facts(10, (8, 8, 1), 146),
    "mnist": Facts(10, (28, 28, 1), 6742),
    "fashion_mnist": Facts(10, (28, 28, 1), 6000),
    "cifar10": Facts(10, (32, 32, 3), 5000),
    "cifar100": Facts(100, (32, 32, 3), 500),
    "tiny_imagenet": Facts(200, (64, 64, 3), 500),
    "imagenette/160px-v2": Facts(10, (0, 0, 3), 993),
}


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
        images: uint8, (N, H, W, C).
        labels: int32, (N,).
    """

    images: np.ndarray
    labels: np.ndarray


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
        """Hex SHA-256 over the training images, their labels and the shapes of both."""
        images, labels = self.train
        digest = hashlib.sha256(repr((images.shape, labels.shape)).encode())
        digest.update(np.ascontiguousarray(images))
        digest.update(np.ascontiguousarray(labels, dtype="<i4"))
        return digest.hexdigest()


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
            `train/<class>/*.png|jpg|jpeg` and `test/<class>/*`, a folder of IDX files, or an
            `.npz` file with `train_images`, `train_labels`, `test_images`, `test_labels` and
            perhaps `class_names`. A name without a path separator is never taken for a folder.
        data_dir: Where a named data set lies; TFDS has its own default.
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
        dataset = _read(name, None if data_dir is None else _expand(data_dir), image_size)
        if image_size is not None and dataset.image_shape[:2] != (image_size, image_size):
            dataset = from_arrays(
                _resize_all(dataset.train.images, image_size),
                dataset.train.labels,
                _resize_all(dataset.test.images, image_size),
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
        largest = int(np.bincount(dataset.train.labels).max())
        return Facts(dataset.num_classes, dataset.image_shape, largest)
    height, width, channels = known.image_shape
    size = pad_to or image_size
    return known._replace(image_shape=(size or height, size or width, channels))


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
        train_labels: Integers, (N,); every class id from 0 to the largest one must occur.
        test_images: As `train_images`, with images of the same shape.
        test_labels: Integers, (N,), among the training classes.
        name: Recorded in the artefact.
        class_names: One per class; the decimal class ids by default.

    Raises:
        InputError: If an array is empty, or has the wrong dtype, shape or range; also if a
            channel is constant over the training images, which cannot be normalised.
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
            raise InputError(f"class name {_shown(label)} is not plain text; rename it")
    mean, std = _statistics(train.images)
    return Dataset(name, train, test, names, mean, std)


def pad(dataset: Dataset, size: int) -> Dataset:
    """Surround every image with black up to `size` by `size`, keeping the statistics.

    The statistics stay those of the bare images, so the border is one more dark region after
    normalisation and does not shift the scale of the picture inside it.

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
        seed: Of `numpy.random.default_rng`, which draws them.

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
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise InputError(f"labels must lie between 0 and {num_classes - 1}")
    counts = np.bincount(labels, minlength=num_classes)
    empty = np.flatnonzero(counts == 0)
    if empty.size:
        raise InputError(f"class {empty[0]} has no images to draw from")
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    columns = np.arange(counts.max())[None, :] % counts[:, None]
    return order[starts[:, None] + columns].astype(np.int32), counts.astype(np.int32)


def _read(name: StrPath, data_dir: Path | None, image_size: int | None) -> Dataset:
    if name == "digits":
        return _read_digits()
    if name == "fashion_mnist":
        return _read_fashion_mnist(data_dir, image_size)
    if name == "tiny_imagenet":
        return _read_tiny_imagenet(data_dir, image_size)
    path = _expand(name)
    if any(ord(letter) < 32 for letter in str(path)):
        raise InputError(f"no data set is called {_shown(name)}; check the name")
    if path.suffix == ".npz":
        return _read_npz(path)
    if isinstance(name, str):
        bare = "/" not in name and os.sep not in name
        # TFDS writes a configuration after a slash ("imagenette/160px-v2").
        if bare or (not path.exists() and _is_tfds_builtin(name.split("/")[0])):
            return _read_tfds(name, data_dir, image_size)
    return _read_folder(path, image_size)


def _expand(path: StrPath) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~ of a user that there is not
        raise InputError(f"no such folder: {_shown(path)}; {one_line(error)}") from error


def _read_digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    n = DIGITS_TRAIN_ROWS
    return from_arrays(images[:n], digits.target[:n], images[n:], digits.target[n:], name="digits")


def _read_fashion_mnist(data_dir: Path | None, image_size: int | None) -> Dataset:
    folder = DEBIAN_FASHION_MNIST if data_dir is None else data_dir
    if _find_idx(folder, ("train",), "images", 3):
        return _read_idx_folder(folder, "fashion_mnist", FASHION_MNIST_CLASSES)
    return _read_tfds(
        "fashion_mnist",
        data_dir,
        image_size,
        other_ways="or install the Debian package dataset-fashion-mnist, "
        "or set data.data_dir to a folder with its four IDX files",
    )


def _read_folder(path: Path, image_size: int | None) -> Dataset:
    if not path.is_dir():
        raise InputError(f"no such folder: {path}; give an existing folder, an .npz or a name")
    if _find_idx(path, ("train",), "images", 3):
        return _read_idx_folder(path, path.resolve().name)
    if (path / "train").is_dir():
        return _read_image_folder(path, image_size)
    raise InputError(
        f"{path} is no data set: expected train/<class>/*.png|jpg|jpeg and test/<class>/*, "
        "or the IDX files train-images-idx3-ubyte[.gz] and so on"
    )


# --- IDX ------------------------------------------------------------------------------------------


def _read_idx_folder(folder: Path, name: str, class_names: Sequence[str] | None = None) -> Dataset:
    arrays = []
    for prefixes in (("train",), ("t10k", "test")):
        paths = []
        for kind, ndim in (("images", 3), ("labels", 1)):
            found = _find_idx(folder, prefixes, kind, ndim)
            if found is None:
                raise InputError(
                    f"missing file {prefixes[0]}-{kind}-idx{ndim}-ubyte[.gz] in {folder}"
                )
            paths.append(found)
            arrays.append(_read_idx(found, ndim))
        if len(arrays[-2]) != len(arrays[-1]):
            raise InputError(
                f"{paths[0]} holds {len(arrays[-2])} images but {paths[1].name} "
                f"{len(arrays[-1])} labels; the files do not belong together"
            )
    return from_arrays(*arrays, name=name, class_names=class_names)


def _find_idx(folder: Path, prefixes: Iterable[str], kind: str, ndim: int) -> Path | None:
    # Unpacking tools and mirrors disagree on the separator before "idx".
    names = (
        f"{prefix}-{kind}{separator}idx{ndim}-ubyte{suffix}"
        for prefix in prefixes
        for separator in "-."
        for suffix in ("", ".gz")
    )
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read unsigned bytes; the header is believed only as far as the file bears it out."""
    opener = gzip.open if path.suffix == ".gz" else open
    body = bytearray()
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:4] != bytes((0, 0, 8, ndim)):
                raise InputError(
                    f"{path} is not an IDX file of {ndim}-dimensional unsigned bytes; "
                    "download it again"
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            expected = math.prod(shape)
            if expected == 0:
                raise InputError(f"{path} is empty: its header announces the shape {shape}")
            if opener is gzip.open and expected > inflation_limit(path.stat().st_size):
                raise InputError(
                    f"{path} announces {expected} bytes (shape {shape}), more than a file of its "
                    "size can hold; download it again"
                )
            # Grown by what is there, never allocated by what the header claims.
            while len(body) <= expected and (chunk := file.read(_READ_CHUNK)):
                body += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}; download it again") from error
    if len(body) != expected:
        kind = "fewer" if len(body) < expected else "more"
        raise InputError(
            f"{path} has {kind} bytes than its header announces ({expected} for shape {shape}); "
            "download it again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


# --- npz ------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> Dataset:
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
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


# --- image files ----------------------------------------------------------------------------------


class _Labelled(NamedTuple):
    path: Path
    label: int


def _read_image_folder(folder: Path, image_size: int | None) -> Dataset:
    root = folder.resolve()
    names = [entry.name for entry in _visible(folder / "train", root) if entry.is_dir()]
    if not names:
        raise InputError(f"{folder / 'train'} has no class folders; expected train/<class>/*.png")
    test_folder = folder / "test" if (folder / "test").is_dir() else folder / "val"
    if not test_folder.is_dir():
        raise InputError(f"{folder} has no test folder; expected test/<class>/* beside train")
    test_names = [entry.name for entry in _visible(test_folder, root) if entry.is_dir()]
    unknown = sorted(set(test_names) - set(names))
    if unknown:
        raise InputError(
            f"class '{unknown[0]}' is in {test_folder} but not in {folder / 'train'}; "
            "test classes must be among the training classes"
        )

    def listed(parent: Path, classes: list[str]) -> list[_Labelled]:
        return [
            _Labelled(path, names.index(name))
            for name in classes
            for path in _image_files(parent / name, root)
        ]

    return _from_files(
        listed(folder / "train", names),
        listed(test_folder, test_names),
        root.name,
        names,
        image_size,
    )


def _read_tiny_imagenet(data_dir: Path | None, image_size: int | None) -> Dataset:
    expected = (
        "expected data_dir/tiny-imagenet-200 (or data_dir itself) with "
        "train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt, "
        "as the archive unpacks"
    )
    if data_dir is None:
        raise InputError(f"tiny_imagenet needs data.data_dir: {expected}")
    inner = data_dir / "tiny-imagenet-200"
    folder = inner if inner.is_dir() else data_dir
    annotations = folder / "val" / "val_annotations.txt"
    if not (folder / "train").is_dir() or not annotations.is_file():
        raise InputError(f"no Tiny ImageNet in {data_dir}: {expected}")
    root = folder.resolve()
    _visible(folder / "val", root)
    names = [entry.name for entry in _visible(folder / "train", root) if entry.is_dir()]
    train = [
        _Labelled(path, label)
        for label, name in enumerate(names)
        for path in _image_files(folder / "train" / name / "images", root)
    ]
    test_files = {path.name: path for path in _image_files(folder / "val" / "images", root)}
    test = []
    for number, line in enumerate(annotations.read_text("utf-8", "replace").splitlines(), 1):
        fields = line.split()
        if len(fields) < 2 or fields[0] not in test_files or fields[1] not in names:
            raise InputError(
                f"{annotations} line {number} does not name a file of val/images and a class of "
                "train; unpack the archive again"
            )
        test.append(_Labelled(test_files[fields[0]], names.index(fields[1])))
    return _from_files(train, test, "tiny_imagenet", names, image_size)


def _visible(folder: Path, root: Path) -> list[Path]:
    """Entries sorted by name, without hidden ones, none leading out of the data set."""
    entries = sorted(
        (entry for entry in folder.iterdir() if not entry.name.startswith(".")),
        key=lambda entry: entry.name,
    )
    for entry in (folder, *entries):
        if not entry.is_symlink():
            continue
        try:
            inside = entry.resolve(strict=True).is_relative_to(root)
        except (OSError, RuntimeError):  # leads nowhere, or to itself
            inside = False
        if not inside:
            raise InputError(f"{entry} links to nothing inside {root}; copy the files instead")
    return entries


def _image_files(folder: Path, root: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    paths = [
        entry
        for entry in _visible(folder, root)
        if entry.suffix.lower() in _IMAGE_SUFFIXES and entry.is_file()
    ]
    if not paths:
        raise InputError(f"{folder} holds no png, jpg or jpeg image; remove it or fill it")
    return paths


def _from_files(
    train: list[_Labelled],
    test: list[_Labelled],
    name: str,
    class_names: list[str],
    image_size: int | None,
) -> Dataset:
    # Every header is read before anything is decoded: a mistake in the last file costs no wait,
    # and an image that claims to be enormous is never unpacked.
    grey, first, pixels, size = True, None, 0, 0
    for path, _ in (*train, *test):
        with _open_image(path) as image:
            width, height = image.size
            mode = image.mode
        _check_pixels(path, height, width, image_size)
        if mode[0] in "IF":
            raise InputError(f"{path} has more than 8 bits per channel; convert it to 8 bits")
        grey = grey and mode == "L"
        first = first or (path, height, width)
        if image_size is None and (height, width) != first[1:]:
            raise _unequal(first[0], first[1:], path, (height, width))
        pixels, size = pixels + height * width, size + path.stat().st_size
    # As single files, so all of them together: blank images are a thousand times their files.
    if image_size is None and pixels * (1 if grey else 3) > inflation_limit(size):
        raise InputError(
            f"the images of {name} are {pixels // 10**6} megapixels in {size} bytes of files; "
            "set data.image_size to shrink them"
        )

    def decoded(files: list[_Labelled]) -> np.ndarray:
        return _stack(
            (_decode(path, "L" if grey else "RGB", image_size) for path, _ in files), len(files)
        )

    labels = [np.array([label for _, label in files], np.int32) for files in (train, test)]
    return from_arrays(
        decoded(train), labels[0], decoded(test), labels[1], name=name, class_names=class_names
    )


def _open_image(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            # Only these two decoders, whatever the bytes inside claim to be.
            return Image.open(path, formats=("PNG", "JPEG"))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large(path) from error
        except Exception as error:  # the decoders raise many kinds on damaged files
            raise InputError(
                f"{path} is not a readable png or jpeg; remove or replace it"
            ) from error


def _decode(path: Path, mode: str, image_size: int | None) -> np.ndarray:
    with _open_image(path) as image:
        try:
            converted = image.convert(mode)
        except Exception as error:
            raise InputError(
                f"cannot decode {path}: {one_line(error)}; remove or replace it"
            ) from error
    pixels = np.asarray(converted if image_size is None else _fit(converted, image_size))
    return pixels.reshape(*pixels.shape[:2], -1)


def _check_pixels(what: object, height: int, width: int, image_size: int | None) -> None:
    short, long = sorted((height, width))
    if short < 1 or height * width > MAX_PIXELS:
        raise _too_large(what)
    # A sliver passes the first limit and explodes when its shorter side is enlarged.
    if image_size is not None and image_size * image_size * long // short > MAX_PIXELS:
        raise _too_large(what)


def _too_large(what: object) -> InputError:
    return InputError(
        f"{what} is empty or exceeds {MAX_PIXELS // 10**6} megapixels; remove or shrink it"
    )


def _unequal(
    first: object, first_shape: tuple[int, ...], other: object, other_shape: tuple[int, ...]
) -> InputError:
    shapes = ["x".join(map(str, shape)) for shape in (first_shape, other_shape)]
    return InputError(
        f"images of unequal size: {first} is {shapes[0]}, {other} is {shapes[1]} "
        "(height x width); set data.image_size to resize them"
    )


# --- TFDS -----------------------------------------------------------------------------------------


def _read_tfds(
    name: str, data_dir: Path | None, image_size: int | None, other_ways: str = _OTHER_WAYS
) -> Dataset:
    builder = _tfds_builder(name, data_dir, other_ways)
    splits = list(builder.info.splits)
    test_split = next((s for s in ("test", "validation") if s in splits), None)
    if "train" not in splits or test_split is None:
        raise InputError(
            f"TFDS data set {name} has the splits {', '.join(splits)}; "
            "needed are train and test (or validation)"
        )
    arrays = []
    for split in ("train", test_split):
        arrays.extend(_read_tfds_split(builder, name, split, image_size))
    names = getattr(builder.info.features["label"], "names", None)
    return from_arrays(*arrays, name=name, class_names=names)


def _tfds_builder(name: str, data_dir: Path | None, other_ways: str) -> Any:
    """The builder of a data set that lies prepared on disk, preparing it where that works."""
    tfds = _import_tfds()
    # The command stands on one line, whatever the name: it is there to be copied.
    command = f"tfds build {name} --file_format=array_record"
    if data_dir is not None:
        command += f" --data_dir={data_dir}"
    advice = f"prepare it once where TensorFlow is installed with `{command}`, {other_ways}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            # The built-in recipes unpack and read their downloads through TensorFlow. Without it
            # they would fetch everything first and fail afterwards.
            if importlib.util.find_spec("tensorflow") is None and type(
                builder
            ).__module__.startswith("tensorflow_datasets."):
                raise InputError(
                    f"data set {name} was not found in {data_dir or 'the TFDS folder'}; {advice}"
                )
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        builder.as_data_source("train")
    except tfds.core.registered.DatasetNotFoundError as error:
        folder = f" (for the folder of this name write ./{name})" if Path(name).is_dir() else ""
        raise InputError(
            f"no data set is called {name}, here or in TFDS{folder}; check the name, {_OTHER_WAYS}"
        ) from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"data set {name} cannot be read through TFDS ({one_line(error)}); {advice}"
        ) from error
    return builder


def _read_tfds_split(
    builder: Any, name: str, split: str, image_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    features = sorted(builder.info.features)
    if "image" not in features or "label" not in features:
        raise InputError(
            f"TFDS data set {name} has the features {', '.join(features)}; "
            "needed are image and label"
        )
    source = builder.as_data_source(split)
    labels = np.empty(len(source), np.int64)

    def images() -> Iterable[np.ndarray]:
        shape = None
        for index in range(len(source)):
            try:
                example = source[index]
                labels[index] = example["label"]
            except Exception as error:  # of the record reader and of the image decoder
                raise InputError(
                    f"cannot read {name} {split}[{index}]: {one_line(error)}; prepare it again"
                ) from error
            image = np.asarray(example["image"])
            if image.ndim == 2:
                image = image[..., None]
            _check_pixels(f"{name} {split}[{index}]", *image.shape[:2], image_size)
            if image_size is not None:
                image = _resize(image, image_size)
            shape = shape or image.shape
            if image.shape != shape:
                raise _unequal(f"{split}[0]", shape, f"{split}[{index}]", image.shape)
            yield image

    return _stack(images(), len(source)), labels


def _import_tfds() -> Any:
    try:
        import array_record  # noqa: F401  (TFDS reports its absence only deep inside)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"TFDS data sets need the package {error.name}: "
            "pip install tensorflow-datasets array-record importlib-resources"
        ) from error
    return tfds


def _is_tfds_builtin(name: str) -> bool:
    return name in _import_tfds().list_builders(with_community_datasets=False)


# --- arrays ---------------------------------------------------------------------------------------


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
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(
            f"{which} labels must be {len(images)} integers, one per image, "
            f"not {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise InputError(f"{which} labels must not be negative or exceed 32 bits")
    return Split(images, labels.astype(np.int32))


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel from integer histograms: exact until the root."""
    values = range(256)
    means, stds = [], []
    step = max(1, _READ_CHUNK // images[0].size)
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
                "it cannot be normalised: drop it"
            )
        means.append(first / total / 255)
        stds.append(math.sqrt(variance) / total / 255)
    return tuple(means), tuple(stds)


def _stack(images: Iterable[np.ndarray], count: int) -> np.ndarray:
    """As `np.stack`, with one copy in memory instead of two."""
    out = np.empty((0,), np.uint8)
    for index, image in enumerate(images):
        if index == 0:
            out = np.empty((count, *image.shape), image.dtype)
        out[index] = image
    return out


def _resize_all(images: np.ndarray, size: int) -> np.ndarray:
    _check_pixels("an image of the data set", *images.shape[1:3], size)
    return _stack((_resize(image, size) for image in images), len(images))


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    # Channel by channel, so that any number of channels works.
    channels = np.moveaxis(image, -1, 0)
    return np.stack([_fit(Image.fromarray(channel), size) for channel in channels], axis=-1)


def _fit(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def _size(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape))


def _shown(name: StrPath) -> str:
    return repr(str(name)[:200])
