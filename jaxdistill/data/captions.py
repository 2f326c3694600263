"""Images with sentences: what holds them, folders of one's own, and grids that describe themselves.

Sentences become vectors by an encoder that is not trained: `jaxdistill.data.hashed`, or vectors
of the user's own, one for each sentence.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxdistill.data import jsonl, vqa
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.folders import image_files, images_of
from jaxdistill.data.hashed import hashed
from jaxdistill.errors import InputError
from jaxdistill.io.files import expanded
from jaxdistill.io.reading import read_npy

SPLITS = ("train", "validation", "test")
CAPTIONS = "captions.jsonl"
HASHED = "hashed"
_VALIDATION = 6  # one part of so many of the training images


class Captions(NamedTuple):
    """Images, each with one or several sentences.

    Attributes:
        images: uint8 (n, h, w, c).
        sentences: The sentences of each.
        first: int64 (n,), the number of the first of them among all sentences of all splits.
    """

    images: np.ndarray
    sentences: tuple[tuple[str, ...], ...]
    first: np.ndarray

    def fingerprint(self) -> str:
        """Hex SHA-256 over images and sentences."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(json.dumps(self.sentences).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Captioned:
    """Images with sentences in host memory.

    Attributes:
        name: Where they came from.
        train: What is distilled.
        validation: What settings are chosen on.
        test: What is retrieved.
        sentences: How many there are in all, those left out included.
    """

    name: str
    train: Captions
    validation: Captions
    test: Captions
    sentences: int


class Texts(NamedTuple):
    """Sentences as vectors, those of an image together.

    Attributes:
        vectors: float32 (n, most, d): an image's sentences start over until they are as many as
            those of the image that has most.
        counts: int32 (n,), sentences of each image.
    """

    vectors: Float32[np.ndarray, "n most d"]
    counts: Int32[np.ndarray, " n"]

    def fingerprint(self) -> str:
        """Hex SHA-256 over the vectors and their numbers."""
        digest = hashlib.sha256(repr(self.vectors.shape).encode())
        digest.update(np.ascontiguousarray(self.vectors))
        digest.update(self.counts)
        return digest.hexdigest()


def grid(data: Dataset, *, train: int, validation: int, test: int, seed: int = 0) -> Captioned:
    """Grids of four images of a labelled set, each with one sentence that says what is where.

    See `jaxdistill.data.vqa.grid`, whose descriptions the sentences are.
    """
    made = vqa.grid(
        data, train=train, validation=validation, test=test, seed=seed, kinds=("describe",)
    )
    splits, count = [], 0
    for questions in (made.train, made.validation, made.test):
        first = count + np.arange(len(questions.answers))
        splits.append(Captions(questions.images, tuple((a,) for a in questions.answers), first))
        count += len(first)
    return Captioned(made.name, *splits, count)


def folder(
    path: Path, *, train: int, validation: int, test: int, image_size: int | None = None
) -> Captioned:
    """Images of one's own: a folder with them and `captions.jsonl`.

    A line is `{"image": "dog.jpg", "captions": ["a dog runs", "a brown dog"], "split": "train"}`;
    one sentence may stand without brackets, and the split is `train` where it is not said.
    Validation has the images of its split, or the last of the training images, which are then
    trained on no more.

    Args:
        path: The folder; its name becomes that of the data.
        train: Images of the training split at most.
        validation: Images of the validation split at most.
        test: Images of the test split at most.
        image_size: What the images are brought to; needed when they differ in size.

    Raises:
        InputError: If a file or an image is missing or damaged, a line is not of that form, a
            sentence has no image or an image no sentence.
    """
    root = path.resolve()
    rows = _rows(path / CAPTIONS, root)
    _check_named(root, {row.image for row in rows})
    count = sum(len(row.sentences) for row in rows)
    split = {name: [row for row in rows if row.split == name] for name in SPLITS}
    if not split["validation"]:
        held = min(validation, max(len(split["train"]) // _VALIDATION, 1))
        split["train"], split["validation"] = split["train"][:-held], split["train"][-held:]
    most = {"train": train, "validation": validation, "test": test}
    split = {name: own[: most[name]] for name, own in split.items()}
    if empty := [name for name, own in split.items() if not own]:
        raise InputError(
            f"{path / CAPTIONS} has no images of the split {empty[0]}; give some lines "
            f'"split": "{empty[0]}"'
        )
    files = [[row.image for row in own] for own in split.values()]
    images = images_of(files, root.name, image_size)
    made = [
        Captions(x, tuple(row.sentences for row in own), np.array([row.first for row in own]))
        for x, own in zip(images, split.values(), strict=True)
    ]
    return Captioned(root.name, *made, count)


def encoded(captions: Captions, encoder: str, dim: int, count: int) -> Texts:
    """The sentences of a split as vectors.

    Args:
        captions: The split.
        encoder: `hashed`, or the path of a `.npy` with a vector for every sentence, in the order
            of `captions.jsonl`.
        dim: Length of a vector of `hashed`.
        count: Sentences of all splits.

    Raises:
        InputError: If the file is none, or has not as many vectors as there are sentences.
    """
    counts = np.array([len(own) for own in captions.sentences], np.int32)
    if encoder == HASHED:
        flat = [sentence for own in captions.sentences for sentence in own]
        vectors, first = hashed(flat, dim), np.cumsum(counts) - counts
    else:
        vectors, first = _embeddings(encoder, count), captions.first
    columns = np.arange(counts.max())[None, :] % counts[:, None]
    return Texts(vectors[first[:, None] + columns], counts)


def _embeddings(path: str, count: int) -> Float32[np.ndarray, "n d"]:
    try:
        vectors = read_npy(expanded(path))
    except InputError as error:
        raise InputError(
            f"text.encoder={path} holds no embeddings ({error}); give {HASHED}, or a .npy of "
            "(sentences, length)"
        ) from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(vectors) != count:
        raise InputError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}, and there are {count} "
            f"sentences; give ({count}, length) floating-point numbers, in the order of {CAPTIONS}"
        )
    if not np.isfinite(vectors).all():
        raise InputError(f"{path} holds values that are not finite; make it again")
    return vectors.astype(np.float32)


class _Row(NamedTuple):
    """A line of a file of captions."""

    image: Path
    sentences: tuple[str, ...]
    split: str
    first: int


def _rows(path: Path, root: Path) -> list[_Row]:
    lines = jsonl.objects(
        path, holds="a line for each image says its captions", form="image and captions"
    )
    rows: list[_Row] = []
    seen: dict[Path, str] = {}
    count = 0
    for where, said in lines:
        row = _row(said, where, root, count)
        if row.image in seen:
            raise InputError(
                f"{where}: {said['image']!r} stands in {seen[row.image]} too; put its captions in "
                "one line"
            )
        seen[row.image] = where.rpartition(", ")[2]
        count += len(row.sentences)
        rows.append(row)
    return rows


def _row(said: dict, where: str, root: Path, first: int) -> _Row:
    captions = said.get("captions")
    sentences = [captions] if isinstance(captions, str) else captions
    good = isinstance(sentences, list) and all(isinstance(x, str) and x.strip() for x in sentences)
    if not good or not sentences:
        raise InputError(
            f"{where} has no captions; each line needs a sentence or a list of some, none empty"
        )
    if not all(map(jsonl.is_whole, sentences)):
        raise InputError(f"{where}: a caption has half a character; write it whole")
    if not isinstance(said.get("image"), str) or not said["image"]:
        raise InputError(f"{where} has captions without an image; say which file they describe")
    split = said.get("split", SPLITS[0])
    if split not in SPLITS:
        raise InputError(f"{where}: split is {split!r:.100}; choose from {', '.join(SPLITS)}")
    return _Row(jsonl.file_in(root, said["image"], where), tuple(sentences), split, first)


def _check_named(root: Path, named: set[Path]) -> None:
    """Refuses images that no line names: they would be left out in silence."""
    if left := [path for path in image_files(root) if path.resolve() not in named]:
        raise InputError(
            f"{len(left)} of the images in {root} have no captions, such as "
            f"{left[0].relative_to(root)}; give each a line in {CAPTIONS}, or move it elsewhere"
        )
