"""The data before they are distilled: what is hard, doubtful, double or rare, in one report.

Nothing of the rows is looked at: an assessment is of the training split. Every image is judged by
networks that have learned it and by networks that have not; see `jaxdistill.eval.dynamics`. The
report is `assessment/` in the workdir: `assessment.json`, `assessment.md`, pictures of the extremes
of each class, and `scores.npz` with the scores of each image.
"""

import functools
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from jaxdistill.data.augment import parse
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.neighbours import copies, near_copies
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import dynamics, results, scores, train_on
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.dynamics import Judgement
from jaxdistill.eval.results import Cell
from jaxdistill.io import pictures
from jaxdistill.io.files import dump, write_files
from jaxdistill.io.reading import read_json
from jaxdistill.io.versions import versions
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count, Fraction, Rate
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import CondenseTask

FAMILY = "condense"
FORMAT = "jaxdistill.assessment/1"

_FOLDER = "assessment"
_ROW = "training images"
_METRICS = (
    "images", "balance", "unseen accuracy", "doubtful labels", "copies", "copies in test",
)  # fmt: skip
_SHOWN = 16  # images of a class in a picture
_PAIRS = 24  # of copies
_LISTED = 1000  # pairs in the report; all are in scores.npz


class Scores(NamedTuple):
    """What is known of each training image; see `jaxdistill.eval.scores`.

    Attributes:
        entropy: Of the probabilities of networks that have not seen the image, like
            `gradient_norm`, `confidence`, `right`, `agreement` and `other`.
        el2n: Mean over the epochs of networks that learned it, like `margin` and `forgotten`.
        margin: The area under the margin, over the epochs.
        forgotten: How often it was forgotten.
        never_learned: The part of the networks that never had it right.
        gradient_norm: The norm of the last layer's gradient.
        confidence: The probability of the label.
        right: The part of these networks that have it right.
        agreement: The part of the nearest images that have its label.
        other: The part of the networks that are confident of another class.
        suspicion: The mean of what `confidence` and `agreement` lack of one.
    """

    entropy: Float[np.ndarray, " n"]
    el2n: Float[np.ndarray, " n"]
    margin: Float[np.ndarray, " n"]
    forgotten: Float[np.ndarray, " n"]
    never_learned: Float[np.ndarray, " n"]
    gradient_norm: Float[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]
    right: Float[np.ndarray, " n"]
    agreement: Float[np.ndarray, " n"]
    other: Float[np.ndarray, " n"]
    suspicion: Float[np.ndarray, " n"]

    def doubtful(self, least_agreement: float) -> Bool[np.ndarray, " n"]:
        """The images whose label neither the networks nor the nearest images believe."""
        return (self.other > 0.5) & (self.agreement < least_agreement)


class Classes(NamedTuple):
    """What is known of each class.

    Attributes:
        variance: The trace of the covariance of the last layer's gradients.
        noise_scale: Images that a mean gradient needs for as much signal as noise.
        joint: Of each label (rows), how many images are confidently of each class, a network.
    """

    variance: Float[np.ndarray, " c"]
    noise_scale: Float[np.ndarray, " c"]
    joint: Float[np.ndarray, "c c"]


class Copies(NamedTuple):
    """Pairs of equal or nearly equal images, positions in the training and then the test split.

    Attributes:
        pairs: The smaller position first.
        exact: Whether all pixels are equal, perhaps in a mirror.
        part: How near the two are; see `jaxdistill.data.neighbours.near_copies`.
    """

    pairs: Int[np.ndarray, "m 2"]
    exact: Bool[np.ndarray, " m"]
    part: Float[np.ndarray, " m"]


def check(task: CondenseTask, data: Dataset, *, strategy: str, ipc: int, **others: Any) -> None:
    """Refuses settings that would fail in the end.

    Raises:
        InputError: If an augmentation is unknown, there are too few images to be dealt to two
            folds, or fewer than the budget.
    """
    del others
    parse(strategy)
    count = len(data.train.labels)
    if count < 4:
        raise InputError(f"{data.name} has {count} training images; give four or more to be judged")
    if ipc * task.num_classes > count:
        raise InputError(
            f"evals.*.ipc={ipc} asks for {ipc * task.num_classes} images in all, and {data.name} "
            f"has {count}; lower it"
        )


def evaluate(
    bench: Bench,
    *,
    runs: Annotated[int, Between(1, 100)] = 1,
    epochs: Count = 20,
    batch_size: Count = 64,
    learning_rate: Rate = 0.02,
    strategy: str = "none",
    neighbours: Count = 20,
    least_agreement: Fraction = 0.2,
    near: Fraction = 0.3,
    ipc: Count = 10,
) -> list[dict]:
    """Judges every training image, once, and writes the report.

    Args:
        bench: What is judged, and the network that judges: the extractors'.
        runs: Networks of each of the two folds; every run has folds of its own.
        epochs: How long each is trained.
        batch_size: Images a step.
        learning_rate: SGD's learning rate, the same in all epochs.
        strategy: Augmentation; see `jaxdistill.data.augment`.
        neighbours: Nearest images whose labels are looked at.
        least_agreement: A label is doubtful if fewer of these have it, and the networks are
            confident of another one.
        near: How near copies are; see `jaxdistill.data.neighbours.near_copies`.
        ipc: Images a class, on the average, of the budgets that are proposed.

    Returns:
        A record for each measure of the whole.

    Raises:
        Diverged: If a network did.
        InputError: If a file that was kept is damaged.
        Interrupted: If it is stopped; networks that are done are kept.
    """
    task, data = bench.task, bench.data
    stated = {
        "runs": runs,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "strategy": strategy,
        "neighbours": neighbours,
    }
    judged = digest([stated, bench.identity])
    stated |= {"least_agreement": least_agreement, "near": near, "ipc": ipc}
    protocol = digest([stated, bench.identity])
    cells = [Cell(bench.name, _ROW, metric, 0, protocol) for metric in _METRICS]
    folder = bench.workdir / _FOLDER
    # What lies there may have been made with other settings since.
    missing = bool(bench.results.missing(cells)) or _protocol(folder) != protocol
    found = []
    start = time.perf_counter(), time.process_time()
    if missing:
        found = dynamics.load_or_judge(
            folder / "networks",
            runs,
            task.network,
            data,
            normalize=task.normalize,
            protocol=train_on.Protocol(
                epochs, batch_size, learning_rate, strategy=strategy, decay_at=()
            ),
            microbatch=task.microbatch,
            neighbours=neighbours,
            identity=judged,
            should_stop=bench.should_stop,
        )

    def work():
        if missing:
            single, classes = scored(data, found)
            same = _copies(bench, near)
            report = _report(data, single, classes, same, least_agreement, ipc)
            report |= {
                "settings": stated,
                "protocol": protocol,
                "wall_seconds": round(time.perf_counter() - start[0], 2),
                "cpu_seconds": round(time.process_time() - start[1], 2),
                "provenance": {**bench.identity, "versions": versions()},
            }
            _write(folder, data, report, single, same, least_agreement)
            measured = _measures(report)
            bench.results.keep({c: {"value": measured[c.metric]} for c in cells})
        print(f"{data.name}: {folder / 'assessment.md'}")
        print(results.table(bench.results.records(cells)))

    processes.in_the_first(work)
    bench.results.gather()
    return bench.results.records(cells)


def scored(data: Dataset, judgements: list[Judgement]) -> tuple[Scores, Classes]:
    """What networks say of each image and each class, averaged over those that say it.

    Args:
        data: What was judged.
        judgements: As `dynamics.load_or_judge` gives them.
    """
    labels, classes = data.train.labels, data.num_classes
    single = {name: np.zeros(len(labels)) for name in Scores._fields}
    variance, signal, count, joint = (np.zeros(shape) for shape in [classes] * 3 + [(classes,) * 2])
    for judged in judgements:
        learned, unseen = judged.learned, judged.unseen
        times, never = scores.forgetting(jnp.asarray(judged.correct))
        single["el2n"][learned] += judged.el2n.mean(0)
        single["margin"][learned] += judged.margin.mean(0)
        single["forgotten"][learned] += times
        single["never_learned"][learned] += never
        said, own = judged.probabilities, labels[unseen]
        single["entropy"][unseen] += scores.entropy(jnp.asarray(said))
        single["gradient_norm"][unseen] += judged.gradient_norm
        single["confidence"][unseen] += said[np.arange(len(own)), own]
        single["right"][unseen] += said.argmax(1) == own
        single["agreement"][unseen] += scores.agreement(own, labels[judged.neighbours])
        sure = scores.confident_classes(said, own)
        single["other"][unseen] += (sure >= 0) & (sure != own)
        joint += scores.confident_joint(sure, own, classes)
        moments = scores.Moments(judged.square, judged.mean_square, judged.count)
        variance += judged.count * moments.variance()
        signal += judged.count * moments.signal()
        count += judged.count
    runs = len(judgements) / 2  # each image is learned by half of the networks
    single = {name: values / runs for name, values in single.items()}
    single["suspicion"] = 1 - (single["confidence"] + single["agreement"]) / 2
    scale = np.divide(variance, signal, out=np.full(classes, np.inf), where=signal > 0)
    return Scores(**single), Classes(variance / count, scale, joint / runs)


# ---------------------------------------------------------------------------- the report


def _protocol(folder: Path) -> str | None:
    """By which settings the report that lies there was made; None where there is none."""
    try:
        return read_json(folder / "assessment.json")["protocol"]
    except (InputError, KeyError, TypeError):
        return None


def _copies(bench: Bench, near: float) -> Copies:
    """Copies within and across both splits."""
    train, test = bench.data.train.images, bench.data.test.images
    images = np.concatenate([train, test])
    bar = Progress(len(images), 0, "looking for copies")

    def on_block(part):
        if bench.should_stop():
            raise Interrupted("stopped while looking for copies")
        bar.update(round(part * len(images)), {})

    first = copies(images)
    again = np.flatnonzero(first != np.arange(len(images)))
    equal = np.stack([first[again], again], 1)
    pairs, part = near_copies(images, ratio=near, on_block=on_block)
    bar.close()
    other = first[pairs[:, 0]] != first[pairs[:, 1]]
    return Copies(
        np.concatenate([equal, pairs[other]]).astype(np.int64),
        np.arange(len(equal) + other.sum()) < len(equal),
        np.concatenate([np.zeros(len(equal)), part[other]]),
    )


def _report(
    data: Dataset,
    single: Scores,
    classes: Classes,
    same: Copies,
    least_agreement: float,
    ipc: int,
) -> dict[str, Any]:
    """All that the report says, as JSON has it."""
    labels, train = data.train.labels, len(data.train.labels)
    counts = np.bincount(labels, minlength=data.num_classes)
    doubtful = single.doubtful(least_agreement)
    # Of two copies in the training split the later one can be done without.
    double = np.zeros(train, bool)
    double[same.pairs[:, 1][same.pairs[:, 1] < train]] = True
    per_class = []
    for label, name in enumerate(data.class_names):
        own = labels == label
        scale = float(classes.noise_scale[label])
        per_class.append(
            {
                "name": name,
                "images": int(counts[label]),
                "usable": int((own & ~doubtful & ~double).sum()),
                "doubtful_labels": int((own & doubtful).sum()),
                "copies": int((own & double).sum()),
                **{field: float(getattr(single, field)[own].mean()) for field in Scores._fields},
                "gradient_variance": float(classes.variance[label]),
                "noise_scale": scale if np.isfinite(scale) else None,
                **extremes(single, own, doubtful),
            }
        )
    spread, total = np.sqrt(classes.variance), ipc * data.num_classes
    sure = classes.joint.sum()
    both = np.concatenate([labels, data.test.labels])
    return {
        "format": FORMAT,
        "dataset": data.name,
        "images": {"train": train, "test": len(data.test.labels)},
        "shape": list(data.image_shape),
        "balance": scores.balance(counts)._asdict(),
        "unseen_accuracy": float(single.right.mean()),
        "labels": {
            "doubtful": int(doubtful.sum()),
            "confidently_other": float(1 - np.trace(classes.joint) / sure) if sure else 0.0,
            "joint": classes.joint.tolist(),
        },
        "copies": {
            "train": _counted(same, (same.pairs < train).all(1)),
            "test": _counted(same, (same.pairs >= train).all(1)),
            "train_and_test": _counted(
                same, (same.pairs[:, 0] < train) & (same.pairs[:, 1] >= train)
            ),
            "other_label": int((both[same.pairs[:, 0]] != both[same.pairs[:, 1]]).sum()),
            "pairs": [
                {
                    "first": _place(data, first),
                    "second": _place(data, second),
                    "exact": bool(exact),
                    "part": float(part),
                }
                for (first, second), exact, part in list(zip(*same, strict=True))[:_LISTED]
            ],
        },
        "budgets": {
            "total": total,
            "overall": scores.budgets(counts * spread, counts, total).tolist(),
            "mean_over_classes": scores.budgets(spread, counts, total).tolist(),
        },
        "classes": per_class,
    }


def extremes(
    single: Scores, own: Bool[np.ndarray, " n"], doubtful: Bool[np.ndarray, " n"]
) -> dict[str, list[int]]:
    """Positions of the most suspicious images of a class, of the easiest and of the hardest.

    Those whose label is doubtful are not among the hardest: a wrong label is no hard image.

    Args:
        single: The scores of all images.
        own: Which of them are of the class.
        doubtful: Which of them have a doubtful label.
    """

    def first(score, among):
        there = np.flatnonzero(among)
        return there[np.argsort(score[there], kind="stable")[:_SHOWN]].tolist()

    return {
        "suspicious": first(-single.suspicion, own),
        "easiest": first(single.el2n, own),
        "hardest": first(-single.el2n, own & ~doubtful),
    }


def _counted(same: Copies, chosen: np.ndarray) -> dict[str, int]:
    return {
        "exact": int((chosen & same.exact).sum()),
        "near": int((chosen & ~same.exact).sum()),
    }


def _place(data: Dataset, position: np.integer) -> dict[str, Any]:
    """Where an image is, of both splits one after the other."""
    train = len(data.train.labels)
    split, index = ("train", position) if position < train else ("test", position - train)
    label = getattr(data, split).labels[index]
    return {"split": split, "index": int(index), "class": data.class_names[label]}


def _measures(report: dict[str, Any]) -> dict[str, int | float]:
    copied = report["copies"]
    measured = (
        report["images"]["train"],
        report["balance"]["entropy"],
        report["unseen_accuracy"],
        report["labels"]["doubtful"],
        sum(copied["train"].values()),
        sum(copied["train_and_test"].values()),
    )
    return dict(zip(_METRICS, measured, strict=True))


def _write(
    folder: Path,
    data: Dataset,
    report: dict[str, Any],
    single: Scores,
    same: Copies,
    least_agreement: float,
) -> None:
    """The report: pictures and scores first, for where `assessment.json` is, all is."""
    shown = {
        name: _extreme(data, [c[name] for c in report["classes"]])
        for name in ("suspicious", "easiest", "hardest")
        if any(c[name] for c in report["classes"])
    }
    if len(same.pairs):
        shown["copies"] = _pairs(data, same)
    arrays = {name: values.astype(np.float32) for name, values in single._asdict().items()}
    arrays |= {"doubtful": single.doubtful(least_agreement), "copies": same.pairs}
    text = markdown(report, list(shown)).encode()
    for name in ("copies", "hardest"):
        if name not in shown:  # what lies there is of other settings
            (folder / f"{name}.png").unlink(missing_ok=True)
    write_files(
        {
            **{
                folder / f"{name}.png": functools.partial(picture.save, format="PNG")
                for name, picture in shown.items()
            },
            folder / "scores.npz": lambda file: np.savez_compressed(file, **arrays),
            folder / "assessment.md": lambda file: file.write(text),
            folder / "assessment.json": functools.partial(dump, report),
        }
    )


def _extreme(data: Dataset, chosen: list[list[int]]) -> Image.Image:
    """Some images of each class; a class that has none is left out."""
    places = np.concatenate([np.asarray(own, np.int64) for own in chosen])
    images, labels = data.train
    some = images[places] / np.float32(255)
    return Image.fromarray(pictures.grid(some, labels[places], list(data.class_names)))


def _pairs(data: Dataset, same: Copies) -> Image.Image:
    """The nearest pairs, one below the other, those across splits first."""
    train = len(data.train.labels)
    across = (same.pairs >= train).sum(1) == 1
    chosen = same.pairs[np.argsort(~across, kind="stable")[:_PAIRS]]
    places = [[_place(data, x) for x in pair] for pair in chosen]
    images = [[getattr(data, x["split"]).images[x["index"]] for x in pair] for pair in places]
    names = [" = ".join(f"{x['split']} {x['index']}" for x in pair) for pair in places]
    flat = np.concatenate(images) / np.float32(255)
    return Image.fromarray(pictures.grid(flat, np.repeat(np.arange(len(names)), 2), names))


def markdown(report: dict[str, Any], shown: list[str]) -> str:
    """The report to be read by people.

    Args:
        report: What `assessment.json` holds.
        shown: The names of the pictures beside it.
    """
    balance, copied, budgets = (report[name] for name in ("balance", "copies", "budgets"))
    labels, classes = report["labels"], report["classes"]
    lines = [
        ["class", "images", "usable", "doubtful labels", "copies", "unseen accuracy", "entropy",
         "EL2N", "forgotten", "never learned", "agreement", "noise scale", "budget, overall",
         "budget, mean"]
    ]  # fmt: skip
    for one, *shares in zip(classes, budgets["overall"], budgets["mean_over_classes"], strict=True):
        fractions = ("right", "entropy", "el2n", "forgotten", "never_learned", "agreement")
        counted = ("images", "usable", "doubtful_labels", "copies")
        scale = one["noise_scale"]
        lines.append(
            [
                one["name"].replace("|", "/"),
                *(str(one[name]) for name in counted),
                *(f"{one[name]:.3f}" for name in fractions),
                "–" if scale is None else f"{scale:.3g}",
                *map(str, shares),
            ]
        )
    kinds = {"train": "within the training split", "train_and_test": "between training and test",
             "test": "within the test split"}  # fmt: skip
    found = [
        f"- {copied[name]['exact']} equal and {copied[name]['near']} nearly equal pairs {where}"
        for name, where in kinds.items()
    ]
    pictured = {
        "suspicious": "The images of each class whose label is believed least",
        "hardest": "The hardest of each class whose label is not in doubt",
        "easiest": "The easiest of each class",
        "copies": "The nearest pairs of copies",
    }
    parts = [
        f"# {report['dataset']}, assessed",
        f"{report['images']['train']} training images of {len(classes)} classes. The largest class "
        f"has {balance['ratio']:.3g} times the images of the smallest; the entropy of the classes "
        f"is that of {balance['effective']:.3g} equal ones. Networks that have seen half of the "
        f"images classify {100 * report['unseen_accuracy']:.1f} % of the other half as labelled.",
        f"{labels['doubtful']} labels are doubtful: networks are confident of another class, and "
        "so are the images that look most alike. Of the images that networks are confident of, "
        f"{100 * labels['confidently_other']:.1f} % are confidently of another class.",
        "\n".join([*found, f"- {copied['other_label']} of all pairs have two labels"]),
        results.markdown(lines),
        f"Budgets share out {budgets['total']} images: *overall* for the accuracy over all images, "
        "*mean* for the mean of the classes' accuracies. A method takes one as",
        "```text\n"
        + "\n".join(
            f'--config.method.ipc="{tuple(budgets[name])}"'
            for name in ("overall", "mean_over_classes")
        )
        + "\n```",
        *(
            f"## {pictured[name]}\n\n![{pictured[name]}]({name}.png)"
            for name in pictured
            if name in shown
        ),
    ]
    return "\n\n".join(parts) + "\n"
