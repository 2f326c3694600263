"""Real images against generated ones, condensed alike: Fashion-MNIST, tested on real images.

    python benchmarks/generate_compress.py --teacher=runs/flow/fashion_mnist-0 --workdir=runs/gc
    python benchmarks/generate_compress.py --table

A two-call ArcFlow student of the frozen teacher, trained as in the tables of flows, makes as many
images of each class as there are real ones. Each arm is condensed by RDED, with an observer that is
trained on the arm's own images, and beside it stand images drawn at random from the arm; networks
are trained on both by one recipe, with equal images and steps. Interrupted, the same command goes
on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import recording

import jaxdistill
from jaxdistill.eval.results import markdown

_RECORD = recording.FOLDER / "generate_compress.json"
_ARMS = ("real", "generated", "confident", "mixed")
_PER_CLASS = 6000


def _generate(args: argparse.Namespace) -> list[dict]:
    """The data sets of all arms but the first, by one generator."""
    config = jaxdistill.load_config(
        "flow:dataset=fashion_mnist,baselines=",
        {
            "teacher.dir": str(args.teacher / "teacher"),
            "method.steps": "300",
            "method.batch_size": "32",
        },
    ).unlock()
    one = {"name": "generate", "per_class": _PER_CLASS}
    config.evals = {
        "generated": one,
        # Of 4,000 made of each class the 2,000 surest.
        "confident": one | {"filter": "confident", "per_class": _PER_CLASS // 3},
        "mixed": one | {"real": True},
    }
    return jaxdistill.train(config, args.workdir / "generator")


def _run(arm: str, seed: int, args: argparse.Namespace) -> dict:
    folder = args.workdir / "generator" / "generated"
    data = "fashion_mnist" if arm == "real" else str(folder / f"{arm}.npz")
    workdir = args.workdir / f"{arm}-{seed}"
    overrides = {
        "data.name": data,
        "pool.dir": str(args.workdir / "pool"),
        "evals.accuracy.labels": '("hard", "teacher")',
        "evals.accuracy.seeds": "1",
    }
    config = jaxdistill.load_config(f"rded:ipc=10,baselines=random,seed={seed}", overrides)
    results = jaxdistill.train(config, workdir)
    resolved = json.loads((workdir / "config.json").read_text())
    del resolved["pool"]["dir"]  # places on this machine
    resolved["data"]["name"] = arm
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    return {
        "arm": arm,
        "seed": seed,
        "results": results,
        "provenance": card["provenance"],
        "config": resolved,
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def table(records: list[dict]) -> str:
    """Markdown: accuracies in %, mean ± std over the seeds of the choice and the network."""
    runs = [r for r in records if "results" in r]
    metrics = list(dict.fromkeys(x["metric"] for r in runs for x in r["results"]))
    lines = [["images", "chosen", "seeds", *(m.removeprefix("convnet, ") for m in metrics)]]
    for arm in dict.fromkeys(r["arm"] for r in runs):
        for row in ("rded", "random"):
            cells, seeds = [], set()
            for metric in metrics:
                values = [
                    100 * x["value"]
                    for r in runs
                    for x in r["results"]
                    if (r["arm"], x["row"], x["metric"]) == (arm, row, metric)
                ]
                seeds.add(len(values))
                cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}")
            lines.append([arm, row, str(max(seeds)), *cells])
    made = [x for r in records if r["arm"] == "generator" for x in r["generator"]]
    said = ", ".join(f"{x['evaluation']} {x['metric']} {x['value']:.3g}" for x in made)
    return f"{markdown(lines)}\n\nThe generator: {said}.\n"


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/generate_compress"))
    parser.add_argument("--teacher", type=Path, help="a workdir with the frozen teacher")
    parser.add_argument("--arms", nargs="*", choices=_ARMS, default=_ARMS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    args = parser.parse_args()
    if not args.table:
        made = {"arm": "generator", "seed": 0, "generator": _generate(args)}
        recording.put(_RECORD, made, ("arm", "seed"))
        for seed in args.seeds:
            for arm in args.arms:
                known = {(r["arm"], r["seed"]) for r in recording.read(_RECORD)}
                if (arm, seed) not in known:
                    recording.put(_RECORD, _run(arm, seed, args), ("arm", "seed"))
    print(table(recording.read(_RECORD)))


if __name__ == "__main__":
    main()
