"""What the evaluations of few-step students share: the rows, and the examples that they make.

All rows start from the same noise and labels. A teacher's row counts the calls of its network,
guidance included (nfe, network function evaluations); a student's is what its sampler calls.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from PIL import Image

from jaxdistill.errors import Diverged, InputError, Interrupted
from jaxdistill.eval import results
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.flow import samplers
from jaxdistill.flow.paths import boundaries, shifted
from jaxdistill.io.files import write_files
from jaxdistill.io.writers import Progress
from jaxdistill.task import FlowTask

# Streams of noise, far from the numbers that splitting a key folds into it.
MAIN, OTHER, PAIRED = 0x6D61696E, 0x6F746865, 0x70616972


class Generator(NamedTuple):
    """A row of the table.

    Attributes:
        sample: `(noise, label) -> examples`, compiled.
        nfe: Network calls for an example.
    """

    sample: Callable[[Any, Any], Any]
    nfe: int


def parse_teacher_row(row: str) -> tuple[str, int]:
    """The sampler and the steps of a row such as `heun:8`, of eight calls.

    Raises:
        InputError: If it is no such row.
    """
    name, _, calls = str(row).partition(":")
    if name in samplers.SAMPLERS and calls.isdecimal() and int(calls):
        steps, rest = divmod(int(calls), samplers.SAMPLERS[name][1])
        if not rest:
            return name, steps
    raise InputError(
        f"teacher_rows has {row!r}; each is a sampler ({', '.join(samplers.SAMPLERS)}) and its "
        "calls, a multiple of those of one step: heun:8"
    )


def check(
    task: FlowTask, data: Any, *, nfe: tuple[int, ...], teacher_rows: tuple[str, ...], **others: Any
) -> None:
    """Refuses rows that are none: the `check` of each evaluation of students.

    Raises:
        InputError: In this case.
    """
    del task, data, others
    if not nfe:
        raise InputError("evals.*.nfe is (); give the numbers of network calls, at least 1 each")
    for row in teacher_rows:
        parse_teacher_row(row)


def teacher_sampler(task: FlowTask, frozen: PyTree, name: str, steps: int) -> Generator:
    """The teacher under a sampler with some steps, even in raw time."""
    sampler, per_step = samplers.SAMPLERS[name]
    times = shifted(boundaries(steps), task.shift)

    @jax.jit
    def run(frozen, x, label):
        return sampler(lambda x, t: task.velocity(frozen, x, t, label), x, times)

    return Generator(functools.partial(run, frozen), steps * per_step * task.nfe)


class Rows(NamedTuple):
    """All rows of a table, and what they are made with.

    Attributes:
        bench: What is measured.
        frozen: What the students' methods were given, on the devices.
        trained: Row -> the parameters of its student.
        generators: Row of the table -> how its examples are made.
        batch_size: Examples made at a time.
    """

    bench: Bench
    frozen: PyTree
    trained: dict[str, PyTree]
    generators: dict[str, Generator]
    batch_size: int


def rows(
    bench: Bench, nfe: tuple[int, ...], teacher_rows: tuple[str, ...], batch_size: int
) -> Rows:
    """The teacher under some samplers, and each student with some numbers of calls."""
    first = next(iter(bench.rows.values()))
    frozen = jax.device_put(first.frozen())
    generators = {}
    for row in teacher_rows:
        name, steps = parse_teacher_row(row)
        generators[f"teacher, {row.replace(':', ', ')}"] = teacher_sampler(
            bench.task, frozen, name, steps
        )
    trained = {name: jax.device_put(made.output()) for name, made in bench.rows.items()}
    for name, made in bench.rows.items():
        for calls in nfe:
            sample = jax.jit(functools.partial(made.recipe.sample, nfe=calls))
            own = functools.partial(sample, trained[name], frozen)
            generators[f"{name}, {calls}"] = Generator(own, calls)
    return Rows(bench, frozen, trained, generators, batch_size)


def noise(task: FlowTask, number: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise and labels that every row starts from, the classes one after another."""
    key = jax.random.fold_in(jax.random.key(0), stream)
    drawn = jax.random.normal(key, (number, *task.shape))
    return np.asarray(drawn), np.arange(number, dtype=np.int32) % max(task.num_classes, 1)


def batches(number: int, size: int) -> list[np.ndarray]:
    """Indices in batches of one size; the last starts over where there are no more."""
    return [np.arange(first, first + size) % number for first in range(0, number, size)]


def generate(
    rows: Rows, generator: Generator, number: int, stream: int, shown: str = ""
) -> np.ndarray:
    """Examples of a row, in batches of one shape, so that each row is compiled once.

    Under a name to show, with a progress bar.
    """
    drawn, label = noise(rows.bench.task, number, stream)
    parts, indices = [], batches(number, rows.batch_size)
    bar = Progress(len(indices), 0, shown) if shown else None
    for index in indices:
        if rows.bench.should_stop():
            raise Interrupted("stopped while evaluating; rows already measured are kept")
        parts.append(np.asarray(generator.sample(jnp.asarray(drawn[index]), label[index])))
        if bar:
            bar.update(len(parts), {})
    if bar:
        bar.close()
    return np.concatenate(parts)[:number]


def finite(examples: np.ndarray) -> np.ndarray:
    """The examples, if there is something to measure of them.

    Raises:
        Diverged: If a number is not finite.
    """
    if not np.isfinite(examples).all():
        raise Diverged("the examples are not finite")
    return examples


def timed(rows: Rows, generator: Generator, number: int, stream: int) -> tuple[np.ndarray, dict]:
    """Examples of a row, and the seconds that they took, compilation left out.

    Raises:
        Diverged: If an example is not finite.
    """
    generate(rows, generator, 1, stream)  # compiles
    began = time.perf_counter(), time.process_time()
    made = finite(generate(rows, generator, number, stream))
    return made, {
        "wall s": round(time.perf_counter() - began[0], 2),
        "CPU s": round(time.process_time() - began[1], 2),
    }


def measure(
    bench: Bench, names: Iterable[str], protocol: str, row: Callable[[str], Mapping[str, Any]]
) -> None:
    """Measures the rows that are not measured yet, each kept when it is done.

    Args:
        bench: What is measured.
        names: The names of the rows; all have the measure `nfe`.
        protocol: Hash of what decides a measurement.
        row: Name of a row -> metric -> value; it raises `Diverged` where there is none.

    Raises:
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    cells = bench.results.missing(Cell(bench.name, n, "nfe", 0, protocol) for n in names)
    bar = Progress(len(cells), 0, "evaluating")
    for done, cell in enumerate(cells):
        if bench.should_stop():
            raise Interrupted(f"stopped while evaluating; {done} of {len(cells)} rows are measured")
        try:
            found = row(cell.row)
        except Diverged:
            found = {"nfe": math.nan}
        bench.results.keep({cell._replace(metric=m): {"value": v} for m, v in found.items()})
        bar.update(done + 1, {m: v for m, v in found.items() if m != "nfe" and v})
    bar.close()


def is_missing(bench: Bench, names: Iterable[str], protocol: str) -> bool:
    """Whether any of the rows is not measured yet."""
    return bool(bench.results.missing(Cell(bench.name, n, "nfe", 0, protocol) for n in names))


def records(bench: Bench, names: Iterable[str], protocol: str) -> list[dict]:
    """The records of some rows, in their order."""
    order = {name: i for i, name in enumerate(names)}
    cells = [
        c
        for c in bench.results.measured
        if (c.evaluation, c.protocol) == (bench.name, protocol) and c.row in order
    ]
    return bench.results.records(sorted(cells, key=lambda c: order[c.row]))


def show(bench: Bench, names: Iterable[str], protocol: str, examples: int) -> None:
    """Prints the table."""
    print(f"{bench.task.name}: {examples} examples a row, one seed")
    print(results.table(records(bench, names, protocol)))


def shown_rows(rows: Rows) -> dict[str, Generator]:
    """The rows of a picture: the students, and the teacher by Euler's method."""
    few = {n: g for n, g in rows.generators.items() if not n.startswith("teacher") or "euler" in n}
    if not any(name.startswith("teacher") for name in few):
        teacher = teacher_sampler(rows.bench.task, rows.frozen, "euler", 16)
        few = {"teacher, euler, 16": teacher} | few
    return few


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files({path: lambda file: Image.fromarray(picture).save(file, "PNG")})
