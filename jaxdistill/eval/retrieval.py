"""Retrieval: fresh towers are trained on each set of pairs, and find images by texts and back.

The last step counts, and nothing is chosen on the test split.
"""

import math
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data.augment import parse
from jaxdistill.errors import InputError
from jaxdistill.eval import results, sampling, train_pairs
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.io import pictures
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count, Rate
from jaxdistill.nn.classifiers import CLASSIFIERS
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import PairsTask

FAMILY = "pairs"
ROWS = ("all pairs",)

_AT = (1, 5, 10)
# Image retrieval by texts, and text retrieval by images, as the literature calls them.
METRICS = (*(f"IR@{k}" for k in _AT), *(f"TR@{k}" for k in _AT), "mean")
# Of the picture: texts, and images found for each.
_ASKED, _FOUND = 8, 5


def check(
    task: PairsTask,
    data: Any,
    *,
    network: str,
    depth: int,
    width: int,
    norm: str,
    dim: int,
    strategy: str,
    **others: Any,
) -> None:
    """Refuses settings that would fail in the end.

    Raises:
        InputError: If the network or the augmentation is none, or does not fit the images.
    """
    del data, others
    parse(strategy)
    if network not in CLASSIFIERS:
        raise InputError(f"unknown network {network!r}; choose from {', '.join(CLASSIFIERS)}")
    fresh = train_pairs.fresh(task.image_shape, task.text_dim, dim, network, depth, width, norm)
    jax.eval_shape(fresh.init, jax.random.key(0))


def evaluate(
    bench: Bench,
    *,
    network: str = "convnet",
    depth: Annotated[int, Between(1, 16)] = 3,
    width: Annotated[int, Between(1, 2**14)] = 64,
    norm: str = "instance",
    dim: Annotated[int, Between(2, 2**14)] = 128,
    seeds: Annotated[int, Between(1, 1000)] = 3,
    steps: Count = 2000,
    batch_size: Annotated[int, Between(2, 10**6)] = 128,
    learning_rate: Rate = 1e-3,
    strategy: str = "crop_cutout",
    ceiling: bool = True,
) -> list[dict]:
    """Trains fresh towers on every row, keeps the records, prints the table.

    IR@k is the part of the test sentences whose image is among the first k that are found for it,
    TR@k the part of the test images for which one of their sentences is; what is as similar comes
    before what is right. `mean` is that of the six. `artifacts/retrieval.png` shows what the
    method's first towers find.

    Args:
        bench: What is measured.
        network: The image network, one of `jaxdistill.nn.classifiers.CLASSIFIERS`.
        depth: Blocks of the ConvNet.
        width: Its channels.
        norm: Its normalization.
        dim: Length of a vector of the common space.
        seeds: Towers for each row.
        steps: Steps of their training, the same for every row.
        batch_size: Pairs a step.
        learning_rate: Adam's learning rate, which falls to zero by a cosine.
        strategy: Augmentation; see `jaxdistill.data.augment`.
        ceiling: Whether towers are trained on all pairs too, with as many steps.

    Returns:
        A record for each row, metric and seed; values are fractions.

    Raises:
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    task, data = bench.task, bench.data
    protocol = train_pairs.Protocol(steps, batch_size, learning_rate, strategy=strategy)
    kind = dim, network, depth, width, norm
    hashed = digest([[*protocol], [*kind], bench.identity])
    rows = [*bench.rows, *(ROWS if ceiling else ())]
    wanted = [
        Cell(bench.name, row, metric, seed, hashed)
        for row in rows
        for seed in range(seeds)
        for metric in METRICS
    ]
    missing = bench.results.missing(wanted)
    todo = processes.mine(list(dict.fromkeys((cell.row, cell.seed) for cell in missing)))
    bar = Progress(len(todo), 0, "retrieving") if todo else None
    towers = train_pairs.fresh(task.image_shape, task.text_dim, *kind)
    for done, (row, seed) in enumerate(todo):
        began = time.perf_counter(), time.process_time()
        with bench.results.counted(wanted, "retrieving", "measurements are kept"):
            params = train_pairs.train(
                jax.random.key(seed),
                towers,
                _pairs(bench, row),
                normalize=task.normalize,
                protocol=protocol,
                on_block=lambda part, done=done: bar.update(done + part, {}),
                should_stop=bench.should_stop,
            )
        found = _scores(bench, towers, params)
        cost = {
            "steps": steps,
            "wall_seconds": round(time.perf_counter() - began[0], 2),
            "cpu_seconds": round(time.process_time() - began[1], 2),
        }
        cells = {m: Cell(bench.name, row, m, seed, hashed) for m in METRICS}
        measured = recalls(found, _owner(data.test_texts))
        bench.results.keep({cells[m]: {"value": x} | cost for m, x in measured.items()})
        if (row, seed) == (rows[0], 0):
            _draw(bench, found)
        bar.update(done + 1, {"mean": measured["mean"]})
    if bar is not None:
        bar.close()
    bench.results.gather()
    records = bench.results.records(wanted)
    if processes.is_first():
        sentences = int(data.test_texts.counts.sum())
        print(
            f"{task.name}: {len(data.test.images)} test images, {sentences} sentences; recall in "
            f"%, mean ± std over {seeds} seeds, last step"
        )
        print(results.table(records, results.percent))
    return records


def recalls(found: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """The metrics of scores, as fractions; not a number where the scores are not finite.

    Args:
        found: Scores (images, texts).
        owner: The image of each text.
    """
    if not np.isfinite(found).all():
        return dict.fromkeys(METRICS, math.nan)
    values = [float((ranks < k).mean()) for ranks in train_pairs.ranks(found, owner) for k in _AT]
    return dict(zip(METRICS, [*values, sum(values) / len(values)], strict=True))


def _pairs(bench: Bench, row: str) -> train_pairs.Pairs:
    if row in ROWS:
        train = bench.task.train.load()
        return train_pairs.Pairs(**train)
    made = bench.rows[row].output()
    counts = np.ones(len(made.texts), np.int32)
    return train_pairs.Pairs(made.images, made.texts[:, None], counts, made.similarity)


def _scores(bench: Bench, towers: Any, params: Any) -> np.ndarray:
    """Cosines of all test images with all their sentences."""
    data, task = bench.data, bench.task
    seen = train_pairs.seen(
        towers, params, data.test.images, normalize=task.normalize, microbatch=task.microbatch
    )
    own = np.arange(data.test_texts.vectors.shape[1]) < data.test_texts.counts[:, None]
    texts = jnp.asarray(data.test_texts.vectors[own])
    return seen @ np.asarray(jax.jit(towers.text)(params, texts)).T


def _owner(texts: Any) -> np.ndarray:
    return np.repeat(np.arange(len(texts.counts)), texts.counts)


def _draw(bench: Bench, found: np.ndarray) -> None:
    """The images found for some test sentences, the first sentence of images far apart."""
    data = bench.data
    counts = data.test_texts.counts
    first = np.cumsum(counts) - counts
    asked = np.linspace(0, len(counts) - 1, min(_ASKED, len(counts))).astype(int)
    best = [np.argsort(-found[:, first[i]], kind="stable")[:_FOUND].tolist() for i in asked]
    picture = pictures.found(
        data.test.images,
        [data.test.sentences[i][0] for i in asked],
        best,
        asked.tolist(),
    )
    sampling.write_picture(bench.workdir / "artifacts" / "retrieval.png", picture)
