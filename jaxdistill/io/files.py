"""Writing files so that a reader sees the old content or the new one, never a part."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxdistill.errors import InputError


def write_files(files: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Writes several files, each replaced as a whole, in the order given.

    Every content is complete and on disk under a temporary name beside its destination before
    the first destination is touched, so an error or a full disk changes nothing. The renames
    follow one by one: killed between two of them, the files before are new and those after old.

    Args:
        files: destination -> function that writes the content to an open binary file. The
            directories must exist.

    Raises:
        OSError: when a file cannot be written; its `filename` is the destination.
    """
    pending: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            # Not tempfile: it would leave the result readable by its owner only.
            with open(temporary, "xb") as file:
                pending[path] = temporary
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in pending.items():
            os.replace(temporary, path)
            _sync_directory(path.parent)
    except OSError as error:
        # A full disk is noticed by a write, which knows no name.
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        for temporary in pending.values():
            temporary.unlink(missing_ok=True)


def write_folder(folder: Path, files: Iterable[tuple[str, Callable[[BinaryIO], object]]]) -> None:
    """Writes a folder that is not there yet: it appears with all of its files, or not at all.

    Killed meanwhile, only a hidden folder beside it is left, `.NAME.XXXXXXXX.tmp`.

    Args:
        folder: Nothing may be there. The folder that it lies in is made when missing.
        files: Pairs of a path in the folder and a function that writes the content to an open
            binary file. Each is written before the next is asked for.

    Raises:
        InputError: When something is there.
        OSError: When a file cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} is there already, and nothing is overwritten; name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for name, write in files:
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        # Refused by the system should anything but an empty folder have come meanwhile.
        os.rename(temporary, folder)
        _sync_directory(folder.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path whose `~` is the home that a shell would put there.

    Raises:
        InputError: If it is of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"no such folder: {str(path)!r:.200}; {error}") from error


def dump(tree: Any, file: BinaryIO) -> None:
    """Writes JSON."""
    file.write(json.dumps(tree, indent=2).encode() + b"\n")


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes left of `write_files` in a directory, if there is one.

    Only for directories that no other process writes to.
    """
    for temporary in directory.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable; some systems and network mounts cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
