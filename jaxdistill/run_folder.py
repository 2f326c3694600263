"""The folder of a run: whose it is, and what every run leaves in it."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxdistill.errors import InputError
from jaxdistill.io.files import dump, remove_leftovers, write_files
from jaxdistill.io.reading import read_json
from jaxdistill.io.versions import versions as of_libraries
from jaxdistill.parallel import processes


def check(workdir: Path, settings: dict, identity: Callable[[dict], dict]) -> None:
    """Makes sure that the folder is free, or holds a run with the same settings.

    Args:
        workdir: The folder; it need not exist.
        settings: The config as JSON has it.
        identity: Takes out of settings those that must be the same.

    Raises:
        InputError: If it holds another run, or what is no run's.
    """
    stored = workdir / "config.json"
    if not stored.is_file():
        return
    try:
        before = identity(read_json(stored))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{stored} is not a run's config ({error}); use another workdir"
        ) from error
    changed = _difference(before, identity(settings))
    if changed:
        raise InputError(
            f"workdir {workdir} was started with another config ({changed});"
            " use another workdir, or the config it was started with"
        )


def make(workdir: Path, settings: dict) -> None:
    """Makes the folder, writes `config.json` and `versions.json`, removes what a kill left over.

    Of several processes the first does it, and the others wait.

    Raises:
        InputError: If the folder cannot be made.
    """
    if processes.is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the workdir {workdir}: {error.strerror}") from error
        for part in (workdir, *workdir.glob("baselines/*")):
            for folder in (part, part / "artifacts", part / "teacher", part / "judge"):
                remove_leftovers(folder)
        write_files(
            {
                workdir / "config.json": functools.partial(dump, settings),
                workdir / "versions.json": functools.partial(dump, versions()),
            }
        )
    processes.wait("set up")


def of(setup: Any, method: str) -> Path:
    """Where a method of a run lives: the run's own in the workdir, a baseline below it.

    Args:
        setup: Of either family, with `workdir` and `config`.
        method: One of `settings.rows`.
    """
    main = method == setup.config.method.name
    return setup.workdir if main else setup.workdir / "baselines" / method


def versions() -> dict:
    """Of the libraries, and what they run on."""
    return of_libraries() | {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _difference(before: Mapping, now: Mapping, prefix: str = "") -> str:
    """The first settings that differ, as `a.b=1, now 2`."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found.append(_difference(old, new, f"{prefix}{key}."))
        elif old != new:
            found.append(f"{prefix}{key}={old}, now {new}")
    return "; ".join(filter(None, found))
