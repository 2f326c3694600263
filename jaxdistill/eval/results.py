"""Records of measured accuracies, and the table made from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.errors import InputError
from jaxdistill.io.files import write_files


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
    if not path.is_file():
        return {}
    try:
        records = json.loads(path.read_text())
        if not isinstance(records, list):
            raise TypeError("not a list")
        return {
            Cell(*(record[field] for field in Cell._fields)): {
                k: v for k, v in record.items() if k not in Cell._fields
            }
            for record in records
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a list of results ({error}); delete it") from error


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
