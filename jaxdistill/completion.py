"""Completion for shells: `jaxdistill completion bash`, `zsh` or `fish` prints a script of words.

The words come from where `jaxdistill describe` has them: modules, signatures, and the configs
themselves. They are made once, when the script is printed, so completing starts no Python.
"""

import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill import config as configs
from jaxdistill import describe, keywords, settings
from jaxdistill.errors import InputError

SHELLS = ("bash", "fish", "zsh")
_WORD = re.compile(r"[\w.+:=/-]+")  # what no shell takes for more than a word


def script(shell: str, flags: Any) -> str:
    """The script of a shell, for its start-up file or its folder of completions.

    Args:
        shell: One of `SHELLS`.
        flags: The flags that are no settings, as absl has them.

    Raises:
        InputError: If the shell is not known.
    """
    if shell not in SHELLS:
        raise InputError(
            f"no completion for {keywords.quoted(shell)}; choose from {', '.join(SHELLS)}"
        )
    known = words(flags)
    lists = (_cases, _switch)[shell == "fish"](known)
    templates = ["words.sh", "bash.sh"], ["words.sh", "zsh.sh"], ["fish.fish"]
    chosen = dict(zip(("bash", "zsh", "fish"), templates, strict=True))[shell]
    folder = Path(__file__).parent / "shells"
    text = "\n".join((folder / name).read_text("utf-8") for name in chosen)
    head = "#compdef jaxdistill\n" if shell == "zsh" else ""
    return f"{head}# Made by: jaxdistill completion {shell}\n\n{lists}\n{text}"


def words(flags: Any) -> dict[str, list[str]]:
    """What can be written where.

    Args:
        flags: As for `script`.

    Returns:
        Place -> words: `flags`; `describe` and `completion`, which stand before a name;
        `argument NAME` for what follows the colon of a config; `settings NAME` for its flags.
    """
    named = sorted(configs.shipped())
    found = {
        "flags": [*_flags(flags), *(f"--config={name}" for name in named)],
        "describe": describe.names(),
        "completion": list(SHELLS),
    }
    for name in named:
        config = configs.load(name).to_dict()
        family = settings.family(config["family"])
        datasets, methods = _datasets(family), settings.modules(family.ROOM, "recipe")
        known = {"dataset=": datasets, "method=": methods}
        arguments = configs.arguments(name)
        found[f"argument {name}"] = [
            f"{word}{value}" for word in arguments for value in known.get(word, [""])
        ]
        found[f"settings {name}"] = [
            f"--config.{path}={value}"
            for path, values in _settings(config)
            for value in (values or [""])
        ]
    return {place: _plain(those) for place, those in found.items()}


def _flags(flags: Any) -> Iterator[str]:
    for name in flags:
        if flags[name].boolean:
            yield f"--{name}"
        else:
            yield from (f"--{name}={value}" for value in _choices(flags[name]))


def _choices(flag: Any) -> list[str]:
    return list(getattr(flag.parser, "enum_values", None) or [""])


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The path of each setting of a complete config, and the words that it may be."""
    family = settings.family(config["family"])
    for path in _paths(config):
        *groups, name = path.split(".")
        if groups[:1] == ["generator"]:
            continue
        if path == "family":
            yield path, settings.modules(settings.FAMILIES, "ROOM")
        elif path == "data.name":
            yield path, _datasets(family)
        elif name == "name":
            room = settings.EVALS if groups[0] == "evals" else family.ROOM
            yield path, settings.modules(room, "evaluate" if groups[0] == "evals" else "recipe")
        else:
            yield path, _values(settings.keyword(config, path.split(".")))
    if "generator" in config:
        for path, values in _settings(config["generator"]):
            yield f"generator.{path}", values


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _values(keyword: keywords.Keyword) -> list[str]:
    """The words that a setting may be; none where it is a number or a text."""
    if keyword.kind is bool:
        return ["True", "False"]
    if typing.get_origin(keyword.kind) is typing.Literal:
        return [*typing.get_args(keyword.kind), *(["None"] if keyword.optional else [])]
    return []


def _datasets(family: Any) -> list[str]:
    return list(getattr(family, "DATASETS", ()))


def _plain(those: Iterable[str]) -> list[str]:
    return [word for word in dict.fromkeys(those) if _WORD.fullmatch(word)]


def _cases(known: Mapping[str, list[str]]) -> str:
    lines = [f"        '{place}') echo '{' '.join(those)}' ;;" for place, those in known.items()]
    return "\n".join(["_jaxdistill_list() {", '    case "$1" in', *lines, "    esac", "}\n"])


def _switch(known: Mapping[str, list[str]]) -> str:
    lines = [
        f"        case '{place}'\n            string split -- ' ' '{' '.join(those)}'"
        for place, those in known.items()
    ]
    return "\n".join(["function _jaxdistill_list", "    switch $argv", *lines, "    end", "end\n"])
