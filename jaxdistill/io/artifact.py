"""The distilled data set on disk: three files that other programs may rely on.

`distilled.npz` (readable by `numpy.load` without pickle):

| key | dtype, shape | meaning |
|---|---|---|
| `images` | float32 (N, H, W, C) | values in [0, 1], decoded as they are to be trained on |
| `labels` | int32 (N,) | class ids, indices into `class_names` |
| `soft_labels` | float32 (N, classes) | probabilities, rows sum to 1; only when they were made |
| `learned_labels` | float32 (N, classes) | logits to be regressed on; only when they were learned |

`distilled.json`, the card: the fields of `REQUIRED`, then `content_sha256`, and whatever else the
writer adds. `mean` and `std` (one number a channel) are those of the training data on the [0, 1]
scale; networks were trained on `(images - mean) / std`. `content_sha256` ties the card to its
arrays: the SHA-256 of, for each array of the table that is there, in this order,
the line `<key> <dtype> <sizes joined by commas>` ended by a newline (such as
`images <f4 100,28,28,1`), followed by the array's bytes, little-endian and row-major.

`distilled.png`: a picture of the images, one row a class.
"""

import hashlib
import json
import os
import reprlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32
from PIL import Image

from jaxdistill.errors import InputError
from jaxdistill.io.files import expanded, write_files
from jaxdistill.io.pictures import grid
from jaxdistill.io.reading import one_line, read_json, read_npz

FORMAT = "jaxdistill.distilled/1"

REQUIRED = (
    "format",  # FORMAT
    "dataset",  # name of the data set that was distilled
    "class_names",  # list of str, indexed by label
    "mean",  # list of C floats, of the training images on the [0, 1] scale
    "std",  # list of C floats > 0, likewise
    "method",  # name of the method
    "ipc",  # stored images per class, the budget; each yields factor**2 decoded images
    "factor",  # side of the grid of small images decoded from a stored one; 1 = none
    "config_hash",  # identifies the resolved config
    "seeds",  # dict: what was seeded -> seed
    "accuracies",  # list or dict of measured records; may be empty
    "provenance",  # dict: hash of the source data, library versions, ...
)
"""Fields every card has."""

_DTYPES = {"images": "<f4", "labels": "<i4", "soft_labels": "<f4", "learned_labels": "<f4"}
_RANKS = {"images": 4, "labels": 1, "soft_labels": 2, "learned_labels": 2}


class Distilled(NamedTuple):
    """A distilled data set.

    Attributes:
        images: float32 in [0, 1], decoded as they are to be trained on, not normalized.
        labels: class ids.
        soft_labels: probabilities (rows sum to 1), or None when none were made.
        card: what the set is and where it comes from; see `REQUIRED`.
        learned_labels: logits that a network is to be regressed on, or None.
    """

    images: Float32[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]
    soft_labels: Float32[np.ndarray, "n classes"] | None
    card: dict
    learned_labels: Float32[np.ndarray, "n classes"] | None = None


def save(directory: str | os.PathLike[str], distilled: Distilled) -> None:
    """Writes `distilled.npz`, `distilled.json` and `distilled.png` into a directory.

    A process killed meanwhile leaves either the earlier artefact or one that `load` refuses,
    never a readable mixture of two.

    Args:
        directory: made when missing.
        distilled: the set. `format` and `content_sha256` are added to the card as written.

    Raises:
        InputError: when the arrays or the card break the format (nothing is touched then), or
            the directory cannot be written.
    """
    directory = expanded(directory)
    arrays = {
        key: np.asarray(value) for key in _DTYPES if (value := getattr(distilled, key)) is not None
    }
    try:
        _check_arrays(arrays)
        digest = _content_sha256(arrays)
        card, text = _as_json({"format": FORMAT, **distilled.card, "content_sha256": digest})
        _check_card(card, arrays)
    except InputError as error:
        raise InputError(f"cannot save the distilled set: {error}") from None
    picture = Image.fromarray(grid(arrays["images"], arrays["labels"], card["class_names"]))
    # The card goes first and the arrays last: from the first rename to the last the two
    # disagree, which `load` notices, and the picture changes while nothing can be loaded.
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_files(
            {
                directory / "distilled.json": lambda file: file.write(text),
                directory / "distilled.png": lambda file: picture.save(
                    file, format="png", optimize=True
                ),
                directory / "distilled.npz": lambda file: np.savez_compressed(file, **arrays),
            }
        )
    except OSError as error:
        where = error.filename or directory
        raise InputError(
            f"cannot write the distilled set: {where}: {error.strerror or error}"
        ) from error


def load(path: str | os.PathLike[str], *, max_bytes: int = 8 << 30) -> Distilled:
    """Reads and validates a distilled data set. Safe on untrusted files: nothing is unpickled.

    Args:
        path: the directory, a workdir that has it as `artifacts`, or the `.npz` itself; the card
            is the `.json` of the same name.
        max_bytes: refuse arrays that would take more memory than this, before reading them.

    Returns:
        The set; its card is empty when there is no `.json`.

    Raises:
        InputError: when the file is not such an artefact, or not a whole one.
    """
    path = expanded(path)
    if os.path.isdir(path):
        inner = path / "artifacts"
        path = (inner if os.path.isdir(inner) else path) / "distilled.npz"
    try:
        arrays = read_npz(
            path,
            ("images", "labels"),
            optional=("soft_labels", "learned_labels"),
            check=_check_layout,
            max_bytes=max_bytes,
        )
        _check_arrays(arrays)
        card = _read_card(path.with_suffix(".json"), arrays)
    except (InputError, OSError, MemoryError) as error:
        raise InputError(
            f"not a jaxdistill artefact: {path}: {one_line(error)}; expected distilled.npz "
            "with images and labels, as written by jaxdistill"
        ) from error
    soft, learned = (arrays.get(key) for key in ("soft_labels", "learned_labels"))
    return Distilled(arrays["images"], arrays["labels"], soft, card, learned)


def _content_sha256(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in _DTYPES:
        if key in arrays:
            array = np.ascontiguousarray(arrays[key], _DTYPES[key])
            sizes = ",".join(map(str, array.shape))
            digest.update(f"{key} {array.dtype.str} {sizes}\n".encode())
            digest.update(array.reshape(-1))
    return digest.hexdigest()


def _check_layout(key: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.dtype(_DTYPES[key]):
        raise InputError(f"{key} are {dtype}, not {np.dtype(_DTYPES[key])}")
    if len(shape) != _RANKS[key]:
        raise InputError(f"{key} have {len(shape)} dimensions, not {_RANKS[key]}")
    if 0 in shape:
        raise InputError(f"{key} of shape {shape} are empty")


def _check_arrays(arrays: dict[str, np.ndarray]) -> None:
    for key, array in arrays.items():
        _check_layout(key, array.dtype, array.shape)
        if len(array) != len(arrays["images"]):
            raise InputError(f"{len(arrays['images'])} images but {len(array)} {key}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{key} hold values that are not finite")
    images, labels, soft = arrays["images"], arrays["labels"], arrays.get("soft_labels")
    if images.min() < 0 or images.max() > 1:
        raise InputError(f"images lie in [{images.min():g}, {images.max():g}], not in [0, 1]")
    if labels.min() < 0:
        raise InputError(f"labels hold {labels.min()}; class ids start at 0")
    for key in ("soft_labels", "learned_labels"):
        if key in arrays and labels.max() >= (known := arrays[key].shape[1]):
            raise InputError(f"labels hold {labels.max()} but {key} know {known} classes")
    if soft is None:
        return
    if soft.min() < 0 or np.abs(soft.sum(1, dtype=np.float64) - 1).max() > 1e-3:
        raise InputError("soft_labels are not probabilities: rows must be >= 0 and sum to 1")


def _as_json(card: dict) -> tuple[dict, bytes]:
    """Returns the card as a reader will get it (tuples as lists, say), and the file's content."""
    try:
        text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
        content = (text + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the card cannot be written as JSON: {one_line(error)}") from error
    return json.loads(content), content


def _plain(value: object) -> object:
    """Arrays and array scalars as numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")


def _read_card(path: Path, arrays: dict[str, np.ndarray]) -> dict:
    if not path.exists():
        return {}
    try:
        card = read_json(path)
    except InputError as error:
        raise InputError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(card, dict):
        raise InputError(f"{path.name} is not a JSON object")
    _check_card(card, arrays)
    if card.get("content_sha256") != _content_sha256(arrays):
        raise InputError(
            f"{path.name} describes other arrays (content_sha256 differs), as after an "
            "interrupted save: save again"
        )
    return card


def _check_card(card: dict, arrays: dict[str, np.ndarray]) -> None:
    missing = [key for key in REQUIRED if key not in card]
    if missing:
        raise InputError(f"the card lacks {', '.join(missing)}")
    channels = arrays["images"].shape[-1]
    names, mean, std = card["class_names"], card["mean"], card["std"]
    rules = {
        "format": (card["format"] == FORMAT, repr(FORMAT)),
        "class_names": (
            isinstance(names, list) and all(isinstance(n, str) for n in names),
            "a list of strings",
        ),
        "mean": (_are_numbers(mean, channels), f"{channels} finite numbers"),
        "std": (
            _are_numbers(std, channels) and min(std) > 0,
            f"{channels} finite numbers above 0",
        ),
        "seeds": (isinstance(card["seeds"], dict), "an object"),
        "accuracies": (isinstance(card["accuracies"], list | dict), "a list or an object"),
        "provenance": (isinstance(card["provenance"], dict), "an object"),
    }
    for key in ("dataset", "method", "config_hash"):
        rules[key] = (isinstance(card[key], str), "a string")
    for key in ("ipc", "factor"):
        rules[key] = (type(card[key]) is int and card[key] >= 1, "a whole number above 0")
    for key, (holds, wanted) in rules.items():
        if not holds:
            raise InputError(f"the card's {key} must be {wanted}, not {reprlib.repr(card[key])}")
    if arrays["labels"].max() >= len(names):
        raise InputError(f"labels hold {arrays['labels'].max()} but class_names are {len(names)}")
    for key in ("soft_labels", "learned_labels"):
        if key in arrays and (known := arrays[key].shape[1]) != len(names):
            raise InputError(f"{key} know {known} classes but class_names are {len(names)}")


def _are_numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in value)
    )
