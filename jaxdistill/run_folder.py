"""The folder of a run: what it holds, and whose each of its rows is."""

import contextlib
import errno
import fcntl
import functools
import os
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.errors import InputError
from jaxdistill.io.files import dump, remove_leftovers, write_files
from jaxdistill.io.reading import read_json
from jaxdistill.io.versions import versions
from jaxdistill.parallel import processes
from jaxdistill.settings import difference, digest

_ROW = "row.json"
_LOCK = ".lock"


def check(workdir: Path) -> None:
    """Refuses a workdir of a version whose runs are not understood.

    Raises:
        InputError: In this case.
    """
    if (workdir / "config.json").is_file() and not (workdir / _ROW).is_file():
        config = _read(workdir / "config.json")
        if config is not None and "baselines" not in config:
            raise InputError(
                f"workdir {workdir} was made by a version before 0.2, whose settings had other "
                "names; use another workdir, and read what it made with "
                "jaxdistill.load_distilled or that version"
            )


@contextlib.contextmanager
def opened(workdir: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Makes the folder and holds it for this process, with `config.json` and `versions.json` in it.

    Another start in the same folder is refused meanwhile. What a killed process left over is
    removed. A folder that cannot be written to is opened as it is: what is finished can be read.
    Of several processes the first does all this, and the others wait.

    Raises:
        InputError: If the folder cannot be made, or another process holds it.
    """
    with contextlib.ExitStack() as stack:
        failure = None
        try:
            if processes.is_first():
                _make(workdir)
                if is_writable(workdir):
                    stack.enter_context(_held(workdir))
                    _prepare(workdir, config)
        except (InputError, OSError) as error:
            failure = error
        # The others wait here, and must not for ever.
        if processes.any_says(failure is not None):
            raise failure or InputError(f"the first process cannot open the workdir {workdir}")
        yield


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the workdir {workdir}: {error.strerror}") from error


def is_writable(workdir: Path) -> bool:
    """Whether files can be made there, which permissions alone do not tell."""
    try:
        with tempfile.TemporaryFile(dir=workdir):
            return True
    except OSError as error:
        # A full disk or a quota is said by what wants to write.
        return error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)


# Where what a kill leaves half-written is removed.
_FOLDERS = (
    *("", "artifacts", "teacher", "start", "judge", "generated", "readings", "answers"),
    *("assessment", "assessment/networks", "released", "copies"),
)


def _prepare(workdir: Path, config: Mapping[str, Any]) -> None:
    for part in (workdir, *workdir.glob("baselines/*")):
        for name in _FOLDERS:
            remove_leftovers(part / name)
    write_files(
        {
            workdir / "config.json": functools.partial(dump, config),
            workdir / "versions.json": functools.partial(dump, versions()),
        }
    )


@contextlib.contextmanager
def _held(workdir: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system takes back when the process ends, however it does.

    Where the file system knows no locks there is none.

    Raises:
        InputError: If another process holds it.
    """
    path = workdir / _LOCK
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = path.read_text("utf-8", "replace")[:200]
            raise InputError(
                f"workdir {workdir} is in use by {holder or 'another process'}; wait for it or end "
                "it, or use another workdir"
            ) from error
        except OSError:  # no such thing on this file system
            pass
        with contextlib.suppress(OSError):  # a full disk is told by what matters
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        os.close(lock)


def compare(folder: Path, wanted: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Makes sure that a row's folder is free, or holds a row of the same settings and data.

    They are compared one by one. A setting that was not there yet when the row was begun counts as
    its default of today, so that new settings leave older workdirs valid, while a default that has
    changed shows as a difference.

    Args:
        folder: The row's folder; it need not exist.
        wanted: What decides what the row is; what is not known yet may be left out.
        defaults: The defaults of its settings.

    Raises:
        InputError: If it holds another row, or what is no row's.
    """
    stored = _read(folder / _ROW)
    if stored is None:
        return
    known = {name: value for name, value in stored.items() if name in wanted}
    changed = difference(known, wanted, defaults)
    if changed:
        raise InputError(
            f"workdir {folder} was started with another config ({changed});"
            " use another workdir, or the config it was started with"
        )


def claim(
    folder: Path,
    wanted: Mapping[str, Any],
    defaults: Mapping[str, Any],
    withheld: Collection[str] = (),
) -> str:
    """Writes whose the folder is, if nobody has; else makes sure that it is this row's.

    Args:
        folder: The row's folder.
        wanted: All that decides what the row is.
        defaults: The defaults of its settings.
        withheld: Names of what the hash leaves out.

    Returns:
        A hash of what is written there, by which checkpoints and artefacts know the row.

    Raises:
        InputError: As `compare` does.
    """
    compare(folder, wanted, defaults)
    processes.wait(f"{folder.name} is compared")
    if processes.is_first() and not (folder / _ROW).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_files({folder / _ROW: functools.partial(dump, dict(wanted))})
    processes.wait(f"{folder.name} is claimed")
    return digest(identity(folder, withheld))


def identity(folder: Path, withheld: Collection[str] = ()) -> dict[str, Any]:
    """What a row's folder says that it is, as it was when the row was begun.

    Args:
        folder: The row's folder.
        withheld: Names of what is left out.

    Raises:
        InputError: If it says nothing.
    """
    stored = _read(folder / _ROW)
    if stored is None:
        raise InputError(f"{folder} holds no {_ROW}: no row was begun there")
    return {name: value for name, value in stored.items() if name not in withheld}


def config(workdir: Path) -> dict[str, Any]:
    """The config of a run, every setting said, as its folder has it.

    Raises:
        InputError: If it has none.
    """
    stored = _read(workdir / "config.json")
    if stored is None:
        raise InputError(f"{workdir} holds no config.json; give the workdir of a run")
    return stored


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise InputError("it is no object")
    except InputError as error:
        raise InputError(f"{path} is not a run's config ({error}); use another workdir") from error
    return stored
