"""Records of measurements, of one form for every evaluation, and the table made from them."""

import contextlib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxdistill.errors import InputError, Interrupted
from jaxdistill.io.files import write_files
from jaxdistill.io.reading import read_json
from jaxdistill.parallel import processes


class Cell(NamedTuple):
    """What one measurement is of.

    Attributes:
        evaluation: The name that the config gives it.
        row: What is measured: a method, perhaps with the way it is used.
        metric: What is measured of it: a column.
        seed: The seed of the measurement.
        protocol: Hash of everything else that decides it.
    """

    evaluation: str
    row: str
    metric: str
    seed: int
    protocol: str


class Results:
    """The measurements of a workdir: read at the start, written whole after each new one.

    Several processes each write what they measure to a file of their own, and `gather` puts them
    together.

    Attributes:
        measured: Cell -> `value`, and what else is known of the measurement.
    """

    def __init__(self, workdir: Path):
        """Reads what all processes of this start and of earlier ones have measured."""
        self._whole = workdir / "results.json"
        part = "" if processes.is_first() else f"-{jax.process_index()}"
        self._own = workdir / f"results{part}.json"
        self.measured: dict[Cell, dict[str, Any]] = {}
        self.gather()

    def gather(self) -> None:
        """Waits for all processes, and reads what each has measured."""
        processes.wait("results are written")
        parts = sorted(self._whole.parent.glob("results-*.json"))
        measured = read(self._whole)
        for part in parts:
            measured |= read(part)
        processes.wait("results are read")
        if parts and processes.is_first():
            write(self._whole, measured)
            for part in parts:
                part.unlink()
        processes.wait("results are gathered")
        self.measured = measured

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those of the cells that are not measured yet."""
        return [cell for cell in cells if cell not in self.measured]

    def keep(self, measured: Mapping[Cell, Mapping[str, Any]]) -> None:
        """Adds measurements, and writes all.

        A value that is not finite is kept as None: what was measured diverged.
        """
        for cell, values in measured.items():
            value = values["value"]
            self.measured[cell] = dict(values) | {"value": value if _is_finite(value) else None}
        write(self._own, self.measured)

    @contextlib.contextmanager
    def counted(self, wanted: Sequence[Cell], doing: str, are: str) -> Iterator[None]:
        """Where it is stopped inside, says how many of the cells are measured.

        Args:
            wanted: The cells.
            doing: What is done, for the message.
            are: What they are when they are measured.
        """
        try:
            yield
        except Interrupted as stop:
            kept = len(wanted) - len(self.missing(wanted))
            raise Interrupted(f"stopped while {doing}; {kept} of {len(wanted)} {are}") from stop

    def records(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """The measurements of some cells, each as one dict."""
        return [cell._asdict() | self.measured[cell] for cell in cells]


def read(path: Path) -> dict[Cell, dict]:
    """The measurements on disk; none if there is no file.

    Raises:
        InputError: If the file is not of this form.
    """
    if not path.exists():
        return {}
    try:
        records = read_json(path)
        if not isinstance(records, list):
            raise TypeError("not a list")
        return dict(map(_measurement, records))
    except (InputError, TypeError) as error:
        raise InputError(f"{path} is not a list of results ({error}); delete it") from error


def _measurement(record: object) -> tuple[Cell, dict]:
    """The two halves of a record as `write` makes it, checked as far as `table` relies on it."""
    if not isinstance(record, dict) or not {*Cell._fields, "value"} <= record.keys():
        raise TypeError(f"each needs {', '.join(Cell._fields)}, value")
    rest = dict(record)
    cell = Cell(*(rest.pop(field) for field in Cell._fields))
    for name, value in cell._asdict().items():
        if type(value) is not Cell.__annotations__[name]:
            raise TypeError(f"{name} is {reprlib.repr(value)}")
    if rest["value"] is not None and (
        type(rest["value"]) not in (int, float) or not _is_finite(rest["value"])
    ):
        raise TypeError(f"value is {reprlib.repr(rest['value'])}")
    return cell, rest


def _is_finite(value: float | int) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def write(path: Path, measured: Mapping[Cell, dict]) -> None:
    """Writes all measurements, as a whole or not at all."""
    lines = [json.dumps(cell._asdict() | values) for cell, values in measured.items()]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    write_files({path: lambda file: file.write(text.encode())})


def diverged(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the records that have no value, for what they measured diverged."""
    return [record for record in records if record["value"] is None]


def percent(values: Sequence[float | int]) -> str:
    """Fractions as percentages, mean ± population standard deviation over seeds."""
    values = [100 * value for value in values]
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}"


def plain(values: Sequence[float | int]) -> str:
    """Numbers as they are, with the population standard deviation where there are several."""
    spread = f" ± {np.std(values):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{spread}"


def table(
    records: Iterable[Mapping[str, Any]], shown: Callable[[Sequence[float | int]], str] = plain
) -> str:
    """A Markdown table of records; see `cells`."""
    return markdown(cells(records, shown))


def cells(
    records: Iterable[Mapping[str, Any]], shown: Callable[[Sequence[float | int]], str] = plain
) -> list[list[str]]:
    """A table's texts, its head first: a row for each row of the records, a column for each metric.

    Args:
        records: Fields of `Cell`, and `value`, None where it diverged.
        shown: The values of a cell over its seeds, as a text.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for record in records:
        values.setdefault((record["row"], record["metric"]), []).append(record["value"])
    rows, metrics = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    lines = [["row", *metrics]]
    for row in rows:
        of = [values.get((row, metric)) for metric in metrics]
        lines.append([row, *("–" if cell is None else _cell(cell, shown) for cell in of)])
    return lines


_UNEVEN = 2  # the largest class over the smallest, from which a training set has rare classes


def rarest_third(counts: Int[np.ndarray, " c"]) -> list[int]:
    """The third of the classes, one at least, that have the fewest training images.

    Args:
        counts: Training images of each class.

    Returns:
        Class ids, the rarest first; none where no class has twice the images of another.
    """
    if counts.max() < _UNEVEN * counts.min():
        return []
    return np.argsort(counts, kind="stable")[: max(len(counts) // 3, 1)].tolist()


def by_class(records: Iterable[Mapping[str, Any]], rarest: Sequence[int]) -> str:
    """A Markdown table of what an accuracy hides; see `class_cells`."""
    return markdown(class_cells(records, rarest))


def class_cells(
    records: Iterable[Mapping[str, Any]], rarest: Sequence[int] = ()
) -> list[list[str]]:
    """What an accuracy hides: the classes, and what a network thinks it knows; the head first.

    Args:
        records: Fields of `Cell`, `value`, the accuracies of the `classes` as fractions, and
            where there are any `calibration_error` and `brier`.
        rarest: Class ids, whose accuracy has a column; none where there are no rare ones.
    """
    columns = {
        "worst class": (lambda r: min(_known(r["classes"])), percent),
        "best less worst": (lambda r: np.ptp(_known(r["classes"])), percent),
        "rarest third": (lambda r: np.mean(_known(r["classes"][c] for c in rarest)), percent),
        "calibration error": (lambda r: r["calibration_error"], percent),
        "Brier score": (lambda r: r["brier"], plain),
    }
    if not rarest:
        del columns["rarest third"]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["row"], record["metric"]), []).append(record)
    lines = [["row", "network", *columns]]
    for (row, metric), own in groups.items():
        cells = []
        for measure, shown in columns.values():
            try:
                values = [None if r["value"] is None else float(measure(r)) for r in own]
            except (KeyError, ValueError):  # a metric that labels cannot have, an absent class
                cells.append("–")
            else:
                cells.append(_cell(values, shown))
        lines.append([row, metric, *cells])
    return lines


def _known(classes: Iterable[float | None]) -> list[float]:
    """Accuracies of the classes that have test images."""
    return [value for value in classes if value is not None]


def _cell(values: Sequence[float | int | None], shown: Callable) -> str:
    """The values over the seeds; a mean of those that have not diverged would flatter the row."""
    lost = sum(value is None for value in values)
    if not lost:
        return shown(values)
    return "diverged" if lost == len(values) else f"{lost} of {len(values)} diverged"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, the first row its head, in columns of one width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
