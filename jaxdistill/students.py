"""Students of any family, ready for use without the config that made them."""

import inspect
import os
from pathlib import Path
from typing import Any

from jaxdistill import settings
from jaxdistill.errors import InputError
from jaxdistill.io.files import expanded
from jaxdistill.io.reading import read_json


def load_student(
    folder: str | os.PathLike[str], teacher: str | os.PathLike[str] | None = None
) -> Any:
    """Reads a student that a run has made.

    Args:
        folder: A workdir, one of its `baselines/`, or the folder `artifacts` in either.
        teacher: Of a student of a flow, the folder of the teacher that it stands on; by default
            the one that it was trained under.

    Returns:
        `jaxdistill.tasks.flow.Trained`, which samples, or
        `jaxdistill.tasks.answering.Trained`, which answers.

    Raises:
        InputError: If there is no student, or something that it needs is missing or another's.
    """
    family, card = _family(folder)
    if teacher is None:
        return family.load_student(folder)
    if "teacher" not in inspect.signature(family.load_student).parameters:
        raise InputError(f"the student in {card.parent} stands on no teacher; leave it out")
    return family.load_student(folder, teacher)


def export_student(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes a student of a run as other libraries have it.

    Args:
        folder: As of `load_student`.
        out: Where it goes; made if missing.

    Raises:
        InputError: If there is no student, other libraries have none of its kind, or it cannot be
            written.
    """
    family, card = _family(folder)
    if not hasattr(family, "export_student"):
        raise InputError(f"{card} is of a family whose students stand on their teachers here")
    family.export_student(folder, out)


def _family(folder: str | os.PathLike[str]) -> tuple[Any, Path]:
    """The family of a student, and its card."""
    place = expanded(folder)
    cards = [where / "student.json" for where in (place / "artifacts", place)]
    card = next((path for path in cards if path.is_file()), None)
    if card is None:
        raise InputError(f"{place} holds no student.json; give the folder that a run wrote")
    said = read_json(card)
    config = said.get("config") if isinstance(said, dict) else None
    name = config.get("family") if isinstance(config, dict) else None
    family = settings.family(name or "flow")
    if not hasattr(family, "load_student"):
        raise InputError(f"{card} is of the family {name}, which has no students")
    return family, card
