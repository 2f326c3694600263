"""A data set made by a generator: a student, or the teacher, makes images of each class.

What is left in `generated/<evaluation>.npz` is a data source as any other: training images that
were made, real ones beside them where that is wanted, and the real test split. A classifier that is
trained on the real images may reject some. So a flow fills up what real data lack, and a data set
is condensed from what it makes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import images, results, sampling
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.eval.sampling import Generator
from jaxdistill.io import pictures
from jaxdistill.io.files import dump, expanded, write_files
from jaxdistill.io.reading import read_json, read_npz
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count, Folder, Natural
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import FlowTask

FAMILY = "flow"

Filter = Literal["none", "consistent", "confident", "middle"]
"""Which images are kept: all; those that the classifier gives their label; of twice as many the
half of which it is surest; or the middle half."""

_STREAM = 0x67656E65  # of noise, apart from those that tables are measured with
_SHOWN = 16  # images of a class in the picture
_ROUNDS = 8  # of images made for those rejected


class Kept(NamedTuple):
    """The images of a class.

    Attributes:
        images: uint8 (n, h, w, c).
        made: How many were looked at.
        good: How many of these the filter let pass.
    """

    images: np.ndarray
    made: int
    good: int


def check(
    task: FlowTask,
    data: Any,
    *,
    teacher: str,
    per_class: int,
    fill: bool,
    real: bool,
    **others: Any,
) -> None:
    """Refuses data without labels, samplers that are none, and filling up what lacks nothing.

    Raises:
        InputError: In these cases.
    """
    del others
    if not task.num_classes or not isinstance(data, Dataset):
        raise InputError(f"{task.name} has no labels, and images are made class by class")
    if teacher:
        sampling.parse_teacher_row(teacher)
    if fill and not real:
        raise InputError("evals.*.fill makes what the real images lack; set real=True beside it")
    if fill and not _wanted(data, per_class, fill).any():
        raise InputError(
            f"evals.*.fill: every class has {per_class} training images or more; raise per_class"
        )


def evaluate(
    bench: Bench,
    *,
    nfe: Natural = 0,
    teacher: str = "",
    per_class: Count = 1000,
    fill: bool = False,
    real: bool = False,
    filter: Filter = "none",
    seed: Annotated[int, Between(0, 2**31)] = 0,
    batch_size: Count = 250,
    judge_epochs: Count = 5,
    judge_dir: Folder = None,
) -> list[dict]:
    """Makes the data set, once; of several processes the first does it.

    Interrupted, it goes on with the class that it was at.

    Args:
        bench: What makes it. The data set is called as the evaluation is.
        nfe: Network calls of the method's student, which makes the images; 0 for those that it was
            trained for.
        teacher: A sampler and its calls, such as `midpoint:16`, by which the teacher makes them
            instead.
        per_class: Images of each class.
        fill: Whether only as many are made as a class lacks of that number in the real training
            split, beside which they then stand.
        real: Whether the real training images are in the set too.
        filter: Which images are kept.
        seed: Decides the noise.
        batch_size: Images made at a time.
        judge_epochs: How long the rejecting classifier is trained, on real images.
        judge_dir: Where it is kept; by default `judge` in the workdir.

    Returns:
        A record for each measure: the images of the set, the part of the made ones that was kept,
        and the part of the kept ones that the classifier gives their label.

    Raises:
        InputError: If the classifier rejects nearly all of a class.
        Interrupted: If it is stopped.
    """
    student = next(iter(bench.rows))
    nfe = nfe or bench.rows[student].recipe.card["nfe"]
    name = f"teacher, {teacher.replace(':', ', ')}" if teacher else f"{student}, {nfe}"
    decides = [name, per_class, fill, real, filter, seed, batch_size, judge_epochs, bench.identity]
    # A student's training is in none of them: its parameters are.
    decides.append(_content(bench, student) if not teacher else "")
    protocol = digest(decides)
    folder = bench.workdir / "generated"
    path = folder / f"{bench.name}.npz"
    cells = [
        Cell(bench.name, name, metric, 0, protocol) for metric in ("images", "kept", "consistent")
    ]
    # What lies there may have been made with other settings since.
    missing = bool(bench.results.missing(cells)) or _protocol(path) != protocol
    judge_folder = expanded(judge_dir) if judge_dir else bench.workdir / "judge"
    judge = images.classifier(bench, judge_folder, judge_epochs) if missing else None

    def work():
        if missing:
            rows = sampling.rows(bench, (nfe,), (teacher,) if teacher else (), batch_size)
            generator = rows.generators[name]
            numbers = _wanted(bench.data, per_class, fill)
            folder.mkdir(parents=True, exist_ok=True)
            parts = [folder / f"part-{protocol}-{c}.npz" for c in range(len(numbers))]
            maker = _Maker(bench, generator, judge, filter, seed, batch_size)
            made = _make(maker, numbers, parts)
            card = {"generator": name, "filter": filter, "protocol": protocol}
            measured = _write(path, maker, made, real, card)
            bench.results.keep({c: {"value": measured[c.metric]} for c in cells})
            for part in parts:
                part.unlink(missing_ok=True)
        print(f"{bench.task.name}: {path}, by {name}")
        print(results.table(bench.results.records(cells)))

    processes.in_the_first(work)
    bench.results.gather()
    return bench.results.records(cells)


def _content(bench: Bench, row: str) -> str:
    """The checksum of a student's parameters, which its card has."""
    return json.loads((bench.rows[row].folder / "student.json").read_text())["sha256"]


def _protocol(path: Path) -> str | None:
    """By which settings a data set was made, as its card says; None where there is none."""
    card = path.with_suffix(".json")
    if not (path.is_file() and card.is_file()):
        return None
    try:
        return read_json(card)["protocol"]
    except (InputError, KeyError, TypeError):
        return None


def _wanted(data: Dataset, per_class: int, fill: bool) -> np.ndarray:
    """Images to be made of each class."""
    there = np.bincount(data.train.labels, minlength=data.num_classes)
    return np.maximum(per_class - there, 0) if fill else np.full(data.num_classes, per_class)


class _Maker(NamedTuple):
    """How images are made and chosen."""

    bench: Bench
    generator: Generator
    judge: Callable
    filter: Filter
    seed: int
    batch_size: int


def _make(maker: _Maker, numbers: np.ndarray, paths: list[Path]) -> list[Kept]:
    """The images of all classes, each class kept on disk when it is done."""
    bar = Progress(int(numbers.sum()), 0, "generating")
    found = []
    for label, (number, path) in enumerate(zip(numbers, paths, strict=True)):
        if not path.is_file():
            one = _class(maker, label, int(number), bar)
            write_files({path: lambda file, one=one: np.savez(file, **one._asdict())})
        read = read_npz(path, Kept._fields)
        found.append(Kept(read["images"], int(read["made"]), int(read["good"])))
        bar.update(int(numbers[: label + 1].sum()), {})
    bar.close()
    return found


def _class(maker: _Maker, label: int, number: int, bar: Progress) -> Kept:
    """As many images of a class as are wanted, those rejected made up for."""
    bench, size, begun = maker.bench, maker.batch_size, bar.done
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(maker.seed), _STREAM), label)
    labels = np.full(size, label, np.int32)
    halved = maker.filter in ("confident", "middle")
    enough = 2 * number if halved else number
    kept, shares, made = [], [], 0
    while sum(map(len, kept)) < enough:
        if bench.should_stop():
            raise Interrupted("stopped while generating; classes that are done are kept")
        if made >= _ROUNDS * enough + 20 * size:
            raise InputError(
                f"of {made} images made of class {bench.data.class_names[label]!r} the classifier "
                f"gave {sum(map(len, kept))} that label; take another filter, or train the "
                "generator longer"
            )
        noise = jax.random.normal(jax.random.fold_in(key, made // size), (size, *bench.task.shape))
        pixels = images.pixels(sampling.finite(np.asarray(maker.generator.sample(noise, labels))))
        said = np.asarray(jax.nn.softmax(maker.judge(jnp.asarray(pixels))[1]))
        good = said.argmax(1) == label if maker.filter == "consistent" else np.ones(size, bool)
        kept.append(np.rint(255 * pixels[good]).astype(np.uint8))
        shares.append(said[good, label])
        made += size
        bar.update(begun + min(sum(map(len, kept)), enough) * number // enough, {})
    if not kept:
        return Kept(np.zeros((0, *bench.task.shape), np.uint8), 0, 0)
    good = sum(map(len, kept)) // (2 if halved else 1)
    found = np.concatenate(kept)[:enough]
    if halved:
        surest = np.argsort(-np.concatenate(shares)[:enough], kind="stable")
        first = 0 if maker.filter == "confident" else number // 2
        found = found[np.sort(surest[first : first + number])]
    return Kept(found, made, good)


def _write(path: Path, maker: _Maker, found: list[Kept], real: bool, card: dict) -> dict[str, Any]:
    """The data set, its card and a picture of what was made; what is measured of it."""
    data = maker.bench.data
    made = np.concatenate([kept.images for kept in found])
    labels = np.repeat(np.arange(len(found)), [len(kept.images) for kept in found])
    said = [
        np.asarray(maker.judge(jnp.asarray(made[i] / np.float32(255)))[1]).argmax(1)
        for i in sampling.batches(len(made), 500)
    ]
    right = np.concatenate(said)[: len(made)] == labels if said else np.ones(0, bool)
    both = made, labels
    if real:
        both = tuple(np.concatenate(x) for x in zip(data.train, both, strict=True))
    few = np.concatenate([np.flatnonzero(labels == c)[:_SHOWN] for c in range(len(found))])
    picture = Image.fromarray(
        pictures.grid(made[few] / np.float32(255), labels[few], list(data.class_names))
    )
    arrays = {
        "train_images": both[0],
        "train_labels": both[1].astype(np.int32),
        "test_images": data.test.images,
        "test_labels": data.test.labels,
        "class_names": np.array(data.class_names),
    }
    measured = {
        "images": len(both[0]),
        "kept": sum(kept.good for kept in found) / max(sum(kept.made for kept in found), 1),
        "consistent": float(right.mean()) if len(right) else 0.0,
    }
    counts = np.bincount(labels, minlength=len(found)).tolist()
    stated = {
        "format": "jaxdistill.generated/1",
        "dataset": data.name,
        **card,
        "made_per_class": counts,
        "real_images": bool(real),
        **measured,
        "provenance": maker.bench.identity,
    }
    write_files(
        {
            path.with_suffix(".json"): lambda file: dump(stated, file),
            path.with_suffix(".png"): lambda file: picture.save(file, "PNG"),
            path: lambda file: np.savez(file, **arrays),
        }
    )
    return measured
