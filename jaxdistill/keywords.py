"""Settings as keywords: the signature of a function is the table of what may be set.

A group of settings, a method's `recipe` and an evaluation's `evaluate` are callables with annotated
keywords and defaults. What a config says is held against the signature, so that a setting is
declared once, with its type, its range and its default.

The annotations that a table may have are `bool`, `int`, `float`, `str`, `Literal`, tuples of those
with an ellipsis, one or many as `int | tuple[int, ...]`, any of them `| None`, and `Annotated` with
`Between` or `ASIDE`. Keywords that several functions share stand once, in a `NamedTuple`:
`**rest: Annotated[Any, Shared, ...]` takes them, and `grouped` gives them back as such.
"""

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from jaxdistill.errors import InputError


class Between(NamedTuple):
    """The range of a number, ends included.

    Attributes:
        least: The smallest value.
        most: The largest. Where only a slip of the keyboard would go there, it is large.
    """

    least: float
    most: float


#: Marks a setting that says how or where something is done and not what: it identifies nothing.
ASIDE = "aside"

Count = Annotated[int, Between(1, 10**9)]
"""A whole number from one."""
Natural = Annotated[int, Between(0, 10**9)]
"""A whole number from zero."""
Rate = Annotated[float, Between(0, 1e3)]
"""A learning rate, or what multiplies one."""
Weight = Annotated[float, Between(0, 1e6)]
"""The weight of a term of a loss."""
Fraction = Annotated[float, Between(0, 1)]
"""A part of a whole."""
Dtype = Literal["float32", "bfloat16"]
"""The type that a network computes in."""
Folder = Annotated[str | None, ASIDE]
"""Where something lies; by default in the workdir."""

#: The default of a setting that has none.
REQUIRED = inspect.Parameter.empty

# The largest whole number that arrays hold.
_LARGEST = 2**63 - 1


class Keyword(NamedTuple):
    """One row of a table.

    Attributes:
        kind: The annotation, without `Annotated` and `None`.
        optional: Whether it may be None.
        between: The range, of a number or of each number of a tuple.
        aside: Whether it identifies nothing.
        default: Its value when nothing is said, or `REQUIRED`.
        or_many: Whether it may be a tuple of such values as well.
    """

    kind: Any
    optional: bool
    between: Between | None
    aside: bool
    default: Any
    or_many: bool = False


@functools.lru_cache
def table(function: Callable) -> dict[str, Keyword]:
    """The settings that a callable takes.

    Args:
        function: A function, whose keyword-only arguments count, or a class of `NamedTuple`.

    Returns:
        Name -> what it may be.
    """
    whole = inspect.isclass(function)
    hints = typing.get_type_hints(function, include_extras=True)
    found, shared = {}, {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for group in typing.get_args(hints[name])[1:]:
                shared |= table(group)
        elif whole or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            found[name] = _keyword(hints.get(name, str), parameter.default)
    return found | shared


def _keyword(hint: Any, default: Any) -> Keyword:
    found: list[Any] = []

    def bare(hint):
        if typing.get_origin(hint) is Annotated:
            inner, *notes = typing.get_args(hint)
            found.extend(notes)
            return bare(inner)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            options = typing.get_args(hint)
            found.extend(None for x in options if x is type(None))
            first, *others = (x for x in options if x is not type(None))
            found.extend(tuple for x in others if typing.get_origin(x) is tuple)
            return bare(first)
        if typing.get_origin(hint) is tuple:
            return tuple[bare(typing.get_args(hint)[0]), ...]
        return hint

    kind = bare(hint)
    between = next((note for note in found if isinstance(note, Between)), None)
    return Keyword(kind, None in found, between, ASIDE in found, default, tuple in found)


def check(path: str, keyword: Keyword, value: Any) -> Any:
    """A value in the type of its setting: whole numbers become floats, and lists tuples, if asked.

    Args:
        path: What the setting is called, for the message.
        keyword: What it may be.
        value: As a config, a flag or a file says it.

    Raises:
        InputError: If it cannot be that.
    """
    try:
        return _converted(keyword, value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{path} is {shown(repr(value))}; it must be {expected(keyword)}"
        ) from None


def _converted(keyword: Keyword, value: Any) -> Any:
    if value is None and keyword.optional:
        return None
    if keyword.or_many and isinstance(value, tuple | list):
        if not value:
            raise ValueError
        return tuple(_converted(keyword._replace(optional=False, or_many=False), x) for x in value)
    if typing.get_origin(keyword.kind) is tuple:
        if not isinstance(value, tuple | list):
            raise TypeError
        inner = keyword._replace(kind=typing.get_args(keyword.kind)[0], optional=False)
        return tuple(_converted(inner, x) for x in value)
    if typing.get_origin(keyword.kind) is Literal:
        if not isinstance(value, str) or value not in typing.get_args(keyword.kind):
            raise ValueError
        return value
    if keyword.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not keyword.kind:
        raise TypeError
    if keyword.kind is int and abs(value) > _LARGEST:
        raise ValueError
    if keyword.kind is float and value != value:
        raise ValueError
    if keyword.between is not None and not keyword.between.least <= value <= keyword.between.most:
        raise ValueError
    return value


def expected(keyword: Keyword) -> str:
    """What a setting may be, as part of a sentence."""
    kind, many = keyword.kind, False
    if typing.get_origin(kind) is tuple:
        kind, many = typing.get_args(kind)[0], True
    if typing.get_origin(kind) is Literal:
        text = f"{'of ' if many else ''}{' or '.join(typing.get_args(kind))}"
    else:
        names = {
            bool: ("true or false", "of booleans"),
            int: ("a whole number", "of whole numbers"),
            float: ("a number", "of numbers"),
            str: ("a text", "of texts"),
        }
        text = names.get(kind, (getattr(kind, "__name__", str(kind)), f"of {kind}"))[many]
    if keyword.between is not None:
        least, most = (f"{x:g}" if abs(x) >= 1e6 else f"{x}" for x in keyword.between)
        text += f" between {least} and {most}"
    if many:
        text = f"a tuple {text}"
    if keyword.or_many:
        text += ", or a tuple of such"
    return f"{text}, or None" if keyword.optional else text


def resolve(
    function: Callable,
    given: Mapping[str, Any],
    path: str,
    renamed: Callable[[str], str | None] = lambda path: None,
) -> dict[str, Any]:
    """All settings of a callable: those given, checked, and the defaults of the others.

    Args:
        function: See `table`.
        given: What a config says.
        path: What the group is called, for messages.
        renamed: Old path of a setting -> its path of today.

    Raises:
        InputError: If a setting is unknown, missing or wrong: one line that names it, and what it
            may be.
    """
    known = table(function)
    for name in given:
        if name not in known:
            raise unknown(f"{path}.{name}", list(known), renamed(f"{path}.{name}"))
    resolved = {}
    for name, keyword in known.items():
        value = given.get(name, keyword.default)
        if value is REQUIRED:
            raise InputError(f"{path}.{name} is missing; it must be {expected(keyword)}")
        resolved[name] = check(f"{path}.{name}", keyword, value)
    return resolved


def defaults(function: Callable) -> dict[str, Any]:
    """The settings that have a default."""
    return {n: k.default for n, k in table(function).items() if k.default is not REQUIRED}


def identifying(function: Callable, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that say what is made, and not how or where."""
    known = table(function)
    return {n: v for n, v in settings.items() if n not in known or not known[n].aside}


def grouped(rest: Mapping[str, Any], *groups: type) -> list[Any]:
    """Shared keywords as the named tuples that they stand in, with the defaults of those not given.

    Args:
        rest: What a function got as `**rest`.
        groups: The classes in its annotation.

    Raises:
        TypeError: If a keyword is of none of them.
    """
    own = [{n: rest[n] for n in group._fields if n in rest} for group in groups]
    if strange := rest.keys() - set().union(*own):
        raise TypeError(f"unexpected keyword {min(strange)!r}")
    return [group(**given) for group, given in zip(groups, own, strict=True)]


def unknown(path: str, options: list[str], new: str | None = None) -> InputError:
    """The error about a setting that there is not."""
    if new is not None:
        return InputError(f"setting {shown(path)} is now called {new}; write that")
    close = difflib.get_close_matches(path.rpartition(".")[2], options) or sorted(options)
    known = f"choose from {', '.join(close)}" if close else "there are none here"
    return InputError(f"unknown setting {shown(path)}; {known}")


def shown(text: str) -> str:
    """A text from outside on one line, and not longer than a line."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 100 else text[:97] + "..."


def quoted(value: Any) -> str:
    """A text from outside in quotes, or what else there is, not longer than a line."""
    if not isinstance(value, str):
        return shown(repr(value))
    return repr(value if len(value) <= 100 else value[:97] + "...")
