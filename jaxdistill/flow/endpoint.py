"""Endpoint regression: one straight line from where a segment starts to where the teacher ends."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill.errors import InputError
from jaxdistill.flow import adapt
from jaxdistill.flow.paths import expand, shifted
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.samplers import euler
from jaxdistill.flow.students import Segment, Source, Student, Teacher, mean_square, student_method
from jaxdistill.keywords import Between, grouped
from jaxdistill.method import Method
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Recipe


def endpoint_regression(
    student: Student,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    *,
    source: Source,
    queries: int = 4,
    shift: float = 1.0,
    **options: Any,
) -> Method:
    """Draws a student's mean velocity over a segment to that of the teacher's Euler steps.

    After Luhman and Luhman (arXiv 2101.02388), segment by segment. A linear student can meet the
    ends exactly, so with many queries this is the strongest linear baseline.

    Args:
        student: The network and its policy.
        teacher: The velocity to follow.
        optimizer: Optimizer of what is trained.
        source: Where examples come from.
        queries: Euler steps of the teacher in a segment, even in raw time.
        shift: See `paths.shifted`.
        **options: Keywords of `student_method`.

    Raises:
        InputError: If there is no query.
    """
    if queries < 1:
        raise InputError(f"{queries} queries a segment; ask the teacher at least once")
    policy = student.policy

    def match(field, x, start, end, keys, query, step):
        del keys, step
        parts = jnp.linspace(0.0, 1.0, queries + 1)[:, None]
        target = euler(query, x, shifted(start + parts * (end - start), shift))
        t, t_end = shifted(start, shift), shifted(end, shift)
        length = jnp.where(start > end, t - t_end, 1.0)
        wanted = jax.lax.stop_gradient((x - target) / expand(length, x))
        loss = mean_square(policy.average(field, x, t, t_end) - wanted)
        after = jax.lax.stop_gradient(policy.transition(field, x, t, t_end))
        return Segment(loss, after, jnp.int32(queries))

    return student_method(match, student, teacher, optimizer, source=source, shift=shift, **options)


def recipe(
    task: FlowTask,
    *,
    queries: Annotated[int, Between(1, 1000)] = 4,
    **rest: Annotated[Any, adapt.Training, adapt.Segments],
) -> Recipe:
    """A linear student of the ends of the teacher's Euler steps.

    Args:
        task: What it is for.
        queries: Euler steps of the teacher in a segment.
        **rest: Settings of `adapt.Training` and `adapt.Segments`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    training, segments = grouped(rest, adapt.Training, adapt.Segments)
    head = MomentumHead(1, task.shape[-1], task.trunk.patch, curved=False)
    student = adapt.adapted(task, head, momentum_policy(), training)
    method = endpoint_regression(
        student,
        task.velocity,
        adapt.optimizer(training),
        queries=queries,
        **adapt.options(task, training, segments),
    )
    return adapt.student_recipe(task, student, method, training, last=segments.last)
