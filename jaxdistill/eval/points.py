"""Students of flows on points in the plane, against the ends of the teacher's exact paths."""

import functools
import itertools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxdistill.eval import generative, sampling
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.sampling import MAIN, Rows
from jaxdistill.flow import samplers
from jaxdistill.flow.paths import boundaries, shifted
from jaxdistill.io import pictures
from jaxdistill.keywords import Between, Count
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import FlowTask

FAMILY = "flow"

_PICTURES = ("samples.png", "trajectories.png")
# What integrates the teacher's exact paths.
_REFERENCE = "rk4"


check = sampling.check


def evaluate(
    bench: Bench,
    *,
    nfe: tuple[Annotated[int, Between(1, 10**6)], ...] = (2,),
    teacher_rows: tuple[str, ...] = ("euler:2", "euler:4", "euler:8", "euler:16", "euler:100"),
    examples: Annotated[int, Between(100, 10**7)] = 8192,
    reference_steps: Annotated[int, Between(2, 10**6)] = 1024,
    batch_size: Count = 8192,
) -> list[dict]:
    """Measures every row that is not measured yet, draws the pictures and prints the table.

    Of several processes the first does it.

    Args:
        bench: What is measured.
        nfe: Network calls of the students; others than they were trained for show how elastic they
            are.
        teacher_rows: Samplers of the teacher, and their network calls, guidance left out.
        examples: Points of a row.
        reference_steps: The Runge-Kutta steps in which the teacher's paths are followed to t = 0.
        batch_size: Points made at a time.

    Returns:
        A record for each row and measure.

    Raises:
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    rows = sampling.rows(bench, nfe, teacher_rows, batch_size)
    protocol = digest([examples, reference_steps, _REFERENCE, "modes", bench.identity])
    names = list(rows.generators)

    def work():
        missing = sampling.is_missing(bench, names, protocol)
        if missing:
            reference = sampling.teacher_sampler(
                bench.task, rows.frozen, _REFERENCE, reference_steps
            )
            ends = sampling.generate(rows, reference, examples, MAIN).reshape(-1, 2)
            keys = jax.random.split(jax.random.key(1), examples)
            data = np.asarray(jax.jit(jax.vmap(bench.data.sample))(keys)).reshape(-1, 2)
            one = functools.partial(_row, rows, ends, data)
            sampling.measure(bench, names, protocol, one)
        pictures = (bench.workdir / "artifacts" / name for name in _PICTURES)
        if missing or not all(path.is_file() for path in pictures):
            _draw(rows, min(2000, examples))
        sampling.show(bench, names, protocol, examples)

    processes.in_the_first(work)
    bench.results.gather()
    return sampling.records(bench, names, protocol)


def _row(rows: Rows, ends: np.ndarray, data: np.ndarray, name: str) -> dict[str, Any]:
    generator = rows.generators[name]
    made, cost = sampling.timed(rows, generator, len(ends), MAIN)
    made = made.reshape(-1, 2)
    error = np.linalg.norm(made - ends, axis=1)
    sliced = functools.partial(generative.sliced_wasserstein, key=jax.random.key(2))
    modes, found = rows.bench.data.modes, {}
    if modes is not None:
        found = generative.modes_found(made, *modes)._asdict()
        found = {name.replace("_", " "): value for name, value in found.items()}
    return {
        "nfe": generator.nfe,
        "endpoint RMSE": float(np.sqrt(np.square(error).mean())),
        "median": float(np.median(error)),
        "p90": float(np.quantile(error, 0.9)),
        "sliced W2 to data": sliced(made, data),
        "to exact ends": sliced(made, ends),
        **found,
        **cost,
    }


def _draw(rows: Rows, number: int) -> None:
    """Samples of the rows from the same noise, and the ways there of the first student."""
    folder = rows.bench.workdir / "artifacts"
    few = sampling.shown_rows(rows)
    made = {
        n: np.nan_to_num(sampling.generate(rows, g, number, MAIN)).reshape(-1, 2)
        for n, g in few.items()
    }
    name = next(iter(rows.bench.rows))
    sampling.write_picture(folder / "trajectories.png", pictures.curves(ways(rows, name)))
    sampling.write_picture(folder / "samples.png", pictures.scatter(made))


def ways(rows: Rows, name: str, parts: int = 16) -> dict[str, np.ndarray]:
    """The ways of some points under the teacher and under a student, (times, points, 2)."""
    task, recipe = rows.bench.task, rows.bench.rows[name].recipe
    noise, label = (jnp.asarray(x) for x in sampling.noise(task, 40, MAIN))
    nfe, last = recipe.card["nfe"], recipe.card.get("last", 1.0)
    own = recipe.trace(rows.trained[name], rows.frozen, noise, label, nfe=nfe, parts=parts)
    both = {
        "teacher": _teachers(task, rows.frozen, noise, label, boundaries(nfe, last), parts),
        f"student, {nfe} calls": own,
    }
    return {name: np.asarray(way).reshape(len(way), -1, 2) for name, way in both.items()}


def _teachers(
    task: FlowTask, frozen: PyTree, x: Array, label: Array, raw: Array, parts: int
) -> Array:
    @jax.jit
    def advance(frozen, x, label, times):
        return samplers.rk4(lambda x, t: task.velocity(frozen, x, t, label), x, times)

    states = [x]
    for start, end in itertools.pairwise(raw):
        fine = shifted(jnp.linspace(start, end, parts + 1), task.shift)
        for pair in itertools.pairwise(fine):
            states.append(advance(frozen, states[-1], label, jnp.stack(pair)))
    return jnp.stack(states)
