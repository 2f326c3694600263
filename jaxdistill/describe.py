"""What there is and what can be set, as text: `jaxdistill list` and `jaxdistill describe NAME`.

Nothing is declared here. Names are those of the modules, settings those of their signatures, and
what they mean stands in the docstrings.
"""

import ast
import difflib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxdistill import config as configs
from jaxdistill import keywords, settings
from jaxdistill.errors import InputError

_WIDTH = 96


def listed() -> str:
    """The configs that are shipped, the methods of each family, and the evaluations."""
    lines = ["Configs, for --config=NAME:"]
    for name, path in sorted(configs.shipped().items()):
        lines.append(_line(name, ast.get_docstring(ast.parse(path.read_text())) or ""))
    for family, room in _rooms():
        lines += ["", f"Methods of the family {family}, for --config.method.name=NAME:"]
        lines += [_line(name, module.__doc__) for name, module in _modules(room, "recipe")]
    lines += ["", "Evaluations, for a group of config.evals:"]
    lines += [_line(n, module.__doc__) for n, module in _modules(settings.EVALS, "evaluate")]
    lines += ["", "jaxdistill describe NAME says more of each."]
    return "\n".join(lines)


def described(spec: str) -> str:
    """What a config, a method or an evaluation does, and what can be set.

    Args:
        spec: The name of one, or of a config with its argument, such as `ncfm:ipc=10`.

    Raises:
        InputError: If there is none of that name.
    """
    name = spec.partition(":")[0]
    if name in configs.shipped() or name.endswith((".py", ".json")):
        return _of_config(spec)
    found = [
        _of_module(module, f"method {name} of the family {family}", module.recipe)
        for family, room in _rooms()
        for own, module in _modules(room, "recipe")
        if own == name
    ]
    found += [
        _of_module(module, f"evaluation {name}", module.evaluate)
        for own, module in _modules(settings.EVALS, "evaluate")
        if own == name
    ]
    if not found:
        close = difflib.get_close_matches(name, names())
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise InputError(f"nothing is called {keywords.quoted(name)}; {hint}see jaxdistill list")
    return "\n\n".join(found)


def names() -> list[str]:
    """All that can be described by its name."""
    methods = (name for _, room in _rooms() for name, _ in _modules(room, "recipe"))
    evaluations = (name for name, _ in _modules(settings.EVALS, "evaluate"))
    return sorted({*configs.shipped(), *methods, *evaluations})


def meanings(function: Callable) -> dict[str, str]:
    """What the docstring of a table says of each setting, those of shared groups included.

    Args:
        function: See `keywords.table`.
    """
    found = _section(inspect.getdoc(function) or "")
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for group in typing.get_args(hints[name])[1:]:
                found |= meanings(group)
    return {name: found[name] for name in keywords.table(function) if name in found}


def _section(doc: str) -> dict[str, str]:
    """Name -> text of the section of arguments or attributes."""
    whole = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    entries = re.findall(
        r"^    (\w[\w, ]*): (.*(?:\n     .*|\n(?=\n     ))*)",
        whole[1] if whole else "",
        re.MULTILINE,
    )
    return {
        name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")
    }


def _rooms() -> Iterator[tuple[str, str]]:
    for name in settings.modules(settings.FAMILIES, "ROOM"):
        yield name, settings.family(name).ROOM


def _modules(room: str, attribute: str) -> list[tuple[str, ModuleType]]:
    of = settings.evaluation if attribute == "evaluate" else lambda n: settings.method(n, room)
    return [(name, of(name)) for name in settings.modules(room, attribute)]


def _line(name: str, doc: str) -> str:
    return f"  {name:<20}{doc.splitlines()[0] if doc else ''}"


def _of_module(module: ModuleType, title: str, function: Callable) -> str:
    known = keywords.defaults(function)
    rows = _rows(function, {n: known.get(n, "–") for n in keywords.table(function)})
    return "\n".join([f"{title}\n", inspect.getdoc(module), "", "Settings and defaults:", *rows])


def _of_config(spec: str) -> str:
    config, path = configs.load(spec), Path(configs.resolve(spec).partition(":")[0])
    doc = "What a run has left of its config."
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(path.read_text()))
    resolved = settings.resolve(config)
    lines = [doc, "", f"What can be set, by --config.GROUP.NAME=VALUE, as {spec} has it:"]
    for name, group in settings.tables(resolved.family).items():
        lines += ["", f"config.{name}", *_rows(group, getattr(resolved.groups, name)._asdict())]
    for number, row in enumerate(resolved.rows.values()):
        place = f"baselines.{row.name}" if number else "method"
        lines += ["", f"config.{place}: {row.method}"]
        # Of baselines, whose settings mean the same, only what they are.
        lines += _values(row.settings) if number else _rows(row.module.recipe, row.settings)
    for name, evaluation in resolved.evals.items():
        lines += ["", f"config.evals.{name}: {evaluation.given}"]
        lines += _rows(evaluation.module.evaluate, evaluation.settings)
    if resolved.generator is not None:
        lines += ["", "config.generator: a whole config, of the run that makes the data"]
    return "\n".join(lines)


def _rows(function: Callable, values: Mapping[str, Any]) -> list[str]:
    """A setting, its value, what it may be and what it means."""
    meant, lines = meanings(function), []
    for name, keyword in keywords.table(function).items():
        lines.append(f"  {name} = {said(values[name])}")
        text = f"{keywords.expected(keyword)}. {meant.get(name, '')}".strip()
        lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _values(values: Mapping[str, Any]) -> list[str]:
    text = ", ".join(f"{name}={said(value)}" for name, value in values.items())
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def said(value: Any) -> str:
    """A value as it is written behind `--config.NAME=`."""
    return value if isinstance(value, str) else repr(value)
