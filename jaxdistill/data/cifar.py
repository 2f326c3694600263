"""CIFAR-10 and CIFAR-100 in the binary form of their authors: records of labels and pixels.

The form for Python is one of pickles, which may run anything and are never read here.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxdistill.data.dataset import Dataset, from_arrays
from jaxdistill.errors import InputError

_SIDE, _CHANNELS = 32, 3
_PIXELS = _SIDE * _SIDE * _CHANNELS
_BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]
# Training files, test files, file of class names, labels of a record; the last label is meant.
_FORMS = {
    "cifar10": (_BATCHES, ["test_batch.bin"], "batches.meta.txt", 1),
    "cifar100": (["train.bin"], ["test.bin"], "fine_label_names.txt", 2),
}
_PICKLED = ("data_batch_1", "batches.meta", "meta")


def form_in(folder: Path) -> str | None:
    """Which of the two a folder holds, `cifar10` or `cifar100`, if any."""
    return next((n for n, f in _FORMS.items() if (folder / f[0][0]).is_file()), None)


def is_pickled(folder: Path) -> bool:
    """Whether a folder holds the form for Python."""
    return any((folder / name).is_file() for name in _PICKLED)


def read(folder: Path, form: str) -> Dataset:
    """Read the binary form.

    Args:
        folder: Where its files lie.
        form: What `form_in` says.

    Raises:
        InputError: If a file is missing or is not one of such records.
    """
    train, test, names, labels = _FORMS[form]
    arrays = [*_read(folder, train, labels), *_read(folder, test, labels)]
    listed = folder / names
    known = listed.read_text("utf-8", "replace").split() if listed.is_file() else None
    return from_arrays(*arrays, name=form, class_names=known)


def _read(folder: Path, names: Sequence[str], labels: int) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise InputError(f"missing file {name} in {folder}; unpack the archive again")
        part = np.fromfile(path, np.uint8)
        if not part.size or part.size % (labels + _PIXELS):
            raise InputError(
                f"{path} does not consist of records of {labels + _PIXELS} bytes; unpack the "
                "archive again"
            )
        parts.append(part.reshape(-1, labels + _PIXELS))
    records = np.concatenate(parts)
    planes = records[:, labels:].reshape(-1, _CHANNELS, _SIDE, _SIDE)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return images, records[:, labels - 1].astype(np.int32)
