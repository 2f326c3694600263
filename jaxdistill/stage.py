"""One run of the loop as a config has it: with restarts, and with what it cost."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill import runner
from jaxdistill.data import device
from jaxdistill.errors import Diverged
from jaxdistill.interrupt import ShouldStop
from jaxdistill.io import checkpoint
from jaxdistill.io.trackers import TrackerWriter
from jaxdistill.method import Frozen, Method, State
from jaxdistill.parallel import processes
from jaxdistill.settings import Run
from jaxdistill.task import Part, Recipe


class Outcome(NamedTuple):
    """What a stage ends with.

    Attributes:
        method: What has run in the end.
        state: Its state.
        rate_factor: The learning rates' factor at the end; 1 if the run was never restarted.
        cost: For a card: steps, wall and CPU seconds.
    """

    method: Method
    state: State
    rate_factor: float
    cost: dict[str, Any]


def run(
    name: str,
    build: Callable[[float], Method],
    *,
    seed: int,
    run: Run,
    backend: str,
    folder: Path,
    identity: str,
    settings: Mapping[str, Any],
    examples: Part,
    frozen: Frozen,
    steps: int,
    mesh: Mesh,
    should_stop: ShouldStop,
) -> Outcome:
    """Runs a method, or goes on with the run in the folder; again, with lower rates, if it may.

    Args:
        name: What to call it.
        build: The method, with its learning rates times a factor.
        seed: The root of all that is drawn.
        run: How the loop runs.
        backend: `jit` or `pmap`.
        folder: Gets `metrics.jsonl` and `checkpoints/`.
        identity: The identity of what is run; a checkpoint of another is refused.
        settings: What a tracker shows as its config.
        examples: What batches are drawn from, for a method that is fed examples.
        frozen: As the runner takes it.
        steps: Length of the whole run.
        mesh: The devices.
        should_stop: As the runner takes it.

    Raises:
        Diverged: When no restart is left.
        InputError, Interrupted: As the runner does.
    """
    saved = checkpoint.newest_metadata(folder / "checkpoints")
    processes.wait(f"{name} is started")  # before any process writes there
    restarts, rate_factor = saved.get("restarts", 0), saved.get("rate_factor", 1.0)
    method = build(rate_factor)
    fed = method.batches.kind not in ("keys", "none")
    data = examples.load() if fed else ()
    # What is read or made first is no cost of this run's.
    began = time.perf_counter(), time.process_time()
    state = None
    while state is None:
        try:
            with _tracked(run.tracker, folder, name, settings, restarts) as writers:
                state = runner.run(
                    method,
                    data=data,
                    frozen=frozen,
                    key=jax.random.key(seed),
                    steps=steps,
                    chunk=run.chunk,
                    mesh=mesh,
                    backend=backend,
                    workdir=folder,
                    checkpoint_every=run.checkpoint_every,
                    metadata={
                        "config_hash": identity,
                        "method": name,
                        "restarts": restarts,
                        "rate_factor": rate_factor,
                    },
                    tensorboard=run.tensorboard,
                    writers=writers,
                    progress=name,
                    should_stop=should_stop,
                )
        except Diverged as error:
            if restarts >= run.restarts:
                raise
            restarts, rate_factor = restarts + 1, rate_factor * run.restart_factor
            told = f"restart {restarts} of {run.restarts} with the rates x {rate_factor:.3g}"
            if processes.is_first():
                print(f"{name}: {error}; {told}", file=sys.stderr)
            method = build(rate_factor)
    jax.block_until_ready(state)
    cost = {
        "steps": steps,
        # Of this start, compilation included: if resumed, of the last part alone.
        "resumed": bool(saved),
        "wall_seconds": round(time.perf_counter() - began[0], 2),
        "cpu_seconds": round(time.process_time() - began[1], 2),
    }
    return Outcome(method, state, rate_factor, cost)


@contextlib.contextmanager
def _tracked(
    tracker: str | None, folder: Path, name: str, settings: Mapping[str, Any], restarts: int
) -> Iterator[tuple[TrackerWriter, ...]]:
    """What tells the tracker, on the first process alone; nothing if there is none."""
    if tracker is None or not processes.is_first():
        yield ()
        return
    folder.mkdir(parents=True, exist_ok=True)
    writer = TrackerWriter(tracker, folder, name=name, settings=settings, restarts=restarts)
    with contextlib.closing(writer):
        yield (writer,)


def output_shapes(recipe: Recipe, examples: Part) -> PyTree:
    """The shapes of what a recipe's method puts out; nothing is read or run.

    Args:
        recipe: The recipe.
        examples: What its batches are drawn from.
    """
    return shapes_of(recipe, examples, recipe.method.output)


def shapes_of(recipe: Recipe, examples: Part, function: Callable[[PyTree], PyTree]) -> PyTree:
    """The shapes of what a function makes of a state of a recipe's method.

    Args:
        recipe: The recipe.
        examples: What its batches are drawn from.
        function: `state -> PyTree`.
    """
    method = recipe.method

    def output(key, frozen, data):
        return function(method.init(key, frozen, device.draw(method.batches, data, key)))

    return jax.eval_shape(output, jax.random.key(0), recipe.frozen.shapes, examples.shapes)
