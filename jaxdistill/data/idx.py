"""Data sets in IDX files, the format of MNIST."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxdistill.data.dataset import Dataset, from_arrays
from jaxdistill.errors import InputError
from jaxdistill.io.reading import inflation_limit, one_line

_CHUNK = 1 << 24  # bytes read at once


def lies_in(folder: Path) -> bool:
    """Whether a folder holds training images in an IDX file."""
    return _find(folder, ("train",), "images", 3) is not None


def read(folder: Path, name: str, class_names: Sequence[str] | None = None) -> Dataset:
    """Read the four IDX files of a folder, each perhaps packed with gzip.

    Args:
        folder: Where `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two of `t10k-`
            or `test-` lie.
        name: Recorded in the data set.
        class_names: One per class; the decimal class ids by default.

    Raises:
        InputError: If one is missing or damaged, or they do not belong together.
    """
    arrays = []
    for prefixes in (("train",), ("t10k", "test")):
        paths = []
        for kind, ndim in (("images", 3), ("labels", 1)):
            found = _find(folder, prefixes, kind, ndim)
            if found is None:
                raise InputError(
                    f"missing file {prefixes[0]}-{kind}-idx{ndim}-ubyte[.gz] in {folder}"
                )
            paths.append(found)
            arrays.append(_read(found, ndim))
        if len(arrays[-2]) != len(arrays[-1]):
            raise InputError(
                f"{paths[0]} holds {len(arrays[-2])} images but {paths[1].name} "
                f"{len(arrays[-1])} labels; the files do not belong together"
            )
    return from_arrays(*arrays, name=name, class_names=class_names)


def _find(folder: Path, prefixes: Iterable[str], kind: str, ndim: int) -> Path | None:
    # Unpacking tools and mirrors disagree on the separator before "idx".
    names = (
        f"{prefix}-{kind}{separator}idx{ndim}-ubyte{suffix}"
        for prefix in prefixes
        for separator in "-."
        for suffix in ("", ".gz")
    )
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(path: Path, ndim: int) -> np.ndarray:
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
            while len(body) <= expected and (chunk := file.read(_CHUNK)):
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
