"""ArcFlow (arXiv 2602.09014): match the teacher's velocity along the student's own curve.

Each segment is entered with one student call. Along the curve that it describes the teacher is
asked a few times, at random places, and the mean velocity of the curve there is drawn to the
teacher's answer. At first the teacher's steps lead from place to place, later the student's own.
"""

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdistill.errors import InputError
from jaxdistill.flow import adapt
from jaxdistill.flow.paths import expand, shifted
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.students import (
    Segment,
    Source,
    Student,
    Teacher,
    mean_square,
    streams,
    student_method,
)
from jaxdistill.keywords import Between, Fraction, Rate, grouped
from jaxdistill.method import Method
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Recipe

Part = Annotated[float, Between(0, 0.99)]
"""A part that leaves something."""

# Of the loss alone it only matters where gradients are clipped.
_LOSS_SCALE = 15.0


def arcflow(
    student: Student,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    *,
    source: Source,
    queries: int = 4,
    shift: float = 1.0,
    window: float = 3 / 128,
    teacher_steps: int = 0,
    mode_dropout: float = 0.0,
    **options: Any,
) -> Method:
    """The training of an ArcFlow student; of any policy, in fact.

    With a linear policy it is the linear on-policy student, with pi-Flow's its own training.

    Args:
        student: The network and its policy.
        teacher: The velocity to follow.
        optimizer: Optimizer of what is trained.
        source: Where examples come from.
        queries: Teacher calls in a segment, for each example.
        shift: See `paths.shifted`.
        window: Raw time beyond the teacher's step over which the student's velocity is averaged;
            0 compares the velocity at the place itself, once the teacher's steps are gone.
        teacher_steps: Steps over which the teacher's share of the way falls from all to none.
        mode_dropout: Share of the modes left out while the student moves, though not in the loss.
        **options: Keywords of `student_method`.

    Raises:
        InputError: For numbers that cannot be meant.
    """
    if queries < 1 or not 0 <= window < 1 or not 0 <= mode_dropout < 1 or teacher_steps < 0:
        raise InputError(
            f"queries={queries}, window={window}, mode_dropout={mode_dropout}, "
            f"teacher_steps={teacher_steps}: give at least one query, a window and a dropout in "
            "[0, 1) and no negative steps"
        )
    policy = student.policy

    def match(field, x, start, end, keys, query, step):
        share = jnp.maximum(1.0 - step / teacher_steps, 0.0) if teacher_steps else 0.0
        ahead = jnp.minimum(window, start - end)
        own, teachers = _gaps(keys, queries, start - end - ahead, share)
        curve = jax.lax.stop_gradient(field)
        if mode_dropout:
            curve = policy.drop(curve, streams(keys, 3)[2], mode_dropout)

        def ask(carry, gaps):
            x, raw = carry
            place = jnp.maximum(raw - gaps[0], 0.0)
            after = jnp.maximum(place - gaps[1], 0.0)
            t_raw, t, t_after = (shifted(r, shift) for r in (raw, place, after))
            x = policy.transition(curve, x, t_raw, t)
            u = query(x, t)
            far = shifted(jnp.maximum(after - ahead, 0.0), shift)
            return (x + expand(t_after - t, x) * u, after), (x, u, t, far)

        (last, raw), asked = jax.lax.scan(ask, (x, start), (own, teachers))
        asked = jax.lax.stop_gradient(asked)

        def gap(x, u, t, far):
            return mean_square(policy.average(field, x, t, far) - u)

        loss = _LOSS_SCALE * jax.vmap(gap)(*asked).mean(0)
        last = policy.transition(curve, last, shifted(raw, shift), shifted(end, shift))
        return Segment(loss, jax.lax.stop_gradient(last), jnp.int32(queries))

    return student_method(match, student, teacher, optimizer, source=source, shift=shift, **options)


def _gaps(keys, queries, length, share):
    """Raw times that the student and the teacher go before each query and after it, (queries, n).

    The teacher's fill their share of the length; the student's leave a rest of theirs.
    """
    k_own, k_teacher, _ = streams(keys, 3)
    own = jax.vmap(lambda k: jax.random.uniform(k, (queries,)), out_axes=1)(k_own)
    own = jnp.diff(jnp.sort(own, 0), axis=0, prepend=0.0)
    cuts = jax.vmap(lambda k: jax.random.uniform(k, (queries - 1,)), out_axes=1)(k_teacher)
    teachers = jnp.diff(jnp.sort(cuts, 0), axis=0, prepend=0.0, append=1.0)
    return own * (1.0 - share) * length, teachers * share * length


class Matching(NamedTuple):
    """The settings of students that are matched along their own way.

    Attributes:
        queries: Teacher calls in a segment.
        window: Raw time beyond the teacher's step over which the velocity is averaged.
        teacher_share: Part of the training in which the teacher leads, fading.
        mode_dropout: Share of the modes left out on the way.
    """

    queries: Annotated[int, Between(1, 1000)] = 4
    window: Part = 3 / 128
    teacher_share: Fraction = 0.3
    mode_dropout: Part = 0.0


def matched(
    task: FlowTask,
    student: Student,
    matching: Matching,
    training: adapt.Training,
    segments: adapt.Segments,
    *,
    gamma_rate_scale: float = 1.0,
) -> Recipe:
    """The recipe of a student that is trained as ArcFlow's is, whatever its policy.

    Args:
        task: What it is for.
        student: The network and its policy.
        matching: How it is matched.
        training: The settings of every student.
        segments: What it goes through.
        gamma_rate_scale: Learning rate of the gammas over that of the rest.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    method = arcflow(
        student,
        task.velocity,
        adapt.optimizer(training, gamma_rate_scale=gamma_rate_scale),
        queries=matching.queries,
        window=matching.window,
        teacher_steps=int(matching.teacher_share * training.steps),
        mode_dropout=matching.mode_dropout,
        **adapt.options(task, training, segments),
    )
    return adapt.student_recipe(task, student, method, training, last=segments.last)


def recipe(
    task: FlowTask,
    *,
    modes: Annotated[int, Between(1, 1000)] = 8,
    log_gamma: tuple[Annotated[float, Between(-80, 80)], ...] = (-1.6094, 1.3863),
    gamma_rate_scale: Rate = 0.1,
    unit: Literal["time", "step"] = "time",
    **rest: Annotated[Any, Matching, adapt.Training, adapt.Segments],
) -> Recipe:
    """An ArcFlow student of the task's teacher.

    Args:
        task: What it is for.
        modes: Modes of the curve.
        log_gamma: Lowest and highest logarithm of gamma at the start, evenly spaced between: by
            default gamma is 0.2 to 4.
        gamma_rate_scale: Learning rate of the gammas over that of the rest.
        unit: What gamma's exponent counts: a unit of time, or the fraction of the segment.
        **rest: Settings of `Matching`, `adapt.Training` and `adapt.Segments`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    matching, training, segments = grouped(rest, Matching, adapt.Training, adapt.Segments)
    if len(log_gamma) != 2:
        raise InputError(f"method.log_gamma is {log_gamma}; give the lowest and the highest")
    if segments.elastic and unit == "step":
        raise InputError(
            "method.elastic goes with gammas of a unit of time: one output serves segments of "
            "several lengths; set method.unit=time"
        )
    head = MomentumHead(modes, task.shape[-1], task.trunk.patch, log_gamma)
    student = adapt.adapted(task, head, momentum_policy(unit), training)
    return matched(task, student, matching, training, segments, gamma_rate_scale=gamma_rate_scale)
