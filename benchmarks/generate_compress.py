"""Real images against generated ones, condensed alike: Fashion-MNIST, tested on real images.

    python benchmarks/generate_compress.py --workdir=runs/gc
    python benchmarks/generate_compress.py --arms tail filled --workdir=runs/gc
    python benchmarks/generate_compress.py --arms all five --workdir=runs/gc
    python benchmarks/generate_compress.py --arms real generated --method=ncfm --workdir=runs/gc
    python benchmarks/generate_compress.py --table
    python benchmarks/generate_compress.py --picture --workdir=runs/gc

A two-call ArcFlow student of a teacher (`--teacher`, or one that is trained first), both trained as
in the tables of flows, makes as many images of each class as there are real ones. Each arm is
condensed by RDED, with an observer that is trained on the arm's own images, and beside it stand
images drawn at random from the arm; networks are trained on both by one recipe, with equal images
and steps. In the arm `five` there are five times as many generated images as real ones, and in the
arms `all` and `five` RDED chooses from one crop of all that there are, else from five crops of 300
of a class. Observers are trained for three epochs, that of `five` for one. With `--method=ncfm`
arms are condensed by NCFM, with networks that are trained on the arm. Interrupted, the same command
goes on.

Of the arm `tail` the training split is long-tailed: the classes, in an order that is drawn once,
have from 6,000 images down to 60. In `filled` those below 600 are filled up to that number by a
guided teacher that has seen the long-tailed split alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import recording
from PIL import Image

import jaxdistill
from jaxdistill.data import sources
from jaxdistill.eval import results
from jaxdistill.io import pictures

_RECORD = recording.FOLDER / "generate_compress.json"
_GENERATED = ("generated", "confident", "mixed")
_ARMS = ("real", *_GENERATED, "all", "five", "tail", "filled")
_PER_CLASS, _TIMES = 6000, 5
_IMBALANCE, _FILLED = 100, 600
_DATA = {"all": "generated"}  # whose images an arm has, where they are another's


def _generate(args: argparse.Namespace) -> list[dict]:
    """The data sets of all arms but the first, by one generator."""
    config = jaxdistill.load_config(
        "flow:dataset=fashion_mnist,baselines=",
        {"method.steps": "300", "method.batch_size": "32"}
        | ({"teacher.dir": str(args.teacher / "teacher")} if args.teacher else {}),
    ).unlock()
    one = {"name": "generate", "per_class": _PER_CLASS}
    made = {
        "generated": one,
        # Of 4,000 made of each class the 2,000 surest.
        "confident": one | {"filter": "confident", "per_class": _PER_CLASS // 3},
        "mixed": one | {"real": True},
        "five": one | {"per_class": _TIMES * _PER_CLASS},
    }
    wanted = {_DATA.get(arm, arm) for arm in args.arms}
    config.evals = {name: settings for name, settings in made.items() if name in wanted}
    return jaxdistill.train(config, args.workdir / "generator")


def _order() -> np.ndarray:
    """The classes, from the most frequent to the rarest."""
    return np.random.default_rng(0).permutation(10)


def _tail(path: Path) -> None:
    """The long-tailed data set."""
    data = sources.load("fashion_mnist")
    sizes = np.rint(_PER_CLASS * _IMBALANCE ** (-np.arange(10) / 9)).astype(int)
    kept = np.sort(
        np.concatenate(
            [
                np.flatnonzero(data.train.labels == c)[:n]
                for c, n in zip(_order(), sizes, strict=True)
            ]
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        train_images=data.train.images[kept],
        train_labels=data.train.labels[kept],
        test_images=data.test.images,
        test_labels=data.test.labels,
        class_names=np.array(data.class_names),
    )


def _fill(args: argparse.Namespace) -> list[dict]:
    """What the long-tailed set lacks, by a teacher that is trained on it."""
    config = jaxdistill.load_config(
        "flow:dataset=fashion_mnist,baselines=",
        {
            "data.name": str(args.workdir / "tail.npz"),
            "teacher.steps": "2000",
            "method.steps": "1",  # of the student, whom nobody asks
        },
    ).unlock()
    config.evals = {
        "filled": {
            "name": "generate",
            "teacher": "midpoint:16",
            "per_class": _FILLED,
            "real": True,
            "fill": True,
        }
    }
    return jaxdistill.train(config, args.workdir / "filler")


def _run(arm: str, seed: int, args: argparse.Namespace) -> dict:
    folders = dict.fromkeys((*_GENERATED, "five"), args.workdir / "generator" / "generated")
    folders |= {"tail": args.workdir, "filled": args.workdir / "filler" / "generated"}
    source = _DATA.get(arm, arm)
    data = "fashion_mnist" if arm == "real" else str(folders[source] / f"{source}.npz")
    workdir = args.workdir / f"{arm}-{seed}{'' if args.method == 'rded' else f'-{args.method}'}"
    overrides = {
        "data.name": data,
        "pool.dir": str(args.workdir / "pool"),
        "evals.accuracy.seeds": "1",
    }
    if args.method == "rded":
        overrides["evals.accuracy.labels"] = '("hard", "teacher")'
        spec = f"rded:ipc=10,baselines=random,seed={seed}"
        if arm in ("all", "five"):
            overrides["method.mipc"] = str(_PER_CLASS * (_TIMES if arm == "five" else 1))
            overrides["method.num_crop"] = "1"
        if arm == "five":  # about as many steps of the observer as the others have
            overrides["pool.epochs"] = "1"
    else:
        spec = f"ncfm:dataset=fashion_mnist,ipc=10,baselines=random,seed={seed}"
        overrides |= {"method.steps": "300", "extractor.width": "32"}
    config = jaxdistill.load_config(spec, overrides)
    found = jaxdistill.train(config, workdir)
    resolved = json.loads((workdir / "config.json").read_text())
    del resolved["pool"]["dir"]  # places on this machine
    resolved["data"]["name"] = arm
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    return {
        "arm": arm,
        "seed": seed,
        "method": args.method,
        "results": found,
        "rarest": _order()[-3:].tolist() if arm in ("tail", "filled") else None,
        "provenance": card["provenance"],
        "config": resolved,
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def table(records: list[dict], method: str) -> str:
    """Markdown: accuracies in %, mean ± std over the seeds of the choice."""
    runs = [r for r in records if "results" in r and r.get("method", "rded") == method]
    metrics = list(dict.fromkeys(x["metric"] for r in runs for x in r["results"]))
    heads = [m.removeprefix("convnet, ") for m in metrics]
    lines = [["images", "chosen", "seeds", *heads, *(f"rarest third, {h}" for h in heads)]]
    for arm in dict.fromkeys(r["arm"] for r in runs):
        for row in (method, "random"):
            cells, rare, seeds = [], [], set()
            for metric in metrics:
                found = [
                    (x, r.get("rarest"))
                    for r in runs
                    for x in r["results"]
                    if (r["arm"], x["row"], x["metric"]) == (arm, row, metric)
                ]
                seeds.add(len(found))
                cells.append(results.percent([x["value"] for x, _ in found]))
                thirds = [np.mean([x["classes"][c] for c in few]) for x, few in found if few]
                rare.append(results.percent(thirds) if thirds else "")
            lines.append([arm, row, str(max(seeds)), *cells, *rare])
    lines = lines if any(line[-1] for line in lines[1:]) else [line[:-2] for line in lines]
    made = [(r["arm"], x) for r in records for x in r.get("generator", ())]
    said = "; ".join(f"{x['evaluation']}, {x['metric']} {x['value']:.3g}" for _, x in made)
    return f"{results.markdown(lines)}\n\nWhat was made: {said}.\n"


def picture(workdir: Path, path: Path) -> None:
    """What each stage has of two classes."""
    stages = {"real": sources.load("fashion_mnist").train}
    for arm in ("generated", "confident"):
        stages[arm] = sources.load(workdir / "generator" / "generated" / f"{arm}.npz").train
    shown, labels, names = [], [], []
    for label in (2, 7):  # pullovers and sneakers
        rows = {name: train.images[train.labels == label][:10] for name, train in stages.items()}
        for arm in ("real", "generated"):
            made = jaxdistill.load_distilled(workdir / f"{arm}-0")
            chosen = made.images[made.labels == label]
            rows[f"{arm}, RDED"] = np.rint(255 * chosen).astype(np.uint8)
        for name, images in rows.items():
            shown.append(images / np.float32(255))
            labels += [len(names)] * len(images)
            names.append(name)
    grid = pictures.grid(np.concatenate(shown), np.array(labels, np.int32), names)
    Image.fromarray(grid).save(path)


def _keep(record: dict) -> None:
    """Records of before `--method` was there have none; all of them are of RDED."""
    records = [{"method": "rded"} | r for r in recording.read(_RECORD)]
    recording.write(_RECORD, records)
    recording.put(_RECORD, record, ("arm", "seed", "method"))


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/generate_compress"))
    parser.add_argument("--teacher", type=Path, help="a workdir whose teacher is used")
    parser.add_argument("--arms", nargs="*", choices=_ARMS, default=_ARMS)
    parser.add_argument("--method", choices=("rded", "ncfm"), default="rded")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--picture", action="store_true", help="only draw what a run has left")
    args = parser.parse_args()
    if args.picture:
        images = Path(__file__).parent.parent / "docs" / "images"
        picture(args.workdir, images / "generate_compress_stages.png")
        return
    if not args.table:
        if {_DATA.get(arm, arm) for arm in args.arms} & {*_GENERATED, "five"}:
            told = [r["generator"] for r in recording.read(_RECORD) if r["arm"] == "generator"]
            told.append(_generate(args))
            found = {(x["evaluation"], x["metric"]): x for own in told for x in own}
            made = {"arm": "generator", "seed": 0, "generator": list(found.values())}
            recording.put(_RECORD, made, ("arm", "seed"))
        if set(args.arms) & {"tail", "filled"}:
            _tail(args.workdir / "tail.npz")
            made = {"arm": "filler", "seed": 0, "generator": _fill(args)}
            recording.put(_RECORD, made, ("arm", "seed"))
        for seed in args.seeds:
            for arm in args.arms:
                known = {
                    (r["arm"], r["seed"], r.get("method", "rded")) for r in recording.read(_RECORD)
                }
                if (arm, seed, args.method) not in known:
                    _keep(_run(arm, seed, args))
    for method in ("rded", "ncfm"):
        if any(r.get("method", "rded") == method for r in recording.read(_RECORD)):
            print(table(recording.read(_RECORD), method))


if __name__ == "__main__":
    main()
