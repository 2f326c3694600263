"""Distilled sets in the formats of other libraries.

Every form has the images as PNG files of 8 bits: a value v in [0, 1] becomes the whole number
nearest to 255 v, and is off by at most 1/510 when it is read back as that number over 255.
WebDataset shards and Parquet files have the float32 values too, bit by bit, and the labels that
are not class ids. Beside them lies the card, `distilled.json`, so that what a set is, and what
guarantee it has, goes where it goes.
"""

import functools
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from jaxdistill.errors import InputError
from jaxdistill.io import artifact
from jaxdistill.io.artifact import Distilled
from jaxdistill.io.files import dump, expanded, write_folder

_SHARD = 10_000  # examples of a shard
_GROUP = 100  # rows that are read together
_OTHER_LABELS = ("soft_labels", "learned_labels")
# What is a folder's name on every system, and no hidden one.
_PLAIN = re.compile(r"[^\W_](?:[\w .,()&+-]{0,78}[\w()&+-])?")

Files = Iterator[tuple[str, Callable[[BinaryIO], object]]]


def export(folder: str | os.PathLike[str], out: str | os.PathLike[str], form: str) -> None:
    """Writes the distilled set of a run in a format of other libraries, as a training split.

    Args:
        folder: A workdir, one of its `baselines/`, or the folder `artifacts` in either.
        out: The folder to be made; nothing may be there.
        form: One of `FORMS`: `imagefolder`, `webdataset` or `parquet`.

    Raises:
        InputError: If there is no such set or form, the form cannot hold the set, or something is
            there already or cannot be written; then nothing is left.
    """
    if form not in FORMS:
        raise InputError(f"no form is called {form!r:.100}; choose from {', '.join(FORMS)}")
    place, distilled = expanded(out), artifact.load(folder)
    channels = distilled.images.shape[-1]
    if channels not in (1, 3):
        raise InputError(f"images of {channels} channels are no PNG files; those of 1 or 3 are")
    try:
        write_folder(place, FORMS[form](distilled))
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}") from error


def quantized(images: np.ndarray) -> np.ndarray:
    """The uint8 values nearest to 255 times those of images in [0, 1], of the same shape."""
    return np.rint(images.astype(np.float64) * 255).astype(np.uint8)


def folder_names(class_names: list[str]) -> list[str]:
    """Names of folders whose sorted order is that of the classes.

    They are the classes' own where these are plain and sort so. Else each has its class id before
    it, and a hyphen for every letter that some system does not take.
    """
    alike = {name.casefold() for name in class_names}
    plain = all(_PLAIN.fullmatch(name) for name in class_names)
    if plain and len(alike) == len(class_names) and sorted(class_names) == class_names:
        return class_names
    width = len(str(len(class_names) - 1))
    clean = (re.sub(r"[^\w .,()&+-]", "-", name)[:60].strip(" .") for name in class_names)
    return [f"{i:0{width}d} {name}".strip() for i, name in enumerate(clean)]


def _class_names(distilled: Distilled) -> list[str]:
    """Those of the card; numbers where there is none."""
    if distilled.card:
        return distilled.card["class_names"]
    soft = next((x for x in map(distilled._asdict().get, _OTHER_LABELS) if x is not None), None)
    count = int(distilled.labels.max()) + 1 if soft is None else soft.shape[1]
    return [str(i) for i in range(count)]


def _png(image: np.ndarray) -> bytes:
    file, values = io.BytesIO(), quantized(image)
    Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(file, "PNG")
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def _content(content: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(content)


def _card(distilled: Distilled) -> Files:
    if distilled.card:
        yield "distilled.json", functools.partial(dump, distilled.card)


def _imagefolder(distilled: Distilled) -> Files:
    """`train/CLASS/000000.png`, as torchvision and `datasets` read it."""
    names = _class_names(distilled)
    folders = folder_names(names)
    counts = np.bincount(distilled.labels, minlength=len(names))
    if not counts.all():
        raise InputError(
            f"class {names[counts.argmin()]!r:.100} has no image, and a folder with none is "
            "no class; export as webdataset or parquet"
        )
    for i, (image, label) in enumerate(zip(distilled.images, distilled.labels, strict=True)):
        yield f"train/{folders[label]}/{i:06d}.png", _content(_png(image))
    yield from _card(distilled)


def _webdataset(distilled: Distilled) -> Files:
    """`train-000000.tar` with `png`, `npy`, `cls`, and other labels as `npy`."""
    total = len(distilled.labels)
    for number, start in enumerate(range(0, total, _SHARD)):
        rows = range(start, min(start + _SHARD, total))
        yield f"train-{number:06d}.tar", functools.partial(_shard, distilled, rows)
    yield "classnames.txt", _content("".join(f"{n}\n" for n in _class_names(distilled)).encode())
    yield from _card(distilled)


def _shard(distilled: Distilled, rows: range, file: BinaryIO) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i in rows:
            image = distilled.images[i]
            members = {
                "png": _png(image),
                "npy": _npy(image),
                "cls": str(distilled.labels[i]).encode(),
            }
            for kind in _OTHER_LABELS:
                if (labels := getattr(distilled, kind)) is not None:
                    members[f"{kind}.npy"] = _npy(labels[i])
            for kind, content in members.items():
                member = tarfile.TarInfo(f"{i:09d}.{kind}")  # of no time: the same set, same bytes
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _parquet(distilled: Distilled) -> Files:
    """`data/train-00000-of-00001.parquet` with what `datasets` wants to know in its schema."""
    yield "data/train-00000-of-00001.parquet", functools.partial(_table, distilled)
    yield from _card(distilled)


def _table(distilled: Distilled, file: BinaryIO) -> None:
    import pyarrow  # which other forms wait for in vain
    import pyarrow.parquet

    files = [
        {"bytes": _png(image), "path": f"{i:06d}.png"} for i, image in enumerate(distilled.images)
    ]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {
        "image": pyarrow.array(files, kind),
        "label": pyarrow.array(distilled.labels.astype(np.int64)),
    }
    features = {
        "image": {"_type": "Image"},
        "label": {"names": _class_names(distilled), "_type": "ClassLabel"},
    }
    for name, key in {"pixels": "images", **{key: key for key in _OTHER_LABELS}}.items():
        if (array := getattr(distilled, key)) is not None:
            columns[name], features[name] = _nested(array)
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(columns).replace_schema_metadata(said)
    pyarrow.parquet.write_table(table, file, row_group_size=_GROUP)


def _nested(array: np.ndarray) -> tuple[Any, dict]:
    """An Arrow array of lists in lists of float32, the first axis outermost, and its feature."""
    import pyarrow

    flat = pyarrow.array(np.ascontiguousarray(array).reshape(-1))
    feature = {"dtype": "float32", "_type": "Value"}
    for size in array.shape[:0:-1]:
        offsets = np.arange(0, len(flat) + 1, size, dtype=np.int32)
        flat = pyarrow.ListArray.from_arrays(offsets, flat)
        feature = {"feature": feature, "_type": "Sequence"}  # datasets' older name of `List`
    return flat, feature


FORMS = {"imagefolder": _imagefolder, "webdataset": _webdataset, "parquet": _parquet}
"""What a set can be written as."""
