"""Configs: where a name is found, and the argument string that selects a preset."""

import ast
import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any

import ml_collections

from jaxdistill.errors import InputError

_LARGEST = 2**63 - 1  # of the whole numbers that arrays hold
# Inside an installed wheel the configs lie in the package; in a checkout they lie beside it.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


def shipped() -> dict[str, Path]:
    """The configs that come with the library, by name."""
    files = [f for folder in _FOLDERS for f in sorted(folder.glob("*.py"))]
    return {f.stem: f for f in reversed(files) if not f.stem.startswith("_")}


def resolve(spec: str) -> str:
    """Turns `name[:argument]` or `path.py[:argument]` into `path.py[:argument]`.

    Raises:
        InputError: if neither a shipped config nor a file has that name.
    """
    path, colon, argument = _find(spec)
    return f"{path}{colon}{argument}"


def load(spec: str) -> ml_collections.ConfigDict:
    """The `ConfigDict` of `name[:argument]`, for notebooks and scripts.

    The file is run as the Python program that it is: load none that you would not run.

    Raises:
        InputError: if there is no such config, it has no `get_config`, or refuses the argument.

    Example:
        >>> config = load("ncfm:digits,ipc=1")
    """
    path, _, argument = _find(spec)
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a Python program: {error}") from error
    if not callable(getattr(module, "get_config", None)):
        raise InputError(f"{path} is no config: it defines no get_config(argument)")
    config = module.get_config(argument or None)
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"get_config of {path} returns {type(config).__name__}, not a ConfigDict")
    return config


def _find(spec: str) -> tuple[Path, str, str]:
    name, colon, argument = spec.partition(":")
    path = shipped().get(name, Path(name))
    # Unlike Path.is_file, this is False for what no file system takes as a name.
    if path.suffix != ".py" or not os.path.isfile(path):
        names = ", ".join(sorted(shipped()))
        raise InputError(f"no config {_shown(name)}: give a path to a .py file or one of: {names}")
    return path, colon, argument


def override(config: ml_collections.ConfigDict, path: str, text: str) -> None:
    """Sets `a.b` to what the text says, in the type that the setting has.

    Args:
        config: Changed in place.
        path: Names joined by dots.
        text: A string as it is; everything else as Python writes it, such as `1e-3`,
            `("random", "herding")` or `None`.

    Raises:
        InputError: if there is no such setting, or the value is of another type.
    """
    node, names = config, path.split(".")
    for i, name in enumerate(names):
        options = list(node) if isinstance(node, ml_collections.ConfigDict) else []
        if name not in options:
            close = ", ".join(difflib.get_close_matches(name, options) or options)
            wrong = _shown(".".join(["config", *names[: i + 1]]))
            raise InputError(
                f"unknown setting {wrong[1:-1]}" + (f"; choose from {close}" if close else "")
            )
        if i < len(names) - 1:
            node = node.get(name)
    name, kind = names[-1], node.get_type(names[-1])
    if kind is ml_collections.ConfigDict:
        raise InputError(f"config.{path} is a group of settings: {', '.join(node[name])}")
    value = text
    if kind is not str:
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        # What it cannot parse also exhausts its stack; {[]: 1} is a TypeError.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text
    before = node[name]
    try:
        if not _fits(value, kind, optional=_is_optional(node, name)):
            raise TypeError
        node[name] = value
    except (TypeError, OverflowError):
        raise InputError(
            f"config.{path}={_shown(text)} must be of type {kind.__name__}, such as {before!r}"
        ) from None


def _is_optional(node: ml_collections.ConfigDict, name: str) -> bool:
    """Whether a setting may be None: a placeholder, or one that is None already."""
    raw = dict(node.items(preserve_field_references=True))[name]
    return raw is None or isinstance(raw, ml_collections.FieldReference)


def _fits(value: Any, kind: type, *, optional: bool) -> bool:
    """Refuses what ConfigDict lets pass and no setting means.

    That is None, booleans as numbers, numbers that no array holds, and nested containers.
    """
    if value is None:
        return optional
    if isinstance(value, tuple | list):
        return all(
            _fits(x, type(x), optional=False) and not isinstance(x, tuple | list) for x in value
        )
    if isinstance(value, bool):
        return kind is not int and kind is not float
    return isinstance(value, str | float) or (isinstance(value, int) and abs(value) <= _LARGEST)


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
            raise InputError(f"unknown config argument {_shown(item)}; choose from {options}")
        result[key] = _convert(key, value, defaults[key])
    return result


def _convert(key: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise InputError(f"config argument {key}={_shown(value)} must be true or false")
        return value.lower() == "true"
    kind = str if default is None else type(default)
    try:
        converted = kind(value)
        if not _fits(converted, kind, optional=False):
            raise ValueError
    except (ValueError, OverflowError):
        raise InputError(
            f"config argument {key}={_shown(value)} must be of type {kind.__name__}"
        ) from None
    return converted


def _shown(text: str) -> str:
    """Quoted, on one line, and not longer than a line."""
    return repr(text if len(text) <= 100 else text[:97] + "...")
