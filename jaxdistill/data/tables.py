"""Hugging Face data sets on a disk: tables of images and labels.

They are Parquet files, as the Hub has them, or the Arrow files of `datasets.save_to_disk`.

`image` holds the bytes of PNG or JPEG files, as structs of `bytes` and `path` or as they are. What
`datasets` knows of the columns stands as JSON under `huggingface` in a file's schema; the names of
a `ClassLabel` are taken from there.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.data import folders
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.folders import Encoded, Labelled
from jaxdistill.data.splits import Files
from jaxdistill.errors import InputError
from jaxdistill.io.reading import inflation_limit, one_line

SUFFIXES = (".parquet", ".arrow")
METADATA = b"huggingface"
"""Where in a schema `datasets` keeps what it knows of the columns."""

_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "fine_label")
_BATCH = 16  # rows; what a page claims of each is believed only so far


class _Row(NamedTuple):
    """An image and what the table says that it is."""

    image: Encoded
    label: int | str


class _Table(NamedTuple):
    """The rows of a file, and the names of its classes where it has them."""

    path: Path
    rows: list[_Row]
    names: list[str] | None


def read(files: Files, name: str, image_size: int | None) -> Dataset:
    """Reads the tables of a training and a test split.

    The classes are those of the feature `ClassLabel`, in its order; of labels that are texts, the
    texts of the training split, sorted.

    Args:
        files: Where they are.
        name: Recorded in the data set.
        image_size: Resize the images to this; needed when they differ in size.

    Raises:
        InputError: If a file is damaged, has no column of images or of labels or several, lacks a
            label or the bytes of an image, or has other classes than the first.
    """
    splits = [[_table(path) for path in paths] for paths in (files.train, files.test)]
    first = splits[0][0]
    for table in (table for tables in splits for table in tables):
        if table.names != first.names:
            raise InputError(
                f"{table.path} has other class names, or another order of them, than {first.path}; "
                "write both with the same"
            )
    train, test = ([row for table in tables for row in table.rows] for tables in splits)
    kinds = {type(row.label) for rows in (train, test) for row in rows}
    if len(kinds) != 1:
        raise InputError(f"labels of {name} are numbers here and texts there; write all the same")
    if kinds == {int}:
        return folders.from_files(
            *([Labelled(*row) for row in rows] for rows in (train, test)),
            name,
            first.names,
            image_size,
        )
    names = sorted({row.label for row in train})
    place = {label: i for i, label in enumerate(names)}
    for row in test:
        if row.label not in place:
            raise InputError(
                f"{row.image} is of class {row.label!r:.200}, which no training image has; test "
                "classes must be among the training classes"
            )
    return folders.from_files(
        *([Labelled(row.image, place[row.label]) for row in rows] for rows in (train, test)),
        name,
        names,
        image_size,
    )


def _table(path: Path) -> _Table:
    try:
        columns, batches, known = _opened(path)
        rows, held, limit = [], 0, inflation_limit(path.stat().st_size)
        for batch in batches:
            images, labels = (batch.column(column).to_pylist() for column in columns)
            for image, label in zip(images, labels, strict=True):
                row = _row(f"{path}, row {len(rows)}", image, label)
                held += row.image.size
                if held > limit:
                    raise InputError(f"{path} unfolds to more than {limit} bytes; write it anew")
                rows.append(row)
    except InputError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise InputError(f"cannot read {path}: {one_line(error)}; write it again") from error
    if not rows:
        raise InputError(f"{path} has no rows; remove it or fill it")
    return _Table(path, rows, _class_names(path, known, columns[1]))


def _opened(path: Path) -> tuple[tuple[str, str], Iterator[Any], bytes | None]:
    """The names of the columns of images and of labels, batches of both, and what is known."""
    import pyarrow  # which other data wait for in vain
    import pyarrow.parquet

    if path.suffix == ".parquet":
        file = pyarrow.parquet.ParquetFile(path)
        schema, parts = file.schema_arrow, file.metadata
        claimed = sum(parts.row_group(i).total_byte_size for i in range(parts.num_row_groups))
        if claimed > (limit := inflation_limit(path.stat().st_size)):
            raise InputError(f"{path} claims to unfold to more than {limit} bytes; write it anew")
        columns = _columns(path, schema)
        batches = file.iter_batches(_BATCH, columns=list(columns))
    else:
        source = pyarrow.memory_map(str(path))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
        schema = reader.schema
        columns = _columns(path, schema)
        numbered = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else ()
        )
        batches = (_checked(batch) for batch in (numbered if is_file else reader))
    return columns, batches, (schema.metadata or {}).get(METADATA)


def _checked(batch: Any) -> Any:
    """A batch whose offsets lie inside of it, which its format does not make sure of."""
    batch.validate(full=True)
    return batch


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    return _column(path, schema, "images", _IMAGES), _column(path, schema, "labels", _LABELS)


def _column(path: Path, schema: Any, what: str, names: Sequence[str]) -> str:
    found = [name for name in schema.names if name in names]
    if len(found) != 1:
        held = " and ".join(found) or f"only {', '.join(schema.names)[:200] or 'nothing'}"
        raise InputError(
            f"{path} must have one column of {what}, {' or '.join(names)}; it has {held}"
        )
    return found[0]


def _row(where: str, image: Any, label: Any) -> _Row:
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise InputError(
            f"{where} holds no bytes of an image file, and files elsewhere are not read; write it "
            "with its images inside, as datasets' to_parquet does"
        )
    if label is None or label == -1:  # which the Hub's have where labels are kept back
        raise InputError(f"{where} has no label; leave it out, or test on a split that has them")
    if type(label) not in (int, str):
        raise InputError(f"{where} has the label {label!r:.99}, neither a class id nor a text")
    if type(label) is int and not 0 <= label < 1 << 31:
        raise InputError(f"{where} has the label {label}, which is no class id")
    return _Row(Encoded(where, len(content), functools.partial(bytes, content)), label)


def _class_names(path: Path, known: bytes | None, column: str) -> list[str] | None:
    """The names that the feature `ClassLabel` gives the classes, if the column has it."""
    if known is None:
        return None
    try:
        feature = json.loads(known)["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(
            f"what {path} says of its columns to datasets is damaged; write it again"
        ) from error
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise InputError(f"{path} has class names that are no texts; write it again")
    return names
