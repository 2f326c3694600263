"""MeanFlow: a network that knows the mean velocity of any part of a path.

Geng et al., "Mean Flows for One-step Generative Modeling" (arXiv 2505.13447). The mean velocity u
from t down to r obeys `u = v - (t - r) du/dt`, where the derivative is along the path and v the
velocity at t. So a network is drawn to what it says itself, corrected by its own derivative; where
r is t that is flow matching. A call then goes all of the way, or any part of it.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.flow import adapt
from jaxdistill.flow.paths import Examples, Times, boundaries, expand, interpolate, shifted
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.students import (
    Labels,
    StudentState,
    Teacher,
    check_velocity,
    chosen,
    descent,
    mean_square,
    noise_like,
    streams,
)
from jaxdistill.keywords import Between, Fraction, Rate, grouped
from jaxdistill.method import Batch, BatchSpec, Frozen, Method
from jaxdistill.nn.dit import DiT
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Recipe

MeanVelocity = Callable[[PyTree, Frozen, Examples, Times, Times, Labels], Examples]
"""`(trainable, frozen, x, t, r, label) -> u`, the mean velocity from t down to r."""


class Means(NamedTuple):
    """What is learned.

    Attributes:
        velocity: Of the `teacher`, guidance included, or of the `data`: noise minus the example,
            whose mean it is.
        guidance: Scale of the guidance that is learned from data; 1 for none. The network guides
            itself.
        label_drop: Part of the labels that is left out, where that is not 1.
        apart: Part of the examples whose r is not t.
        centre: Mean of the logit of the raw times, of which t is the larger and r the smaller.
        spread: Its deviation.
        power: Of the weight `(square + floor)^-power` of an example; 0 is the square distance.
        floor: See `power`.
    """

    velocity: Literal["teacher", "data"] = "teacher"
    guidance: Annotated[float, Between(0, 100)] = 1.0
    label_drop: Annotated[float, Between(0, 0.99)] = 0.1
    apart: Fraction = 0.25
    centre: Annotated[float, Between(-10, 10)] = -0.4
    spread: Rate = 1.0
    power: Annotated[float, Between(0, 10)] = 1.0
    floor: Rate = 1e-2


def draw_times(keys: Key[Array, " n"], means: Means) -> tuple[Times, Times]:
    """Raw times t and r <= t of each example, from its key; of most r is t."""

    def one(key):
        k_times, k_apart = jax.random.split(key)
        raw = jax.nn.sigmoid(means.centre + means.spread * jax.random.normal(k_times, (2,)))
        apart = jax.random.uniform(k_apart) < means.apart
        return raw.max(), jnp.where(apart, raw.min(), raw.max())

    return jax.vmap(one)(keys)


def mean_target(
    mean: Callable[[Examples, Times], Examples],
    x: Examples,
    t: Times,
    r: Times,
    velocity: Examples,
) -> Examples:
    """What a mean velocity is drawn to: equation 10.

    Args:
        mean: `(x, t) -> u`, the network's, for ends that are held.
        x: Points of paths.
        t: Their noise levels.
        r: The ends.
        velocity: The velocities at the points.
    """
    change = jax.jvp(mean, (x, t), (velocity, jnp.ones_like(t)))[1]
    return velocity - expand(t - r, x) * change


def weighted(square: Float[Array, " n"], means: Means) -> Float[Array, " n"]:
    """Square distances with their weights, which have no gradient."""
    weight = (jax.lax.stop_gradient(square) + means.floor) ** -means.power
    return weight * square


def meanflow(
    init: Callable[[PRNGKeyArray, Frozen], PyTree],
    mean: MeanVelocity,
    optimizer: optax.GradientTransformation,
    *,
    batches: BatchSpec,
    data: Callable[[Batch], tuple[Examples, Labels]],
    teacher: Teacher | None = None,
    teacher_nfe: int = 1,
    means: Means = Means(),  # noqa: B008, a tuple of numbers
    shift: float = 1.0,
    null: int | None = None,
    ema_power: float = 7.0,
    ema_from: int = 100,
) -> Method:
    """Learns mean velocities.

    Args:
        init: `(key, frozen) -> trainable`.
        mean: The network.
        optimizer: Optimizer.
        batches: What a step is fed; it must have `keys`.
        data: `batch -> (data, label)`.
        teacher: `(frozen, x, t, label) -> u`, guidance included, where it is followed.
        teacher_nfe: Network calls of one of its velocities, for the count of queries.
        means: What is learned.
        shift: See `paths.shifted`.
        null: The label that says nothing, where there is one.
        ema_power: See `students.power_average`.
        ema_from: Steps before the average begins.

    Raises:
        InputError: If there is no teacher to follow, nothing that guides, or, from `init`, the
            teacher's output has not the shape of the examples.
    """
    descend = descent(optimizer, power=ema_power, begin=ema_from)
    follows, guides = means.velocity == "teacher", means.guidance != 1.0
    if follows and teacher is None:
        raise InputError("velocity=teacher needs a teacher; give one, or take velocity=data")
    if follows and guides:
        raise InputError(
            f"guidance={means.guidance} is learned from data; a teacher that is followed has its "
            "own: set guidance=1.0, or velocity=data"
        )
    if guides and (null is None or not means.label_drop):
        raise InputError(
            f"guidance={means.guidance} needs labels, and a label_drop above 0; or set guidance=1.0"
        )

    def make(key, frozen, batch):
        x, label = data(batch)
        if follows:
            check_velocity(teacher, frozen, x, jnp.ones(x.shape[0]), label)
        trainable = init(key, frozen)
        copy, zero = jax.tree.map(jnp.copy, trainable), jnp.int32(0)
        return StudentState(trainable, optimizer.init(trainable), copy, zero, zero)

    def step(state, frozen, batch, key):
        del key  # each example has its own
        still = jax.lax.stop_gradient(frozen)
        x0, label = data(batch)
        k_noise, k_times, k_drop = streams(batch["keys"], 3)
        noise = noise_like(x0, k_noise)
        t, r = (shifted(raw, shift) for raw in draw_times(k_times, means))
        x, t, r, label = collective.by_example((interpolate(x0, noise, t), t, r, label))
        velocity = noise - x0
        if follows:
            velocity = teacher(still, x, t, label)
        if guides:
            nothing = jnp.full_like(label, null)
            without = mean(jax.lax.stop_gradient(state.trainable), still, x, t, t, nothing)
            guided = without + means.guidance * (velocity - without)
            dropped = jax.vmap(jax.random.uniform)(k_drop) < means.label_drop
            label = jnp.where(dropped, null, label)
            velocity = chosen(dropped, velocity, guided)

        def loss(trainable):
            there = lambda x, t: mean(trainable, still, x, t, r, label)  # noqa: E731
            wanted = jax.lax.stop_gradient(mean_target(there, x, t, r, velocity))
            square = mean_square(there(x, t) - wanted)
            return weighted(square, means).mean(), square.mean()

        (value, square), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        moved, norm = descend(grads, state.trainable, state.opt, state.average, state.step)
        asked = teacher_nfe if follows else 0
        metrics = {"loss": value, "square": square, "grad_norm": norm}
        metrics["queries"] = jnp.float32(asked)
        done = state.step + 1, state.queries + asked
        return StudentState(*moved, *done), metrics

    return Method(make, step, lambda state: state.average, batches)


def recipe(
    task: FlowTask,
    *,
    fresh: bool = False,
    **rest: Annotated[Any, Means, adapt.Training],
) -> Recipe:
    """A network of mean velocities, tuned from the teacher or trained from the beginning.

    Args:
        task: What it is for.
        fresh: Whether it starts from nothing instead of from the teacher.
        **rest: Settings of `Means` and `adapt.Training`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    means, training = grouped(rest, Means, adapt.Training)
    if fresh and training.rank:
        raise InputError("method.fresh trains the whole network; set method.rank=0 with it")
    if isinstance(task.trunk, DiT):
        # The kernel of attention has no forward derivative.
        task = task._replace(trunk=task.trunk.clone(per_device=None))
    head = MomentumHead(1, task.shape[-1], task.trunk.patch, curved=False)
    student = adapt.adapted(task, head, momentum_policy(), training, spans=True)

    def init(key, frozen):
        if fresh:
            frozen = {"teacher": adapt.fresh_trunk(task.trunk, task.shape, key)}
        return student.init(key, frozen)

    def mean(trainable, frozen, x, t, r, label):
        outputs = student.apply(trainable, frozen, x, t, label, t - r)
        return student.policy.velocity(student.policy.begin(outputs, x, t, r), x, t)

    method = meanflow(
        init,
        mean,
        adapt.optimizer(training),
        batches=task.batches(training.batch_size),
        data=task.data,
        teacher=task.velocity,
        teacher_nfe=task.nfe,
        means=means,
        shift=task.shift,
        null=task.num_classes or None,
        ema_power=training.ema_power,
        ema_from=adapt.warmup_of(training, training.steps),
    )

    def states(output, frozen, noise, label, nfe):
        times = shifted(boundaries(nfe), task.shift)

        def call(x, ends):
            t, r = (jnp.full(len(x), end) for end in ends)
            x = x - expand(t - r, x) * mean(output, frozen, x, t, r, label)
            return x, x

        return jax.lax.scan(call, noise, (times[:-1], times[1:]))[1]

    return adapt.by_states(adapt.student_recipe(task, student, method, training), states)
