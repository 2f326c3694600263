"""Records of the benchmarks, in `benchmarks/records/`, each written as a whole.

Records keep the form of their rows from before version 0.2, so that one table shows old and new
ones; the configs in those of before have the settings' old names.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.io.files import write_files

FOLDER = Path(__file__).parent / "records"
# What is known of an accuracy besides its value.
_MEASURED = ("images", "epochs", "wall_seconds", "cpu_seconds")


def read(path: Path) -> list[dict]:
    """The records of a file; none if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else []


def write(path: Path, record: Any) -> None:
    """Writes what JSON can hold."""
    path.parent.mkdir(exist_ok=True)
    write_files({path: functools.partial(_dump, record)})


def accuracies(records: Sequence[dict]) -> list[dict]:
    """What the evaluation `classify` gives, as records hold it."""
    found = []
    for record in records:
        network, labels = record["metric"].removesuffix(" labels").split(", ")
        names = {"network": network, "method": record["row"], "labels": labels}
        decided = {name: record[name] for name in ("seed", "protocol")}
        measured = {name: record[name] for name in _MEASURED}
        found.append(names | decided | {"accuracy": record["value"]} | measured)
    return found


def samples(records: Sequence[dict]) -> list[dict]:
    """What the evaluations `points` and `images` give, as records hold it: a dict for each row."""
    rows: dict[str, dict] = {}
    for record in records:
        row = rows.setdefault(record["row"], {"row": record["row"]})
        row["calls" if record["metric"] == "nfe" else record["metric"]] = record["value"]
    return list(rows.values())


def students(workdir: Path, first: str, others: Sequence[str]) -> dict:
    """What a run of flow students leaves in its workdir, as records hold it.

    Args:
        workdir: The run's.
        first: What its method is called.
        others: Its baselines.
    """
    resolved = json.loads((workdir / "config.json").read_text())
    del resolved["teacher"]["dir"]  # places on this machine
    resolved["evals"]["samples"].pop("judge_dir", None)
    folders = {first: workdir} | {n: workdir / "baselines" / n for n in others}
    cards = {
        n: json.loads((folder / "artifacts" / "student.json").read_text())
        for n, folder in folders.items()
    }
    return {
        "costs": {n: card["cost"] for n, card in cards.items()},
        "teacher_sha256": cards[first]["provenance"]["teacher_sha256"],
        "config": resolved,
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def put(path: Path, record: dict, names: Sequence[str]) -> None:
    """Adds a record to a list of them, in the place of that with the same values of some names."""
    same = [record[name] for name in names]
    kept = [r for r in read(path) if [r[name] for name in names] != same]
    write(path, [*kept, record])


def has(path: Path, values: Sequence[Any], names: Sequence[str]) -> bool:
    """Whether there is a record with these values of some names."""
    return list(values) in [[r[name] for name in names] for r in read(path)]


def kept(path: Path, key: str, measure: Callable[[], Any]) -> Any:
    """What a file of several values has under a key; measured where it has nothing yet."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    if key not in known:
        found = measure()
        # Another process may have added to it.
        known = json.loads(path.read_text()) if path.is_file() else {}
        known[key] = found
        write(path, known)
    return known[key]


def slug(*parts: object) -> str:
    """A part of a path that tells what it is of."""
    return re.sub("[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")


def _dump(record, file) -> None:
    file.write(json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
