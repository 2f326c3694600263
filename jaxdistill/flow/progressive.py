"""Progressive distillation (Salimans and Ho 2022): each round a student of half as many steps."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int32, PyTree

from jaxdistill.errors import InputError
from jaxdistill.flow import adapt
from jaxdistill.flow.paths import Examples, expand, interpolate, shifted
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.samplers import euler
from jaxdistill.flow.students import (
    Labels,
    Student,
    Teacher,
    check_velocity,
    descent,
    noise_like,
    streams,
)
from jaxdistill.keywords import Between, grouped
from jaxdistill.method import Batch, BatchSpec, Method
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Recipe


class ProgressiveState(NamedTuple):
    """What changes in progressive distillation.

    Attributes:
        trainable: What this round's student trains.
        teacher: What the last round's student trained, which this one follows.
        opt: The optimizer's state.
        average: The moving average of `trainable`.
        step: Steps done, in all rounds.
        queries: Network calls of the teachers so far, of each of the examples of a step.
    """

    trainable: PyTree
    teacher: PyTree
    opt: PyTree
    average: PyTree
    step: Int32[Array, ""]
    queries: Int32[Array, ""]


def progressive(
    student: Student,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    *,
    batches: BatchSpec,
    data: Callable[[Batch], tuple[Examples, Labels]],
    steps: int,
    nfe: int = 2,
    first_nfe: int = 16,
    teacher_nfe: int = 1,
    shift: float = 1.0,
    ema_power: float = 7.0,
    ema_from: int = 100,
) -> Method:
    """Halves the number of calls round by round, from `first_nfe` of the teacher to `nfe`.

    A round's target is the mean velocity of two steps of the round before, the first round's that
    of the teacher itself. Segments are even in raw time.

    Args:
        student: The network and a policy, meant to be a straight line.
        teacher: The velocity to follow.
        optimizer: Optimizer of what is trained; it starts anew each round.
        batches: What a step is fed; it must have `keys`.
        data: `batch -> (data, label)`; segments are entered from the path of data to noise.
        steps: The steps of all rounds together, which share them evenly.
        nfe: The network calls of the last student.
        first_nfe: The network calls of the teacher; `nfe` times a power of two.
        teacher_nfe: Network calls of one of its velocities, for the count of queries.
        shift: See `paths.shifted`.
        ema_power: See `students.power_average`.
        ema_from: Steps of a round before its average begins.

    Raises:
        InputError: If the numbers of calls do not fit, a round would have no step, or, from
            `init`, the teacher's output has not the shape of the examples.
    """
    rounds = max(first_nfe // max(nfe, 1), 1).bit_length() - 1
    if nfe < 1 or rounds < 1 or first_nfe != nfe * 2**rounds:
        raise InputError(
            f"first_nfe={first_nfe} must be nfe={nfe} times a power of two, 2 at least"
        )
    if steps < rounds:
        raise InputError(f"{steps} steps for {rounds} rounds; give each one at least")
    # Evenly shared: as many steps a round, or one more.
    starts = np.array([-(-i * steps // rounds) for i in range(rounds)])
    policy = student.policy
    descend = descent(optimizer, power=ema_power, begin=ema_from)

    def init(key, frozen, batch):
        x, label = data(batch)
        check_velocity(teacher, frozen, x, jnp.ones(x.shape[0]), label)
        trainable = student.init(key, frozen)
        zero, copy = jnp.int32(0), lambda: jax.tree.map(jnp.copy, trainable)
        return ProgressiveState(trainable, copy(), optimizer.init(trainable), copy(), zero, zero)

    def line(params, frozen, x, start, end, label):
        """The mean velocity that a student gives for a segment."""
        t, t_end = shifted(start, shift), shifted(end, shift)
        outputs = student.apply(params, frozen, x, t, label)
        return policy.average(policy.begin(outputs, x, t, t_end), x, t, t_end)

    def step(state, frozen, batch, key):
        del key
        done = jnp.sum(state.step >= starts[1:])
        within = state.step - jnp.asarray(starts)[done]
        state = jax.lax.cond((within == 0) & (done > 0), next_round, lambda s: s, state)
        x0, label = data(batch)
        k_noise, k_place = streams(batch["keys"], 2)
        count = first_nfe / 2.0 ** (done + 1)
        start = jnp.ceil((1.0 - jax.vmap(jax.random.uniform)(k_place)) * count) / count
        middle, end = start - 0.5 / count, start - 1.0 / count
        noise = noise_like(x0, k_noise)
        times = shifted(jnp.stack([start, middle, jnp.maximum(end, 0.0)]), shift)
        x = interpolate(x0, noise, times[0])

        def by_teacher(x):
            return euler(lambda x, t: teacher(frozen, x, t, label), x, times)

        def by_student(x):
            u = line(state.teacher, frozen, x, start, middle, label)
            x = x + expand(times[1] - times[0], x) * u
            u = line(state.teacher, frozen, x, middle, jnp.maximum(end, 0.0), label)
            return x + expand(times[2] - times[1], x) * u

        target = jax.lax.cond(done == 0, by_teacher, by_student, x)
        wanted = jax.lax.stop_gradient((x - target) / expand(times[0] - times[2], x))

        def loss(params):
            u = line(params, frozen, x, start, jnp.maximum(end, 0.0), label)
            return jnp.square(u - wanted).mean()

        value, grads = jax.value_and_grad(loss)(state.trainable)
        moved, _ = descend(grads, state.trainable, state.opt, state.average, within)
        # Of the round before, whose student is a teacher too.
        queries = jnp.where(done == 0, 2 * teacher_nfe, 2)
        metrics = {"loss": value, "nfe": count, "queries": queries.astype(jnp.float32)}
        counts = {"step": state.step + 1, "queries": state.queries + queries}
        return state._replace(**moved._asdict(), **counts), metrics

    def next_round(state):
        new = jax.tree.map(jnp.copy, state.average)
        return state._replace(
            trainable=new, teacher=state.average, opt=optimizer.init(state.average)
        )

    return Method(init, step, lambda state: state.average, batches)


def recipe(
    task: FlowTask,
    *,
    first_nfe: Annotated[int, Between(2, 10**6)] = 16,
    **rest: Annotated[Any, adapt.Training],
) -> Recipe:
    """A linear student by progressive distillation, from real examples.

    Args:
        task: What it is for.
        first_nfe: Euler steps of the teacher in the first round: `nfe` times a power of two.
        **rest: Settings of `adapt.Training`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    (training,) = grouped(rest, adapt.Training)
    # The rate falls in each round anew.
    rounds = max((first_nfe // training.nfe).bit_length() - 1, 1)
    steps = -(-training.steps // rounds)
    head = MomentumHead(1, task.shape[-1], task.trunk.patch, curved=False)
    student = adapt.adapted(task, head, momentum_policy(), training)
    method = progressive(
        student,
        task.velocity,
        adapt.optimizer(training, steps=steps),
        batches=task.batches(training.batch_size),
        data=task.data,
        steps=training.steps,
        nfe=training.nfe,
        first_nfe=first_nfe,
        teacher_nfe=task.nfe,
        shift=task.shift,
        ema_power=training.ema_power,
        ema_from=adapt.warmup_of(training, steps),
    )
    return adapt.student_recipe(task, student, method, training)
