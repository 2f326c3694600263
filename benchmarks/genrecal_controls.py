"""GenRecal with something that must not help: what is left of its gain is no distillation."""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxdistill.errors import InputError
from jaxdistill.task import Recipe, VLMTask
from jaxdistill.vlm import genrecal
from jaxdistill.vlm.genrecal import Recalibration, Stages
from jaxdistill.vlm.staged import Pace


def recipe(
    task: VLMTask,
    *,
    control: Literal["random", "shuffled"] = "random",
    **rest: Annotated[Any, Recalibration, Stages, Pace],
) -> Recipe:
    """GenRecal under a teacher that knows nothing, or nothing of the question.

    Args:
        task: What it is for.
        control: A teacher whose body is `random`, below its own head; or its answers `shuffled`:
            each student's question is followed by the teacher's answer to another.
        **rest: Settings of `Recalibration`, `Stages` and `Pace`.
    """
    if control == "shuffled":
        other = task._replace(pair=lambda batch: _shuffled(task.pair(batch)))
        return genrecal.recipe(other, **rest)
    # The teacher reads at each step: what is kept is the true one's.
    made = genrecal.recipe(task._replace(read=task.examples), **rest)
    model = task.teacher_model

    def load():
        known = made.frozen.load()
        drawn = jax.jit(model.init)(jax.random.key(0))
        teacher = {
            name: own if model.part((name,)) == "embedding" else drawn[name]
            for name, own in known["teacher"].items()
        }
        return known | {"teacher": teacher}

    return made._replace(frozen=made.frozen._replace(load=load))


def _shuffled(pair):
    if pair.hidden is None:
        # Else the teacher would read a neighbour's question beside this picture.
        raise InputError("this control needs what the teacher has read: set teacher.cache=True")
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, 0), (pair.teacher, pair.hidden))
    return pair._replace(teacher=rolled[0], hidden=rolled[1])
