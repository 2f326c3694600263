"""Configs: where a name is found, and the argument string that selects a preset."""

import ast
import difflib
import importlib.util
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from jaxdistill import keywords, settings
from jaxdistill.errors import InputError
from jaxdistill.io.reading import read_json

_LARGEST = 2**63 - 1  # of the whole numbers that arrays hold
# Settings that a config's recipe depends on, and the keywords of `get_config` that take them.
_SAID = {"data.name": "dataset", "method.name": "method"}
# Inside an installed wheel the configs lie in the package; in a checkout they lie beside it.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


class UnknownArgument(InputError):
    """An argument that a config has not.

    Attributes:
        options: Those that it has, `key=` or a word alone.
    """

    def __init__(self, message: str, options: list[str]):
        """Takes what the message cannot be asked for."""
        super().__init__(message)
        self.options = options


def arguments(name: str) -> list[str]:
    """What may stand behind the colon of a config, `key=` or a word alone."""
    try:
        load(f"{name}:?")
    except UnknownArgument as unknown:
        return unknown.options
    return []


def shipped() -> dict[str, Path]:
    """The configs that come with the library, by name."""
    files = [f for folder in _FOLDERS for f in sorted(folder.glob("*.py"))]
    return {f.stem: f for f in reversed(files) if not f.stem.startswith("_")}


def resolve(spec: str) -> str:
    """Turns `name[:argument]` or `path[:argument]` into `path[:argument]`.

    Raises:
        InputError: if neither a shipped config nor a file has that name.
    """
    path, colon, argument = _find(spec)
    return f"{path}{colon}{argument}"


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ml_collections.ConfigDict:
    """The config of `name[:argument]`, every setting said, for notebooks and scripts.

    The file is run as the Python program that it is: load none that you would not run. Where its
    `get_config` has the keywords `dataset` and `method`, it gets the overrides of `data.name` and
    `method.name` so: a path may then hold the commas that an argument may not.

    Args:
        spec: A shipped config or the path of one, and its argument; or the path of the
            `config.json` that a run has left, with every setting as it was.
        overrides: Path of a setting -> its text, as on the command line.

    Raises:
        InputError: If there is no such config, it has no `get_config` or refuses the argument, or a
            setting is unknown or wrong.

    Example:
        >>> config = load("ncfm:dataset=digits,ipc=1", {"method.steps": "100"})
    """
    path, _, argument = _find(spec)
    if path.suffix == ".json":
        return complete(_stored(path, argument), overrides or {})
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a Python program: {error}") from error
    if not callable(getattr(module, "get_config", None)):
        raise InputError(f"{path} is no config: it defines no get_config(argument)")
    overrides = dict(overrides or {})
    # A recipe follows the data and the method, whichever way they are named.
    taken = inspect.signature(module.get_config).parameters
    said = {word: path for path, word in _SAID.items() if path in overrides and word in taken}
    config = module.get_config(argument or None, **{w: overrides.pop(p) for w, p in said.items()})
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"get_config of {path} returns {type(config).__name__}, not a ConfigDict")
    return complete(config, overrides)


def complete(
    config: ml_collections.ConfigDict | Mapping, overrides: Mapping[str, str]
) -> ml_collections.ConfigDict:
    """Says every setting of a config: those overridden, those given, and the others' defaults.

    What a row, an evaluation or the family is called is overridden first, for the settings that
    there are depend on it.

    Args:
        config: As `get_config` gives it, or nested dictionaries.
        overrides: Path of a setting -> its text.

    Raises:
        InputError: If a setting is unknown or wrong.
    """
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    named = {p: text for p, text in overrides.items() if p == "family" or p.endswith(".name")}
    named.pop("data.name", None)
    for path, text in named.items():
        *groups, name = path.split(".")
        node = plain
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise InputError(f"config.{keywords.shown(path)} is no setting: {group} is a value")
        node[name] = text
    said = _in_order(settings.resolve(plain).stated())
    for path, text in overrides.items():
        if path not in named:
            override(said, path, text)
    return said.lock()


def _in_order(tree: Mapping) -> ml_collections.ConfigDict:
    """Nested dictionaries as a `ConfigDict` that keeps the order of what it holds."""
    config = ml_collections.ConfigDict(sort_keys=False)
    for name, value in tree.items():
        plain = tuple(value) if isinstance(value, list) else value
        config[name] = _in_order(value) if isinstance(value, Mapping) else plain
    return config


def _stored(path: Path, argument: str) -> dict[str, Any]:
    """What a run's `config.json` holds."""
    if argument:
        raise InputError(f"{path} says every setting, and takes no argument; override them")
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise InputError("it is no object")
    except InputError as error:
        raise InputError(f"{path} is no run's config: {error}") from error
    return stored


def _find(spec: str) -> tuple[Path, str, str]:
    name, colon, argument = spec.partition(":")
    path = shipped().get(name, Path(name))
    # Unlike Path.is_file, this is False for what no file system takes as a name.
    if path.suffix not in (".py", ".json") or not os.path.isfile(path):
        close = difflib.get_close_matches(name, shipped())
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise InputError(
            f"no config {keywords.quoted(name)}: give a path to a .py file or to a run's "
            f"config.json, or a name that jaxdistill list has{meant}"
        )
    return path, colon, argument


def override(config: ml_collections.ConfigDict, path: str, text: str) -> None:
    """Sets `a.b` to what the text says, in the type that the setting has.

    Args:
        config: A complete config; changed in place.
        path: Names joined by dots.
        text: A string as it is; everything else as Python writes it, such as `1e-3`,
            `("convnet", "vgg11")` or `None`.

    Raises:
        InputError: If there is no such setting, or the value is of another type.
    """
    node, names = config, path.split(".")
    for i, name in enumerate(names):
        options = list(node) if isinstance(node, ml_collections.ConfigDict) else []
        if name not in options:
            here = ".".join(names[: i + 1])
            raise keywords.unknown(f"config.{here}", options, settings.renamed(here))
        if i < len(names) - 1:
            node = node[name]
    name = names[-1]
    if isinstance(node[name], ml_collections.ConfigDict):
        raise InputError(f"config.{path} is a group of settings: {', '.join(node[name])}")
    keyword = settings.keyword(config.to_dict(), names)
    value = text
    if keyword.kind is not str or (keyword.optional and text == "None"):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        # What it cannot parse also exhausts its stack; {[]: 1} is a TypeError.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text
    with config.unlocked(), node.ignore_type():
        node[name] = keywords.check(f"config.{path}", keyword, value)


def parse_argument(argument: str | None, words: tuple[str, ...] = (), **defaults: Any) -> dict:
    """Parses `word,key=value,...` into a dict typed by the defaults.

    Args:
        argument: The text behind the colon of `--config=name:argument`.
        words: Words that may stand alone; each becomes a boolean entry.
        **defaults: Allowed keys; a value is converted to the type of its default (a string
            where the default is None).

    Returns:
        `defaults` and `{word: False}`, updated with what the argument says.

    Raises:
        InputError: for a key or word that is not known, or a value of the wrong type.
    """
    result = defaults | dict.fromkeys(words, False)
    for item in filter(None, (argument or "").split(",")):
        key, equals, value = item.partition("=")
        if not equals and key in words:
            result[key] = True
            continue
        if not equals or key not in defaults:
            options = ", ".join([f"{k}=…" for k in defaults] + list(words))
            raise UnknownArgument(
                f"unknown config argument {keywords.quoted(item)}; choose from {options}",
                [*(f"{k}=" for k in defaults), *words],
            )
        result[key] = _convert(key, value, defaults[key])
    return result


def derived(
    spec: str, argument: str | None, dataset: str | None, **defaults: Any
) -> ml_collections.ConfigDict:
    """Another config under a name of its own, with the arguments that make it so.

    Args:
        spec: The other config with those arguments, such as `ncfm:method=dm`.
        argument: What the user has given behind the colon.
        dataset: What the command line says of the data, which goes before the argument; or None.
        **defaults: The arguments that the user may give, beside `dataset` (digits), `seed` (0) and
            the word `smoke`.

    Raises:
        InputError: As `parse_argument` and `load` do.
    """
    arg = parse_argument(argument, words=("smoke",), dataset="digits", **defaults, seed=0)
    return based(spec, arg, dataset, *defaults)


def based(
    spec: str, arg: Mapping[str, Any], dataset: str | None, *names: str
) -> ml_collections.ConfigDict:
    """Another config to be changed, with some of the arguments of one's own.

    Args:
        spec: The other config with an argument, such as `ncfm:method=dm`.
        arg: What `parse_argument` gave, with `dataset`, `seed` and `smoke`, which it gets too.
        dataset: What the command line says of the data, which goes before the argument; or None.
        *names: Others of these arguments that it gets.

    Raises:
        InputError: As `load` does.
    """
    rest = "".join(f",{name}={arg[name]}" for name in (*names, "seed"))
    smoke = ",smoke" if arg["smoke"] else ""
    name = arg["dataset"] if dataset is None else dataset
    return load(f"{spec}{rest}{smoke}", {"data.name": name}).unlock()


def _convert(key: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise InputError(
                f"config argument {key}={keywords.quoted(value)} must be true or false"
            )
        return value.lower() == "true"
    kind = str if default is None else type(default)
    try:
        converted = kind(value)
        if isinstance(converted, int) and abs(converted) > _LARGEST:
            raise ValueError
    except (ValueError, OverflowError):
        raise InputError(
            f"config argument {key}={keywords.quoted(value)} must be of type {kind.__name__}"
        ) from None
    return converted
