"""WebDataset shards: tar files whose members of one name are an example.

`000012.png` and `000012.cls` are the image and the class id of one example; members of other kinds
are passed over. Nothing is unpacked to a disk, so that what members are called matters to nothing
but messages, and no pickle is read.
"""

import functools
import tarfile
from collections.abc import Iterator
from pathlib import Path

from jaxdistill.data import folders
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.folders import Encoded, Labelled
from jaxdistill.data.splits import Files
from jaxdistill.errors import InputError
from jaxdistill.io.reading import one_line

SUFFIX = ".tar"
NAMES = "classnames.txt"
"""The names of the classes, a line each, beside the shards; as CLIP's benchmarks have it."""

_IMAGES = ("png", "jpg", "jpeg")
_LABEL = "cls"
_PICKLES = ("pyd", "pickle", "pkl", "pth", "pt")  # by what WebDataset would unpickle
_LONGEST_LABEL = 32  # bytes
_LONGEST_NAMES = 1 << 24  # bytes


def read(files: Files, name: str, image_size: int | None) -> Dataset:
    """Reads the shards of a training and a test split.

    Args:
        files: Where they are; classes have the names of `classnames.txt` there, or their numbers.
        name: Recorded in the data set.
        image_size: Resize the images to this; needed when they differ in size.

    Raises:
        InputError: If a shard is damaged or cut off, or holds links, pickles or an example without
            one image and one label.
    """
    train, test = (
        [example for shard in shards for example in _examples(shard)]
        for shards in (files.train, files.test)
    )
    return folders.from_files(train, test, name, _class_names(files.folder / NAMES), image_size)


def _class_names(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    if path.stat().st_size > _LONGEST_NAMES:
        raise InputError(f"{path} is no list of class names; remove it")
    try:
        return path.read_text("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text; write the class names so") from error


def _examples(shard: Path) -> list[Labelled]:
    """The examples of a shard, in its order."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in _members(shard):
        folder, slash, file = member.name.rpartition("/")
        stem, _, kind = file.partition(".")
        if not stem:  # hidden
            continue
        key, kind = f"{folder}{slash}{stem}", kind.lower()
        what = f"{shard}: {member.name}"
        if kind.rpartition(".")[2] in _PICKLES:
            raise InputError(f"{what} is a pickle, which is never read; write the shard without it")
        example = found.setdefault(key, {})
        if kind in example:
            raise InputError(f"{what} is there twice; give each example a name of its own")
        example[kind] = member
    if not found:
        raise InputError(f"{shard} holds no example; remove it or fill it")
    return [_labelled(shard, key, example) for key, example in found.items()]


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar, whose headers are believed as far as the file bears them out."""
    size = shard.stat().st_size
    try:
        # Not packed as a whole, for what is packed unfolds while it is looked through.
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if not member.isreg() or member.sparse is not None:
                    raise InputError(
                        f"{shard}: {member.name} is no plain file; write the shard without links"
                    )
                if member.offset_data + member.size > size:
                    raise InputError(f"{shard} is cut off in {member.name}; copy it again")
                yield member
            end = archive.offset
    except InputError:
        raise
    except Exception as error:  # damaged archives raise many kinds
        raise InputError(
            f"cannot read {shard} as a tar file that is not compressed: {one_line(error)}; copy it "
            "again, or unpack it with gzip -d"
        ) from error
    # A tar that is cut off between two members, or damaged in a header, only seems to end there.
    if len(mark := _bytes_at(shard, end, tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE or any(mark):
        raise InputError(f"{shard} ends without a mark of its end; it is cut off: copy it again")


def _labelled(shard: Path, key: str, example: dict[str, tarfile.TarInfo]) -> Labelled:
    what = f"{shard}: {key}"
    images = [kind for kind in _IMAGES if kind in example]
    if len(images) != 1:
        held = " and ".join(images) or "no png, jpg or jpeg"
        raise InputError(f"{what} has {held}; each example needs one image")
    if _LABEL not in example:
        raise InputError(f"{what} has no {_LABEL}; each example needs one, with its class id")
    image, label = example[images[0]], example[_LABEL]
    said = b"" if label.size > _LONGEST_LABEL else _bytes_at(shard, label.offset_data, label.size)
    if not said.strip().isdigit() or int(said) >= 1 << 31:
        raise InputError(f"{what} has a {_LABEL} that is no class id; write one as 0, 1, 2, ...")
    content = functools.partial(_bytes_at, shard, image.offset_data, image.size)
    return Labelled(Encoded(f"{shard}: {image.name}", image.size, content), int(said))


def _bytes_at(path: Path, start: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)
