"""pi-Flow (Chen et al., arXiv 2510.14974): a Gaussian mixture of data instead of a curve."""

from typing import Annotated, Any

from jaxdistill.flow import adapt
from jaxdistill.flow.arcflow import Matching, matched
from jaxdistill.flow.policies import gaussian_policy
from jaxdistill.keywords import Between, grouped
from jaxdistill.nn.momentum_head import GaussianHead
from jaxdistill.task import FlowTask, Recipe


def recipe(
    task: FlowTask,
    *,
    modes: Annotated[int, Between(1, 1000)] = 8,
    substeps: Annotated[int, Between(1, 1000)] = 16,
    **rest: Annotated[Any, Matching, adapt.Training, adapt.Segments],
) -> Recipe:
    """A student with pi-Flow's policy, trained as ArcFlow's is.

    Args:
        task: What it is for.
        modes: Gaussians of the mixture.
        substeps: Euler steps of a move, which take no network call.
        **rest: Settings of `arcflow.Matching`, `adapt.Training` and `adapt.Segments`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    matching, training, segments = grouped(rest, Matching, adapt.Training, adapt.Segments)
    head = GaussianHead(modes, task.shape[-1], task.trunk.patch)
    student = adapt.adapted(task, head, gaussian_policy(substeps), training)
    return matched(task, student, matching, training, segments)
