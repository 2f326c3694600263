"""Configs: where a name is found, and the argument string that selects a preset."""

import ast
import difflib
import importlib.util
from pathlib import Path
from typing import Any

import ml_collections

from jaxdistill.errors import InputError

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
    name, colon, argument = spec.partition(":")
    path = shipped().get(name, Path(name))
    if not path.is_file():
        names = ", ".join(sorted(shipped()))
        raise InputError(f"no config {name!r}: give a path to a .py file or one of: {names}")
    return f"{path}{colon}{argument}"


def load(spec: str) -> ml_collections.ConfigDict:
    """The `ConfigDict` of `name[:argument]`, for notebooks and scripts.

    Example:
        >>> config = load("ncfm:digits,ipc=1")
    """
    path, _, argument = resolve(spec).partition(":")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(argument or None)


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
            wrong = ".".join(["config", *names[: i + 1]])
            raise InputError(
                f"unknown setting {wrong}" + (f"; choose from {close}" if close else "")
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
        except (ValueError, SyntaxError):
            value = text
    try:
        node[name] = value
    except TypeError:
        raise InputError(
            f"config.{path}={text!r} must be of type {kind.__name__}, such as {node[name]!r}"
        ) from None


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
            raise InputError(f"unknown config argument {item!r}; choose from {options}")
        result[key] = _convert(key, value, defaults[key])
    return result


def _convert(key: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise InputError(f"config argument {key}={value!r} must be true or false")
        return value.lower() == "true"
    kind = str if default is None else type(default)
    try:
        return kind(value)
    except ValueError:
        raise InputError(
            f"config argument {key}={value!r} must be of type {kind.__name__}"
        ) from None
