"""Which settings make a run fit a slice, those of the least estimated seconds first. Needs no data.

`fit` is what the command line calls with `--mode=fit`. It compiles the run's program with settings
that decide how it is carried out, and none that decides what comes out beyond rounding: how classes
and large arrays are split over the devices, what is computed again instead of being kept, where the
data lie, how many images go through a network and how many steps through a program at once.
"""

import functools
import hashlib
import heapq
import importlib.metadata
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxdistill import compile as programs
from jaxdistill import settings
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io.files import dump, expanded, write_files
from jaxdistill.io.reading import read_json
from jaxdistill.method import CLASS_AXIS
from jaxdistill.parallel.hlo import Cost, Traffic
from jaxdistill.parallel.topology import Report, memory_of, quiet, report, topology_devices
from jaxdistill.settings import Config, digest

# Slices of a kind, the smallest first.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _CUBIC, "v5p": _CUBIC}
# Published bytes a second over all links of a chip, for a model of what collectives take.
_LINKS = {
    "TPU v4": 300e9,
    "TPU v5 lite": 200e9,
    "TPU v5": 600e9,
    "TPU v6 lite": 448e9,
}
MARGIN = 0.05  # of the memory, left free for what the compiler does not know of
_MESHES = 3  # ways to split the classes that are compared

Point = tuple[int, ...]
"""A level of each knob."""


class Knob(NamedTuple):
    """A setting that decides how a run is carried out.

    Attributes:
        path: Where it stands in the config.
        levels: Its values, each with less memory in use than the one before, or with as much.
    """

    path: str
    levels: tuple[Any, ...]


class Tried(NamedTuple):
    """A program, and whether it fits.

    Attributes:
        changed: What differs from the config: path -> value.
        fits: Whether a device has room for it.
        why: Why it does not fit.
        seconds: Of a step, by the compiler's estimate and a model of the links; None where there
            is no estimate.
        sizes: Bytes of a device's arguments: `state`, `frozen` and `data`.
        report: What the compiler said; None where it was not asked.
        program: Hash of the program's text.
    """

    changed: Mapping[str, Any]
    fits: bool
    why: str
    seconds: float | None
    sizes: Mapping[str, int]
    report: Report | None
    program: str

    @property
    def rank(self) -> tuple[float, int, int]:
        """The less, the better: seconds, then work, then memory."""
        seconds = math.inf if self.seconds is None else self.seconds
        return seconds, self.report.cost.flops, self.report.peak


# ---------------------------------------------------------------------------- the search


def search(
    levels: Sequence[int],
    start: Point,
    attempt: Callable[[Point], Tried],
    stop: Callable[[], bool],
) -> Tried | None:
    """The best program among those that fit, by few attempts.

    What takes too much memory is not tried with more in use, and what fits is not tried with less:
    a level more should take no more memory and save no time. The second does not hold strictly, so
    from what is found it goes on to neighbours for as long as one of them is better.

    Args:
        levels: How many each knob has.
        start: The level of each at first.
        attempt: Tries a point; it is asked once for each.
        stop: Whether to be content with what there is.

    Returns:
        None where even the last level of every knob does not fit.
    """
    attempt, last = functools.cache(attempt), tuple(n - 1 for n in levels)
    fitting = {start: found} if (found := attempt(start)).fits else {}
    if not fitting:
        if last == start or not attempt(last).fits:
            return None
        failed = {start}
        for point in _upwards(start, levels, lambda p: any(_at_most(f, p) for f in fitting)):
            if stop():
                break
            if any(_at_most(point, lost) for lost in failed):
                continue
            if (found := attempt(point)).fits:
                fitting[point] = found
            else:
                failed.add(point)
        fitting = fitting or {last: attempt(last)}
    best = min(fitting, key=lambda point: fitting[point].rank)
    while True:
        near = [p for p in _neighbours(best, levels) if not stop() and attempt(p).fits]
        better = min([best, *near], key=lambda point: attempt(point).rank)
        if better == best:
            return attempt(best)
        best = better


def _upwards(start: Point, levels: Sequence[int], done: Callable[[Point], bool]) -> Iterator[Point]:
    """Points from a start on, those of fewer levels first, and none beyond one that is done."""
    heap, seen = [(0, start)], {start}
    while heap:
        total, point = heapq.heappop(heap)
        if done(point):
            continue
        yield point
        if done(point):
            continue
        for more in _neighbours(point, levels, (1,)):
            if more not in seen:
                seen.add(more)
                heapq.heappush(heap, (total + 1, more))


def _at_most(point: Point, other: Point) -> bool:
    return all(a <= b for a, b in zip(point, other, strict=True))


def _neighbours(point: Point, levels: Sequence[int], steps: Sequence[int] = (-1, 1)) -> list[Point]:
    """Points that differ in one knob, by one of some steps."""
    near = [
        (*point[:i], point[i] + step, *point[i + 1 :])
        for i, step in itertools.product(range(len(levels)), steps)
    ]
    return [p for p in near if all(0 <= x < n for x, n in zip(p, levels, strict=True))]


# ---------------------------------------------------------------------------- what is tried


def knobs(stated: Mapping[str, Any]) -> list[Knob]:
    """The knobs of a config in which every setting is said."""
    run = stated.get("run", {})
    levels = {
        "placement": ("resident", "streamed"),
        "fully_sharded": (False, True),
        "remat": (False, True),
        "microbatch": tuple(
            max(int(run.get("microbatch", 1) * factor), 1) for factor in (16, 4, 1, 1 / 4)
        ),
        "chunk": (run.get("chunk", 1), 1),
    }
    return [
        Knob(f"{group}.{name}", tuple(dict.fromkeys(levels[name])))
        for group, given in stated.items()
        if group not in ("method", "baselines", "evals", "generator") and isinstance(given, dict)
        for name in given
        if name in levels
    ]


class _Slice:
    """Programs of one config on one slice, each of which is lowered and compiled once.

    Attributes:
        asked: How often the compiler was.
    """

    def __init__(
        self,
        stated: Mapping[str, Any],
        devices: Sequence[jax.Device],
        limit: int | None,
        compiled: dict[str, Report],
        on_tried: Callable[[Tried], None],
    ):
        self._stated, self._devices, self._limit = stated, devices, limit
        self._compiled, self._on_tried = compiled, on_tried
        self._lowered: dict[str, tuple] = {}
        self.asked = 0

    def lowered(self, changed: Mapping[str, Any]) -> tuple:
        """The program of a changed config: lowered, bytes of its arguments, hash, mesh.

        Raises:
            InputError: If there is no such program.
        """
        key = json.dumps(changed, sort_keys=True)
        if key not in self._lowered:
            made = programs.chunk(_with(self._stated, changed), self._devices)
            program = made.function.lower(*made.arguments)
            text = hashlib.sha256(program.as_text().encode()).hexdigest()
            self._lowered[key] = program, _sizes(made.arguments), text[:16], made.mesh
        return self._lowered[key]

    def attempt(self, changed: Mapping[str, Any]) -> Tried:
        """Whether the program of a changed config fits, and what it takes."""
        try:
            program, sizes, text, _ = self.lowered(changed)
        except InputError as error:
            return self._noted(Tried(changed, False, str(error), None, {}, None, ""))
        whole = sum(sizes.values())
        if self._limit is not None and whole > self._limit:
            why = f"the arguments alone are {_gb(whole)}, {_gb(whole - self._limit)} too many"
            return self._noted(Tried(changed, False, why, None, sizes, None, text))
        if text not in self._compiled:
            self._compiled[text] = report(program, self._devices)
            self.asked += 1
        found = self._compiled[text]
        fits, why = found.fits, found.refusal
        if fits and self._limit is not None and found.peak > self._limit:
            fits, why = False, f"{_gb(found.peak)}, {_gb(found.peak - self._limit)} too many"
        return self._noted(Tried(changed, fits, why, _seconds(found), sizes, found, text))

    def _noted(self, found: Tried) -> Tried:
        self._on_tried(found)
        return found


def best(made: _Slice, stated: Mapping[str, Any], stop: Callable[[], bool]) -> Tried | None:
    """The best program of a config on a slice; None where none fits.

    Raises:
        InputError: If the config has no program there.
    """
    _, _, text, mesh = made.lowered({})
    axis = mesh.shape[CLASS_AXIS]
    splits = [n for n in range(axis, 0, -1) if axis % n == 0][:_MESHES]
    turned = [knob for knob in knobs(stated) if _matters(made, knob, text)]
    start = tuple(knob.levels.index(_at(stated, knob.path)) for knob in turned)
    found = []
    for number in splits:
        split = {} if number == axis else {"parallel.class_devices": number}

        def attempt(point, split=split):
            values = {k.path: k.levels[i] for k, i in zip(turned, point, strict=True)}
            return made.attempt(split | _changes(stated, values))

        found.append(search([len(knob.levels) for knob in turned], start, attempt, stop))
        if stop():
            break
    return min(filter(None, found), key=lambda tried: tried.rank, default=None)


def _matters(made: _Slice, knob: Knob, text: str) -> bool:
    """Whether a knob changes the program at all, where it can be turned."""
    for level in reversed(knob.levels):
        try:
            if made.lowered({knob.path: level})[2] != text:
                return True
        except InputError:  # of this level
            continue
    return False


def _with(stated: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The config with other values of some settings."""
    config = {n: dict(v) if isinstance(v, Mapping) else v for n, v in stated.items()}
    for path, value in changed.items():
        group, name = path.split(".")
        config[group][name] = value
    return config


def _at(stated: Mapping[str, Any], path: str) -> Any:
    group, name = path.split(".")
    return stated[group][name]


def _changes(stated: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the config does not have already."""
    return {path: value for path, value in values.items() if _at(stated, path) != value}


def _sizes(arguments: Sequence[PyTree]) -> dict[str, int]:
    """Bytes that a device holds of each argument."""
    return {
        name: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
        for name, tree in zip(("state", "count", "frozen", "data"), arguments, strict=True)
        if name != "count"
    }


def _seconds(found: Report) -> float | None:
    """Seconds of a step: the compiler's, and what its collectives take if links are all full."""
    if found.seconds is None:
        return None
    moved = sum(traffic.bytes for traffic in found.cost.collectives.values())
    return found.seconds + (moved / _LINKS[found.kind] if found.kind in _LINKS else 0.0)


# ---------------------------------------------------------------------------- mode=fit


@jax.enable_x64(False)  # as `experiment.train` runs it
def fit(
    config: Config,
    topology: str = "v5e",
    workdir: str | os.PathLike[str] | None = None,
    *,
    most: int = 24,
    should_stop: ShouldStop = never,
) -> dict:
    """Finds settings with which a run fits a slice, or the smallest slice that it fits.

    Args:
        config: See `configs/`.
        topology: A slice; see `parallel.topology.topology_devices`. Of a kind alone, such as `v5e`,
            the slices of `SLICES` are tried from the smallest on.
        workdir: Gets `fit.json`, if given, program by program; what it has of the same programs is
            not compiled again.
        most: Programs to compile for a slice, after which the best so far counts.
        should_stop: Whether to give up; it is asked between two programs.

    Returns:
        What `fit.json` holds.

    Raises:
        InputError: If the config is wrong, does not go with the slice, or does not fit it.
        Interrupted: If `should_stop` said yes.
    """
    quiet()
    names = [f"{topology}:{n}" for n in SLICES[topology]] if topology in SLICES else [topology]
    stated = settings.resolve(config).stated()
    path = None if workdir is None else expanded(workdir) / "fit.json"
    # In this order: without the compiler, the first of these lines says what to install.
    slices = [(name, topology_devices(name)) for name in names]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    compiled = _compiled(path, versions)
    record: dict[str, Any] = {
        "topology": topology,
        "config": stated,
        "config_hash": digest(stated),
        "versions": versions,
        "margin": MARGIN,
        "slices": [],
        "compiled": compiled,
    }
    for name, devices in slices:
        memory = memory_of(devices)
        usable = None if memory is None else int(memory * (1 - MARGIN))
        print(f"{name}: {len(devices)} {devices[0].device_kind}, {_gb(usable)} usable on each")
        own: dict[str, Any] = {"topology": name, "usable": usable, "tried": [], "best": None}
        record["slices"].append(own)

        def on_tried(found, own=own):
            own["tried"].append(found)
            print(f"  {_line(found)}", flush=True)
            _write(path, record)

        made = _Slice(stated, devices, usable, compiled.setdefault(name, {}), on_tried)
        try:
            own["best"] = best(made, stated, lambda n=made: should_stop() or n.asked >= most)
        except InputError as error:  # there is no such program
            if len(names) == 1:
                raise
            print(f"  {error}")
            own["refusal"] = str(error)
            continue
        _write(path, record)
        if should_stop():
            raise Interrupted(f"stopped; {len(own['tried'])} programs for {name} are tried")
        if own["best"] is not None:
            print(_told(name, own["best"], own["tried"]))
            return _plain(record)
    raise InputError(_too_large(record["slices"]))


def _compiled(path: Path | None, versions: Mapping[str, str]) -> dict[str, dict[str, Report]]:
    """Slice -> hash of a program -> report, of an earlier search with the same compiler."""
    if path is None or not path.is_file():
        return {}
    earlier = read_json(path)
    try:
        if earlier["versions"] != versions:
            return {}
        return {
            name: {text: _report(entry) for text, entry in reports.items()}
            for name, reports in earlier["compiled"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a search ({error}); delete it") from error


def _report(entry: Mapping[str, Any]) -> Report:
    cost = Cost(**entry["cost"])
    moved = {kind: Traffic(**traffic) for kind, traffic in cost.collectives.items()}
    return Report(**{**entry, "cost": cost._replace(collectives=moved)})


def _plain(value: Any) -> Any:
    """A record as JSON has it."""
    if isinstance(value, Tried):  # its report stands under the program's hash
        value = value._replace(report=None)
    if isinstance(value, Tried | Report | Cost | Traffic):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _write(path: Path | None, record: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files({path: functools.partial(dump, _plain(record))})


# ---------------------------------------------------------------------------- what is said


def _gb(size: int | None) -> str:
    return "an unknown number of GB" if size is None else f"{size / 1e9:.2f} GB"


def _flags(changed: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{path}={value}" for path, value in changed.items())


def _line(found: Tried) -> str:
    """An attempt in one line."""
    what = _flags(found.changed) or "as it is"
    if not found.fits:
        return f"{what}: no, {found.why}"
    seconds = "" if found.seconds is None else f", {found.seconds:.3g} s a step"
    return f"{what}: {_gb(found.report.peak)}{seconds}"


def _told(name: str, found: Tried, tried: Sequence[Tried]) -> str:
    """What a search that found something ends with."""
    said, known = _flags(found.changed), found.report
    sizes = ", ".join(f"{n} {_gb(size)}" for n, size in found.sizes.items())
    lines = [
        f"fits {name} {f'with {said}' if said else 'as it is'}",
        f"  {_gb(known.peak)} of {_gb(known.hbm)}: {sizes}, temporaries {_gb(known.temporaries)}",
    ]
    if found.seconds is not None:
        links = found.seconds - known.seconds
        lines.append(
            f"  {found.seconds:.3g} s a step: the compiler's estimate, and {links:.2g} s for "
            "collectives over full links; no measurement"
        )
    if known.cost.custom_kernels:
        lines.append(f"  {known.cost.custom_kernels} custom kernels a step are in none of these")
    if any(path.endswith(".remat") for path in found.changed):
        lines.append("  remat is a part of what a run is: say it from the first start on")
    lines.append(f"  {len(tried)} programs tried")
    return "\n".join(lines)


def _too_large(slices: Sequence[Mapping[str, Any]]) -> str:
    """Why nothing fits, by the attempt on the last slice that came nearest."""
    own = slices[-1]
    tried = [found for found in own["tried"] if found.sizes]
    if not tried:
        return f"there is no program for {own['topology']}: {own['refusal']}"
    peak = lambda found: (found.report.peak if found.report else 0) or math.inf  # noqa: E731
    near = min(tried, key=lambda found: (peak(found), sum(found.sizes.values())))
    sizes = ", ".join(f"{name} {_gb(size)}" for name, size in near.sizes.items())
    return (
        f"does not fit {own['topology']}, where {_gb(own['usable'])} are usable; nearest is "
        f"{_flags(near.changed) or 'the config as it is'}: {near.why} ({sizes}); try a larger slice"
    )
