"""All methods that make a small data set, at equal CPU seconds and under one protocol.

    python benchmarks/leaderboard.py digits --ipc 1 10 --tune      # a rate for each method
    python benchmarks/leaderboard.py digits --ipc 1 10
    python benchmarks/leaderboard.py fashion_mnist --ipc 1 10 50
    python benchmarks/leaderboard.py cifar10 --folder=FOLDER --ipc 1 10
    python benchmarks/leaderboard.py digits --table                # from the records
    python benchmarks/leaderboard.py digits --parts 0.25 0.5 2 --seeds 0    # the curves
    python benchmarks/leaderboard.py digits --picture              # from records and workdir

An arm's seconds hold all that it needs: extractors, experts or the observer, compilation, and the
steps, whose number follows from what a step takes in two short runs before. Arms share what is
prepared, and each is charged for it. A rate is chosen for each arm from the same three factors of
its recipe's, with seed 100, which no run of the table has, on training images that are held out of
everything. Every arm is judged by the same networks; random and herded images stand beside them
under the same labels and augmentation. Records go to `benchmarks/records/leaderboard_NAME.json` run
by run, and the same command goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import recording
from PIL import Image

import jaxdistill
from jaxdistill.eval import ranking, results
from jaxdistill.io import pictures

_IMAGES_FOLDER = Path(__file__).parent.parent / "docs" / "images"
# Rows of the configs `ncfm` and `leaderboard`, with what an arm sets of its own.
_ARMS: dict[str, tuple[str, dict[str, str]]] = {
    "random": ("random", {}),
    "herding": ("herding", {}),
    "tiled real images": ("start", {}),
    "RDED": ("rded", {}),
    "DC": ("dc", {}),
    "DSA": ("gradient", {}),
    "DM": ("dm", {}),
    "NCFM, no calibration": ("ncfm", {"method.calibration": "0.0"}),
    "NCFM": ("ncfm", {}),
    "MTT": ("trajectory", {}),
    "DATM": ("datm", {}),
    "KIP": ("kip", {}),
    "FRePo": ("kernel", {}),
    "all images": ("random", {}),
}
_WHOLE = "all images"
# What an arm is chosen and ranked by, where it is not hard labels.
_LABELS = {"DATM": "soft", "KIP": "learned", "FRePo": "learned"}
_FACTORS = (0.3, 1.0, 3.0)  # of the recipe's rate
_TUNING_SEED = 100
_KEYS = ("arm", "ipc", "seed", "factor", "part")


class Kind(NamedTuple):
    """How a data set is measured.

    Attributes:
        budget: CPU seconds of an arm, by images per class.
        probes: Steps of the short runs.
        holdout: Images of each class that rates are chosen on.
        whole: Images of a class, and epochs, of the networks trained on as good as all of them.
        overrides: Of every run.
        tuning: Of those whose rates are compared.
    """

    budget: dict[int, float]
    probes: tuple[int, int]
    holdout: int
    whole: tuple[int, int]
    overrides: dict[str, str]
    tuning: dict[str, str]


_NETWORKS = {"evals.accuracy.networks": "('convnet', 'mlp')"}
_LARGE = Kind(
    {1: 200.0, 10: 400.0, 50: 800.0},
    (5, 25),
    500,
    (5000, 10),
    {"evals.accuracy.networks": "('convnet', 'resnet18', 'vgg11', 'mlp')"},
    {"evals.accuracy.width": "64", "evals.accuracy.seeds": "1", "evals.accuracy.epochs": "300"},
)
_KINDS = {
    "digits": Kind(
        {1: 60.0, 10: 60.0},
        (20, 120),
        30,
        (130, 100),
        _NETWORKS | {"evals.accuracy.epochs": "300"},
        {"evals.accuracy.networks": "('convnet',)", "evals.accuracy.seeds": "1"},
    ),
    "fashion_mnist": _LARGE,
    "cifar10": _LARGE,
}


def _path(name: str, what: str = "") -> Path:
    return recording.FOLDER / f"leaderboard_{name}{what}.json"


def _config(arm: str, ipc: int, seed: int, args: argparse.Namespace) -> Any:
    """The recipe of an arm; what is prepared lies where the other arms find it."""
    row, own = _ARMS[arm]
    kind = _KINDS[args.dataset]
    shared = args.workdir / f"{args.dataset}-prepared{'-held' if args.tune else ''}"
    overrides = kind.overrides | own | {"pool.dir": str(shared / "pool")}
    if arm == _WHOLE:
        ipc, epochs = kind.whole
        overrides |= {"evals.accuracy.epochs": str(epochs)}
    else:
        overrides |= {"evals.accuracy.soft_labels": "True", "evals.accuracy.learned_labels": "True"}
    if args.tune:
        overrides |= kind.tuning | {"data.holdout_per_class": str(kind.holdout)}
    if row in ("trajectory", "datm"):
        overrides |= {"method.expert_dir": str(shared / "experts")}
    if args.folder:
        overrides |= {"data.name": str(args.folder)}
    spec = f"ncfm:dataset={args.dataset},ipc={ipc},method={row},baselines=,seed={seed}"
    return jaxdistill.load_config(spec, overrides).unlock()


class Seconds(NamedTuple):
    """What an arm costs, in CPU seconds.

    Attributes:
        before: All before the run: reading the data, and what is prepared.
        start: Of the run, compilation above all.
        step: Of a step.
    """

    before: float
    start: float
    step: float


def _distilled(arm: str, ipc: int, steps: int, own: Path, args: argparse.Namespace) -> list[float]:
    """Runs an arm that prepares all for itself; CPU seconds before the run, and of it."""
    config = _config(arm, ipc, 0, args)
    config.pool.dir, config.evals = str(own / "pool"), {}
    if "expert_dir" in config.method:
        config.method.expert_dir = str(own / "experts")
    if "steps" in config.method:
        config.method.steps = steps
    workdir, began = own / str(len(list(own.glob("*")))), time.process_time()
    jaxdistill.train(config, workdir)
    spent = time.process_time() - began
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    return [spent - card["cost"]["cpu_seconds"], card["cost"]["cpu_seconds"]]


def _seconds(arm: str, ipc: int, args: argparse.Namespace) -> Seconds:
    """What an arm costs, by short runs; kept in the workdir."""
    (few, many), key = _KINDS[args.dataset].probes, recording.slug(args.dataset, ipc, arm)
    own = args.workdir / f"seconds-{key}"

    def measure():
        (before, start), step = _distilled(arm, ipc, few, own, args), 0.0
        if "steps" in _config(arm, ipc, 0, args).method:
            # A schedule has the number of steps in it, so each number is compiled once.
            _, short, long = (_distilled(arm, ipc, n, own, args)[1] for n in (many, few, many))
            step = max((long - short) / (many - few), 1e-4)
            start -= few * step
        return Seconds(before, start, step)._asdict()

    return Seconds(**recording.kept(args.workdir / "seconds.json", key, measure))


def _workdir(
    arm: str, ipc: int, seed: int, factor: float, part: float, args: argparse.Namespace
) -> Path:
    tuned = "-tuning" if args.tune else ""
    return args.workdir / recording.slug(args.dataset + tuned, ipc, arm, seed, factor, part)


def _run(
    arm: str, ipc: int, seed: int, factor: float, part: float, args: argparse.Namespace
) -> dict | None:
    """The record of an arm; None where its seconds do not even last for what goes before."""
    config = _config(arm, ipc, seed, args)
    seconds = Seconds(0.0, 0.0, 0.0) if arm == _WHOLE else _seconds(arm, ipc, args)
    if "steps" in config.method:
        budget = part * _KINDS[args.dataset].budget[ipc]
        steps = int((budget - seconds.before - seconds.start) / seconds.step)
        if steps < config.run.chunk:
            return None
        config.method.steps = steps
        config.method.learning_rate = factor * config.method.learning_rate
        if "warmup" in config.method:
            config.method.warmup = min(config.method.warmup, steps // 4)
    workdir = _workdir(arm, ipc, seed, factor, part, args)
    found = recording.accuracies(jaxdistill.train(config, workdir))
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    resolved = json.loads((workdir / "config.json").read_text())
    resolved["pool"].pop("dir")  # places on this machine
    resolved["method"].pop("expert_dir", None)
    if args.folder:
        resolved["data"].pop("name")
    return {
        "arm": arm,
        "ipc": ipc,
        "seed": seed,
        "factor": factor,
        "part": part,
        "results": found,
        "cost": card["cost"],
        "before": round(seconds.before, 1),
        "config": resolved,
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def _factor(name: str, arm: str, ipc: int) -> float:
    """The best of the factors that were tried; the recipe's rate where none was."""
    tried = recording.read(_path(name, "_tuning"))
    own = [r for r in tried if (r["arm"], r["ipc"]) == (arm, ipc)]
    best = max(own, key=lambda r: (_mean([r], _LABELS.get(arm, "hard")), -r["factor"]), default={})
    return best.get("factor", 1.0)


# ---------------------------------------------------------------------------- what is shown


def _accuracies(records: list[dict], labels: str, network: str = "convnet") -> list[float]:
    measured = [m for r in records for m in r["results"]]
    return [m["accuracy"] for m in measured if (m["labels"], m["network"]) == (labels, network)]


def _mean(records: list[dict], labels: str) -> float:
    return float(np.mean(_accuracies(records, labels)))


def _score(arm: str, arms: dict[str, list[dict]]) -> str:
    """DD-Ranking's, under the arm's own labels, against random images under the same."""
    if not arms.get(_WHOLE) or not arms.get("random") or arm == _WHOLE:
        return "–"
    labels = _LABELS.get(arm, "hard")
    whole, hard = _mean(arms[_WHOLE], "hard"), _mean(arms[arm], "hard")
    own, chance = _mean(arms[arm], labels), _mean(arms["random"], labels)
    return f"{100 * ranking.label_robust_score(whole, hard, own, chance):.1f}"


def table(records: list[dict], ipc: int) -> str:
    """Markdown: accuracy in %, mean ± std over all seeds, at the whole budget."""
    whole = [r for r in records if r["part"] == 1.0 and r["ipc"] in (0, ipc)]
    networks = list(dict.fromkeys(m["network"] for r in whole for m in r["results"]))
    columns = [("convnet", labels) for labels in ("hard", "soft", "learned")]
    columns += [(network, "hard") for network in networks if network != "convnet"]
    names = [f"{network}, {labels}" for network, labels in columns]
    lines = [["method", "seeds", "rate x", *names, "score", "steps", "CPU s"]]
    arms = {arm: [r for r in whole if r["arm"] == arm] for arm in _ARMS}
    for arm, own in arms.items():
        if not own:
            continue
        values = [_accuracies(own, labels, network) for network, labels in columns]
        cells = [results.percent(v) if v else "–" for v in values]
        cost = np.mean([r["before"] + r["cost"]["cpu_seconds"] for r in own])
        learns = "learning_rate" in own[0]["config"]["method"]
        lines.append(
            [
                arm,
                f"{len(own)} x {len(values[0]) // len(own)}",
                f"{own[0]['factor']:g}" if learns else "–",
                *cells,
                _score(arm, arms),
                str(own[0]["cost"]["steps"]),
                f"{cost:.0f}",
            ]
        )
    return results.markdown(lines)


def tuning_table(records: list[dict], ipc: int) -> str:
    """Markdown: held-out accuracy in %, under an arm's own labels."""
    lines = [["method", "labels", *(f"rate x {factor:g}" for factor in _FACTORS)]]
    for arm in _ARMS:
        labels = _LABELS.get(arm, "hard")
        own = [r for r in records if (r["arm"], r["ipc"]) == (arm, ipc)]
        known = {r["factor"]: f"{100 * _mean([r], labels):.1f}" for r in own}
        if known:
            lines.append([arm, labels, *(known.get(factor, "–") for factor in _FACTORS)])
    return results.markdown(lines)


def curves(name: str, records: list[dict], path: Path) -> None:
    """Accuracy under an arm's own labels against CPU seconds, a panel for each number of images."""
    sizes = sorted({r["ipc"] for r in records} - {0})
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(5.5 * len(sizes), 4.5), layout="constrained", squeeze=False
    )
    for ipc, axes in zip(sizes, panels[0], strict=True):
        for i, arm in enumerate(_ARMS):
            own = [r for r in records if (r["arm"], r["ipc"]) == (arm, ipc)]
            points = []
            for part in sorted({r["part"] for r in own}):
                few = [r for r in own if r["part"] == part]
                cost = np.mean([r["before"] + r["cost"]["cpu_seconds"] for r in few])
                points.append((max(cost, 1.0), 100 * _mean(few, _LABELS.get(arm, "hard"))))
            if points:
                axes.plot(*zip(*points, strict=True), marker="osD^vP*Xd<>hp8"[i], label=arm)
        axes.set(xscale="log", xlabel="CPU seconds", title=f"{name}, {ipc} a class")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("accuracy in %, own labels")
    panels[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def picture(ipc: int, args: argparse.Namespace, path: Path) -> None:
    """The images of the first run of each arm, a row for each."""
    shown = {}
    for arm in _ARMS:
        factor = _factor(args.dataset, arm, ipc)
        file = _workdir(arm, ipc, args.seeds[0], factor, 1.0, args) / "artifacts" / "distilled.npz"
        if arm != _WHOLE and file.is_file():
            made = jaxdistill.load(file)
            first = [np.flatnonzero(made.labels == c)[0] for c in range(made.num_classes)]
            shown[arm] = made.images[first]
    if not shown:
        raise SystemExit(f"no run of {ipc} images per class in {args.workdir} to draw")
    labels = np.repeat(np.arange(len(shown), dtype=np.int32), len(next(iter(shown.values()))))
    drawn = pictures.grid(np.concatenate(list(shown.values())), labels, list(shown))
    Image.fromarray(drawn).save(path)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=tuple(_KINDS))
    parser.add_argument("--folder", type=Path, help="where its images lie, if not under its name")
    parser.add_argument("--ipc", type=int, nargs="*", default=[1, 10])
    parser.add_argument("--workdir", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--arms", nargs="*", choices=tuple(_ARMS), default=tuple(_ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument(
        "--parts", type=float, nargs="*", default=[1.0], help="of the CPU seconds of an arm"
    )
    parser.add_argument("--tune", action="store_true", help="compare rates")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--picture", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    name, path = args.dataset, _path(args.dataset, "_tuning" if args.tune else "")
    if args.picture:
        curves(name, recording.read(path), _IMAGES_FOLDER / f"leaderboard_{name}_curves.png")
        for ipc in args.ipc:
            picture(ipc, args, _IMAGES_FOLDER / f"leaderboard_{name}_{ipc}.png")
        return
    seeds = [_TUNING_SEED] if args.tune else args.seeds
    for seed in [] if args.table else seeds:
        for ipc in args.ipc:
            for arm in args.arms:
                learns = "learning_rate" in _config(arm, ipc, seed, args).method
                if args.tune and not learns:
                    continue
                for factor in _FACTORS if args.tune else [_factor(name, arm, ipc)]:
                    for part in args.parts if learns else [1.0]:
                        own = (arm, 0 if arm == _WHOLE else ipc, seed, factor, part)
                        if not recording.has(path, own, _KEYS):
                            record = _run(*own, args)
                            if record is not None:
                                recording.put(path, record, _KEYS)
    for ipc in args.ipc:
        shown = tuning_table if args.tune else table
        print(f"\n{name}, {ipc} a class\n\n{shown(recording.read(path), ipc)}")


if __name__ == "__main__":
    main()
