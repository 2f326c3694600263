"""Questions about images: what holds them, a generator of grids with questions, and folders.

`grid` makes pictures of two rows and two columns of real images, and asks where what is. No image
is in two splits, and what is asked is balanced within each kind of question, so that a model which
does not look is as good as a guess.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.data import jsonl
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.folders import images_of
from jaxdistill.errors import InputError

KINDS = ("at", "next", "count", "exist", "where", "rows", "describe")
"""What is asked: what stands in a place, or next to one; how many there are of a class, whether
there is one, where it is, which row has more of it; and what is to be seen at all."""

_PLACES = ("top left", "top right", "bottom left", "bottom right")
_NUMBERS = ("zero", "one", "two", "three", "four")
_CELLS = len(_PLACES)
_VALIDATION = 6  # one part of so many of the training images, or questions
_ONE_KIND = "questions"  # where nothing else is said
_ASKED = {
    "at": ("what is at the {place}?", "name the item at the {place}.", "{place}: which item?"),
    "next": (
        "what is {side} the item at the {place}?",
        "name the item {side} the one at the {place}.",
        "{side} the {place} item: which item?",
    ),
    "count": (
        "how many items are of the kind {name}?",
        "count the items of the kind {name}.",
        "{name}: how many?",
    ),
    "exist": (
        "is there an item of the kind {name}?",
        "does the picture show the kind {name}?",
        "{name}: yes or no?",
    ),
    "where": (
        "where is the item of the kind {name}?",
        "find the item of the kind {name}.",
        "{name}: where?",
    ),
    "rows": (
        "which row has more items of the kind {name}?",
        "top or bottom row: where is more of the kind {name}?",
        "{name}: which row has more?",
    ),
    "describe": ("describe the picture.", "what does the picture show?", "name all items."),
}


class Questions(NamedTuple):
    """Images, each with a question and its answer.

    Attributes:
        images: uint8 (n, h, w, c).
        questions: A text for each.
        answers: A text for each.
        kinds: int32 (n,), places in `VQA.kinds`.
    """

    images: np.ndarray
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    kinds: np.ndarray

    def fingerprint(self, kinds: Sequence[str]) -> str:
        """Hex SHA-256 over images, texts and the names of the kinds, of which `kinds` are all."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))
        named = [kinds[i] for i in self.kinds.tolist()]
        digest.update(json.dumps([self.questions, self.answers, named]).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class VQA:
    """Questions about images in host memory.

    Attributes:
        name: Where they came from.
        train: What models are trained on.
        validation: What settings are chosen on.
        test: What models are measured on.
        kinds: Names of the kinds of questions.
    """

    name: str
    train: Questions
    validation: Questions
    test: Questions
    kinds: tuple[str, ...]


def grid(
    data: Dataset,
    *,
    train: int,
    validation: int,
    test: int,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
) -> VQA:
    """Grids of four images of a labelled set, and questions about them.

    The last sixth of the training images of each class are those of validation grids, and the test
    split's those of test grids. An example follows from the seed, its split and its number alone.

    Args:
        data: Where the images come from.
        train: Questions of the training split.
        validation: Questions of the validation split.
        test: Questions of the test split.
        seed: Decides everything that is drawn.
        kinds: Some of `KINDS`.

    Raises:
        InputError: If a kind is none, or there are fewer than three classes, which the questions
            need.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise InputError(f"kinds of questions are {', '.join(KINDS)}, not {', '.join(kinds)}")
    if data.num_classes < 3:
        raise InputError(f"{data.name} has {data.num_classes} classes; a grid needs three or more")
    by_class = [np.flatnonzero(data.train.labels == c) for c in range(data.num_classes)]
    cuts = [len(own) - max(len(own) // _VALIDATION, 1) for own in by_class]
    early = [own[:cut] for own, cut in zip(by_class, cuts, strict=True)]
    late = [own[cut:] for own, cut in zip(by_class, cuts, strict=True)]
    tested = [np.flatnonzero(data.test.labels == c) for c in range(data.num_classes)]
    if not all(len(own) for pool in (early, late, tested) for own in pool):
        raise InputError(f"{data.name} lacks images of a class in a split; grids need all of them")
    names = [name.lower() for name in data.class_names]

    def split(number, count, images, pool):
        drawn = [_example([seed, number, i], pool, names, kinds) for i in range(count)]
        cells, questions, answers, asked = zip(*drawn, strict=True)
        return Questions(
            _tiled(images, np.array(cells)),
            questions,
            answers,
            np.array([KINDS.index(kind) for kind in asked], np.int32),
        )

    return VQA(
        f"grid of {data.name}",
        split(0, train, data.train.images, early),
        split(1, validation, data.train.images, late),
        split(2, test, data.test.images, tested),
        KINDS,
    )


def folder(
    path: Path, *, train: int, validation: int, test: int, image_size: int | None = None
) -> VQA:
    """Questions of one's own: a folder with images, `train.jsonl` and `test.jsonl`.

    A line is `{"image": "shelf.png", "question": "how many jars?", "answer": "three"}`, the image
    being a file in the folder or below it, and may have a `kind`, by which accuracies are told
    apart. Questions of validation are those of `validation.jsonl`, or those about the last images
    of the training file, which are then trained on no more.

    Args:
        path: The folder; its name becomes that of the questions.
        train: Questions of the training split at most.
        validation: Questions of the validation split at most.
        test: Questions of the test split at most.
        image_size: What the images are brought to; needed when they differ in size.

    Raises:
        InputError: If a file or an image is missing or damaged, or a line is not of that form.
    """
    root = path.resolve()
    rows = {name: _lines(path / f"{name}.jsonl", root) for name in ("train", "test")}
    held = path / "validation.jsonl"
    if held.is_file():
        rows["validation"] = _lines(held, root)
    else:
        rows["train"], rows["validation"] = _held_out(rows["train"], validation)
    most = {"train": train, "validation": validation, "test": test}
    rows = {name: own[: most[name]] for name, own in rows.items()}
    empty = [name for name, own in rows.items() if not own]
    if empty:
        raise InputError(
            f"{path} has no questions for {empty[0]}; give {empty[0]}.jsonl some lines"
        )
    kinds = tuple(sorted({row.kind for own in rows.values() for row in own}))
    # Several questions are asked about one image, which is read once.
    files = {name: sorted({row.image for row in own}) for name, own in rows.items()}
    arrays = dict(zip(files, images_of(list(files.values()), root.name, image_size), strict=True))

    def split(name):
        own, place = rows[name], {file: i for i, file in enumerate(files[name])}
        return Questions(
            arrays[name][[place[row.image] for row in own]],
            tuple(row.question for row in own),
            tuple(row.answer for row in own),
            np.array([kinds.index(row.kind) for row in own], np.int32),
        )

    return VQA(root.name, split("train"), split("validation"), split("test"), kinds)


def _held_out(rows: list["_Row"], count: int) -> tuple[list["_Row"], list["_Row"]]:
    """Questions to be trained on, and about so many of others about the last images."""
    count = min(count, max(len(rows) // _VALIDATION, 1))
    held: set[Path] = set()
    for image in reversed(list(dict.fromkeys(row.image for row in rows))):
        if sum(row.image in held for row in rows) >= count:
            break
        held.add(image)
    return [r for r in rows if r.image not in held], [r for r in rows if r.image in held]


class _Row(NamedTuple):
    """A line of a file of questions."""

    image: Path
    question: str
    answer: str
    kind: str


def _lines(path: Path, root: Path) -> list[_Row]:
    lines = jsonl.objects(
        path,
        holds="questions stand in train.jsonl and test.jsonl",
        form="image, question and answer",
    )
    return [_row(said, where, root) for where, said in lines]


def _row(said: dict, where: str, root: Path) -> _Row:
    for name in ("image", "question", "answer"):
        if not isinstance(said.get(name), str) or not said[name]:
            raise InputError(f"{where} has no {name}; each line needs image, question and answer")
        if not jsonl.is_whole(said[name]):
            raise InputError(f"{where}: the {name} has half a character; write it whole")
    kind = said.get("kind", _ONE_KIND)
    if not isinstance(kind, str):
        raise InputError(f"{where}: kind is {kind!r}; it must be a text")
    image = jsonl.file_in(root, said["image"], where)
    return _Row(image, said["question"], said["answer"], kind)


def _tiled(images: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Pictures (n, 2 h, 2 w, c) of the images whose places are given (n, 4)."""
    n, (h, w, c) = len(cells), images.shape[1:]
    four = images[cells].reshape(n, 2, 2, h, w, c)
    return four.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c)


def _example(seed: list[int], pool, names, kinds) -> tuple[np.ndarray, str, str, str]:
    """Positions of four images, question, answer, kind."""
    rng = np.random.default_rng(seed)
    kind = kinds[rng.integers(len(kinds))]
    classes, answer, words = _DRAWN[kind](rng, names)
    cells = np.array([rng.choice(pool[c]) for c in classes])
    asked = _ASKED[kind]
    return cells, asked[rng.integers(len(asked))].format(**words), answer, kind


def _others(rng, names, target: int, count: int) -> list[int]:
    """Classes that are not the target."""
    return [(target + 1 + int(k)) % len(names) for k in rng.integers(len(names) - 1, size=count)]


def _any(rng, names) -> list[int]:
    return rng.integers(len(names), size=_CELLS).tolist()


def _at(rng, names):
    classes, place = _any(rng, names), int(rng.integers(_CELLS))
    return classes, names[classes[place]], {"place": _PLACES[place]}


def _next(rng, names):
    classes, place = _any(rng, names), int(rng.integers(_CELLS))
    across, side = (
        (1, "beside"),
        (2, "below" if place < 2 else "above"),
        (3, "diagonally across from"),
    )[rng.integers(3)]
    return classes, names[classes[place ^ across]], {"place": _PLACES[place], "side": side}


def _placed(rng, names, target: int, places: Sequence[int]) -> list[int]:
    """The target in some places and other classes in the others."""
    classes = _others(rng, names, target, _CELLS)
    for place in places:
        classes[place] = target
    return classes


def _count(rng, names):
    target, count = int(rng.integers(len(names))), int(rng.integers(_CELLS + 1))
    classes = _placed(rng, names, target, rng.permutation(_CELLS)[:count].tolist())
    return classes, _NUMBERS[count], {"name": names[target]}


def _exist(rng, names):
    target, there = int(rng.integers(len(names))), bool(rng.integers(2))
    places = rng.permutation(_CELLS)[: int(rng.integers(1, 3)) if there else 0].tolist()
    return _placed(rng, names, target, places), "yes" if there else "no", {"name": names[target]}


def _where(rng, names):
    target, place = int(rng.integers(len(names))), int(rng.integers(_CELLS))
    return _placed(rng, names, target, [place]), f"at the {_PLACES[place]}", {"name": names[target]}


def _rows(rng, names):
    target, answer = int(rng.integers(len(names))), int(rng.integers(3))
    low, high = sorted(rng.choice(3, 2, replace=False).tolist())
    top, bottom = ((high, low), (low, high), (low, low))[answer]
    places = [*rng.permutation(2)[:top].tolist(), *(2 + rng.permutation(2)[:bottom]).tolist()]
    return (
        _placed(rng, names, target, places),
        ("top", "bottom", "same")[answer],
        {"name": names[target]},
    )


def _describe(rng, names):
    classes = _any(rng, names)
    a, b, c, d = (names[k] for k in classes)
    return classes, f"top row: {a} and {b}. bottom row: {c} and {d}.", {}


_DRAWN: dict[str, Callable] = {
    "at": _at,
    "next": _next,
    "count": _count,
    "exist": _exist,
    "where": _where,
    "rows": _rows,
    "describe": _describe,
}
