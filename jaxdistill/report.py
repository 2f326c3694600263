"""A run as one page: what it was, what came out, how it went, and what makes it again.

The page stands alone. Pictures and curves are in it, it loads nothing and runs nothing, and it is
read without the library. It is made from what lies in the workdir, of whatever family that is, so
the same workdir gives the same page. Every text goes through `ElementTree`, which escapes it.
"""

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Tree

import numpy as np
from PIL import Image

from jaxdistill import describe, keywords, run_folder
from jaxdistill.eval import results
from jaxdistill.io import charts
from jaxdistill.io.files import write_files
from jaxdistill.io.reading import read_json
from jaxdistill.settings import Experiment

NAME = "report.html"
_ASIDE = "generator"  # a whole run of its own, with a page of its own
_LARGEST = 16 << 20  # bytes of all pictures: a page of more is no pleasure to open
# What reading a line of metrics may raise that this library has not written.
_FOREIGN = (ValueError, TypeError, LookupError, OverflowError, AttributeError, RecursionError)
# Nothing of the page can reach a network or run, whatever a text in it says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(
    workdir: Path,
    experiment: Experiment,
    folders: Mapping[str, Path],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """Writes `report.html` into a workdir, unless it is there as it should be.

    A folder that cannot be written to is left as it is.

    Args:
        workdir: Of a run whose rows are finished.
        experiment: Its config, resolved.
        folders: The folder of each row, by name.
        records: What its evaluations say.

    Raises:
        InputError: If a card or a file of metrics in the workdir cannot be read.
        OSError: If the page cannot be written.
    """
    text = page(workdir, experiment, folders, records).encode()
    path = workdir / NAME
    if path.is_file() and path.read_bytes() == text:
        return
    if run_folder.is_writable(workdir):
        write_files({path: lambda file: file.write(text)})


def page(
    workdir: Path,
    experiment: Experiment,
    folders: Mapping[str, Path],
    records: Sequence[Mapping[str, Any]],
) -> str:
    """The page of a run; see `write`."""
    cards = {name: _card(folder, experiment) for name, folder in folders.items()}
    method = next(iter(experiment.rows))
    names = {folder: name for name, folder in folders.items()}
    curves = {
        names.get(path.parent, str(path.parent.relative_to(workdir))): _curves(path)
        for path in _found(workdir, "metrics.jsonl")
    }
    title = f"{method} on {cards[method].get('dataset', experiment.groups.data.name)}"
    html = Tree.Element("html", {"lang": "en"})
    head, body = _add(html, "head"), _add(html, "body")
    _add(head, "meta", charset="utf-8")
    _add(head, "meta", http_equiv="Content-Security-Policy", content=_POLICY)
    _add(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    _add(head, "title", f"{title} – jaxdistill")
    _add(head, "style", Path(__file__).with_suffix(".css").read_text("utf-8"))
    _header(body, experiment, title, cards, workdir)
    parts = {
        "Results": lambda place: _results(place, experiment, records),
        "Pictures": lambda place: _pictures(place, workdir),
        "Curves": lambda place: _charts(place, curves, list(folders)),
        "Rows": lambda place: _rows(place, experiment, cards),
        "Settings": lambda place: _settings(place, experiment),
        "Again": lambda place: _again(place, experiment),
        "Versions and hashes": lambda place: _provenance(place, cards),
    }
    nav = _add(body[0], "nav")
    for name, write_part in parts.items():
        place = Tree.Element("section", {"id": name.lower().replace(" ", "-")})
        _add(place, "h2", name)
        write_part(place)
        if len(place) > 1:
            body.append(place)
            _add(nav, "a", name, href=f"#{place.get('id')}")
    if (workdir / _ASIDE / NAME).is_file():
        _add(nav, "a", "The run that made its data", href=f"{_ASIDE}/{NAME}")
    return "<!DOCTYPE html>\n" + Tree.tostring(html, "unicode", method="html") + "\n"


# ---------------------------------------------------------------------------- what is read


def _card(folder: Path, experiment: Experiment) -> dict[str, Any]:
    return read_json(folder / "artifacts" / Path(experiment.family.ARTEFACT).with_suffix(".json"))


def _found(workdir: Path, pattern: str) -> Iterator[Path]:
    """The files of a workdir, those of the method first; not those of its generator."""
    paths = (path for path in workdir.rglob(pattern) if path.is_file())
    of = {path: path.relative_to(workdir).parts for path in paths}
    own = [path for path, parts in of.items() if parts[0] not in (_ASIDE, "checkpoints")]
    yield from sorted(own, key=lambda path: ("baselines" in of[path], len(of[path]), of[path]))


def _curves(path: Path) -> dict[str, charts.Curve]:
    """Name -> what was measured, of the whole records of a file; those not finite are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                step = np.int64(record["step"])
                values = {n: float(v) for n, v in record.items() if n not in ("step", "time")}
            except _FOREIGN:
                continue  # cut short, or of another hand
            for name, value in values.items():
                if np.isfinite(value):
                    found.setdefault(name, []).append((step, value))
    return {
        name: charts.Curve(np.array([s for s, _ in points]), np.array([v for _, v in points]))
        for name, points in found.items()
    }


# ---------------------------------------------------------------------------- its parts


def _header(
    body: Tree.Element,
    experiment: Experiment,
    title: str,
    cards: Mapping[str, Mapping],
    workdir: Path,
) -> None:
    header = _add(body, "header")
    _add(header, "h1", title)
    row = next(iter(experiment.rows.values()))
    card = cards[row.name]
    _add(header, "p", _first_line(row.module.__doc__), class_="soft")
    cost, versions = card.get("cost", {}), card.get("provenance", {}).get("versions", {})
    resumed = ", its last start" if cost.get("resumed") else ""
    facts = {
        "steps": f"{cost['steps']:,}" if "steps" in cost else None,
        f"seconds{resumed}": _number(cost.get("wall_seconds")),
        f"CPU seconds{resumed}": _number(cost.get("cpu_seconds")),
        "seed": experiment.seed,
        "devices": f"{versions['devices']} × {versions['device']}"
        if "device" in versions
        else None,
        "last step": _ended(workdir / "metrics.jsonl"),
        "learning rates times": card["rate_factor"] if card.get("rate_factor", 1) != 1 else None,
    }
    place = _add(header, "dl", class_="facts")
    for name, value in facts.items():
        if value is not None:
            fact = _add(place, "div")
            _add(fact, "dt", name)
            _add(fact, "dd", value)
    guarantees = {name: of.get("privacy", {}) for name, of in cards.items()}
    for name, told in guarantees.items():
        if told.get("epsilon") is not None:
            _add(
                header,
                "p",
                f"The artefact of {name} has a guarantee: epsilon = {told['epsilon']}, delta = "
                f"{told.get('delta')}. This page has none: other rows, measurements and pictures "
                "on it were made from the data. Publish that artefact, and not this page.",
                class_="note",
            )


def _ended(path: Path) -> str | None:
    """When the last record of a file of metrics was written."""
    if not path.is_file():
        return None
    *_, last = [None, *path.read_bytes().splitlines()]
    try:
        when = datetime.fromtimestamp(json.loads(last)["time"], UTC)
    except (ValueError, TypeError, KeyError, OverflowError, OSError):
        return None
    return when.strftime("%Y-%m-%d %H:%M UTC")


def _results(place: Tree.Element, experiment: Experiment, records: Sequence[Mapping]) -> None:
    own = next(iter(experiment.rows))
    for name, evaluation in experiment.evals.items():
        of = [record for record in records if record["evaluation"] == name]
        if not of:
            continue
        card = _add(place, "section", class_="card")
        _add(card, "h3", name)
        seeds = len({record["seed"] for record in of})
        spread = f" Mean ± standard deviation over {seeds} seeds." if seeds > 1 else ""
        _add(card, "p", _first_line(evaluation.module.__doc__) + spread, class_="soft")
        accuracies = all("classes" in record for record in of)
        tables = [results.cells(of, results.percent if accuracies else results.plain)]
        if accuracies:
            tables.append(results.class_cells(of))
        titles = ("Accuracies in %", "By class, in %") if accuracies else ("",)
        for (head, *rows), title in zip(tables, titles, strict=False):
            if title:
                _add(card, "h4", title)
            _table(card, head, rows, "numbers", lit=lambda row: row[0].split(", ")[0] == own)


def _pictures(place: Tree.Element, workdir: Path) -> None:
    gallery = Tree.Element("div", {"class": "gallery"})
    shown = 0
    for path in _found(workdir, "*.png"):
        content = path.read_bytes()
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                width, height = picture.size
                picture.verify()
        except Exception:  # damaged pictures raise many kinds of errors
            continue
        figure = _add(gallery, "figure")
        if shown + len(content) <= _LARGEST:
            shown += len(content)
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            name = path.stem.replace("_", " ")
            _add(figure, "img", src=source, width=width, height=height, alt=name)
        _add(figure, "figcaption", f"{path.relative_to(workdir)}, {width} × {height}")
    if len(gallery):
        place.append(gallery)


def _charts(place: Tree.Element, curves: Mapping[str, Mapping], rows: Sequence[str]) -> None:
    """A drawing for each name, of all rows together, and of each stage before them."""
    stages = [[row for row in rows if row in curves], *([n] for n in curves if n not in rows)]
    constant = []
    for stage in stages:
        names = dict.fromkeys(name for row in stage for name in curves[row])
        drawn = {
            name: {row: c for row in stage if (c := curves[row].get(name)) and len(c.steps) > 1}
            for name in names
        }
        grid = Tree.Element("div", {"class": "curves"})
        for name, of in drawn.items():
            if not of:
                continue
            if len({value for curve in of.values() for value in curve.values.tolist()}) == 1:
                level = next(iter(of.values())).values[0]
                constant.append(f"{name} of {', '.join(of)} is {level:.6g} throughout")
                continue
            figure = _add(grid, "figure")
            _add(figure, "h3", name)
            colors = {row: number for number, row in enumerate(stage)}
            figure.append(charts.chart(of, f"{name} over steps", colors))
            legend = _add(figure, "div", class_="legend")
            for row, curve in of.items():
                entry = _add(legend, "span", class_=charts.color(colors[row]))
                _add(entry, "b", row)
                _add(entry, "span", f" {curve.values[-1]:.4g}", class_="soft")
            if charts.is_logarithmic(of):
                _add(legend, "span", "logarithmic axis", class_="soft")
        if len(grid):
            if stage != stages[0]:
                _add(place, "p", f"Before that, {', '.join(stage)}:", class_="soft apart")
            place.append(grid)
    if constant:
        _add(place, "p", f"{'; '.join(constant)}.", class_="soft apart")


def _rows(place: Tree.Element, experiment: Experiment, cards: Mapping[str, Mapping]) -> None:
    costs = {name: card.get("cost", {}) for name, card in cards.items()}
    columns = list(dict.fromkeys(column for cost in costs.values() for column in cost))
    table = [
        [name, row.method, *(_number(costs[name].get(column)) or "–" for column in columns)]
        for name, row in experiment.rows.items()
    ]
    head = ["row", "method", *(column.replace("_", " ") for column in columns)]
    card = _add(place, "section", class_="card")
    _table(card, head, table, "numbers")


def _settings(place: Tree.Element, experiment: Experiment) -> None:
    _add(
        place,
        "p",
        "Every setting as it was; those that differ from the default are marked.",
        class_="soft",
    )
    groups = experiment.groups._asdict()
    tables = [(name, "", type(group), group._asdict()) for name, group in groups.items()]
    for number, row in enumerate(experiment.rows.values()):
        name = f"baselines.{row.name}" if number else "method"
        tables.append((name, row.method, row.module.recipe, row.settings))
    for name, of in experiment.evals.items():
        tables.append((f"evals.{name}", of.given, of.module.evaluate, of.settings))
    first = ("method", "data")
    for table in sorted(tables, key=lambda t: first.index(t[0]) if t[0] in first else 2):
        _group(place, *table)


def _group(place: Tree.Element, name: str, of: str, function: Any, values: Mapping) -> None:
    """One table of settings; that of the method is open."""
    known, meant = keywords.defaults(function), describe.meanings(function)
    rows, changed = [], set()
    for setting, value in values.items():
        default = known.get(setting, value)
        meaning = meant.get(setting, "")
        if value != default:
            changed.add(setting)
            meaning = f"{meaning} By default {describe.said(default)}."
        rows.append([setting, describe.said(value), meaning])
    if not rows:
        return
    details = _add(place, "details", **({"open": "open"} if name == "method" else {}))
    summary = _add(details, "summary", f"config.{name}")
    told = f" {of}, {len(changed)} of {len(rows)} differ" if of else f" {len(changed)} differ"
    _add(summary, "span", told, class_="soft")
    table = _add(_add(details, "div", class_="wide"), "table", class_="settings")
    for cells in rows:
        line = _add(table, "tr", **({"class_": "changed"} if cells[0] in changed else {}))
        _add(line, "td", cells[0])
        _add(line, "td", cells[1])
        _add(line, "td", cells[2], class_="soft")


def _again(place: Tree.Element, experiment: Experiment) -> None:
    stated = json.dumps(experiment.stated(), indent=2).encode() + b"\n"
    card = _add(place, "section", class_="card")
    told = _add(card, "p", "In this folder, or beside a copy of its ")
    link = _add(
        told,
        "a",
        "config.json",
        download="config.json",
        href=f"data:application/json;base64,{base64.b64encode(stated).decode()}",
    )
    link.tail = ", which this link holds, this makes the run again elsewhere:"
    _add(card, "pre", "jaxdistill --config=config.json --workdir=../again")
    _add(card, "p", "and this checks that what lies here is what it says:")
    _add(card, "pre", "jaxdistill --mode=verify --workdir=.")
    own = sorted({r.method.split(".")[0] for r in experiment.rows.values() if "." in r.method})
    if own:
        _add(card, "p", f"Python must find {', '.join(own)}, which is not the library's.")


def _provenance(place: Tree.Element, cards: Mapping[str, Mapping]) -> None:
    card = _add(place, "section", class_="card")
    method = next(iter(cards.values()))
    versions = method.get("provenance", {}).get("versions", {})
    _add(card, "p", " · ".join(f"{name} {value}" for name, value in versions.items() if value))
    lines = []
    for name, of in cards.items():
        known = {"settings": of.get("config_hash"), **of.get("provenance", {}), **of}
        hashes = {n: v for n, v in known.items() if n == "settings" or n.endswith("sha256")}
        lines += [
            [name, n.removesuffix("_sha256"), v] for n, v in hashes.items() if isinstance(v, str)
        ]
    table = _add(_add(card, "div", class_="wide"), "table")
    for row, of, value in lines:
        line = _add(table, "tr")
        _add(line, "td", row)
        _add(line, "td", of)
        _add(line, "td", value, class_="hash")


# ---------------------------------------------------------------------------- elements


def _table(place: Tree.Element, head: Sequence[str], rows: Iterable[Sequence[str]], kind, lit=None):
    table = _add(_add(place, "div", class_="wide"), "table", class_=kind)
    line = _add(_add(table, "thead"), "tr")
    for cell in head:
        _add(line, "th", cell)
    body = _add(table, "tbody")
    for row in rows:
        line = _add(body, "tr", **({"class_": "own"} if lit is not None and lit(row) else {}))
        _add(line, "th", row[0])
        for cell in row[1:]:
            _add(line, "td", cell)


def _add(place: Tree.Element, tag: str, text: object = None, **attributes: object) -> Tree.Element:
    """A new element at the end of another; `class_` and `http_equiv` are `class` and `http-equiv`.

    What no page may hold, such as control letters and halves of letters, becomes a replacement.
    """
    named = {n.rstrip("_").replace("_", "-"): _clean(v) for n, v in attributes.items()}
    element = Tree.SubElement(place, tag, named)
    element.text = None if text is None else _clean(text)
    return element


def _clean(text: object) -> str:
    return "".join(c if c.isprintable() or c in "\n " else "\ufffd" for c in str(text))


def _number(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else None if value is None else str(value)


def _first_line(doc: str | None) -> str:
    return (doc or "").partition("\n")[0]
