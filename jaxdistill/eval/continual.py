"""Class-incremental learning: distilled images as the memory of a network that meets new classes.

The protocol of Zhao and Bilen, "Dataset Condensation with Distribution Matching" (WACV 2023), after
GDumb (Prabhu, Torr and Dokania, ECCV 2020): classes come in groups, of which the memory keeps the
distilled images alone. After each group a fresh network is trained on the memory and nothing else,
and classifies the test images of all classes that it has met. The last epoch counts.

The images of a class may be taken from a set that was made of all classes at once only where
nothing in their making has looked at the others: where `Recipe.separate` says so. Rows of other
methods are called "made of all classes", for they knew what was to come.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from PIL import Image

from jaxdistill.data.dataset import Dataset, Split
from jaxdistill.errors import InputError
from jaxdistill.eval import classify, results, train_on
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io import pictures
from jaxdistill.io.artifact import Distilled
from jaxdistill.io.files import write_files
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count, Rate
from jaxdistill.nn.classifiers import CLASSIFIERS
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import CondenseTask

FAMILY = "condense"
_JOINT = " (made of all classes)"


def check(
    task: CondenseTask,
    data: Dataset,
    *,
    groups: int,
    network: str,
    depth: int,
    width: int,
    norm: str,
    strategy: str,
    **others: Any,
) -> None:
    """Refuses settings that would fail in the end.

    Raises:
        InputError: If there are more groups than classes, or the network cannot be built.
    """
    del others
    if groups > task.num_classes:
        raise InputError(
            f"{data.name} has {task.num_classes} classes, which do not come in "
            f"evals.*.groups={groups}; give at most as many groups as classes"
        )
    shape = {"depth": depth, "width": width, "norm": norm}
    classify.check(task, data, networks=(network,), strategy=strategy, **shape)


def evaluate(
    bench: Bench,
    *,
    groups: Annotated[int, Between(2, 10**4)] = 5,
    orders: Annotated[int, Between(1, 1000)] = 5,
    network: Literal[CLASSIFIERS] = "convnet",
    depth: Annotated[int, Between(1, 16)] = 3,
    width: Annotated[int, Between(1, 2**14)] = 128,
    norm: str = "instance",
    epochs: Count = 1000,
    batch_size: Count = 256,
    learning_rate: Rate = 0.01,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
) -> list[dict]:
    """Trains fresh networks on growing memories, keeps the records, prints table and curves.

    Args:
        bench: What is measured.
        groups: Groups that the classes come in, of one size or of two that differ by one.
        orders: Orders of the classes; each has one network after each group.
        network: One of `jaxdistill.nn.classifiers.CLASSIFIERS`, with an output for every class.
        depth: Blocks of the ConvNet.
        width: Its channels.
        norm: Its normalization.
        epochs: Passes over the memory; the network is measured after the last.
        batch_size: Images a step.
        learning_rate: SGD's learning rate.
        strategy: Augmentation; see `jaxdistill.data.augment`.

    Returns:
        A record for each row, group and order: the accuracy on the test images of all classes met,
        a fraction, beside it that of each of the `classes`, None for those not met yet. After them
        one for each row and order of their `average`, and of what is `forgotten`: by how much the
        accuracy on a group's classes fell from its best to the end, on the average of all groups
        but the last.

    Raises:
        InputError: If an artefact is none.
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    task, data = bench.task, bench.data
    protocol = train_on.Protocol(epochs, batch_size, learning_rate, strategy=strategy)
    own = digest([*protocol, network, depth, width, norm, groups, bench.identity])
    judge = classify.judge(network, task.num_classes, task.image_shape, depth, width, norm)
    sequences = [divided(task.num_classes, groups, order) for order in range(orders)]
    wanted = [
        Cell(bench.name, row, f"{sum(map(len, sequences[0][: step + 1]))} classes", order, own)
        for row in bench.rows
        # Sets of one size follow each other: they share a program.
        for step in range(groups)
        for order in range(orders)
    ]
    steps = dict.fromkeys(cell.metric for cell in wanted)
    step_of = {metric: step for step, metric in enumerate(steps)}
    todo = processes.mine(bench.results.missing(wanted))
    bar = Progress(len(todo), 0, "learning class by class") if todo else None
    for done, cell in enumerate(todo):
        met = np.concatenate(sequences[cell.seed][: step_of[cell.metric] + 1])
        distilled = bench.rows[cell.row].output()
        normalize = classify.normalization(bench, distilled.card)
        with bench.results.counted(wanted, "evaluating", "networks are measured"):
            measured = measure(
                task._replace(normalize=normalize),
                data.test,
                distilled,
                met,
                judge,
                protocol,
                cell.seed,
                bench.should_stop,
            )
        bench.results.keep({cell: measured})
        bar.update(done + 1, {"accuracy": measured["value"]})
    if bar is not None:
        bar.close()
    bench.results.gather()
    records = _named(bench, bench.results.records(wanted))
    records += summaries(records, sequences)
    if processes.is_first():
        print(
            f"{data.name} in {groups} groups of classes, {epochs} epochs: accuracy in % on the "
            f"classes met, mean ± std over {orders} orders, last epoch"
        )
        print(results.table(records, results.percent))
        drawn = pictures.lines(_curves(records, list(steps)), "classes met", "accuracy in %")
        path = bench.workdir / f"{bench.name}.png"
        write_files({path: lambda file: Image.fromarray(drawn).save(file, "PNG")})
    return records


def divided(num_classes: int, groups: int, order: int) -> list[np.ndarray]:
    """The classes in an order that its number decides, in groups of one size or of two.

    Args:
        num_classes: How many there are.
        groups: How many groups, at most as many as classes.
        order: The number of the order.

    Returns:
        The ids of each group.
    """
    shuffled = jax.random.permutation(jax.random.key(order), num_classes)
    return np.array_split(np.asarray(shuffled), groups)


def summaries(records: Sequence[dict], sequences: Sequence[Sequence[np.ndarray]]) -> list[dict]:
    """What the accuracies after all groups of an order amount to; see `evaluate`.

    Args:
        records: Those of the accuracies, in the order of the groups.
        sequences: By order, the classes of each group.

    Returns:
        Records `average` and `forgotten`; their value is None where a network has diverged.
    """
    found = []
    for (row, order), own in itertools.groupby(
        sorted(records, key=lambda r: (r["row"], r["seed"])), lambda r: (r["row"], r["seed"])
    ):
        own = list(own)
        values = {"average": None, "forgotten": None}
        if all(record["value"] is not None for record in own):
            values["average"] = float(np.mean([record["value"] for record in own]))
            values["forgotten"] = _forgotten([r["classes"] for r in own], sequences[order])
        rest = {k: own[-1][k] for k in ("evaluation", "protocol")}
        found += [
            {"row": row, "seed": order, **rest, "metric": k, "value": values[k]} for k in values
        ]
    return found


def _forgotten(classes: Sequence[Sequence[float | None]], groups: Sequence[np.ndarray]) -> float:
    """From the accuracies of the classes after each group: see `evaluate`."""

    def known(step, group):
        values = [classes[step][c] for c in groups[group]]
        return np.mean([v for v in values if v is not None] or [0.0])

    last = len(groups) - 1
    best = [max(known(step, group) for step in range(group, last)) for group in range(last)]
    return float(np.mean([b - known(last, group) for group, b in enumerate(best)]))


def measure(
    task: CondenseTask,
    test: Split,
    distilled: Distilled,
    met: np.ndarray,
    network: train_on.Network,
    protocol: train_on.Protocol,
    seed: int,
    should_stop: ShouldStop = never,
) -> dict[str, Any]:
    """Trains one network on the memory of some classes, and measures it on their test images.

    Args:
        task: What the set was made for, with its normalization.
        test: The test images of all classes.
        distilled: The set that the memory is a part of.
        met: The ids of the classes met.
        network: What is trained.
        protocol: How.
        seed: Of the network.
        should_stop: Whether to give up.

    Returns:
        The `value`, NaN where the network has diverged, the accuracy of each of the `classes`, and
        what it took.

    Raises:
        Interrupted: If `should_stop` said yes.
    """
    # In the order of the set: a memory is the same whatever way led to its classes.
    kept = np.flatnonzero(np.isin(distilled.labels, met))
    (judged,) = train_on.judged(
        [seed],
        network,
        distilled.images[kept],
        train_on.one_hot(distilled.labels[kept], task.num_classes),
        test,  # all of it, so that every memory is judged by one program
        num_classes=task.num_classes,
        normalize=task.normalize,
        protocol=protocol,
        microbatch=task.microbatch,
        should_stop=should_stop,
    )
    every = judged.accuracy.classes
    sizes = np.bincount(test.labels, minlength=task.num_classes)
    known = [c for c in met if sizes[c]]
    value = np.average([every[c] for c in known], weights=sizes[known]) if known else math.nan
    return {
        "value": math.nan if judged.diverged else float(value),
        "classes": [every[c] if c in met else None for c in range(task.num_classes)],
        "images": len(kept),
        "epochs": protocol.epochs,
        "wall_seconds": judged.wall_seconds,
        "cpu_seconds": judged.cpu_seconds,
    }


def _named(bench: Bench, records: list[dict]) -> list[dict]:
    """The records, with rows that knew all classes called so."""
    joint = {name for name, row in bench.rows.items() if not row.recipe.separate}
    return [r | {"row": r["row"] + _JOINT} if r["row"] in joint else r for r in records]


def _curves(records: Sequence[dict], steps: Sequence[str]) -> dict[str, np.ndarray]:
    """By row: how many classes were met, and the mean accuracy in per cent, after each group."""
    met = [float(step.split()[0]) for step in steps]
    ways = {}
    for row in dict.fromkeys(record["row"] for record in records):
        means = []
        for step in steps:
            values = [r["value"] for r in records if (r["row"], r["metric"]) == (row, step)]
            means.append(math.nan if None in values else 100 * float(np.mean(values)))
        ways[row] = np.array([met, means]).T
    return ways
