"""Which score finds wrong labels: of 5 % that are planted, how many are among the worst 5 %.

    python benchmarks/assess.py
    python benchmarks/assess.py --table
    python benchmarks/assess.py --picture --workdir=runs/assess

Digits and the first 2,000 images of Fashion-MNIST, three seeds of the planted labels, by the
networks that the evaluation `assess` trains: two folds, ten or twenty epochs. Writes
`benchmarks/records/assess.json`; interrupted, it goes on with the next seed.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import recording

import jaxdistill
from jaxdistill import keywords
from jaxdistill.data import sources
from jaxdistill.data.augment import normalizer
from jaxdistill.data.dataset import Dataset, Split
from jaxdistill.eval import assess, dynamics, results, train_on
from jaxdistill.io.versions import versions
from jaxdistill.nn.classifiers import classifier

_RECORD = recording.FOLDER / "assess.json"
_IMAGES = Path(__file__).parent.parent / "docs" / "images"
_WRONG = 0.05
_DATA = {
    "digits": {"images": 1437, "depth": 2, "width": 32, "epochs": 20},
    "fashion_mnist": {"images": 2000, "depth": 3, "width": 32, "epochs": 10},
}
# What is high, or low, where a label is doubted.
_SCORES = {
    "entropy": 1,
    "forgotten": 1,
    "gradient_norm": 1,
    "el2n": 1,
    "margin": -1,
    "confidence": -1,
    "agreement": -1,
    "suspicion": 1,
}
_HEADS = {"gradient_norm": "gradient norm", "el2n": "EL2N", "margin": "area under the margin"}


def _planted(name: str, count: int, seed: int) -> tuple[Dataset, np.ndarray]:
    """A data set some of whose labels are of another class, and which."""
    data, rng = sources.load(name), np.random.default_rng(seed)
    images, labels = data.train.images[:count], data.train.labels[:count].copy()
    wrong = np.zeros(count, bool)
    wrong[rng.choice(count, round(_WRONG * count), replace=False)] = True
    away = rng.integers(1, data.num_classes, wrong.sum())
    labels[wrong] = (labels[wrong] + away) % data.num_classes
    return replace(data, train=Split(images, labels)), wrong


def _measure(name: str, seed: int) -> dict:
    shape = _DATA[name]
    data, wrong = _planted(name, shape["images"], seed)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        judgements = dynamics.load_or_judge(
            Path(folder),
            1,
            classifier(
                "convnet",
                data.num_classes,
                data.image_shape,
                depth=shape["depth"],
                width=shape["width"],
            ),
            data,
            normalize=normalizer(data.mean, data.std),
            protocol=train_on.Protocol(shape["epochs"], 64, 0.02, strategy="none", decay_at=()),
            microbatch=16,
            neighbours=20,
            identity="planted",
        )
    single, _ = assess.scored(data, judgements)
    seconds = time.process_time() - start
    # What never was right is forgotten most (Toneva et al., 2019).
    forgotten = single.forgotten + shape["epochs"] * single.never_learned
    single = single._replace(forgotten=forgotten)
    ranked = {
        n: np.argsort(-sign * getattr(single, n), kind="stable") for n, sign in _SCORES.items()
    }
    doubtful = single.doubtful(keywords.defaults(assess.evaluate)["least_agreement"])
    return {
        "data": name,
        "seed": seed,
        "settings": shape,
        "wrong": int(wrong.sum()),
        "precision": {n: float(wrong[order[: wrong.sum()]].mean()) for n, order in ranked.items()},
        "doubtful": int(doubtful.sum()),
        "doubtful_precision": float(wrong[doubtful].mean()),
        "doubtful_recall": float(doubtful[wrong].mean()),
        "unseen_accuracy": float(single.right.mean()),
        "cpu_seconds": round(seconds, 1),
        "versions": versions(),
    }


def table(records: list[dict]) -> str:
    """Markdown: precision in %, mean ± standard deviation over the seeds."""
    names = list(dict.fromkeys(r["data"] for r in records))
    lines = [["score", *names]]
    groups = [[r for r in records if r["data"] == name] for name in names]
    for score in _SCORES:
        cells = [results.percent([r["precision"][score] for r in own]) for own in groups]
        lines.append([_HEADS.get(score, score), *cells])
    for field in ("doubtful_precision", "doubtful_recall", "unseen_accuracy"):
        cells = [results.percent([r[field] for r in own]) for own in groups]
        lines.append([field.replace("_", ", "), *cells])
    seconds = [f"{np.mean([r['cpu_seconds'] for r in own]):.0f}" for own in groups]
    return results.markdown([*lines, ["CPU seconds", *seconds]])


def _picture(workdir: Path) -> None:
    """The report on the images of Fashion-MNIST as they are, whose pictures the docs show."""
    name, shape = "fashion_mnist", _DATA["fashion_mnist"]
    data, count = sources.load(name), shape["images"]
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "part.npz"
    np.savez(
        path,
        train_images=data.train.images[:count],
        train_labels=data.train.labels[:count],
        test_images=data.test.images,
        test_labels=data.test.labels,
        class_names=np.array(data.class_names),
    )
    config = jaxdistill.load_config(
        f"assess:epochs={shape['epochs']}",
        {"data.name": str(path), "extractor.width": str(shape["width"])},
    )
    jaxdistill.train(config, workdir / "run")
    for shown in ("suspicious", "copies"):
        made = workdir / "run" / "assessment" / f"{shown}.png"
        shutil.copy(made, _IMAGES / f"assess_{shown}.png")


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--picture", action="store_true", help="only draw for the docs")
    parser.add_argument("--workdir", type=Path, default=Path("runs/assess"))
    args = parser.parse_args()
    if args.picture:
        _picture(args.workdir)
        return
    if not args.table:
        for name in _DATA:
            for seed in args.seeds:
                if not recording.has(_RECORD, (name, seed), ("data", "seed")):
                    recording.put(_RECORD, _measure(name, seed), ("data", "seed"))
    print(table(recording.read(_RECORD)))


if __name__ == "__main__":
    main()
