"""Architecture search: whether networks trained on a small set are ranked as on the real images.

The protocol of Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (ICLR 2021),
on a smaller space: every ConvNet of a grid is trained on each set and on real images, and the two
rankings are compared. Beside the sets stand what costs as much or nothing: real images of as many
image steps, and the number of parameters. How well one training on real images agrees with another
is the most that any set can be asked for.

A choice is made here, so the images that networks are judged by should be held out of the training
split: see `data.holdout_per_class`, which the config sets.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import stats

from jaxdistill.data.augment import parse
from jaxdistill.data.dataset import Dataset, Split
from jaxdistill.errors import InputError
from jaxdistill.eval import classify, results, train_on
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.io import pictures
from jaxdistill.io.files import write_files
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count, Rate
from jaxdistill.nn.classifiers import as_functions
from jaxdistill.nn.convnet import ACTIVATIONS, ConvNet
from jaxdistill.nn.norm import NORMS
from jaxdistill.nn.pooling import POOLS
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import CondenseTask

FAMILY = "condense"
_REAL, _EARLY, _PARAMETERS = "real images", "real images, stopped early", "number of parameters"
_BEST = 0.2  # part of the networks whose order among each other is looked at
_LEAST = 3  # networks that can have an order worth the name
_DRAWS = 1000  # of the bootstrap


class Shape(NamedTuple):
    """A ConvNet of the space; see `jaxdistill.nn.convnet.ConvNet`."""

    width: int
    depth: int
    norm: str
    activation: str
    pool: str

    def __str__(self) -> str:
        """Its name in records."""
        return f"{self.width}x{self.depth} {self.norm} {self.activation} {self.pool}"


def check(
    task: CondenseTask,
    data: Dataset,
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    norms: Sequence[str],
    activations: Sequence[str],
    pools: Sequence[str],
    strategy: str,
    **others: Any,
) -> None:
    """Refuses settings that would fail in the end.

    Raises:
        InputError: If the space holds too few networks, or one cannot be built for the images.
    """
    del data, others
    parse(strategy)
    shapes = space(widths, depths, norms, activations, pools)
    if len(shapes) < _LEAST:
        raise InputError(
            f"a space of {len(shapes)} networks has no order to be found; give more of "
            "evals.*.widths, depths, norms, activations or pools"
        )
    for shape in shapes:
        net = _network(shape, task.num_classes, task.image_shape)
        jax.eval_shape(net.init, jax.random.key(0))


def evaluate(
    bench: Bench,
    *,
    widths: tuple[Annotated[int, Between(1, 2**12)], ...] = (16, 32, 64),
    depths: tuple[Annotated[int, Between(1, 16)], ...] = (2, 3),
    norms: tuple[Literal[NORMS], ...] = ("none", "instance", "group"),
    activations: tuple[Literal[ACTIVATIONS], ...] = ("relu", "sigmoid"),
    pools: tuple[Literal[POOLS], ...] = ("avg", "max"),
    seeds: Annotated[int, Between(2, 1000)] = 2,
    epochs: Count = 100,
    batch_size: Count = 256,
    learning_rate: Rate = 0.01,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
    real_images: Count = 10_000,
    real_epochs: Count = 6,
    real_batch_size: Count = 64,
) -> list[dict]:
    """Trains every network of a space on every set and on real images, and compares the rankings.

    Args:
        bench: What is measured.
        widths: Channels of the ConvNets; their number of networks is that of all combinations.
        depths: Their blocks.
        norms: Their normalizations; see `jaxdistill.nn.norm.Norm`.
        activations: Their activations.
        pools: Their pools.
        seeds: Networks of each shape on each set; their mean accuracy ranks it.
        epochs: Passes over a set.
        batch_size: Images of a step on a set.
        learning_rate: SGD's learning rate, of all networks.
        strategy: Augmentation; see `jaxdistill.data.augment`.
        real_images: Real images of the ranking that is the measure, at most all there are.
        real_epochs: Passes over them.
        real_batch_size: Images of a step on them.

    Returns:
        A record for each row, shape and seed; accuracies are fractions. After them for each row
        what `agreement` says of its ranking and that by real images.

    Raises:
        InputError: If an artefact is none.
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    task, data = bench.task, bench.data
    shapes = space(widths, depths, norms, activations, pools)
    small = train_on.Protocol(epochs, batch_size, learning_rate, strategy=strategy)
    real = small._replace(epochs=real_epochs, batch=real_batch_size)
    some = _drawn(data.train, real_images)
    # As many images pass as in the training on the method's own set.
    steps = epochs * len(next(iter(bench.rows.values())).output().labels)
    few = _drawn(data.train, min(real_images, steps))
    early = real._replace(epochs=max(round(steps / len(few.labels)), 1))
    protocols = dict.fromkeys(bench.rows, small) | {_EARLY: early, _REAL: real}
    own = {
        row: digest([*p, real_images if row in (_EARLY, _REAL) else 0, steps, bench.identity])
        for row, p in protocols.items()
    }
    wanted = [
        Cell(bench.name, row, str(shape), seed, own[row])
        for shape in shapes  # whose programs are compiled once, one after the other
        for row in protocols
        for seed in range(seeds)
    ]
    by_name = {str(shape): shape for shape in shapes}
    same = itertools.groupby(bench.results.missing(wanted), lambda cell: cell._replace(seed=0))
    size = train_on.together()
    groups = [g[i : i + size] for g in (list(g) for _, g in same) for i in range(0, len(g), size)]
    todo = processes.mine(groups)
    bar = Progress(sum(map(len, todo)), 0, "searching") if todo else None
    for group in todo:
        row = group[0].row
        normalize = task.normalize
        if row in bench.rows:
            images, labels, *_ = made = bench.rows[row].output()
            normalize = classify.normalization(bench, made.card)
        else:
            images, labels = {_REAL: some, _EARLY: few}[row]
        network = _network(by_name[group[0].metric], task.num_classes, task.image_shape)
        with bench.results.counted(wanted, "searching", "networks are measured"):
            measured = _measure(bench, group, network, images, labels, normalize, protocols[row])
        bench.results.keep(measured)
        bar.update(bar.done + len(group), {"accuracy": measured[group[-1]]["value"]})
    if bar is not None:
        bar.close()
    bench.results.gather()
    records = bench.results.records(wanted)
    found = summaries(records, {str(s): _parameters(s, task) for s in shapes})
    if processes.is_first():
        print(
            f"{data.name}, {len(shapes)} networks, {seeds} seeds: how sets rank them, compared "
            f"with {len(some.labels)} real images for {real_epochs} epochs; accuracies are of 1"
        )
        print(results.table(found))
        path = bench.workdir / f"{bench.name}.png"
        drawn = pictures.lines(_points(records), "on real images", "on the set", joined=False)
        write_files({path: lambda file: Image.fromarray(drawn).save(file, "PNG")})
    return records + found


def space(*choices: Sequence[Any]) -> list[Shape]:
    """All combinations of what a `Shape` is made of, each once."""
    return list(dict.fromkeys(Shape(*shape) for shape in itertools.product(*choices)))


def agreement(
    proxy: Float[np.ndarray, " n"], reference: Float[np.ndarray, " n"]
) -> dict[str, float]:
    """How well one ranking stands for another.

    Args:
        proxy: What networks are ranked by, the more the better.
        reference: What they should be ranked by.

    Returns:
        `spearman`, the rank correlation, with the ends `from` and `to` of its 95 % interval by
        drawing networks with replacement; `spearman, best fifth`, that among the fifth of the
        networks, three at least, which the proxy puts first; `kendall`, tau-b; `first`, the
        reference's value of the network that the proxy puts first; `regret`, what the best network
        has more than that. What is not defined, for one side is constant, is left out.
    """
    first = int(proxy.argmax())
    best = np.argsort(-proxy, kind="stable")[: max(round(_BEST * len(proxy)), _LEAST)]
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(proxy), (_DRAWS, len(proxy)))
    drawn = [_spearman(proxy[i], reference[i]) for i in draws]
    found = {
        "spearman": _spearman(proxy, reference),
        "from": float(np.nanquantile(drawn, 0.025)) if np.isfinite(drawn).any() else np.nan,
        "to": float(np.nanquantile(drawn, 0.975)) if np.isfinite(drawn).any() else np.nan,
        "spearman, best fifth": _spearman(proxy[best], reference[best]),
        "kendall": float(stats.kendalltau(proxy, reference).statistic),
        "first": float(reference[first]),
        "regret": float(reference.max() - reference[first]),
    }
    return {name: value for name, value in found.items() if np.isfinite(value)}


def summaries(records: Sequence[dict], parameters: Mapping[str, int]) -> list[dict]:
    """What the accuracies of all networks amount to; see `evaluate`.

    Args:
        records: Those of the accuracies.
        parameters: The number of parameters of each network.

    Returns:
        For each row, and for the number of parameters, what `agreement` says. In the row of the
        real images one seed is compared with the others: no set can be expected to agree better.
    """
    seeds = 1 + max(record["seed"] for record in records)
    rows = list(dict.fromkeys(record["row"] for record in records))
    names = list(parameters)
    values = {(r["row"], r["metric"], r["seed"]): r["value"] for r in records}
    array = np.array([[[values[r, n, s] for s in range(seeds)] for n in names] for r in rows])
    real = array[rows.index(_REAL)]
    ranked = {row: agreement(array[i].mean(1), real.mean(1)) for i, row in enumerate(rows)}
    ranked[_REAL] = agreement(real[:, 0], real[:, 1:].mean(1))
    ranked[_PARAMETERS] = agreement(np.array([parameters[n] for n in names], float), real.mean(1))
    seconds = {
        row: {"CPU s": sum(r["cpu_seconds"] for r in records if r["row"] == row)} for row in rows
    }
    evaluation = records[0]["evaluation"]
    return [
        {"evaluation": evaluation, "row": row, "metric": metric, "seed": 0, "value": value}
        for row, own in ranked.items()
        for metric, value in (own | seconds.get(row, {})).items()
    ]


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


@functools.cache
def _network(shape: Shape, num_classes: int, image_shape: tuple[int, int, int]) -> train_on.Network:
    """A network of the space: the same for the same shape, as its programs are."""
    width, depth, norm, activation, pool = shape
    net = as_functions(ConvNet(num_classes, depth, width, norm, activation, pool), image_shape)
    return train_on.Network(net.init, net.logits)


def _parameters(shape: Shape, task: CondenseTask) -> int:
    net = _network(shape, task.num_classes, task.image_shape)
    params = jax.eval_shape(net.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _drawn(train: Split, count: int) -> Split:
    """So many images of the training split, always the same ones for the same number."""
    order = np.random.default_rng(0).permutation(len(train.labels))[:count]
    return Split(train.images[order], train.labels[order])


def _measure(
    bench: Bench,
    group: Sequence[Cell],
    network: train_on.Network,
    images: np.ndarray,
    labels: np.ndarray,
    normalize: Callable[[jax.Array], jax.Array],
    protocol: train_on.Protocol,
) -> dict[Cell, dict[str, Any]]:
    """Trains the networks of some cells, which differ in the seed alone, and measures them."""
    judged = train_on.judged(
        [cell.seed for cell in group],
        network,
        images,
        train_on.one_hot(labels, bench.task.num_classes),
        bench.data.test,
        num_classes=bench.task.num_classes,
        normalize=normalize,
        protocol=protocol,
        microbatch=bench.task.microbatch,
        should_stop=bench.should_stop,
    )
    return {
        cell: {
            # One that has diverged says nothing, and is as good as chance.
            "value": one.accuracy.value,
            "images": len(labels),
            "epochs": protocol.epochs,
            "wall_seconds": round(one.wall_seconds / len(group), 2),
            "cpu_seconds": round(one.cpu_seconds / len(group), 2),
        }
        for cell, one in zip(group, judged, strict=True)
    }


def _points(records: Sequence[dict]) -> dict[str, Float[np.ndarray, "n 2"]]:
    """By row: the accuracy of every network on real images and on the row's."""
    means = {}
    for record in records:
        means.setdefault((record["row"], record["metric"]), []).append(record["value"])
    rows = [row for row in dict.fromkeys(r["row"] for r in records) if row != _REAL]
    names = list(dict.fromkeys(record["metric"] for record in records))
    return {
        row: np.array([[np.mean(means[_REAL, n]), np.mean(means[row, n])] for n in names])
        for row in rows
    }
