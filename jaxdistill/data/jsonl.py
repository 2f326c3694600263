"""Files with a JSON object a line that name images beside them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.errors import InputError
from jaxdistill.io.reading import one_line


def objects(path: Path, *, holds: str, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, and where each stands, for messages; empty lines are passed over.

    Args:
        path: The file.
        holds: For the message when it is missing: what stands in it.
        form: For the message when a line is no object: what one has.

    Raises:
        InputError: If the file is missing, or a line is no such object.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: {holds}")
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # and at no other sign that ends a line
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({one_line(error)})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no JSON ({one_line(error)})") from error
        if not isinstance(said, dict):
            raise InputError(f"{where} is no object with {form}")
        yield where, said


def is_whole(text: str) -> bool:
    """Whether a text has no half of a character, which no file could hold."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def file_in(root: Path, name: str, where: str) -> Path:
    """A file that a line names.

    Args:
        root: The resolved folder that it must be in.
        name: Its path from there.
        where: Where the line stands.

    Raises:
        InputError: If there is none, or it lies elsewhere.
    """
    try:
        path = (root / name).resolve()
        there = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError, RuntimeError):
        there = False
    if not there:
        raise InputError(f"{where}: {name!r} is no file in {root}")
    return path
