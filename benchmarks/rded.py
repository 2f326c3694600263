"""RDED's claims taken apart: which images, which labels, which learning rate.

    python benchmarks/rded.py                 # what is missing, into benchmarks/records/rded.json
    python benchmarks/rded.py --ipc 50 --epochs 100
    python benchmarks/rded.py --data=FOLDER --record=rded_cifar10_jpeg75
    python benchmarks/rded.py --labels teacher views --baselines=random --record=rded_views
    python benchmarks/rded.py --table         # the tables, from the record
    python benchmarks/rded.py --picture       # docs/images/rded_fashion_mnist.png, from the workdir

The data are Fashion-MNIST, or those of a folder. Every row of images is trained on under every kind
of label, with equal steps. The observer is trained once; the seed of a run decides the images and
the crops, and each set is trained on by several networks.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import recording

import jaxdistill
from jaxdistill import settings
from jaxdistill.eval.results import markdown

_COSINES = ("half", "full")
_SHOWN = 10  # crops of a row in the picture


def _run(ipc: int, cosine: str, seed: int, args: argparse.Namespace) -> dict:
    # One workdir for both: the evaluation alone differs.
    workdir = args.workdir / f"{ipc}-{seed}"
    overrides = {
        "pool.dir": str(args.workdir / "pool"),
        "evals.accuracy.cosine": cosine,
        "evals.accuracy.seeds": str(args.students),
        "evals.accuracy.epochs": str(args.epochs),
        "data.name": args.data,
    }
    spec = f"rded:ipc={ipc},seed={seed},baselines={args.baselines}"
    config = jaxdistill.load_config(spec, overrides | {"evals.accuracy.labels": repr(args.labels)})
    results = jaxdistill.train(config, workdir)
    resolved = json.loads((workdir / "config.json").read_text())
    del resolved["pool"]["dir"]  # places on this machine
    resolved["data"]["name"] = Path(args.data).name
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    return {
        "ipc": ipc,
        "cosine": cosine,
        "seed": seed,
        "cost": card["cost"],
        "results": results,
        "config": resolved,
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def picture(workdir: Path, path: Path) -> None:
    """What each row has of two classes, with the observer's cross-entropy under each crop.

    An image is a crop here, and is seen as it was when it was scored.
    """
    config = json.loads((workdir / "config.json").read_text())
    config["pool"]["dir"] = str(workdir.parent / "pool")
    experiment = settings.resolve(config)
    task = experiment.family.load(experiment, workdir, lambda: False).task
    observer = jax.tree.map(lambda x: x[0], task.extractors.load()["trained"])
    rows = {
        "easiest": "",
        "medium": "baselines/medium",
        "hardest": "baselines/hardest",
        "random crop": "baselines/cropped",
        "random": "baselines/random",
    }
    classes = {7: "sneakers", 8: "bags"}
    figure, axes = plt.subplots(
        len(classes) * len(rows), _SHOWN + 1, figsize=(9, 9.6), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    shown = [(label, name) for label in classes for name in rows]
    for line, (label, name) in zip(axes, shown, strict=True):
        made = jaxdistill.load_distilled(workdir / rows[name])
        images = made.images[made.labels == label]
        said = task.network.logits(observer, task.normalize(jnp.asarray(images)))
        hard = jnp.full(len(images), label)
        losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(said, hard))
        line[0].text(1, 0.5, f"{classes[label]},\n{name}", ha="right", va="center", fontsize=8)
        # From the first to the last of those that are kept.
        for axis, i in zip(
            line[1:], np.linspace(0, len(images) - 1, _SHOWN).astype(int), strict=True
        ):
            axis.imshow(images[i][..., 0], cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{losses[i]:.2g}", fontsize=7, pad=1)
    figure.savefig(path, dpi=100)


def table(records: list[dict], ipc: int, cosine: str) -> str:
    """Markdown: accuracies in %, mean ± std over sets and networks; then margins over `random`."""
    mine = [r for r in records if (r["ipc"], r["cosine"]) == (ipc, cosine)]
    results = [record | {"set": r["seed"]} for r in mine for record in r["results"]]
    rows, metrics = (list(dict.fromkeys(x[k] for x in results)) for k in ("row", "metric"))

    def values(row: str, metric: str) -> dict[tuple[int, int], float]:
        chosen = (x for x in results if (x["row"], x["metric"]) == (row, metric))
        return {(x["set"], x["seed"]): 100 * x["value"] for x in chosen}

    heads = [m.removeprefix("convnet, ") for m in metrics]
    margins = [f"margin, {head.removesuffix(' labels')}" for head in heads]
    lines = [["images", *heads, *margins]]
    plain = {m: values("random", m) for m in metrics}
    for row in rows:
        own = {m: values(row, m) for m in metrics}
        # The same set's seed and the same network's: pairs.
        apart = [[own[m][key] - plain[m][key] for key in own[m]] for m in metrics]
        cells = (
            f"{np.mean(c):.1f} ± {np.std(c):.1f}" for c in ([*x.values()] for x in own.values())
        )
        lines.append([row, *cells, *(f"{np.mean(c):+.1f} ± {np.std(c):.1f}" for c in apart)])
    networks = len(plain[metrics[0]]) // len(mine)
    sizes = {m: x["label_bytes"] for m in metrics for x in results if x["metric"] == m}
    said = ", ".join(f"{m.removeprefix('convnet, ')} {sizes[m]:,}" for m in metrics)
    epochs = mine[0]["config"]["evals"]["accuracy"]["epochs"]
    head = f"{ipc} images a class, {cosine} cosine, {epochs} epochs, {len(mine)} sets x {networks}"
    return f"{head}\n\n{markdown(lines)}\n\nBytes of labels: {said}\n"


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/rded"))
    parser.add_argument("--data", default="fashion_mnist", help="a data set's name or folder")
    parser.add_argument("--record", default="rded", help="the name of the record")
    parser.add_argument("--cosines", nargs="*", choices=_COSINES, default=_COSINES)
    parser.add_argument("--epochs", type=int, default=300, help="of the networks trained on a set")
    parser.add_argument("--ipc", type=int, nargs="*", default=[1, 10])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--students", type=int, default=2, help="networks on each set")
    parser.add_argument("--labels", nargs="*", default=["hard", "soft", "teacher"])
    parser.add_argument("--baselines", default="random+cropped+hardest+medium")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--picture", action="store_true", help="only draw what a run has left")
    args = parser.parse_args()
    args.labels = tuple(args.labels)
    path = recording.FOLDER / f"{args.record}.json"
    if args.picture:
        images = Path(__file__).parent.parent / "docs" / "images"
        picture(args.workdir / f"{args.ipc[-1]}-0", images / "rded_fashion_mnist.png")
        return
    for seed in () if args.table else args.seeds:
        for ipc in args.ipc:
            for cosine in args.cosines:
                names = ("ipc", "cosine", "seed")
                if not recording.has(path, (ipc, cosine, seed), names):
                    recording.put(path, _run(ipc, cosine, seed, args), names)
    records = recording.read(path)
    for ipc, cosine in dict.fromkeys((r["ipc"], r["cosine"]) for r in records):
        print(table(records, ipc, cosine))


if __name__ == "__main__":
    main()
