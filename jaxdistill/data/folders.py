"""Data sets in image files: a folder for each class, and Tiny ImageNet as its archive unpacks."""

import io
import itertools
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from jaxdistill.data.dataset import Dataset, from_arrays
from jaxdistill.data.resize import check_pixels, fit, stack, too_large, unequal
from jaxdistill.errors import InputError
from jaxdistill.io.reading import inflation_limit, one_line

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_ORIENTATION = 0x0112  # of EXIF; from 5 on width and height are exchanged
_GROUND = "white"  # what shows where a picture is transparent


class Encoded(NamedTuple):
    """An image file that lies in another file.

    Attributes:
        name: What it is called in messages.
        size: Its bytes.
        read: Gives them.
    """

    name: str
    size: int
    read: Callable[[], bytes]

    def __str__(self):
        return self.name


class Labelled(NamedTuple):
    """An image file and its class id."""

    image: Path | Encoded
    label: int


def read(folder: Path, image_size: int | None) -> Dataset:
    """Read `train/<class>/*` and `test/<class>/*`, or `val/<class>/*`, of PNG and JPEG files.

    Args:
        folder: What holds `train`; its name becomes that of the data set.
        image_size: Resize the images to this; needed when they differ in size.

    Raises:
        InputError: If something is missing, damaged, enormous or outside of the folder.
    """
    root = folder.resolve()
    train = _classes(folder / "train", root)
    if not train:
        raise InputError(f"{folder / 'train'} has no class folders; expected train/<class>/*.png")
    test_folder = folder / "test" if (folder / "test").is_dir() else folder / "val"
    if not test_folder.is_dir():
        raise InputError(f"{folder} has no test folder; expected test/<class>/* beside train")
    test = _classes(test_folder, root)
    if unknown := sorted(test.keys() - train.keys()):
        raise InputError(
            f"class '{unknown[0]}' is in {test_folder} but not in {folder / 'train'}; "
            "test classes must be among the training classes"
        )

    names = sorted(train)

    def listed(classes: dict[str, Path]) -> list[Labelled]:
        return [
            Labelled(path, names.index(name))
            for name in sorted(classes)
            for path in _image_files(classes[name], root)
        ]

    return from_files(listed(train), listed(test), root.name, names, image_size)


def _classes(folder: Path, root: Path) -> dict[str, Path]:
    """The class folders of a split, by their names as people read them.

    The same letters may be stored in several ways, and systems that a folder passes change them.
    """
    found: dict[str, Path] = {}
    for entry in _visible(folder, root):
        if not entry.is_dir():
            continue
        name = unicodedata.normalize("NFC", entry.name)
        if name in found:
            raise InputError(f"{folder} has two folders that read '{name}'; rename or merge them")
        found[name] = entry
    return found


def read_tiny_imagenet(data_dir: Path | None, image_size: int | None) -> Dataset:
    """Read Tiny ImageNet; its validation images become the test split.

    Args:
        data_dir: The folder `tiny-imagenet-200`, or the one that holds it.
        image_size: Resize the images to this.

    Raises:
        InputError: If it is not there, or not as the archive unpacks.
    """
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
        Labelled(path, label)
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
        test.append(Labelled(test_files[fields[0]], names.index(fields[1])))
    return from_files(train, test, "tiny_imagenet", names, image_size)


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
    entries = _visible(folder, root)
    paths = [x for x in entries if x.suffix.lower() in _IMAGE_SUFFIXES and x.is_file()]
    if not paths:
        raise InputError(f"{folder} holds no png, jpg or jpeg image; remove it or fill it")
    if left := sorted({*entries} - {*paths}):
        warnings.warn(
            f"{folder}: {len(left)} of {len(entries)} entries are left out, for they are no png, "
            f"jpg or jpeg file: {', '.join(x.name for x in left[:3])}"
            f"{', …' if len(left) > 3 else ''}",
            stacklevel=2,
        )
    return paths


def image_files(root: Path) -> list[Path]:
    """The image files in a folder and below it, sorted, without hidden ones."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in _IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def from_files(
    train: Sequence[Labelled],
    test: Sequence[Labelled],
    name: str,
    class_names: Sequence[str] | None,
    image_size: int | None,
) -> Dataset:
    """Decodes image files and makes a data set of them.

    Args:
        train: Those of the training split.
        test: Those of the test split.
        name: Recorded in the data set.
        class_names: One per class; the decimal class ids by default.
        image_size: Resize the images to this; needed when they differ in size.

    Raises:
        InputError: If a class has no name, or as `images_of` and `dataset.from_arrays` do.
    """
    both = train, test
    for image, label in (file for files in both for file in files):
        if class_names is not None and label >= len(class_names):
            raise InputError(
                f"{image} is of class {label}, but {name} names only {len(class_names)} classes, "
                "from 0 on; name them all"
            )
    images = images_of([[image for image, _ in files] for files in both], name, image_size)
    labels = [np.array([label for _, label in files], np.int32) for files in both]
    return from_arrays(
        images[0], labels[0], images[1], labels[1], name=name, class_names=class_names
    )


def images_of(
    lists: Sequence[Sequence[Path | Encoded]], name: str, image_size: int | None
) -> list[np.ndarray]:
    """Some lists of image files as arrays uint8 (n, h, w, c), of one size and number of channels.

    Args:
        lists: The files of each array.
        name: What they are of, for messages.
        image_size: What they are brought to; needed where they differ in size.

    Raises:
        InputError: If a file is no image that can be used, or they do not go together.
    """
    # Every header is read before anything is decoded: a mistake in the last file costs no wait,
    # and an image that claims to be enormous is never unpacked.
    grey, first, pixels, held = True, None, 0, 0
    for path in itertools.chain(*lists):
        with _open_image(path) as image:
            width, height = _upright_size(path, image)
            mode = image.mode
        check_pixels(path, height, width, image_size)
        if mode[0] in "IF":
            raise InputError(f"{path} has more than 8 bits per channel; convert it to 8 bits")
        grey = grey and mode in ("1", "L", "LA")
        first = first or (path, height, width)
        if image_size is None and (height, width) != first[1:]:
            raise unequal(first[0], first[1:], path, (height, width))
        size = path.size if isinstance(path, Encoded) else path.stat().st_size
        pixels, held = pixels + height * width, held + size
    # As single files, so all of them together: blank images are a thousand times their files.
    if image_size is None and pixels * (1 if grey else 3) > inflation_limit(held):
        raise InputError(
            f"the images of {name} are {pixels // 10**6} megapixels in {held} bytes of files; "
            "set data.image_size to shrink them"
        )

    size = None if image_size is not None else first[1:]
    mode = "L" if grey else "RGB"
    return [
        stack((_decode(path, mode, image_size, size) for path in files), len(files))
        for files in lists
    ]


def _upright_size(path: Path | Encoded, image: Image.Image) -> tuple[int, int]:
    """Width and height as a viewer shows them, from the header alone."""
    if image.format == "PNG" and "exif" not in image.info:
        return image.size  # Pillow would unpack the pixels to look for it behind them
    try:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:  # EXIF is read by another parser, which raises what it likes
        raise InputError(f"{path} has damaged EXIF data; remove or replace it") from error
    return image.size[::-1] if turned else image.size


def _as_seen(image: Image.Image, mode: str) -> Image.Image:
    """A picture as a viewer shows it: upright, and on a ground where it is transparent."""
    upright = ImageOps.exif_transpose(image)
    if "A" in upright.mode or "transparency" in upright.info:
        above = upright.convert("RGBA")
        ground = Image.new("RGBA", above.size, _GROUND)
        return Image.alpha_composite(ground, above).convert("RGB").convert(mode)
    return upright.convert(mode)


def _open_image(path: Path | Encoded) -> Image.Image:
    file = io.BytesIO(path.read()) if isinstance(path, Encoded) else path
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            # Only these two decoders, whatever the bytes inside claim to be.
            return Image.open(file, formats=("PNG", "JPEG"))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise too_large(path) from error
        except Exception as error:  # the decoders raise many kinds on damaged files
            raise InputError(
                f"{path} is not a readable png or jpeg; remove or replace it"
            ) from error


def _decode(
    path: Path | Encoded, mode: str, image_size: int | None, size: tuple[int, int] | None
) -> np.ndarray:
    with _open_image(path) as image:
        try:
            converted = _as_seen(image, mode)
        except Exception as error:
            raise InputError(
                f"cannot decode {path}: {one_line(error)}; remove or replace it"
            ) from error
    pixels = np.asarray(converted if image_size is None else fit(converted, image_size))
    if size is not None and pixels.shape[:2] != size:
        raise InputError(f"{path} is not of the size that its header says; remove or replace it")
    return pixels.reshape(*pixels.shape[:2], -1)
