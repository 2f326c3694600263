"""Where metrics go: a JSON-lines file always, TensorBoard on request, a progress display.

`JsonlWriter`, `TensorBoardWriter` and the one of `io.trackers` share `write(step, values)` and
`close()`, so a tuple of them is all the composition there is.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxdistill.errors import InputError
from jaxdistill.io.files import write_files

Values = Mapping[str, object]
"""Name -> number: a Python number, or a NumPy or JAX scalar already on the host."""


class JsonlWriter:
    """Appends one JSON object a line: `step`, `time` (seconds since 1970), then the values.

    Whole numbers and finite floats are JSON numbers, floats in the shortest form that gives the
    same value back in their own precision. JSON knows no other floats: they are the strings
    "nan", "inf" and "-inf", which Python's `float` and NumPy read. Each record is handed to the
    system when it is written, so killing the process loses none.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None):
        """Opens the file for appending.

        Args:
            path: the file; its directory must exist. Earlier records are kept.
            resume_step: the step of the restored checkpoint: records of later steps are dropped,
                as the resumed run writes them again. A last line cut short is dropped in any
                case.

        Raises:
            InputError: when the file cannot be written.
        """
        self._path = path = Path(path)
        try:
            if path.exists():
                if not path.is_file():  # a pipe would be waited for, for ever
                    raise InputError(f"cannot write metrics to {path}: it is not a regular file")
                write_files({path: lambda file: file.writelines(_kept(path, resume_step))})
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise InputError(f"cannot write metrics to {path}: {error.strerror}") from error

    def write(self, step: int, values: Values) -> None:
        """Appends one record.

        Raises:
            InputError: when a value is not a number, or is named `step` or `time`, or the file
                cannot be written.
        """
        if taken := {"step", "time"} & set(values):
            raise InputError(f"metrics may not be named {', '.join(sorted(taken))}: choose others")
        record = {"step": int(step), "time": round(time.time(), 3)}
        for name, value in values.items():
            value = number(name, value)
            record[name] = value if np.isfinite(value) else str(value)
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"cannot write metrics to {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Closes the file."""
        # What a full disk refused is still buffered, and is refused once more.
        with contextlib.suppress(OSError):
            self._file.close()


class TensorBoardWriter:
    """Writes the values as TensorBoard scalars (event files), without TensorFlow."""

    def __init__(self, directory: str | os.PathLike[str], *, resume_step: int | None = None):
        """Starts an event file.

        Args:
            directory: where the event files go; made when missing.
            resume_step: as for `JsonlWriter`: TensorBoard is told to forget later steps.

        Raises:
            InputError: when tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError(
                "TensorBoard events need tensorboardX: pip install jaxdistill[tensorboard]"
            ) from error
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(os.fspath(directory), purge_step=purge)

    def write(self, step: int, values: Values) -> None:
        """Adds one point to the curve of each value.

        Raises:
            InputError: when a value is not a number.
        """
        for name, value in values.items():
            self._writer.add_scalar(name, float(number(name, value)), int(step))

    def close(self) -> None:
        """Writes what is pending and closes the event file."""
        self._writer.close()


class Progress:
    """Shows on standard error how far a run is: steps/s, time left and a few values.

    On a terminal that is a bar. Elsewhere (logs, notebooks) it is a plain line now and then.

    Attributes:
        done: The steps reported last.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        desc: str = "",
        *,
        keys: Sequence[str] | None = None,
        every: float = 10.0,
    ):
        """Starts the clock.

        Args:
            total: the last step.
            initial: the step the run starts from, above 0 when resumed; steps before it do not
                count for the speed.
            desc: what is running.
            keys: names of the values to show, in order; by default the first four given.
            every: seconds between plain lines.
        """
        self.done: float = initial
        self._keys = keys
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=desc,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
            )
            return
        self._total, self._desc, self._every = total, desc, every
        self._shown_step, self._shown_time = initial, time.monotonic()
        self._unshown: tuple[float, str] | None = None

    def update(self, step: float | int, values: Values) -> None:
        """Reports that `step` steps of the total are done, with the values measured there."""
        self.done = step
        keys = self._keys if self._keys is not None else list(values)[:4]
        text = " ".join(f"{k} {number(k, values[k]):.4g}" for k in keys if k in values)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._unshown = (step, text)
        if time.monotonic() - self._shown_time >= self._every:
            self._print()

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
        elif self._unshown is not None:
            self._print()

    def _print(self) -> None:
        (step, text), now = self._unshown, time.monotonic()
        speed = (step - self._shown_step) / max(now - self._shown_time, 1e-9)
        left = tqdm.format_interval((self._total - step) / speed) if speed > 0 else "?"
        parts = [
            self._desc,
            f"{step:.6g}/{self._total}",
            f"{speed:.3g} steps/s",
            f"{left} left",
            text,
        ]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
        self._unshown, self._shown_step, self._shown_time = None, step, now


def number(name: str, value: object) -> int | float:
    """A scalar as a Python number; floats of low precision by their shortest decimal form."""
    array = np.asarray(value)
    try:
        if array.ndim or array.dtype.kind in "OSU":
            raise ValueError
        if array.dtype.kind in "biu":
            return int(array)
        return float(str(array[()]))
    except ValueError:
        raise InputError(f"metric {name!r} is not one number: {str(value)[:80]!r}") from None


def _kept(path: Path, last_step: int | None) -> Iterator[bytes]:
    """Whole lines of the file up to a step; a line that is no record is nobody's to judge."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            whole = line.endswith(b"\n") or isinstance(record, dict)
            late = (
                last_step is not None
                and isinstance(record, dict)
                and isinstance(step := record.get("step"), int)
                and step > last_step
            )
            if whole and not late:
                yield line.rstrip(b"\n") + b"\n"
