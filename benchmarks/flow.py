"""Makes the tables of few-step students: every row through the command line's own `train`.

    python benchmarks/flow.py ring8 soft4 checkerboard --workdir=runs/flow
    python benchmarks/flow.py fashion_mnist --seeds 0 1 --workdir=runs/flow

Interrupted, the same command goes on. Writes one record for each data set, variant and seed to
`benchmarks/records/flow_<data set>.json`; `--table` only prints the table of what is there.
All students of a data set follow one teacher, that of its first run. With `--tune` settings of
images are compared on held-out training images instead, into `flow_<data set>_tuning.json`.
"""

import argparse
from pathlib import Path

import numpy as np
import recording

import jaxdistill

_POINTS = ("ring8", "soft4", "checkerboard", "spirals")
_ALL = ("linear", "straight", "endpoint", "endpoint_8x", "progressive", "gaussian")
_SEVERAL = "(1, 2, 4, 8)"
# Kind of data -> variant -> overrides, of which those without a dot hold for every student, and
# `baselines` are the rows beside the method. The first variant holds the method beside all that
# it is compared with; the others are the method alone.
_VARIANTS = {
    "points": {
        "": {"baselines": _ALL},
        "a quarter of the steps": {"steps": "500"},
        "wide gammas": {"method.log_gamma": "(-9.2, 9.2)"},
        "gammas per segment": {"method.unit": "step", "method.log_gamma": "(-4.0, 4.0)"},
        "mode dropout 0.1": {"method.mode_dropout": "0.1"},
        "elastic": {"method.elastic": _SEVERAL, "evals.samples.nfe": _SEVERAL},
    },
    "images": {
        "": {"baselines": _ALL},
        "a quarter of the steps": {"steps": "75"},
        "eight times the steps": {"steps": "2400"},
    },
}
# Settings compared on images that are held out. A run has a student; ten steps make one of no use
# where only the teacher is looked at.
_HELD_OUT = {"data.holdout_per_class": "250", "evals.samples.reference_steps": "8"}
_SHORT = ("linear", "straight", "endpoint", "progressive")
_TUNED = {
    **{
        f"guidance {scale}": {
            "teacher.guidance": scale,
            "evals.samples.teacher_rows": "('midpoint:16',)",
            "steps": "10",
        }
        for scale in ("1.0", "1.5", "2.0")
    },
    **{
        f"rate {rate}": {"learning_rate": rate, "steps": "150", "baselines": _SHORT}
        for rate in ("0.001", "0.003", "0.01")
    },
}
# What the table shows of what the records hold.
_COLUMNS = (
    "calls",
    "FD to data",
    "FD to teacher",
    "KID to data",
    "precision",
    "recall",
    "class accuracy",
    "least class accuracy",
    "diversity",
    "copies",
    "endpoint RMSE",
    "endpoint cosine",
    "p90",
    "sliced W2 to data",
    "CPU s",
    "train CPU s",
    "teacher queries",
)
_BUDGET = {
    "points": {"steps": "2000"},
    "images": {
        "steps": "300",
        "batch_size": "32",
        "evals.samples.examples": "2500",
        "evals.samples.paired": "500",
        "evals.samples.reference_steps": "16",
    },
}


def _kind(name: str) -> str:
    return "points" if name in _POINTS else "images"


def _run(name: str, variant: str, seed: int, own: dict[str, str], args: argparse.Namespace) -> dict:
    """The record of a variant, given what it sets itself."""
    kind = _kind(name)
    slug = "-".join([name, *variant.split(), str(seed)])
    workdir, first = args.workdir / slug, args.workdir / f"{name}-0"
    overrides = dict(_BUDGET[kind])
    if workdir != first:
        overrides |= {
            "teacher.dir": str(first / "teacher"),
            "evals.samples.teacher_rows": "()",  # measured in the first run
        }
        if kind == "images":
            overrides["evals.samples.judge_dir"] = str(first / "judge")
    overrides |= own | dict(o.split("=", 1) for o in args.set)
    baselines = overrides.pop("baselines", ())
    if isinstance(baselines, str):  # of --set
        baselines = tuple(filter(None, baselines.split("+")))
    rows = ("method", *(f"baselines.{name}" for name in baselines))
    shared = {s: overrides.pop(s) for s in list(overrides) if "." not in s}
    # What is said of one student goes before what is said of all.
    overrides = {f"{row}.{s}": text for row in rows for s, text in shared.items()} | overrides
    spec = f"flow:dataset={name},baselines={'+'.join(baselines)},seed={seed}"
    config = jaxdistill.load_config(spec, overrides)
    found = recording.samples(jaxdistill.train(config, workdir))
    return {
        "variant": variant,
        "seed": seed,
        "rows": found,
        **recording.students(workdir, config.method.name, baselines),
    }


def table(records: list[dict], order: list[str]) -> str:
    """Markdown: mean ± population standard deviation over the seeds of training."""
    cells: dict[str, list[dict]] = {}
    for record in sorted(records, key=lambda r: (order.index(r["variant"]), r["seed"])):
        for row in record["rows"]:
            name, *rest = row["row"].split(", ")
            student = name not in ("teacher", "real")
            variant = [] if name == "real" else [record["variant"]] * bool(record["variant"])
            if student:
                cost = record["costs"][name]
                row = row | {
                    "train CPU s": None if cost.get("resumed") else cost["cpu_seconds"],
                    "teacher queries": cost["teacher_queries"],
                }
            cell = cells.setdefault(", ".join([name, *variant, *rest]), [])
            if student or not cell:  # the teacher is one, whatever the seed
                cell.append(row)
    there = {c for rows in cells.values() for row in rows for c in row}
    columns = [c for c in _COLUMNS if c in there]
    lines = [f"| row | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, rows in cells.items():
        shown = []
        for column in columns:
            values = [row[column] for row in rows if row.get(column) is not None]
            spread = f" ± {np.std(values):.2g}" if len(set(values)) > 1 else ""
            shown.append(f"{np.mean(values):.4g}{spread}" if values else "–")
        lines.append(f"| {name} | {len(rows)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--workdir", type=Path, default=Path("runs/flow"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", help="all by default")
    parser.add_argument("--set", nargs="*", default=[], help="config overrides, a.b=value")
    parser.add_argument("--tune", action="store_true", help="compare settings on held-out images")
    parser.add_argument("--table", action="store_true", help="print and run nothing")
    args = parser.parse_args()
    if args.tune and "points" in map(_kind, args.datasets):
        parser.error("points have no images to hold out; leave --tune out")
    for name in args.datasets:
        path = recording.FOLDER / f"flow_{name}{'_tuning' * args.tune}.json"
        variants = _TUNED if args.tune else _VARIANTS[_kind(name)]
        for variant in args.variants or variants:
            own = variants[variant] | (_HELD_OUT if args.tune else {})
            for seed in [] if args.table else args.seeds:
                recording.put(path, _run(name, variant, seed, own, args), ("variant", "seed"))
        if not path.is_file():
            parser.error(f"there is no record of {name} yet; leave --table out")
        print(f"\n{name}\n\n{table(recording.read(path), list(variants))}")


if __name__ == "__main__":
    main()
