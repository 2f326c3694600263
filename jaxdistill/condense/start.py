"""The undistilled start: what a method that learns pixels has before its first step."""

import jax

from jaxdistill.condense.synthetic import (
    Budget,
    Factor,
    ImagesByClass,
    Pixels,
    by_class,
    distilled,
    initial_pixels,
    longest,
    real_needed,
    start_of,
)
from jaxdistill.keywords import Count
from jaxdistill.method import BatchSpec, Method
from jaxdistill.task import CondenseTask, Recipe


def start_alone(
    *, ipc: Budget, factor: int, start: str, pixels: Pixels | None = None, batch_real: int = 1
) -> Method:
    """A method whose one step changes nothing: its output is the start.

    Args:
        ipc: Images of every class, or a tuple with those of each.
        factor: Tiles per side of an image.
        start: See `synthetic.initial_pixels`, as `pixels`.
        pixels: The start outright.
        batch_real: Real images of each class that are drawn; with as many as `ncfm` draws, and its
            key, the images are those it starts from.
    """
    needed = 1 if pixels is not None else real_needed(start, longest(ipc), factor)

    def init(key, frozen, batch):
        del frozen
        k_pixels, _ = jax.random.split(key)  # as NCFM does
        return initial_pixels(
            k_pixels, batch["images"], ipc=ipc, factor=factor, start=start, pixels=pixels
        )

    def step(state, frozen, batch, key):
        del frozen, batch, key
        return state, {"mean": state.mean()}

    def output(state):
        return distilled(state, factor, ipc)

    def specs(state, mesh):
        del mesh
        return by_class(state, state.shape)

    batches = BatchSpec("per_class", max(batch_real, needed))
    return Method(init, step, output, batches, specs)


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesByClass = 1,
    factor: Factor = 2,
    start: str = "tiled",
    batch_real: Count = 1,
) -> Recipe:
    """The recipe of the start, with the settings of the method that starts from it.

    Args:
        task: What it is for.
        ipc: Images of every class, or a tuple with those of each.
        factor: Tiles per side of an image.
        start: `tiled`, `random`, `noise`, or the path of a `distilled.npz`.
        batch_real: Real images of each class that the method draws in a step.

    Raises:
        InputError: If the settings do not fit the task.
    """
    method = start_alone(
        ipc=ipc,
        factor=factor,
        start=start,
        pixels=start_of(task, start=start, ipc=ipc, factor=factor, batch_real=batch_real),
        batch_real=batch_real,
    )
    return Recipe(method, steps=1, rates=(), separate=True)
