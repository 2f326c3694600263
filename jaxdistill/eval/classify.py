"""Accuracy: fresh networks are trained on each distilled set, and classify the real test split.

The last epoch counts, hard and soft labels never share a column, and nothing is chosen on the test
split.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.condense.labels import centred as label_centred
from jaxdistill.condense.labels import soft_labels as label_softly
from jaxdistill.data.augment import normalizer, parse
from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import InputError
from jaxdistill.eval import results, train_on
from jaxdistill.eval.bench import Bench, Made
from jaxdistill.eval.results import Cell
from jaxdistill.io import artifact
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count, Rate
from jaxdistill.nn.classifiers import CLASSIFIERS, classifier
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import CondenseTask, Network

FAMILY = "condense"


def check(
    task: CondenseTask,
    data: Dataset,
    *,
    networks: Sequence[str],
    depth: int,
    width: int,
    norm: str,
    strategy: str,
    **others: Any,
) -> None:
    """Refuses settings that would fail in the end.

    Raises:
        InputError: If a network or an augmentation is unknown, there is no network, or one cannot
            be built for the images.
    """
    del data, others
    parse(strategy)
    if not networks:
        raise InputError("evals.*.networks is empty; give at least one network")
    for name in networks:
        if name not in CLASSIFIERS:
            raise InputError(f"unknown network {name!r}; choose from {', '.join(CLASSIFIERS)}")
        network = judge(name, task.num_classes, task.image_shape, depth, width, norm)
        jax.eval_shape(network.init, jax.random.key(0))


def evaluate(
    bench: Bench,
    *,
    networks: tuple[str, ...] = ("convnet",),
    depth: Annotated[int, Between(1, 16)] = 3,
    width: Annotated[int, Between(1, 2**14)] = 128,
    norm: str = "instance",
    seeds: Annotated[int, Between(1, 1000)] = 3,
    epochs: Count = 1000,
    batch_size: Count = 256,
    learning_rate: Rate = 0.01,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
    soft_labels: bool = False,
    temperature: Annotated[float, Between(1e-6, 1e6)] = 1.0,
    learned_labels: bool = False,
) -> list[dict]:
    """Trains fresh networks on every row, keeps the records, prints the table.

    Args:
        bench: What is measured.
        networks: Any of `jaxdistill.nn.classifiers.CLASSIFIERS`.
        depth: Blocks of the ConvNet.
        width: Its channels.
        norm: Its normalization.
        seeds: Networks of each kind.
        epochs: Passes over the set; the network is measured after the last.
        batch_size: Images a step.
        learning_rate: SGD's learning rate.
        strategy: Augmentation; see `jaxdistill.data.augment`.
        soft_labels: Whether the networks are trained on soft labels too: those of the artefact, or
            else what the task's trained extractors say.
        temperature: The temperature of the soft labels.
        learned_labels: Whether networks are regressed, by least squares, on the learned labels of
            the artefact too; on centred hard ones where it has none.

    Returns:
        A record for each row, network, kind of label and seed; accuracies are fractions, beside
        them those of the `classes`.

    Raises:
        InputError: If an artefact is none.
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    task, data = bench.task, bench.data
    protocol = train_on.Protocol(epochs, batch_size, learning_rate, strategy=strategy)
    protocol_hash = digest([*protocol, depth, width, norm, temperature, bench.identity])
    kinds = ("hard",) + ("soft",) * soft_labels + ("learned",) * learned_labels
    # Once, for programs are compiled anew for other functions.
    judges = {
        f"{name}, {kind} labels": (
            judge(name, task.num_classes, task.image_shape, depth, width, norm),
            kind,
        )
        for name in networks
        for kind in kinds
    }
    wanted = [
        Cell(bench.name, row, metric, seed, protocol_hash)
        for metric in judges
        for row in bench.rows
        for seed in range(seeds)
    ]
    missing = bench.results.missing(wanted)
    labels = {}
    # All processes wait for each other in here, so it is not for one that happens to need it.
    for row in dict.fromkeys(cell.row for cell in missing if judges[cell.metric][1] == "soft"):
        labels[row] = _soft_labels(task, bench.rows[row], temperature)
    # Networks that differ in their seed alone train together, and each process takes a part.
    same = [list(g) for _, g in itertools.groupby(missing, lambda cell: cell._replace(seed=0))]
    size = train_on.together()
    groups = processes.mine([g[i : i + size] for g in same for i in range(0, len(g), size)])
    bar = Progress(sum(map(len, groups)), 0, "evaluating") if groups else None
    for group in groups:
        network, kind = judges[group[0].metric]
        distilled = bench.rows[group[0].row].output()
        targets = train_on.one_hot(distilled.labels, task.num_classes)
        loss = optax.softmax_cross_entropy
        if kind == "soft":
            targets = labels[group[0].row]
        if kind == "learned":
            loss = train_on.squares
            targets = label_centred(distilled.labels, task.num_classes)
            if distilled.learned_labels is not None:
                targets = jnp.asarray(distilled.learned_labels)
        with bench.results.counted(wanted, "evaluating", "networks are measured"):
            _measure(bench, network, distilled, targets, loss, protocol, group, bar)
    if bar is not None:
        bar.close()
    bench.results.gather()
    records = bench.results.records(wanted)
    if processes.is_first():
        for row in bench.rows.values():
            own = [r for r in records if r["row"] == row.name]
            _record_in_card(row, [r for r in own if r["value"] is not None])
        where = f"{data.name}, {epochs} epochs, {len(data.test.labels)} test images"
        print(f"{where}: accuracy in %, mean ± std over {seeds} seeds, last epoch")
        print(results.table(records, results.percent))
        rarest = results.rarest_third(np.bincount(data.train.labels, minlength=task.num_classes))
        print(f"\nby class, in %\n{results.by_class(records, rarest)}")
    return records


@functools.cache
def judge(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    depth: int,
    width: int,
    norm: str,
) -> train_on.Network:
    """A network to be trained and measured: the same for the same arguments, as its programs are.

    Args:
        name: One of `jaxdistill.nn.classifiers.CLASSIFIERS`.
        num_classes: Number of classes.
        image_shape: (h, w, c).
        depth: Blocks of the ConvNet.
        width: Its channels.
        norm: Its normalization.
    """
    net: Network = classifier(name, num_classes, image_shape, depth=depth, width=width, norm=norm)
    return train_on.Network(net.init, net.logits)


def _soft_labels(task: CondenseTask, row: Made, temperature: float) -> jax.Array:
    """The labels of a row's artefact, which gets them where it has none."""
    distilled = row.output()
    known = distilled.soft_labels
    told = distilled.card.get("privacy", {}).get("epsilon")
    if known is None and told is not None:
        raise InputError(
            f"{row.name} was made with epsilon={told:g}, which soft labels by networks trained on "
            "the data would undo; set evals.accuracy.soft_labels=False"
        )
    # Learned labels are what they are, at any temperature.
    if known is not None and distilled.card.get("temperature", temperature) == temperature:
        return jnp.asarray(known)
    label = jax.jit(
        functools.partial(
            label_softly,
            task.network.logits,
            normalize=task.normalize,
            temperature=temperature,
            microbatch=task.microbatch,
        )
    )
    made = np.asarray(label(task.extractors.load()["trained"], jnp.asarray(distilled.images)))
    processes.wait(f"{row.name} is labelled")
    if known is None and processes.is_first():
        card = distilled.card | {"temperature": temperature}
        artifact.save(row.folder, distilled._replace(soft_labels=made, card=card))
    processes.wait(f"the labels of {row.name} are written")
    return jnp.asarray(made)


def _measure(
    bench: Bench,
    network: train_on.Network,
    distilled: artifact.Distilled,
    targets: jax.Array,
    loss: train_on.Loss,
    protocol: train_on.Protocol,
    group: Sequence[Cell],
    bar: Progress,
) -> None:
    """Trains the networks of some cells, which differ in the seed alone, and measures them."""
    task, data = bench.task, bench.data
    before = bar.done
    judged = train_on.judged(
        [cell.seed for cell in group],
        network,
        distilled.images,
        targets,
        data.test,
        num_classes=task.num_classes,
        normalize=normalization(bench, distilled.card),
        protocol=protocol,
        loss=loss,
        microbatch=task.microbatch,
        on_block=lambda part: bar.update(before + part * len(group), {}),
        should_stop=bench.should_stop,
    )
    measured = {
        cell: {
            **train_on.as_record(one.accuracy, one.diverged, loss is not train_on.squares),
            "images": len(distilled.labels),
            "epochs": protocol.epochs,
            # Of the networks trained together.
            "wall_seconds": one.wall_seconds,
            "cpu_seconds": one.cpu_seconds,
        }
        for cell, one in zip(group, judged, strict=True)
    }
    bar.update(bar.done, {"accuracy": judged[-1].accuracy.value})
    bench.results.keep(measured)


def normalization(bench: Bench, card: dict) -> Callable[[jax.Array], jax.Array]:
    """As the card says that the set is normalized: by the data's statistics, or by public ones."""
    own = tuple(card["mean"]), tuple(card["std"])
    known = tuple(bench.data.mean), tuple(bench.data.std)
    return bench.task.normalize if own == known else _normalizer(*own)


# Once, for programs are compiled anew for other functions.
_normalizer = functools.cache(normalizer)


def _record_in_card(row: Made, records: list[dict]) -> None:
    distilled = row.output()
    drawn = (row.folder / "distilled.png").is_file()
    if distilled.card.get("accuracies") != records or not drawn:
        distilled.card["accuracies"] = records
        artifact.save(row.folder, distilled)
