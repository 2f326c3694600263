"""Linear on-policy students: ArcFlow's training of one straight line a segment."""

from typing import Annotated, Any

from jaxdistill.flow import adapt
from jaxdistill.flow.arcflow import Matching, matched
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.keywords import grouped
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Recipe


def recipe(
    task: FlowTask,
    **rest: Annotated[Any, Matching, adapt.Training, adapt.Segments],
) -> Recipe:
    """A student that goes each segment in one straight line.

    Args:
        task: What it is for.
        **rest: Settings of `arcflow.Matching`, `adapt.Training` and `adapt.Segments`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    matching, training, segments = grouped(rest, Matching, adapt.Training, adapt.Segments)
    head = MomentumHead(1, task.shape[-1], task.trunk.patch, curved=False)
    student = adapt.adapted(task, head, momentum_policy(), training)
    return matched(task, student, matching, training, segments)
