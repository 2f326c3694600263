"""Metrics for a tracker of experiments, wandb or trackio, by the same two methods as `io.writers`.

Nothing leaves the machine unless it is asked for where the tracker itself is told so: wandb keeps
its files in the folder of the run until `WANDB_MODE=online` is set or `wandb sync` is called, and
trackio keeps a database of its own until `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` is set.
"""

import contextlib
import functools
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxdistill.errors import InputError
from jaxdistill.io.files import dump, write_files
from jaxdistill.io.reading import one_line, read_json
from jaxdistill.io.writers import Values, number

TRACKERS = ("wandb", "trackio")
_PROJECT = "jaxdistill"
_FILE = "tracker.json"


class TrackerWriter:
    """Tells a tracker each step at most once, however often the run is begun again.

    Trackers cannot forget steps, and a run that goes on computes again, to the same values, what it
    had done after its last checkpoint. So the last step that a tracker was told is kept beside the
    run, written before it is told; what lies before is not told again. A process that is killed may
    take with it what the tracker had not stored: `metrics.jsonl` is what is whole.
    """

    def __init__(
        self,
        tracker: str,
        folder: str | os.PathLike[str],
        *,
        name: str,
        settings: Mapping[str, Any],
        restarts: int = 0,
    ):
        """Begins a run of the tracker's, or goes on with the one that the folder has.

        Args:
            tracker: One of `TRACKERS`.
            folder: Where the run lies; gets `tracker.json`, and of wandb `wandb/`.
            name: What the run is called.
            settings: What the tracker shows as the run's config.
            restarts: How often the run went back to a checkpoint with other rates: each time is a
                run of its own, for its values are others.

        Raises:
            InputError: If the tracker is not installed, or cannot begin.
        """
        try:
            module = importlib.import_module(tracker)
        except ImportError as error:
            raise InputError(
                f"run.tracker={tracker} needs {tracker}: pip install jaxdistill[{tracker}]"
            ) from error
        self._path = Path(folder) / _FILE
        self._known = {"tracker": tracker, "restarts": restarts}
        stored = _stored(self._path)
        if {name: stored.get(name) for name in self._known} != self._known:
            stored = {"id": secrets.token_hex(4), "step": -1}
        self._known |= {"id": stored["id"], "step": stored["step"]}
        title = f"{name}, restart {restarts}" if restarts else name
        begin = {"wandb": _wandb, "trackio": _trackio}[tracker]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where a table will be printed
                self._log, self._finish = begin(
                    module, self._path.parent, title, self._known["id"], dict(settings)
                )
        except Exception as error:  # trackers raise many kinds of errors
            raise InputError(f"{tracker} cannot begin a run: {one_line(error)}") from error

    def write(self, step: int, values: Values) -> None:
        """Tells the tracker the values of a step, unless it has been told.

        Raises:
            InputError: When a value is not a number.
        """
        if step <= self._known["step"]:
            return
        numbers = {name: number(name, value) for name, value in values.items()}
        self._known["step"] = int(step)
        write_files({self._path: functools.partial(dump, self._known)})
        self._log(numbers, step=int(step))

    def close(self) -> None:
        """Waits until the tracker has stored what it was told."""
        with contextlib.redirect_stdout(sys.stderr):
            self._finish()


def _stored(path: Path) -> dict[str, Any]:
    """What the folder says of the tracker's run; nothing if there was none."""
    if not path.exists():
        return {}
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise InputError("it is no object")
        if not isinstance(stored.get("id"), str) or type(stored.get("step")) is not int:
            raise InputError("it lacks id and step")
    except InputError as error:
        raise InputError(
            f"{path} does not say what a tracker was told ({error}); delete it, and a new run of "
            "the tracker begins"
        ) from error
    return stored


def _wandb(
    wandb: ModuleType, folder: Path, name: str, identity: str, settings: dict[str, Any]
) -> tuple[Callable, Callable]:
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        dir=folder,
        id=identity,
        name=name,
        config=settings,
        mode=os.environ.get("WANDB_MODE", "offline"),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
    )
    # Else a step is stored only when the next is told.
    return functools.partial(run.log, commit=True), run.finish


def _trackio(
    trackio: ModuleType, folder: Path, name: str, identity: str, settings: dict[str, Any]
) -> tuple[Callable, Callable]:
    del folder  # its database is one for all runs
    run = trackio.init(
        project=_PROJECT,
        name=f"{name}, {identity}",
        config=settings,
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    # Which, unlike the run's, is not called once more when the process ends.
    return run.log, trackio.finish
