"""Records of the benchmarks, in `benchmarks/records/`, each written as a whole."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdistill.io.files import write_files

FOLDER = Path(__file__).parent / "records"


def read(path: Path) -> list[dict]:
    """The records of a file; none if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else []


def write(path: Path, record: Any) -> None:
    """Writes what JSON can hold."""
    path.parent.mkdir(exist_ok=True)
    write_files({path: functools.partial(_dump, record)})


def put(path: Path, record: dict, names: Sequence[str]) -> None:
    """Adds a record to a list of them, in the place of that with the same values of some names."""
    same = [record[name] for name in names]
    kept = [r for r in read(path) if [r[name] for name in names] != same]
    write(path, [*kept, record])


def _dump(record, file) -> None:
    file.write(json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
