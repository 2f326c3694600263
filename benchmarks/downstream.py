"""What distilled sets are used for, measured: class-incremental learning and architecture search.

    python benchmarks/downstream.py continual fashion_mnist --workdir=runs/downstream
    python benchmarks/downstream.py search fashion_mnist --workdir=runs/downstream
    python benchmarks/downstream.py continual fashion_mnist --table    # from the record
    python benchmarks/downstream.py continual fashion_mnist --picture --workdir=runs/downstream

Each is the run of a config, with NCFM beside DM, random images and herding, at ten images a class.
Records go to `benchmarks/records/NAME_DATASET.json`; interrupted, the same command goes on.
"""

import argparse
import json
import shutil
from pathlib import Path

import recording

import jaxdistill
from jaxdistill.eval import results

_ROWS = "baselines=random+herding+ncfm"
_IMAGES_FOLDER = Path(__file__).parent.parent / "docs" / "images"
# Fewer orders, and a third of the space, than the configs have.
_OVERRIDES = {
    "continual": {"evals.continual.orders": "3"},
    "search": {
        "evals.search.widths": "(16, 32)",
        "evals.search.norms": "('none', 'instance', 'group')",
        "evals.search.activations": "('relu',)",
    },
}
_SHOWN = {"continual": results.percent, "search": results.plain}


def _measure(name: str, dataset: str, workdir: Path) -> dict:
    config = jaxdistill.load_config(f"{name}:dataset={dataset},{_ROWS}", _OVERRIDES[name])
    records = jaxdistill.train(config, workdir)
    rows = {"dm": workdir} | {n: workdir / "baselines" / n for n in ("random", "herding", "ncfm")}
    cards = {n: jaxdistill.load_distilled(folder).card for n, folder in rows.items()}
    return {
        "records": records,
        "costs": {n: card["cost"] for n, card in cards.items()},
        "config": json.loads((workdir / "config.json").read_text()),
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def main() -> None:
    """Measures, or shows what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=tuple(_OVERRIDES))
    parser.add_argument("dataset")
    parser.add_argument("--workdir", type=Path, default=Path("runs/downstream"))
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--picture", action="store_true", help="only keep the run's picture")
    args = parser.parse_args()
    name = f"{args.name}_{args.dataset}"
    path, workdir = recording.FOLDER / f"{name}.json", args.workdir / name
    if args.picture:
        shutil.copyfile(workdir / f"{args.name}.png", _IMAGES_FOLDER / f"{name}.png")
        return
    if not args.table:
        recording.write(path, _measure(args.name, args.dataset, workdir))
    record = json.loads(path.read_text())
    # Of a search, what its accuracies amount to.
    kept = [r for r in record["records"] if args.name != "search" or "cpu_seconds" not in r]
    print(results.table(kept, _SHOWN[args.name]))
    for row, cost in record["costs"].items():
        print(f"{row}: {cost['cpu_seconds']:.0f} CPU s, {cost['steps']} steps")


if __name__ == "__main__":
    main()
