"""Students of two calls at equal CPU seconds: which should one use?

    python benchmarks/two_calls.py grid25 ring8 soft4 --tune --workdir=runs/two_calls
    python benchmarks/two_calls.py grid25 ring8 soft4 --workdir=runs/two_calls
    python benchmarks/two_calls.py grid25 --arms dmd2 "pcm, dmd2" --seeds 0 1

All students of a data set follow one teacher, that of the folder `teacher-NAME`. An arm has one
stage or several, each of which begins where the one before ended, and they share its seconds; steps
follow from the seconds that a step takes in two short runs before, and the record has those that it
took. A rate is chosen for each arm from the same three, with seed 100, which no run of the
table has, by the sliced Wasserstein distance to the data. Records go to
`benchmarks/records/two_calls_NAME.json` run by run, and the same command goes on.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import recording

import jaxdistill
from jaxdistill.eval import results

_POINTS = ("grid25", "ring8", "soft4")
_BUDGET = 45  # seconds of an arm
_RATES = (0.0003, 0.001, 0.003)
_TUNING_SEED = 100
_PROBES = (100, 500)  # steps of the runs that a step is timed by
_CHOSEN_BY = "sliced W2 to data"
_GAN = {"adversarial": 1.0, "match": 0.0, "augment": 0.0, "match_norms": False}
# What an arm goes through: a method, its settings, and its share of the seconds.
_ARMS = {
    "linear": [("linear", {}, 1)],
    "arcflow": [("arcflow", {"modes": 16}, 1)],
    "progressive": [("progressive", {}, 1)],
    "consistency": [("pcm", {"whole": True}, 1)],
    "pcm": [("pcm", {}, 1)],
    "meanflow": [("meanflow", {}, 1)],
    "dmd2": [("dmd2", {}, 1)],
    "pcm, dmd2": [("pcm", {}, 1 / 3), ("dmd2", {}, 2 / 3)],
    "pcm, dmd2, gan": [
        ("pcm", {}, 1 / 3),
        ("dmd2", {}, 1 / 3),
        ("dmd2", {"adversarial": 0.1}, 1 / 3),
    ],
    "pcm, gan": [("pcm", {}, 1 / 3), ("dmd2", _GAN, 2 / 3)],
}
_COLUMNS = ("sliced W2 to data", "modes", "mass off", "outside", "endpoint RMSE")


def _slug(*parts: object) -> str:
    return re.sub("[^a-z0-9]+", "-", " ".join(map(str, parts)))


def _config(name: str, method: str, own: dict, seed: int, args: argparse.Namespace):
    """The config of one stage."""
    overrides = {"teacher.dir": str(args.workdir / f"teacher-{name}" / "teacher")}
    overrides |= {f"method.{key}": str(value) for key, value in own.items()}
    overrides |= {"evals.samples.teacher_rows": "()", "run.chunk": "50"}
    spec = f"flow:dataset={name},method={method},baselines=,seed={seed}"
    return jaxdistill.load_config(spec, overrides).unlock()


def _spent(workdir: Path) -> float:
    """CPU seconds of the student of a folder."""
    card = json.loads((workdir / "artifacts" / "student.json").read_text())
    return card["cost"]["cpu_seconds"]


def _seconds(name: str, method: str, own: dict, args: argparse.Namespace) -> float:
    """CPU seconds of a step, by two runs whose compilation is alike; kept in the workdir."""
    path = args.workdir / "seconds.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    key = _slug(name, method, *own)
    if key not in known:
        spent = []
        # The first compiles for both.
        for i, steps in enumerate((_PROBES[0], *_PROBES)):
            config = _config(name, method, own | {"steps": steps, "batch_size": 256}, 0, args)
            config.evals = {}
            workdir = args.workdir / f"seconds-{key}-{i}"
            jaxdistill.train(config, workdir)
            spent.append(_spent(workdir))
        known[key] = max((spent[2] - spent[1]) / (_PROBES[1] - _PROBES[0]), 1e-4)
        recording.write(path, known)
    return known[key]


def _teacher(name: str, args: argparse.Namespace) -> None:
    """Trains the teacher once, beside a student of ten steps, and measures its own samplers."""
    spec = f"flow:dataset={name},method=linear,baselines="
    config = jaxdistill.load_config(spec, {"method.steps": "10", "run.chunk": "10"})
    rows = recording.samples(jaxdistill.train(config, args.workdir / f"teacher-{name}"))
    for row in rows:
        if row["row"].startswith("teacher"):
            record = {"arm": row["row"], "seed": 0, "rate": 0.0, "row": row, "cpu_seconds": None}
            recording.put(_path(name, False), record, ("arm", "seed", "rate"))


def _run(name: str, arm: str, rate: float, seed: int, args: argparse.Namespace) -> dict:
    """All stages of an arm; the record of the last."""
    start, spent = None, []
    for i, (method, own, share) in enumerate(_ARMS[arm]):
        steps = max(round(args.budget * share / _seconds(name, method, own, args)), 10)
        settings = own | {"learning_rate": rate, "steps": steps, "batch_size": 256}
        if method == "dmd2":
            settings["critic_learning_rate"] = rate
            if start is not None:
                settings["start"] = str(start)
        workdir = args.workdir / _slug(name, arm, i, rate, seed)
        config = _config(name, method, settings, seed, args)
        rows = recording.samples(jaxdistill.train(config, workdir))
        spent.append(_spent(workdir))
        start = workdir
    row = next(r for r in rows if not r["row"].startswith("teacher"))
    seconds = float(sum(spent))
    return {"arm": arm, "seed": seed, "rate": rate, "row": row, "cpu_seconds": seconds}


def _path(name: str, tuning: bool) -> Path:
    return recording.FOLDER / f"two_calls_{name}{'_tuning' * tuning}.json"


def _rate(name: str, arm: str) -> float:
    """The best of the rates that were tried; the middle one where none was."""
    tried = [r for r in recording.read(_path(name, True)) if r["arm"] == arm]
    return min(tried, key=lambda r: r["row"][_CHOSEN_BY])["rate"] if tried else _RATES[1]


def table(records: list[dict]) -> str:
    """Markdown: mean ± std over seeds."""
    arms = dict.fromkeys([*(r["arm"] for r in records if r["arm"] not in _ARMS), *_ARMS])
    lines = [["row", "seeds", "rate", *_COLUMNS, "train CPU s"]]
    for arm in arms:
        own = [r for r in records if r["arm"] == arm]
        if own:
            cells = [_spread([r["row"][c] for r in own if c in r["row"]]) for c in _COLUMNS]
            seconds = [r["cpu_seconds"] for r in own if r["cpu_seconds"] is not None]
            rate = f"{own[0]['rate']:g}" if own[0]["rate"] else "–"
            lines.append([arm, str(len(own)), rate, *cells, _spread(seconds)])
    return results.markdown(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    more = f" ± {np.std(values):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{more}"


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", choices=_POINTS)
    parser.add_argument("--workdir", type=Path, default=Path("runs/two_calls"))
    parser.add_argument("--arms", nargs="*", choices=tuple(_ARMS), default=tuple(_ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=_BUDGET, help="CPU seconds of an arm")
    parser.add_argument("--tune", action="store_true", help="compare rates")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    args = parser.parse_args()
    names = ("arm", "seed", "rate")
    for name in args.datasets:
        path = _path(name, args.tune)
        if not args.table:
            _teacher(name, args)
            for seed in [_TUNING_SEED] if args.tune else args.seeds:
                for arm in args.arms:
                    for rate in _RATES if args.tune else [_rate(name, arm)]:
                        known = {tuple(r[n] for n in names) for r in recording.read(path)}
                        if (arm, seed, rate) not in known:
                            recording.put(path, _run(name, arm, rate, seed, args), names)
        print(f"\n{name}\n\n{table(recording.read(path))}")


if __name__ == "__main__":
    main()
