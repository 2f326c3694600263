"""Records of measured accuracies, and the table made from them."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.errors import InputError
from jaxdistill.io.files import write_files
from jaxdistill.io.reading import read_json


class Cell(NamedTuple):
    """What one measurement is of.

    Attributes:
        network: Architecture of the fresh network.
        method: How its training set was made.
        labels: `hard` or `soft`.
        seed: Seed of the fresh network.
        protocol: Hash of everything else that decides the measurement.
    """

    network: str
    method: str
    labels: str
    seed: int
    protocol: str


def read(path: Path) -> dict[Cell, dict]:
    """The measurements on disk; none if there is no file.

    Raises:
        InputError: if the file is not of this form.
    """
    if not path.exists():
        return {}
    try:
        records = read_json(path)
        if not isinstance(records, list):
            raise TypeError("not a list")
        return dict(map(_measurement, records))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a list of results ({error}); delete it") from error


def _measurement(record: object) -> tuple[Cell, dict]:
    """The two halves of a record as `write` makes it, checked as far as `table` relies on it."""
    if not isinstance(record, dict) or not {*Cell._fields, "accuracy"} <= record.keys():
        raise TypeError(f"each needs {', '.join(Cell._fields)}, accuracy")
    rest = dict(record)
    cell = Cell(*(rest.pop(field) for field in Cell._fields))
    for name, value in cell._asdict().items():
        if type(value) is not Cell.__annotations__[name]:
            raise TypeError(f"{name} is {reprlib.repr(value)}")
    if type(rest["accuracy"]) not in (int, float) or not 0 <= rest["accuracy"] <= 1:
        raise TypeError(f"accuracy is {reprlib.repr(rest['accuracy'])}")
    return cell, rest


def write(path: Path, measured: Mapping[Cell, dict]) -> None:
    """Writes all measurements, as a whole or not at all."""
    lines = [json.dumps(cell._asdict() | values) for cell, values in measured.items()]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    write_files({path: lambda file: file.write(text.encode())})


def table(records: Sequence[Mapping]) -> str:
    """A Markdown table: a row per method, a column per network and kind of label.

    Hard and soft labels never share a column.

    Args:
        records: Fields of `Cell` and `accuracy` as a fraction.

    Returns:
        Percentages, mean ± population standard deviation over seeds.
    """
    methods = list(dict.fromkeys(r["method"] for r in records))
    columns = list(dict.fromkeys((r["network"], r["labels"]) for r in records))
    rows = [["method", *(f"{network}, {labels} labels" for network, labels in columns)]]
    for method in methods:
        cells = []
        for column in columns:
            values = [
                100 * r["accuracy"]
                for r in records
                if r["method"] == method and (r["network"], r["labels"]) == column
            ]
            cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "–")
        rows.append([method, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
