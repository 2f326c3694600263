"""Students of two calls at equal CPU seconds: which should one use?

    python benchmarks/two_calls.py grid25 ring8 soft4 --tune --workdir=runs/two_calls
    python benchmarks/two_calls.py grid25 ring8 soft4 --workdir=runs/two_calls
    python benchmarks/two_calls.py fashion_mnist --teachers 4000 8000 16000    # its length
    python benchmarks/two_calls.py fashion_mnist --tune
    python benchmarks/two_calls.py fashion_mnist
    python benchmarks/two_calls.py fashion_mnist --parts 0.25 0.5 2 --seeds 0    # the curves
    python benchmarks/two_calls.py fashion_mnist --table         # from the records
    python benchmarks/two_calls.py fashion_mnist --picture       # from the workdir

All students of a data set follow one teacher. An arm has one stage or several, each of which begins
where the one before ended, and they share its seconds; steps follow from the seconds that a step
takes in two short runs before, and the record has the seconds that it took. Arms that begin alike
share those stages. A rate is chosen for each arm from the same ones by the same search (the middle
three, then outwards while the outermost is the best), with seed 100, which no run of the table has:
of points by the sliced Wasserstein distance to the data, of images by the Fréchet distance to 250
training images of each class that are held out of everything, the teacher's training included, at a
part of the seconds. Records go to `benchmarks/records/two_calls_NAME.json` run by run, and the same
command goes on.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import recording
from PIL import Image

import jaxdistill
from jaxdistill import errors, settings
from jaxdistill.eval import results
from jaxdistill.io import pictures

_IMAGES_FOLDER = Path(__file__).parent.parent / "docs" / "images"
_GAN = {"adversarial": 1.0, "match": 0.0, "augment": 0.0, "match_norms": False}
# What an arm goes through: a method, its settings, and its share of the seconds.
_ARMS = {
    "linear": [("linear", {}, 1)],
    "arcflow": [("arcflow", {}, 1)],
    "gaussian": [("gaussian", {}, 1)],
    "progressive": [("progressive", {}, 1)],
    "consistency": [("pcm", {"whole": True}, 1)],
    "pcm": [("pcm", {}, 1)],
    "pcm, adversarial": [("pcm", {"adversarial": 0.1}, 1)],
    "meanflow": [("meanflow", {}, 1)],
    "ucgm": [("ucgm", {}, 1)],
    "dmd2": [("dmd2", {}, 1)],
    "pcm, dmd2": [("pcm", {}, 1 / 3), ("dmd2", {}, 2 / 3)],
    "pcm, dmd2, gan": [
        ("pcm", {}, 1 / 3),
        ("dmd2", {}, 1 / 3),
        ("dmd2", {"adversarial": 0.1}, 1 / 3),
    ],
    "pcm, gan": [("pcm", {}, 1 / 3), ("dmd2", _GAN, 2 / 3)],
}


class Kind(NamedTuple):
    """How data of a kind are measured.

    Attributes:
        budget: CPU seconds of an arm.
        tuned_at: Part of them in which rates are compared.
        rates: The learning rates.
        batch_size: Examples of an update of the student.
        chunk: Steps in a program.
        probes: Steps of the two runs that a step is timed by.
        chosen_by: The measure that rates are chosen by, the less the better.
        columns: What the table shows.
        overrides: Of every run.
        tuning: Of those whose rates are compared.
        seeds: Of the table.
    """

    budget: float
    tuned_at: float
    rates: tuple[float, ...]
    batch_size: int
    chunk: int
    probes: tuple[int, int]
    chosen_by: str
    columns: tuple[str, ...]
    overrides: dict[str, str]
    tuning: dict[str, str]
    seeds: tuple[int, ...]


_POINTS = Kind(
    45,
    1.0,
    (0.0001, 0.0003, 0.001, 0.003),
    256,
    50,
    (50, 1050),
    "sliced W2 to data",
    ("sliced W2 to data", "modes", "mass off", "outside", "endpoint RMSE"),
    {},
    {},
    (0, 1, 2),
)
_HELD_OUT = {"data.holdout_per_class": "250"}
_FASHION = Kind(
    300,
    0.25,
    (0.0003, 0.001, 0.003, 0.01, 0.03),
    32,
    5,
    (5, 25),
    "FD to data",
    (
        "calls",
        "FD to data",
        "FD to teacher",
        "FD to data, by turns",
        "FD to teacher, by turns",
        "KID to data",
        "precision",
        "recall",
        "class accuracy",
        "least class accuracy",
        "diversity",
        "copies",
        "endpoint RMSE",
        "CPU s",
        "wall s",
        "wall s over two calls'",
    ),
    {
        "evals.samples.examples": "5000",
        "evals.samples.paired": "500",
        "evals.samples.reference_steps": "16",
    },
    _HELD_OUT | {"evals.samples.examples": "2500", "evals.samples.paired": "250"},
    (0, 1),
)
_KINDS = {"grid25": _POINTS, "ring8": _POINTS, "soft4": _POINTS, "fashion_mnist": _FASHION}
_TUNING_SEED = 100
_SAMPLERS = ("euler:2", "euler:8", "euler:50", "midpoint:16", "ucgm_s:8")  # guidance doubles
_KEYS = ("arm", "seed", "rate", "part")


def _path(name: str, what: str = "") -> Path:
    return recording.FOLDER / f"two_calls_{name}{what}.json"


# ---------------------------------------------------------------------------- the teacher


def _length(name: str) -> int | None:
    """The best of the lengths that were compared; None where none was, or none can be chosen."""
    tried = recording.read(_path(name, "_teachers"))
    return min(tried, key=lambda r: r["row"]["FD to data"])["steps"] if tried else None


def _teacher(name: str, args: argparse.Namespace) -> Path:
    """The folder of the teacher."""
    steps = _length(name)
    return args.workdir / f"teacher-{name}{f'-{steps}' if steps else ''}"


def _compare_teachers(name: str, args: argparse.Namespace) -> None:
    """Trains teachers of several lengths and measures each by one sampler on held-out images."""
    path = _path(name, "_teachers")
    for steps in args.teachers:
        if steps in [r["steps"] for r in recording.read(path)]:
            continue
        workdir = args.workdir / f"teacher-{name}-{steps}"
        overrides = {"teacher.steps": str(steps), "method.steps": "10"}
        overrides |= _FASHION.overrides | _FASHION.tuning
        overrides |= {"evals.samples.teacher_rows": "('midpoint:16',)"}
        overrides |= {"evals.samples.judge_dir": str(args.workdir / "judge-held")}
        config = jaxdistill.load_config(f"flow:dataset={name},method=linear,baselines=", overrides)
        rows = recording.samples(jaxdistill.train(config, workdir))
        card = json.loads((workdir / "teacher" / "teacher.json").read_text())
        row = next(r for r in rows if r["row"].startswith("teacher"))
        del row["wall s"]  # lengths differ in what they make, not in how long that takes
        # Of a training that was interrupted the card has the seconds of its last start alone.
        seconds = None if card["cost"]["resumed"] else card["cost"]["cpu_seconds"]
        made = {"cpu_seconds": seconds, "sha256": card["sha256"]}
        recording.put(path, {"steps": steps, "row": row, **made}, ("steps",))
    lines = [["steps", "CPU s", "FD to held-out images", "precision", "recall", "class accuracy"]]
    for record in recording.read(path):
        numbers = ("FD to data", "precision", "recall", "class accuracy")
        cells = [f"{record['row'][n]:.3g}" for n in numbers]
        seconds = "–" if record["cpu_seconds"] is None else f"{record['cpu_seconds']:.0f}"
        lines.append([str(record["steps"]), seconds, *cells])
    print(f"\n{results.markdown(lines)}")


def _measure_teacher(name: str, args: argparse.Namespace) -> None:
    """Trains the teacher if it must, and measures its samplers beside a student of ten steps."""
    kind, folder = _KINDS[name], _teacher(name, args)
    overrides = {"method.steps": "10", "run.chunk": "10"} | kind.overrides
    if (folder / "teacher").is_dir() and kind is _FASHION:
        overrides |= {"teacher.dir": str(folder / "teacher")}
        overrides |= {"evals.samples.teacher_rows": repr(_SAMPLERS)}
        overrides |= {"evals.samples.judge_dir": str(args.workdir / f"judge-{name}")}
        folder = args.workdir / f"rows-{name}"
    spec = f"flow:dataset={name},method=linear,baselines="
    rows = recording.samples(jaxdistill.train(jaxdistill.load_config(spec, overrides), folder))
    student = next(row for row in rows if row["row"].startswith("linear"))
    for row in rows:
        if row is not student:
            if "wall s" in row:  # in one run, with equal batches
                row["wall s over two calls'"] = row["wall s"] / student["wall s"]
            record = {"arm": row["row"], "seed": 0, "rate": 0.0, "part": 1.0, "row": row}
            recording.put(_path(name), record | {"cpu_seconds": None}, _KEYS)


# ---------------------------------------------------------------------------- the students


def _config(name: str, method: str, own: dict, seed: int, args: argparse.Namespace) -> Any:
    """The config of one stage."""
    kind = _KINDS[name]
    overrides = {f"method.{key}": str(value) for key, value in own.items()}
    overrides |= {"teacher.dir": str(_teacher(name, args) / "teacher")}
    overrides |= {"evals.samples.teacher_rows": "()", "run.chunk": str(kind.chunk)}
    overrides |= kind.overrides | (kind.tuning if args.tune else {})
    if kind is _FASHION:
        judge = "judge-held" if args.tune else f"judge-{name}"
        overrides |= {"evals.samples.judge_dir": str(args.workdir / judge)}
    spec = f"flow:dataset={name},method={method},baselines=,seed={seed}"
    return jaxdistill.load_config(spec, overrides).unlock()


def _card(workdir: Path) -> dict:
    """What a student says of itself."""
    return json.loads((workdir / "artifacts" / "student.json").read_text())


def _seconds(name: str, method: str, own: dict, args: argparse.Namespace) -> float:
    """CPU seconds of a step, by two runs that are compiled already; kept in the workdir."""
    kind, key = _KINDS[name], recording.slug(name, method, *own)

    def measure():
        spent = []
        # The first two compile, for a schedule has the number of steps in it.
        for i, steps in enumerate(2 * kind.probes):
            probe = own | {"steps": steps, "batch_size": kind.batch_size}
            config = _config(name, method, probe, 0, args)
            config.evals = {}
            workdir = args.workdir / f"seconds-{key}-{i}"
            jaxdistill.train(config, workdir)
            spent.append(_card(workdir)["cost"]["cpu_seconds"])
        return max((spent[3] - spent[2]) / (kind.probes[1] - kind.probes[0]), 1e-4)

    return recording.kept(args.workdir / "seconds.json", key, measure)


def _stages(
    name: str, arm: str, rate: float, seed: int, part: float, args: argparse.Namespace
) -> list[tuple[Path, Any]]:
    """Workdir and config of each stage of an arm."""
    kind, found, start = _KINDS[name], [], None
    for i, (method, own, share) in enumerate(_ARMS[arm]):
        seconds = kind.budget * part * share
        steps = max(round(seconds / _seconds(name, method, own, args)), kind.chunk)
        # Stages that begin alike are one run, whatever arm asks for it.
        line = [_ARMS[arm][: i + 1], kind.budget * part, rate, seed, args.tune]
        own = own | {"learning_rate": rate, "steps": steps, "batch_size": kind.batch_size}
        if method == "dmd2":
            own["critic_learning_rate"] = rate
            if start is not None:
                own["start"] = str(start)
        start = args.workdir / f"{recording.slug(name, method)}-{settings.digest(line)}"
        found.append((start, _config(name, method, own, seed, args)))
    return found


def _run(
    name: str, arm: str, rate: float, seed: int, part: float, args: argparse.Namespace
) -> dict:
    """All stages of an arm; the record of the last."""
    stages = _stages(name, arm, rate, seed, part, args)
    for workdir, config in stages[:-1]:
        config.evals = {}
        jaxdistill.train(config, workdir)
    workdir, config = stages[-1]
    rows = recording.samples(jaxdistill.train(config, workdir))
    cards = [_card(folder) for folder, _ in stages]
    resolved = json.loads((workdir / "config.json").read_text())
    for group, setting in (("teacher", "dir"), ("method", "start")):  # places on this machine
        resolved[group].pop(setting, None)
    resolved["evals"]["samples"].pop("judge_dir", None)
    return {
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "part": part,
        "row": next(r for r in rows if r["row"].startswith(config.method.name)),
        "cpu_seconds": sum(card["cost"]["cpu_seconds"] for card in cards),
        "steps": [card["cost"]["steps"] for card in cards],
        "trained_parameters": cards[-1]["cost"]["trained_parameters"],
        "teacher_sha256": cards[-1]["provenance"]["teacher_sha256"],
        "config": resolved,
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def _tried(name: str, arm: str) -> dict[float, float]:
    """What the rates are chosen by, for each that was tried; infinite where it diverged."""
    kind, records = _KINDS[name], recording.read(_path(name, "_tuning"))
    return {r["rate"]: r["row"].get(kind.chosen_by, np.inf) for r in records if r["arm"] == arm}


def _rate(name: str, arm: str) -> float:
    """The best of the rates that were tried; the middle one where none was."""
    rates, tried = _KINDS[name].rates, _tried(name, arm)
    return min(tried, key=tried.get) if tried else rates[len(rates) // 2]


def _untried(name: str, arm: str) -> list[float]:
    """The rates to try next: the three in the middle, then the neighbours of the best."""
    rates, tried = _KINDS[name].rates, _tried(name, arm)
    around = {len(rates) // 2, rates.index(_rate(name, arm))}
    wanted = sorted({i + step for i in around for step in (-1, 0, 1)})
    return [rates[i] for i in wanted if 0 <= i < len(rates) and rates[i] not in tried]


def _tune(name: str, arm: str, args: argparse.Namespace) -> None:
    """Runs an arm at rate after rate, until the best lies between two that were tried."""
    kind, path = _KINDS[name], _path(name, "_tuning")
    while rates := _untried(name, arm):
        for rate in rates:
            try:
                record = _run(name, arm, rate, _TUNING_SEED, kind.tuned_at, args)
            except errors.Diverged as error:
                record = {"arm": arm, "seed": _TUNING_SEED, "rate": rate, "part": kind.tuned_at}
                record |= {"row": {}, "diverged": str(error)}
            recording.put(path, record, _KEYS)


# ---------------------------------------------------------------------------- what is shown


def table(name: str, records: list[dict]) -> str:
    """Markdown: mean ± std over seeds, at the whole budget."""
    whole = [r for r in records if r.get("part", 1.0) == 1.0]
    arms = dict.fromkeys([*(r["arm"] for r in whole if r["arm"] not in _ARMS), *_ARMS])
    columns = _KINDS[name].columns
    lines = [["row", "seeds", "rate", *columns, "train CPU s"]]
    for arm in arms:
        own = [r for r in whole if r["arm"] == arm]
        if own:
            cells = [_spread([r["row"][c] for r in own if c in r["row"]]) for c in columns]
            seconds = [r["cpu_seconds"] for r in own if r["cpu_seconds"] is not None]
            rate = f"{own[0]['rate']:g}" if own[0]["rate"] else "–"
            lines.append([arm, str(len(own)), rate, *cells, _spread(seconds)])
    return results.markdown(lines)


def tuning_table(name: str, records: list[dict]) -> str:
    """Markdown: the measure that rates are chosen by."""
    kind = _KINDS[name]
    lines = [["row", *(f"rate {rate:g}" for rate in kind.rates)]]
    for arm in _ARMS:
        own = {r["rate"]: r["row"].get(kind.chosen_by) for r in records if r["arm"] == arm}
        if own:
            said = {rate: "diverged" if x is None else f"{x:.3g}" for rate, x in own.items()}
            lines.append([arm, *(said.get(rate, "–") for rate in kind.rates)])
    return results.markdown(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    more = f" ± {np.std(values):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{more}"


def curves(name: str, records: Sequence[dict], path: Path) -> None:
    """The measure that rates are chosen by against CPU seconds, a line for each arm."""
    kind = _KINDS[name]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, arm in enumerate(_ARMS):
        parts = sorted({r["part"] for r in records if r["arm"] == arm})
        own = [[r for r in records if (r["arm"], r["part"]) == (arm, part)] for part in parts]
        if len(parts) > 1:
            seconds = [np.mean([r["cpu_seconds"] for r in few]) for few in own]
            values = [np.mean([r["row"][kind.chosen_by] for r in few]) for few in own]
            axes.plot(seconds, values, marker="osD^vP*Xd<>hp"[i], label=arm)
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds of training", ylabel=kind.chosen_by)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def picture(name: str, args: argparse.Namespace, path: Path) -> None:
    """The same noise through the first run of each arm."""
    shown = {}
    for arm in args.arms:
        workdir = _stages(name, arm, _rate(name, arm), args.seeds[0], 1.0, args)[-1][0]
        if not (workdir / "artifacts" / "student.json").is_file():
            continue
        student = jaxdistill.load_student(workdir, _teacher(name, args) / "teacher")
        number = 20 if student.num_classes else 4000
        label = np.arange(number) % max(student.num_classes, 1)
        made = np.asarray(student.sample(jax.random.key(0), label))
        shown[arm] = np.clip((made + 1) / 2, 0, 1) if student.num_classes else made.reshape(-1, 2)
    if name == "fashion_mnist":
        labels = np.repeat(np.arange(len(shown), dtype=np.int32), 20)
        drawn = pictures.grid(np.concatenate(list(shown.values())), labels, list(shown))
    else:
        drawn = pictures.scatter(shown)
    Image.fromarray(drawn).save(path)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", choices=tuple(_KINDS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/two_calls"))
    parser.add_argument("--arms", nargs="*", choices=tuple(_ARMS), default=tuple(_ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", help="by default those of the table")
    parser.add_argument(
        "--parts", type=float, nargs="*", default=[1.0], help="of the CPU seconds of an arm"
    )
    parser.add_argument(
        "--teachers", type=int, nargs="+", metavar="STEPS", help="compare lengths of its training"
    )
    parser.add_argument("--tune", action="store_true", help="compare rates")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--picture", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    for name in args.datasets:
        kind = _KINDS[name]
        seeds = args.seeds or [*kind.seeds]
        path = _path(name, "_tuning" if args.tune else "")
        if args.teachers:
            if kind is not _FASHION:
                parser.error(f"the teacher of {name} is exact; leave --teachers out")
            _compare_teachers(name, args)
            continue
        if args.picture:
            args.seeds = seeds
            picture(name, args, _IMAGES_FOLDER / f"two_calls_{name}.png")
            records = recording.read(path)
            if any(r["part"] != 1.0 for r in records):
                curves(name, records, _IMAGES_FOLDER / f"two_calls_{name}_curves.png")
            continue
        if not args.table:
            if kind is _FASHION and _length(name) is None:
                parser.error("run --teachers 4000 8000 first: it makes the teacher")
            if kind is not _FASHION or not args.tune:  # no measure of it chooses a rate
                _measure_teacher(name, args)
            if args.tune:
                for arm in args.arms:
                    _tune(name, arm, args)
            else:
                for seed, part, arm in itertools.product(seeds, args.parts, args.arms):
                    rate = _rate(name, arm)
                    if not recording.has(path, (arm, seed, rate, part), _KEYS):
                        record = _run(name, arm, rate, seed, part, args)
                        recording.put(path, record, _KEYS)
        said = tuning_table if args.tune else table
        print(f"\n{name}\n\n{said(name, recording.read(path))}")


if __name__ == "__main__":
    main()
