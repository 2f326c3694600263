"""Image-text pairs of Flickr8k at 32 pixels: chosen ones, covariance matching, and all of them.

    python benchmarks/pairs.py --prepare FOLDER   # from the unpacked photos, captions and splits
    python benchmarks/pairs.py                    # what is missing, into records/pairs.json
    python benchmarks/pairs.py --pairs 200 500
    python benchmarks/pairs.py --data digits --record pairs_digits
    python benchmarks/pairs.py --table            # the tables, from the record
    python benchmarks/pairs.py --data digits --picture   # docs/images/pairs_digits.png

FOLDER has `images/`, `captions.json` (file name -> five sentences) and the official splits,
`split_train.txt`, `split_dev.txt` and `split_test.txt`. Towers are trained from scratch, with as
many steps on every row, and one training of the observers serves all runs.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import recording

import jaxdistill
from jaxdistill.eval.results import markdown
from jaxdistill.eval.retrieval import METRICS

_NAMES = ("pairs", "seed")
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_BASELINES = "random+herding+texts"
_OVERRIDES = {
    "observer.size": "1",
    "observer.width": "32",
    "observer.steps": "400",
    "observer.learning_rate": "0.002",
    "method.steps": "100",
    "evals.retrieval.width": "32",
    "evals.retrieval.steps": "300",
    "evals.retrieval.batch_size": "64",
    "evals.retrieval.seeds": "1",
}


def prepare(folder: Path, out: Path) -> dict[str, int]:
    """Writes images and `captions.jsonl` for the library to read; returns images by split."""
    sentences = json.loads((folder / "captions.json").read_text())
    (out / "images").mkdir(parents=True)
    lines = []
    for split, name in _SPLITS.items():
        for image in (folder / f"split_{name}.txt").read_text().split():
            shutil.copyfile(folder / "images" / image, out / "images" / image)
            own = {"image": f"images/{image}", "captions": sentences[image], "split": split}
            lines.append(own)
    (out / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {split: sum(line["split"] == split for line in lines) for split in _SPLITS}


def _run(pairs: int, seed: int, args: argparse.Namespace) -> dict:
    workdir = _workdir(args, pairs, seed)
    # What all pairs give is the same for every set of them.
    first = (pairs, seed) == (args.pairs[0], args.seeds[0])
    own = {
        "observer.dir": str(workdir.parent / "observers"),
        "evals.retrieval.ceiling": str(first).lower(),
    }
    spec = f"pairs:dataset={args.data},pairs={pairs},seed={seed},baselines={_BASELINES}"
    results = jaxdistill.train(jaxdistill.load_config(spec, _OVERRIDES | own), workdir)
    resolved = json.loads((workdir / "config.json").read_text())
    del resolved["observer"]["dir"]  # places on this machine
    resolved["data"]["name"] = Path(args.data).name
    card = json.loads((workdir / "artifacts" / "pairs.json").read_text())
    return {
        "pairs": pairs,
        "seed": seed,
        "cost": card["cost"],
        "results": results,
        "config": resolved,
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def _workdir(args: argparse.Namespace, pairs: int, seed: int) -> Path:
    return args.workdir / Path(args.data).name / f"{pairs}-{seed}"


def table(records: list[dict], pairs: int) -> str:
    """Markdown: recalls in %, mean ± std over sets."""
    mine = [r for r in records if r["pairs"] == pairs]
    results = [x for record in mine for x in record["results"]]
    rows = list(dict.fromkeys(x["row"] for x in results))
    lines = [["pairs", *METRICS]]
    for row in rows:
        cells = []
        for metric in METRICS:
            own = [100 * x["value"] for x in results if (x["row"], x["metric"]) == (row, metric)]
            spread = f" ± {np.std(own):.1f}" if len(own) > 1 else ""
            cells.append(f"{np.mean(own):.1f}{spread}")
        lines.append([row, *cells])
    sets = f"{len(mine)} sets" if len(mine) > 1 else "one set"
    return f"{pairs} pairs, {sets} of each kind\n\n{markdown(lines)}\n"


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--data", default="runs/flickr8k", help="that folder, or a data set's name")
    parser.add_argument("--record", default="pairs", help="the name of the record")
    parser.add_argument("--prepare", type=Path, help="only prepare the data from this folder")
    parser.add_argument("--pairs", type=int, nargs="*", default=[100])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--picture", action="store_true", help="only keep what a run has drawn")
    args = parser.parse_args()
    path = recording.FOLDER / f"{args.record}.json"
    if args.prepare:
        print(prepare(args.prepare, Path(args.data)))
        return
    if args.picture:
        name = f"pairs_{Path(args.data).name}.png"
        drawn = _workdir(args, args.pairs[0], args.seeds[0]) / "artifacts" / "retrieval.png"
        shutil.copyfile(drawn, Path(__file__).parent.parent / "docs" / "images" / name)
        return
    for seed in () if args.table else args.seeds:
        for pairs in args.pairs:
            if not recording.has(path, (pairs, seed), _NAMES):
                recording.put(path, _run(pairs, seed, args), _NAMES)
    records = recording.read(path)
    for pairs in dict.fromkeys(r["pairs"] for r in records):
        print(table(records, pairs))


if __name__ == "__main__":
    main()
