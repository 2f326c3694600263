"""Makes the Fashion-MNIST table: every row through the command line's own `train`.

    python benchmarks/fashion_mnist.py --ipc=1 --workdir=runs/fashion1
    python benchmarks/fashion_mnist.py --ipc=10 --workdir=runs/fashion10

Interrupted, the same command goes on. Needs Fashion-MNIST (Debian: dataset-fashion-mnist). Writes
one record per row and condensation seed to `benchmarks/records/fashion_mnist_ipc<N>.json`.
`--table` only prints the table of the records that are there.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from jaxdistill import config as configs
from jaxdistill import train
from jaxdistill.io.files import write_files

_RECORDS = Path(__file__).parent / "records"
# Row -> overrides of the shipped config. Each was chosen on images held out of the training set
# (`data.holdout_per_class`), see docs/results.md.
_ROWS = {
    "random": {"method.name": "random"},
    "herding": {"method.name": "herding"},
    "k-center": {"method.name": "k_center"},
    "tiled real images (start)": {"method.name": "start"},
    "DM": {"method.name": "dm", "method.rate": "0.1"},
    "NCFM, Gaussian frequencies": {"method.calibration": "0.0"},
    "NCFM, learned frequencies": {"method.calibration": "0.0", "method.sampler": "learned"},
    "NCFM, Gaussian, calibration": {"eval.soft_labels": "true"},
    "NCFM, Gaussian, calibration, fine-tuning": {"method.finetune_rate": "0.001"},
    # Five times the budget of the rows above.
    "NCFM, Gaussian, calibration, long": {"run.steps": "2000"},
}


def _slug(row: str, seed: int) -> str:
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in row.lower())
    return f"{kept.strip('-')}-{seed}"


def _run(ipc: int, row: str, seed: int, args: argparse.Namespace) -> dict:
    workdir = args.workdir / _slug(row, seed)
    config = configs.load(f"ncfm:dataset=fashion_mnist,ipc={ipc},seed={seed}")
    overrides = _ROWS[row] | {"eval.baselines": "()", "pool.dir": str(args.workdir / "pool")}
    overrides |= dict(o.split("=", 1) for o in args.set)
    for path, value in overrides.items():
        configs.override(config, path, value)
    results = train.train(config, workdir)
    resolved = json.loads((workdir / "config.json").read_text())
    del resolved["pool"]["dir"]  # a place on this machine
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    return {
        "row": row,
        "ipc": ipc,
        "condense_seed": seed,
        "cost": card["cost"],
        "results": results,
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
        hard = sum(x["labels"] == "hard" for x in mine[0]["results"])
        cpu = np.mean([r["cost"]["cpu_seconds"] for r in mine])
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
    parser.add_argument("--rows", nargs="*", default=list(_ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--set", nargs="*", default=[], help="config overrides, a.b=value")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    path = _RECORDS / f"fashion_mnist_ipc{args.ipc}.json"
    records = json.loads(path.read_text()) if path.is_file() else []
    for seed in [] if args.table else args.seeds:
        for row in args.rows:
            record = _run(args.ipc, row, seed, args)
            same = (row, seed)
            records = [r for r in records if (r["row"], r["condense_seed"]) != same] + [record]
            text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
            path.parent.mkdir(exist_ok=True)
            write_files({path: lambda file, text=text: file.write(text.encode())})
    order = {row: i for i, row in enumerate(_ROWS)}
    print(table(sorted(records, key=lambda r: (order[r["row"]], r["condense_seed"]))))


if __name__ == "__main__":
    main()
