"""Files that each hold many examples, and which split they are of, by their names.

Those of the Hugging Face Hub are `data/train-00000-of-00002.parquet`, of `datasets.save_to_disk`
`train/data-00000-of-00001.arrow`, of WebDataset `train-000000.tar` or `train/0.tar`.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxdistill.errors import InputError

# What a split may be called; of several that are tested on the first is taken.
_TRAIN = ("train",)
_TEST = ("test", "validation", "valid", "val")
_NAMED = re.compile(rf"({'|'.join(_TRAIN + _TEST)})(?![A-Za-z])")
_INNER = "data"  # where the Hub has them


class Files(NamedTuple):
    """The files of a data set.

    Attributes:
        folder: Where they lie, or below.
        suffix: What their names end in.
        train: Those of the training split, sorted.
        test: Those of the test split.
    """

    folder: Path
    suffix: str
    train: tuple[Path, ...]
    test: tuple[Path, ...]


def find(folder: Path, suffixes: Sequence[str]) -> Files | None:
    """The files of a data set in a folder, if it has training files of such a form.

    Args:
        folder: What holds them, or `data` or folders of the splits with them.
        suffixes: The forms, such as `.tar`.

    Raises:
        InputError: If they are of two forms, or there are none to test on.
    """
    if not folder.is_dir():
        return None
    found: dict[str, dict[str, list[Path]]] = {}
    left = []
    for path, split in _named(folder):
        if path.suffix in suffixes and split is None:
            left.append(path.name)
        elif path.suffix in suffixes:
            found.setdefault(path.suffix, {}).setdefault(split, []).append(path)
    forms = [suffix for suffix in suffixes if "train" in found.get(suffix, {})]
    if not forms:
        return None
    if len(forms) > 1:
        raise InputError(f"{folder} has training files in {' and in '.join(forms)}; keep one form")
    splits = found[forms[0]]
    tested = next((name for name in _TEST if name in splits), None)
    if tested is None:
        raise InputError(
            f"{folder} has no test files; expected test-*{forms[0]} or validation-*{forms[0]} "
            f"beside {splits['train'][0].name}"
        )
    left += [path.name for name in splits if name not in ("train", tested) for path in splits[name]]
    if left:
        warnings.warn(
            f"{folder}: {len(left)} files of no split that is read are left out: "
            f"{', '.join(left[:3])}{', …' if len(left) > 3 else ''}",
            stacklevel=2,
        )
    return Files(folder, forms[0], *(tuple(splits[name]) for name in ("train", tested)))


def _named(folder: Path, below: str | None = _INNER) -> Iterator[tuple[Path, str | None]]:
    """Files, sorted, and the split that each is of, if any."""
    for entry in sorted(folder.iterdir()):
        name = _NAMED.match(entry.name)
        if entry.is_file() and not entry.name.startswith("."):
            yield entry, name and name[1]
        elif entry.is_dir() and entry.name == below:
            yield from _named(entry, below=None)
        # A folder with folders in it is of an image folder, whatever else lies there.
        elif entry.is_dir() and entry.name in _TRAIN + _TEST:
            inner = sorted(x for x in entry.iterdir() if not x.name.startswith("."))
            if all(path.is_file() for path in inner):
                yield from ((path, entry.name) for path in inner)
