"""GenRecal and its rivals on questions about grids of Fashion-MNIST, under one protocol.

    python benchmarks/genrecal.py --teacher   # trains the teacher into benchmarks/gridvqa/
    python benchmarks/genrecal.py --tune      # a rate for each arm, on held-out questions
    python benchmarks/genrecal.py             # the runs that are missing
    python benchmarks/genrecal.py --table
    python benchmarks/genrecal.py --arms sft genrecal --seeds 1 2

The teacher reads byte pairs and patches of 14 pixels, students characters and patches of 28; those
of one tokenizer read both as the teacher does. All students of a seed start from the same weights,
see the same examples in the same order and take equally many steps, but for `sft, longer`, which
takes as much time as GenRecal, and `blind`, which starts from nothing. A rate is chosen for each
arm from the same four, by the questions of the validation split with seed 0, which no run of the
table has; the questions of the test split are asked once for each of those. Records go to
`benchmarks/records/genrecal.json` run by run, and the same command goes on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import recording

import jaxdistill
from jaxdistill.data import sources, vqa
from jaxdistill.eval import answers, results

_RECORD = recording.FOLDER / "genrecal.json"
_TUNING = recording.FOLDER / "genrecal_tuning.json"
_TEACHER = Path(__file__).parent / "gridvqa"
_RATES = (0.00025, 0.0005, 0.001, 0.002)
_USUAL = 0.001  # of what is not tuned
_ALIGN, _DISTIL, _TUNE = 600, 1000, 500
_STEPS = _DISTIL + _TUNE  # of every student
_BATCH = 32  # so that two cores carry it
_LONGER = 2.5  # times as many, which is what GenRecal's cost of time amounts to
_STAGES = {"name": "genrecal", "align": _ALIGN, "distil": _DISTIL, "tune": _TUNE}
_SFT = {"name": "supervised", "steps": _STEPS}


def _across(loss: str, **more) -> dict:
    return {"name": "across", "steps": _STEPS, "loss": loss, **more}


def _logits(divergence: str, **more) -> dict:
    return {"name": "logits", "steps": _STEPS, "divergence": divergence, **more}


# Of two tokenizers: arms (a) to (p) of the plan, the main ones first.
_TWO = {
    "sft": _SFT,
    "genrecal": _STAGES,
    "sequence_kd": _SFT | {"answers": "teacher"},
    "uld": _across("uld", weight=1.5),
    "gold_hybrid": _across("gold_hybrid"),
    "pkl": _across("pkl"),
    "alm": _across("alm"),
    "mined": _across("mined", weight=0.5, sft=0.5, temperature=2.0),
    "dskd": {"name": "dskd", "steps": _STEPS},
    "sft, longer": _SFT | {"steps": round(_STEPS * _LONGER)},
    "genrecal, no regularizer": _STAGES | {"regularizer": "none"},
    "genrecal, KL alone": _STAGES | {"ce": 0.0},
    "genrecal, kept positions": _STAGES | {"positions": "kept"},
    "genrecal, one block": _STAGES | {"depth": 1},
    "genrecal, excluded": _STAGES | {"boundary": "exclude"},
    "genrecal, hidden": _STAGES | {"hide": 0.5},
    "genrecal, first": _STAGES | {"first": 4.0},
    "genrecal, tokens": _STAGES | {"reads": "tokens"},
    "genrecal, contrast": _STAGES | {"contrast": 0.1},
    "control: random teacher": _STAGES | {"name": "genrecal_controls", "control": "random"},
    "control: shuffled": _STAGES | {"name": "genrecal_controls", "control": "shuffled"},
    "blind": _SFT | {"blind": True, "steps": _STEPS + 1000},
}
_ONE = {
    "sft": _SFT,
    "genrecal": _STAGES,
    "forward_kl": _logits("forward_kl"),
    "reverse_kl": _logits("reverse_kl"),
    "jsd": _logits("jsd"),
    "skew_kl": _logits("skew_kl"),
    "skew_reverse_kl": _logits("skew_reverse_kl"),
    "gkd": _logits("jsd", on_policy=0.5),
    "minillm": {"name": "minillm", "steps": _STEPS},
    "distillm": {"name": "distillm", "steps": _STEPS},
    "llava_kd": {"name": "llava_kd", "pretrain": 400, "tune": 550, "distil": 550},
}
_ARMS = {"two": _TWO, "one": _ONE}


def _config(tokenizers: str, seed: int, tuning: bool):
    config = jaxdistill.load_config(
        f"genrecal:dataset=fashion_mnist,method=sft,baselines=,tokenizers={tokenizers},"
        f"patches={tokenizers},seed={seed}",
        {
            "teacher.dir": str(_TEACHER),
            "teacher.cache": "True",
            "data.judge_by_validation": str(tuning),
            "run.chunk": "50",
        },
    ).unlock()
    # Looks at rows of GenRecal alone.
    config.evals.recalibration = {"name": "recalibration"}
    return config


def _row(arm: dict, rate: float) -> dict:
    return arm | {"learning_rate": rate, "batch_size": _BATCH}


def _run(tokenizers: str, arm: str, rate: float, seed: int, args: argparse.Namespace) -> dict:
    config = _config(tokenizers, seed, args.tune)
    # A row of one step that all runs of a workdir have; they share the start of the students.
    config.method = _row(_SFT | {"steps": 1}, _USUAL)
    name = recording.slug(arm, rate)
    config.baselines = {name: _row(_ARMS[tokenizers][arm], rate)}
    workdir = args.workdir / f"{tokenizers}-{seed}{'-tuning' if args.tune else ''}"
    records = jaxdistill.train(config, workdir)
    found = [r for r in records if r["row"] == name]
    known = {r["row"]: r["value"] for r in records if r["metric"] == "exact match"}
    said = json.loads((workdir / "answers" / f"{name}.json").read_text())
    card = json.loads((workdir / "baselines" / name / "artifacts" / "student.json").read_text())
    return {
        "tokenizers": tokenizers,
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "results": [{k: r[k] for k in ("evaluation", "metric", "value")} for r in found],
        "beside": {row: known[row] for row in answers.ROWS},
        "answers": said if not args.tune else None,
        "cost": card["cost"],
        "settings": card["settings"]["method"],
        "provenance": card["provenance"],
    }


def _rates() -> dict[tuple[str, str], float]:
    """The best rate of each arm that is tuned."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for record in recording.read(_TUNING):
        key, value = (record["tokenizers"], record["arm"]), _exact(record)
        best[key] = max(best.get(key, (-1.0, 0.0)), (value, -record["rate"]))
    return {key: -rate for key, (_, rate) in best.items()}


def _tuned_as(arm: str) -> str:
    """The arm whose rate an arm has: variants have that of what they vary."""
    return "genrecal" if arm.startswith("control") else arm.partition(",")[0]


def _exact(record: dict, metric: str = "exact match") -> float:
    return next(r["value"] for r in record["results"] if r["metric"] == metric)


# ---------------------------------------------------------------------------- the table


def _questions() -> vqa.Questions:
    settings = _config("two", 0, False).data
    data = vqa.grid(
        sources.load("fashion_mnist"),
        train=settings.teacher_train,
        validation=settings.validation,
        test=settings.test,
        seed=settings.seed,
        kinds=tuple(settings.kinds),
    )
    return data.test


def bootstrap(right: np.ndarray, other: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % of the differences of means over questions, drawn in pairs; bool (seeds, n) both."""
    rng = np.random.default_rng(0)
    apart = (right.astype(float) - other).mean(0)
    drawn = [apart[rng.integers(0, len(apart), len(apart))].mean() for _ in range(draws)]
    return tuple(np.quantile(drawn, [0.025, 0.975]))


def table(records: list[dict], tokenizers: str, wanted: tuple[str, ...]) -> str:
    """Markdown: exact match in %, mean ± std over seeds; what is gained over SFT."""
    mine = [r for r in records if r["tokenizers"] == tokenizers]
    arms = [arm for arm in _ARMS[tokenizers] if any(r["arm"] == arm for r in mine)]
    metrics = list(dict.fromkeys(x["metric"] for r in mine for x in r["results"]
                                 if x["evaluation"] == "answers"))  # fmt: skip
    right = {
        (r["arm"], r["seed"]): np.array([a == b for a, b in zip(r["answers"], wanted, strict=True)])
        for r in mine
    }
    lines = [["arm", "seeds", "rate", *metrics, "over SFT (95 %)", "CPU s"]]
    for arm in arms:
        own = [r for r in mine if r["arm"] == arm]
        shared = [s for a, s in right if a == arm and ("sft", s) in right]
        gap = ""
        if arm != "sft" and shared:
            pair = [np.stack([right[a, s] for s in shared]) for a in (arm, "sft")]
            low, high = bootstrap(*pair)
            gained = pair[0].mean() - pair[1].mean()
            gap = f"{100 * gained:+.1f} ({100 * low:.1f}, {100 * high:.1f})"
        cells = [results.percent([_exact(r, m) for r in own]) for m in metrics]
        cpu = np.mean([r["cost"]["cpu_seconds"] for r in own])
        lines.append([arm, str(len(own)), f"{own[0]['rate']:g}", *cells, gap, f"{cpu:.0f}"])
    return results.markdown(lines)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/genrecal"))
    parser.add_argument("--tokenizers", nargs="*", choices=tuple(_ARMS), default=tuple(_ARMS))
    parser.add_argument("--arms", nargs="*", help="by default all")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--teacher", action="store_true", help="train the teacher")
    parser.add_argument("--tune", action="store_true", help="compare rates on held-out questions")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    args = parser.parse_args()
    if args.teacher:
        config = _config("two", 0, True)
        config.teacher.dir = None
        config.teacher.cache = False
        config.method.steps = 1
        jaxdistill.train(config, args.workdir / "teacher")
        _TEACHER.mkdir(exist_ok=True)
        for path in sorted((args.workdir / "teacher" / "teacher").glob("teacher.*")):
            (_TEACHER / path.name).write_bytes(path.read_bytes())
        return
    path = _TUNING if args.tune else _RECORD
    names = ("tokenizers", "arm", "seed", "rate")
    if not args.table:
        chosen = _rates()
        for seed in [0] if args.tune else args.seeds:
            for tokenizers in args.tokenizers:
                for arm in args.arms or _ARMS[tokenizers]:
                    if arm not in _ARMS[tokenizers]:
                        continue
                    tuned = _tuned_as(arm)
                    if args.tune and tuned != arm:
                        continue
                    own = chosen.get((tokenizers, tuned), _USUAL)
                    for rate in _RATES if args.tune else [own]:
                        if not recording.has(path, (tokenizers, arm, seed, rate), names):
                            record = _run(tokenizers, arm, rate, seed, args)
                            recording.put(path, record, names)
    records = recording.read(path)
    if args.tune:
        for record in records:
            print(record["tokenizers"], record["arm"], record["rate"], f"{_exact(record):.3f}")
        return
    wanted = _questions().answers
    for tokenizers in args.tokenizers:
        if any(r["tokenizers"] == tokenizers for r in records):
            print(table(records, tokenizers, wanted))


if __name__ == "__main__":
    main()
