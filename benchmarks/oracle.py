"""Losses across tokenizers before the referee: which of them leave a perfect student in place?

    python benchmarks/oracle.py                # the worlds that are missing, then the tables
    python benchmarks/oracle.py --table        # the tables of what is recorded
    python benchmarks/oracle.py --worlds=6     # more worlds of each kind

Each world is recorded as soon as it is done; interrupted, the same command goes on, and a loss
whose rows are taken out of the record is measured again. About 100 CPU seconds a world. Everything
is exact or seeded, in float64. In space worlds the forms of ALM are also minimized for longer,
which tells slow ones from wrong ones; in a control both sides have one tokenizer. GenRecal, whose
loss is one of hidden states, is measured in a world of each kind with contexts of its own, in
float32, 160 CPU seconds each; see `jaxdistill.vlm.oracle_recalibrated`.
"""

import argparse
import functools
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import recording

from jaxdistill.eval.results import markdown
from jaxdistill.io.versions import versions
from jaxdistill.vlm import oracle
from jaxdistill.vlm import oracle_recalibrated as through

_RECORD = recording.FOLDER / "oracle.json"
_KINDS = {"free": b"", "space": b"c"}
_LENGTH = 5
_LOSSES = 19
_STEPS = 400
_LONG = 3000
_WIDTH = 8  # of a student's prefix, with a Recalibrator between it and the teacher's head
_STARTS = ("perfect", "near", "random", "random")
_FORMS = ("ALM, whole text", "ALM, two-sided", "ALM, spaces, end only", "ALM, naive")


def _world(kind: str, seed: int) -> tuple[oracle.World, jax.Array]:
    """A world, and keys for its tests."""
    keys = jax.random.split(jax.random.key(seed), 5)
    same = kind == "control"
    opener = _KINDS["space" if same else kind]
    return oracle.world(keys[0], opener=opener, length=_LENGTH, same=same), keys


def measure(kind: str, seed: int, known: dict | None) -> dict:
    """The record of one world: every loss, every test, but of a control only the first one.

    Args:
        kind: Of the world.
        seed: Of the world and its tests.
        known: A record of the same world, whose rows are kept.
    """
    started = time.process_time()
    before = known or {"rows": [], "cpu_seconds": 0.0}
    rows = {row["loss"]: row for row in before["rows"]}
    with jax.enable_x64(True):
        made, keys = _world(kind, seed)
        truth = oracle.candidate(made, oracle.exact(made))
        objectives = oracle.contenders(made)
        for name in [n for n in objectives if n not in rows]:
            judged = oracle.candidate(made, objectives[name])
            row = {"loss": name, **oracle.zero_gap(judged, keys[1])._asdict()}
            if kind != "control":
                row["bias"] = oracle.bias(judged, truth, keys[2])
                row["variance"] = oracle.variance(judged, truth, keys[4])
                row["before"], row["after"] = oracle.descent(judged, keys[3], steps=_STEPS)
            rows[name] = row
    return before | {
        "kind": kind,
        "seed": seed,
        "length": _LENGTH,
        "steps": _STEPS,
        "teacher": [str(piece) for piece in made.teacher.pieces],
        "student": [str(piece) for piece in made.student.pieces],
        "rows": [rows[name] for name in objectives],
        "cpu_seconds": before["cpu_seconds"] + time.process_time() - started,
        "versions": versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def measure_long(kind: str, seed: int) -> dict:
    """Where long descents end, for the forms of ALM."""
    started = time.process_time()
    found = {}
    with jax.enable_x64(True):
        made, keys = _world(kind, seed)
        objectives = oracle.contenders(made)
        for name in _FORMS:
            judged = oracle.candidate(made, objectives[name])
            found[name] = oracle.descent(judged, keys[3], steps=_LONG)[1]
    return {"steps": _LONG, "after": found, "cpu_seconds": time.process_time() - started}


def measure_recalibrated(kind: str, seed: int) -> dict:
    """What GenRecal's loss does to students of a world with contexts."""
    started = time.process_time()
    keys = jax.random.split(jax.random.key(seed), 3)
    made = through.contexts(keys[0], opener=_KINDS[kind])
    module = through.recalibrator(made, _WIDTH)
    starts = []
    for name, key in zip(_STARTS, jax.random.split(keys[1], len(_STARTS)), strict=True):
        astray = 0.1 if name == "near" else 0.0
        starts.append(
            through.random_student(made, key, _WIDTH)
            if name == "random"
            else through.perfect_student(made, key, _WIDTH, astray=astray)
        )
    students = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    own = jax.random.split(keys[2], len(_STARTS))
    texts = {"teacher's": made.laws, "others": made.others}
    rows = []

    def keep(boundary, name, found):
        for i, student in enumerate(_STARTS):
            values = {n: float(x[i]) for n, x in found._asdict().items()}
            rows.append({"boundary": boundary, "texts": name, "student": student} | values)

    for boundary in ("include", "exclude"):
        judge = jax.jit(
            jax.vmap(
                functools.partial(through.judge, made, module, boundary=boundary), (0, 0, None)
            )
        )
        for name, weights in texts.items():
            keep(boundary, name, judge(students, own, weights))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def tuned(student, weights):
        start = through.Learned(student, {})
        options = {"boundary": "include", "steps": 200, "genrecal": 0.0, "weights": weights}
        return through.divergence(made, through.distilled(made, module, start, **options).student)

    return {
        "width": _WIDTH,
        "contexts": len(made.laws),
        "rows": rows,
        "sft": {name: tuned(students, weights).tolist() for name, weights in texts.items()},
        "cpu_seconds": time.process_time() - started,
    }


def recalibrated_table(records: list[dict]) -> str:
    """Markdown: what GenRecal's loss does, a row for each boundary, kind of texts and student."""
    worlds = [r for r in records if "recalibrated" in r]
    if not worlds:
        return ""
    shown = ("kl", "swapped", "gradient", "cosine", "before", "alone", "both")
    lines = [["boundary", "texts", "student", *shown, "SFT"]]
    first = worlds[0]["recalibrated"]["rows"]
    for boundary, texts, student in dict.fromkeys(
        (row["boundary"], row["texts"], row["student"]) for row in first
    ):
        cells = []
        for name in shown:
            means = [
                np.mean([
                    row[name]
                    for row in r["recalibrated"]["rows"]
                    if (row["boundary"], row["texts"], row["student"])
                    == (boundary, texts, student)
                ])
                for r in worlds
            ]  # fmt: skip
            cells.append(" / ".join(f"{m:.2g}" for m in means))
        tuned = [
            np.mean([
                value
                for value, name in zip(r["recalibrated"]["sft"][texts], _STARTS, strict=True)
                if name == student
            ])
            for r in worlds
        ]  # fmt: skip
        cells.append(" / ".join(f"{m:.2g}" for m in tuned))
        lines.append([boundary, texts, student, *cells])
    kinds = " / ".join(r["kind"] for r in worlds)
    return f"GenRecal, one world of each kind: {kinds}\n\n{markdown(lines)}\n"


def control_table(records: list[dict]) -> str:
    """Markdown: what the losses do at the perfect student of the teacher's own tokenizer."""
    controls = [r for r in records if r["kind"] == "control"]
    lines = [["loss", "gradient", "drift"]]
    for row in [row for r in controls for row in r["rows"]]:
        lines.append([row["loss"], f"{row['gradient']:.2g}", f"{row['drift']:.2g}"])
    return f"control: one tokenizer\n\n{markdown(lines)}\n" if controls else ""


def long_table(records: list[dict]) -> str:
    """Markdown: a row for each form of ALM, a column for each world and length."""
    worlds = [r for r in records if "long" in r]
    if not worlds:
        return ""
    lines = [["loss", *(f"world {r['seed']}, {n} steps" for r in worlds for n in (_STEPS, _LONG))]]
    for name in _FORMS:
        cells = []
        for r in worlds:
            short = next(row["after"] for row in r["rows"] if row["loss"] == name)
            cells += [f"{short:.2g}", f"{r['long']['after'][name]:.2g}"]
        lines.append([name, *cells])
    return f"descents in space worlds\n\n{markdown(lines)}\n"


def table(records: list[dict]) -> str:
    """Markdown: means over the worlds of each kind, free / space."""
    kinds = [k for k in _KINDS if any(r["kind"] == k for r in records)]
    counts = [sum(r["kind"] == kind for r in records) for kind in kinds]

    def cell(of):
        means = []
        for kind in kinds:
            own = [row for r in records if r["kind"] == kind for row in r["rows"]]
            found = [row for row in own if row["loss"] == name]
            means.append(" ".join(f"{v:.2g}" for v in np.mean([of(row) for row in found], 0)))
        return " / ".join(means)

    lines = [["loss", "gradient", "drift", "bias", "descent", "16 texts"]]
    for name in [row["loss"] for row in records[0]["rows"]]:
        lines.append([
            name,
            cell(lambda row: [row["gradient"]]),
            cell(lambda row: [row["drift"]]),
            cell(lambda row: row["bias"]),
            cell(lambda row: [row["after"]]),
            cell(lambda row: row["variance"]),
        ])  # fmt: skip
    start = " / ".join(
        f"{np.mean([r['rows'][0]['before'] for r in records if r['kind'] == kind]):.2g}"
        for kind in kinds
    )
    worlds = " and ".join(f"{n} {kind}" for n, kind in zip(counts, kinds, strict=True))
    return f"means over {worlds} worlds; descents start from {start}\n\n{markdown(lines)}\n"


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=2, help="of each kind")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    args = parser.parse_args()
    if not args.table:
        worlds = [(kind, seed) for seed in range(args.worlds) for kind in _KINDS]
        known = {(r["kind"], r["seed"]): r for r in recording.read(_RECORD)}
        for kind, seed in [*worlds, ("control", 0)]:
            record = known.get((kind, seed))
            if record is None or len(record["rows"]) < _LOSSES:
                recording.put(_RECORD, measure(kind, seed, record), ("kind", "seed"))
        for record in recording.read(_RECORD):
            if record["kind"] == "space" and "long" not in record:
                record["long"] = measure_long(record["kind"], record["seed"])
                recording.put(_RECORD, record, ("kind", "seed"))
        records = recording.read(_RECORD)
        for record in records:
            if record["kind"] in _KINDS and record["seed"] == 0 and "recalibrated" not in record:
                record["recalibrated"] = measure_recalibrated(record["kind"], record["seed"])
                recording.write(_RECORD, records)
    records = recording.read(_RECORD)
    print(table(records))
    print(recalibrated_table(records))
    print(long_table(records))
    print(control_table(records))


if __name__ == "__main__":
    main()
