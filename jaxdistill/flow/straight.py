"""Straight-mode students: ArcFlow's training of a mixture of straight lines."""

from typing import Annotated, Any

from jaxdistill.flow import adapt
from jaxdistill.flow.arcflow import Matching, matched
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.keywords import Between, grouped
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Recipe


def recipe(
    task: FlowTask,
    *,
    modes: Annotated[int, Between(1, 1000)] = 8,
    **rest: Annotated[Any, Matching, adapt.Training, adapt.Segments],
) -> Recipe:
    """A student whose modes are straight: what ArcFlow is without its gammas.

    Args:
        task: What it is for.
        modes: Modes of the mixture.
        **rest: Settings of `arcflow.Matching`, `adapt.Training` and `adapt.Segments`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    matching, training, segments = grouped(rest, Matching, adapt.Training, adapt.Segments)
    head = MomentumHead(modes, task.shape[-1], task.trunk.patch, curved=False)
    student = adapt.adapted(task, head, momentum_policy(), training)
    return matched(task, student, matching, training, segments)
