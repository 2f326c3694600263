"""Whether the images of a set are copies of training images.

An image is compared with its nearest training image, in pixels, mirrored and moved by a pixel too,
and in the features of a random network. What is near is said by real images that nobody trained on:
their own nearest training images. This finds copies, and nothing else: a set without copies may
still tell who was among the training images, which only a proof excludes (`condense.released`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from jaxdistill.condense.charfn import normalize_rows
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.passes import passes
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import attacks, results, sampling
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.io import pictures
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import CondenseTask

FAMILY = "condense"

_SPACES = ("pixels", "features")
_METRICS = tuple(f"{space}, {what}" for space in _SPACES for what in ("copies", "median"))
_KEY = 4000  # of the random network


def check(task: CondenseTask, data: Dataset, *, held_out: int, **others: Any) -> None:
    """Refuses what there are not enough images for.

    Raises:
        InputError: In this case.
    """
    del task, others
    if len(data.test.labels) < held_out:
        raise InputError(
            f"{data.name} has {len(data.test.labels)} images that nobody trains on, but held_out="
            f"{held_out}; lower evals.*.held_out"
        )


def evaluate(
    bench: Bench,
    *,
    held_out: Annotated[int, Between(10, 10**6)] = 500,
    quantile: Annotated[float, Between(1e-6, 0.5)] = 0.01,
    neighbours: Annotated[int, Between(2, 10**4)] = 50,
    shown: Count = 10,
) -> list[dict]:
    """Looks for copies in the images of every row, and prints the table.

    A distance is relative: to the nearest training image, over the mean distance of the nearest
    `neighbours`; else blurred images would be near to everything. `copies` is the share of a row's
    images whose distance is at most the quantile of the held-out images' own; of sets without
    copies about the quantile. `median` is the median distance over that of the held-out images.
    `copies/ROW.png` in the workdir has the nearest pairs: an image, and the training image. It is
    not for publication.

    Args:
        bench: What is measured.
        held_out: Images of the test split that say what is near.
        quantile: The share of them that counts as near.
        neighbours: Training images that a distance is compared with.
        shown: Pairs in the picture.

    Returns:
        A record for each row and metric.

    Raises:
        InputError: If an artefact is none.
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    protocol = digest([bench.identity, held_out, quantile, neighbours])
    cells = [Cell(bench.name, row, m, 0, protocol) for row in bench.rows for m in _METRICS]
    missing = {cell.row for cell in bench.results.missing(cells)}
    missing |= {row for row in bench.rows if not _picture(bench, row).is_file()}
    if todo := processes.mine([row for row in bench.rows if row in missing]):
        _measure(bench, todo, held_out, quantile, neighbours, shown, protocol)
    bench.results.gather()
    records = bench.results.records(cells)
    if processes.is_first():
        print(
            f"{bench.data.name}: images that are copies of training images, in % of a row's, where "
            f"{100 * quantile:g} % of {held_out} real images that nobody trained on are called so; "
            "median distance over theirs, in %"
        )
        print(results.table(records, lambda values: f"{100 * values[0]:.1f}"))
    return records


def _picture(bench: Bench, row: str) -> Path:
    return bench.workdir / "copies" / f"{row}.png"


def _measure(bench, todo, held_out, quantile, neighbours, shown, protocol) -> None:
    train = np.float32(bench.data.train.images) / 255
    # From all over the split, in whatever order it lies.
    chosen = np.linspace(0, len(bench.data.test.labels) - 1, held_out).astype(int)
    real = np.float32(bench.data.test.images[chosen]) / 255
    bar = Progress(1 + len(todo), 0, "looking for copies")
    embed = _features(bench)
    embedded = embed(train)

    def distances(images):
        if bench.should_stop():
            raise Interrupted("stopped while looking for copies; rows that are done are kept")
        yield attacks.nearest_of_views(images, train, neighbours)
        yield attacks.nearest(embed(images), embedded, neighbours)

    near = [(np.quantile(d.relative, quantile), np.median(d.relative)) for d in distances(real)]
    bar.update(1, {})
    for done, row in enumerate(todo):
        images = bench.rows[row].output().images
        found = list(distances(images))
        values = []
        for own, (low, middle) in zip(found, near, strict=True):
            over = np.median(own.relative) / max(middle, 1e-12)
            values += [np.mean(own.relative <= low), over]
        by_pixels = found[0]
        worst = np.argsort(by_pixels.relative, kind="stable")[:shown]
        pairs = np.concatenate([images[worst], train[by_pixels.index[worst]]])
        labels = np.repeat(np.arange(2, dtype=np.int32), len(worst))
        drawn = pictures.grid(pairs, labels, [row, "training image"])
        sampling.write_picture(_picture(bench, row), drawn)
        cells = [Cell(bench.name, row, metric, 0, protocol) for metric in _METRICS]
        bench.results.keep({c: {"value": float(v)} for c, v in zip(cells, values, strict=True)})
        bar.update(done + 2, {})
    bar.close()


def _features(bench: Bench) -> Callable[[np.ndarray], np.ndarray]:
    """Features of a random network, of length 1: what they are depends on no data."""
    task = bench.task
    params = jax.jit(task.network.init)(jax.random.key(_KEY))

    @jax.jit
    def some(images):
        return normalize_rows(task.network.features(params, task.normalize(images)))

    def all_of(images):
        return np.concatenate([some(part)[:own] for part, own in passes(images, task.microbatch)])

    return all_of
