"""Makes the Fashion-MNIST table: every row through the command line's own `train`.

    python benchmarks/fashion_mnist.py --ipc=1 --workdir=runs/fashion1
    python benchmarks/fashion_mnist.py --ipc=10 --workdir=runs/fashion10

Interrupted, the same command goes on. Needs Fashion-MNIST (Debian: dataset-fashion-mnist). Writes
one record per row and condensation seed to `benchmarks/records/fashion_mnist_ipc<N>.json`.

With `--tune` it runs the settings that were tried for each method instead, in shorter runs that
are judged by 500 images of each class held out of the training split, and writes
`fashion_mnist_tuning_ipc<N>.json`. `--table` only prints the table of the records that are there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import recording

import jaxdistill

# Row -> overrides of the shipped config. Each was chosen on images held out of the training set
# (`data.holdout_per_class`), see docs/results.md.
_ROWS = {
    "random": {"method.name": "random"},
    "herding": {"method.name": "herding"},
    "k-center": {"method.name": "k_center"},
    "tiled real images (start)": {"method.name": "start"},
    "DM": {"method.name": "dm", "method.learning_rate": "0.1"},
    "NCFM, Gaussian frequencies": {"method.learning_rate": "0.1", "method.calibration": "0.0"},
    "NCFM, learned frequencies": {
        "method.learning_rate": "0.1",
        "method.calibration": "0.0",
        "method.sampler": "learned",
    },
    "NCFM, Gaussian, calibration": {"evals.accuracy.soft_labels": "true"},
    "NCFM, Gaussian, calibration, fine-tuning": {"method.finetune_learning_rate": "0.001"},
    # Many times the budget of the rows above.
    "NCFM, Gaussian, calibration, long": {
        "method.steps": "2000",
        "evals.accuracy.soft_labels": "true",
    },
}
# Further rows of ten images per class: the length of training that its recipe has.
_TEN = {
    "NCFM, Gaussian, calibration, long, 300 epochs": {
        "method.steps": "2000",
        "evals.accuracy.epochs": "300",
    }
}
_DM = {"method.name": "dm"}
_PLAIN = {"method.calibration": "0.0"}
_LEARNED = {"method.calibration": "0.0", "method.sampler": "learned"}
# Number of extractors, and the epochs that each is trained for, instead of four and two.
_POOLS = {
    f"NCFM, calibration 10.0, {size} extractors of {epochs} epochs": {
        "method.calibration": "10.0",
        "pool.size": size,
        "pool.epochs": epochs,
    }
    for size, epochs in (("12", "2"), ("2", "2"), ("2", "8"))
}
# Images per class -> setting -> overrides.
_TUNING = {
    1: {
        **{f"DM, rate {r}": _DM | {"method.learning_rate": r} for r in ("0.03", "0.1", "0.3")},
        **{f"NCFM, rate {r}": _PLAIN | {"method.learning_rate": r} for r in ("0.03", "0.1", "0.3")},
        **{f"NCFM, calibration {c}": {"method.calibration": c} for c in ("10.0", "30.0", "100.0")},
        **{
            f"NCFM, learned, spread {s}": _LEARNED
            | {"method.learning_rate": "0.1", "method.freq_spread": s}
            for s in ("1.5", "4.0")
        },
        "NCFM, learned, spread 4.0, slow ascent": _LEARNED
        | {
            "method.learning_rate": "0.1",
            "method.freq_spread": "4.0",
            "method.sampler_learning_rate": "3e-5",
        },
        **{
            f"NCFM, calibration, fine-tuning {r}": {"method.finetune_learning_rate": r}
            for r in ("0.001", "0.01")
        },
        **_POOLS,
    },
    10: {
        **{f"DM, rate {r}": _DM | {"method.learning_rate": r} for r in ("0.05", "0.1", "0.2")},
        **{f"NCFM, rate {r}": _PLAIN | {"method.learning_rate": r} for r in ("0.05", "0.1", "0.2")},
        **{f"NCFM, calibration {c}": {"method.calibration": c} for c in ("10.0", "30.0", "100.0")},
        **_POOLS,
    },
}
# What the settings are judged by: shorter runs, a narrower network, never the test split.
_JUDGE = {
    "data.holdout_per_class": "500",
    "evals.accuracy.width": "64",
    "evals.accuracy.seeds": "1",
}
_SHORTER = {
    1: {"method.steps": "200", "evals.accuracy.epochs": "300"},
    10: {"method.steps": "80", "evals.accuracy.epochs": "60"},
}


def _rows(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    if args.tune:
        return {r: _JUDGE | _SHORTER[args.ipc] | o for r, o in _TUNING[args.ipc].items()}
    return _ROWS | (_TEN if args.ipc == 10 else {})


def _slug(row: str, seed: int) -> str:
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in row.lower())
    return f"{kept.strip('-')}-{seed}"


def _run(row: str, seed: int, args: argparse.Namespace) -> dict:
    workdir = args.workdir / _slug(row, seed)
    own = dict(_rows(args)[row])
    method = own.pop("method.name", "ncfm")
    every = f"ncfm:dataset=fashion_mnist,ipc={args.ipc},baselines=,seed={seed}"
    spec = f"{every},method={method}"
    # What is set for all rows goes to the methods that have it, as some take no steps.
    known, own_names = (set(jaxdistill.load_config(s).method) for s in (every, spec))
    absent = {f"method.{name}" for name in known - own_names}
    given = dict(o.split("=", 1) for o in args.set)
    given = {path: text for path, text in given.items() if path not in absent}
    overrides = {"pool.dir": str(args.workdir / "pool")} | given | own
    results = jaxdistill.train(jaxdistill.load_config(spec, overrides), workdir)
    resolved = json.loads((workdir / "config.json").read_text())
    del resolved["pool"]["dir"]  # a place on this machine
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    return {
        "row": row,
        "ipc": args.ipc,
        "condense_seed": seed,
        "cost": card["cost"],
        "results": recording.accuracies(results),
        "config": resolved,
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def table(records: list[dict]) -> str:
    """Markdown: mean ± std over all condensation and evaluation seeds, hard and soft apart."""
    lines = [
        "| method | hard labels | soft labels | seeds (condense × train) | steps | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for row in dict.fromkeys(r["row"] for r in records):
        mine = [r for r in records if r["row"] == row]
        cells = []
        for kind in ("hard", "soft"):
            values = [
                100 * x["accuracy"] for r in mine for x in r["results"] if x["labels"] == kind
            ]
            cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "–")
            runs = sum(any(x["labels"] == kind for x in r["results"]) for r in mine)
            if 0 < runs < len(mine):
                cells[-1] += f" ({runs} × {len(values) // runs})"
        hard = sum(x["labels"] == "hard" for x in mine[0]["results"])
        cpu = np.mean([r["cost"].get("cpu_seconds", 0) for r in mine])
        lines.append(
            f"| {row} | {cells[0]} | {cells[1]} | {len(mine)} × {hard} |"
            f" {mine[0]['cost']['steps']} | {cpu:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--workdir", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--rows", nargs="*", help="all by default")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--set", nargs="*", default=[], help="a.b=value where a row says nothing")
    parser.add_argument("--tune", action="store_true", help="the settings that were tried")
    parser.add_argument("--table", action="store_true", help="print and run nothing")
    args = parser.parse_args()
    rows = list(_rows(args))
    path = recording.FOLDER / f"fashion_mnist_{'tuning_' if args.tune else ''}ipc{args.ipc}.json"
    for seed in [] if args.table else args.seeds:
        for row in args.rows or rows:
            record = _run(row, seed, args)
            recording.put(path, record, ("row", "condense_seed"))
    order = {row: i for i, row in enumerate(rows)}
    print(table(sorted(recording.read(path), key=lambda r: (order[r["row"]], r["condense_seed"]))))


if __name__ == "__main__":
    main()
