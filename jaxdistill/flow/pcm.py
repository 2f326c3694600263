"""Phased consistency models: one call ends a phase, wherever in it a path is met.

Wang et al., "Phased Consistency Model" (arXiv 2405.18407). The way from noise to data is cut into
as many phases as a student has calls. In each a student learns that the points of a path of the
teacher's end at the same place: where it ends from a point of the path it must end from the next
point too, one step of the teacher's further on.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.flow import adapt, gan
from jaxdistill.flow.gan import Adversary, Discriminator
from jaxdistill.flow.paths import Examples, Times, expand, interpolate, shifted
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.students import (
    Labels,
    Student,
    Teacher,
    check_velocity,
    descent,
    ended,
    mean_square,
    noise_like,
    streams,
)
from jaxdistill.keywords import Between, grouped
from jaxdistill.method import Batch, BatchSpec, Frozen, Method
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Recipe

Blocks = Callable[[Frozen, Examples, Times, Labels], Float[Array, "depth n gh gw d"]]
"""`(frozen, x, t, label) -> blocks`: what a discriminator sees of examples."""


class Phases(NamedTuple):
    """What is asked of a student.

    Attributes:
        grid: Steps of the teacher from noise to data, even in raw time; a multiple of the phases.
        distance: `huber` of each number, or its `square`.
        huber: Where the Huber distance turns from square to straight; published: 0.001.
    """

    grid: Annotated[int, Between(1, 10**6)] = 32
    distance: Literal["huber", "square"] = "huber"
    huber: Annotated[float, Between(1e-9, 1e6)] = 1e-3


class Point(NamedTuple):
    """Where a path is met, in raw time.

    Attributes:
        start: The time of the point.
        after: The time of the next one, a step of the teacher's on.
        edge: The end of the phase.
        re_noised: A time of the grid in the phase, but not its start, for a discriminator.
    """

    start: Times
    after: Times
    edge: Times
    re_noised: Times


def draw_point(keys: Key[Array, " n"], grid: int, phases: int, phase: int | None = None) -> Point:
    """Draws a point of the grid for each example, all of them alike often, but for the data.

    Args:
        keys: A key for each.
        grid: Steps from noise to data.
        phases: Phases, of which `grid` is a multiple.
        phase: Of these the one to draw from, 0 ending at the data; by default all.
    """
    length = grid // phases
    low, high = (1, grid + 1) if phase is None else (phase * length + 1, (phase + 1) * length + 1)

    def one(key):
        k_place, k_noise = jax.random.split(key)
        place = jax.random.randint(k_place, (), low, high)
        # A point that is an edge belongs to the phase that starts there.
        edge = (place - 1) // length * length
        noised = edge + jax.random.randint(k_noise, (), 0, length)
        return Point(*(x / grid for x in (place, place - 1, edge, noised)))

    return jax.vmap(one)(keys)


class Pair(NamedTuple):
    """The two ends that should be one.

    Attributes:
        made: Where the student ends from a point, which carries the gradient.
        wanted: Where it ends from the teacher's next point.
        loss: (n,). How far they are apart.
    """

    made: Examples
    wanted: Examples
    loss: Float[Array, " n"]


def consistency(
    student: Student,
    teacher: Teacher,
    trainable: PyTree,
    frozen: Frozen,
    data: Examples,
    noise: Examples,
    at: Point,
    label: Labels,
    phases: Phases,
    shift: float,
) -> Pair:
    """What a student is asked for at a point of a path.

    Args:
        student: The student.
        teacher: The velocity to follow, guidance included.
        trainable: What it trains.
        frozen: The rest, the teacher's parameters included.
        data: Where the path comes from.
        noise: Where it leads.
        at: The point.
        label: What is asked for.
        phases: What is asked of a student.
        shift: See `paths.shifted`.
    """
    t, t_after = shifted(at.start, shift), shifted(at.after, shift)
    x, t = collective.by_example((interpolate(data, noise, t), t))
    after = x + expand(t_after - t, x) * teacher(frozen, x, t, label)
    edge = shifted(at.edge, shift)
    wanted = jax.lax.stop_gradient(ended(student, trainable, frozen, after, label, t_after, edge))
    made = ended(student, trainable, frozen, x, label, t, edge)
    if phases.distance == "square":
        return Pair(made, wanted, mean_square(made - wanted))
    far = jnp.sqrt(jnp.square(made - wanted) + phases.huber**2) - phases.huber
    return Pair(made, wanted, far.reshape(len(x), -1).mean(1))


class PCMState(NamedTuple):
    """What changes.

    Attributes:
        trainable: What the student trains.
        heads: The discriminator's parameters; empty without one.
        opt: The optimizers' states, of both.
        average: The moving average of `trainable`, which the student is used with.
        step: Steps done.
        queries: Network calls of the teacher so far, of each of the examples of a step.
    """

    trainable: PyTree
    heads: PyTree
    opt: tuple[PyTree, PyTree]
    average: PyTree
    step: Int32[Array, ""]
    queries: Int32[Array, ""]


def check_grid(grid: int, phases: int) -> None:
    """Refuses phases that do not end on the grid.

    Raises:
        InputError: If the steps are no multiple of the phases.
    """
    if phases < 1 or grid < phases or grid % phases:
        raise InputError(
            f"method.grid={grid} steps do not divide into method.nfe={phases} phases; give a "
            "multiple of them"
        )


def pcm(
    student: Student,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    *,
    batches: BatchSpec,
    data: Callable[[Batch], tuple[Examples, Labels]],
    nfe: int = 2,
    phases: Phases = Phases(),  # noqa: B008, a tuple of numbers
    shift: float = 1.0,
    teacher_nfe: int = 1,
    adversarial: float = 0.0,
    discriminator: Discriminator | None = None,
    blocks: Blocks | None = None,
    ema_power: float = 7.0,
    ema_from: int = 100,
) -> Method:
    """Trains a student that ends a phase in one call.

    What it is drawn to is its own end without gradient, with the parameters of the step and not
    their average, as in the released code. A discriminator tells the ends that it comes to from
    those it is drawn to, at noise levels of their phase; both players move in each step, where the
    released code alternates.

    Args:
        student: The network and its policy, meant to be a straight line.
        teacher: The velocity to follow.
        optimizer: Optimizer of what is trained.
        batches: What a step is fed; it must have `keys`.
        data: `batch -> (data, label)`.
        nfe: Phases, and calls of the student.
        phases: What is asked of it.
        shift: See `paths.shifted`.
        teacher_nfe: Network calls of one of the teacher's velocities, for the count of queries.
        adversarial: Weight of the adversarial loss.
        discriminator: Who tells ends apart, where that is not 0.
        blocks: What it sees; without gradient into `frozen`.
        ema_power: See `students.power_average`.
        ema_from: Steps before the average begins.

    Raises:
        InputError: If the phases do not end on the grid, or, from `init`, the teacher's output has
            not the shape of the examples.
    """
    check_grid(phases.grid, nfe)
    played = adversarial > 0
    descend = descent(optimizer, power=ema_power, begin=ema_from)

    def init(key, frozen, batch):
        x, label = data(batch)
        check_velocity(teacher, frozen, x, jnp.ones(x.shape[0]), label)
        k_student, k_heads = jax.random.split(key)
        trainable = student.init(k_student, frozen)
        heads = discriminator.init(k_heads) if played else ()
        opt = optimizer.init(trainable), discriminator.optimizer.init(heads) if played else ()
        copy = jax.tree.map(jnp.copy, trainable)
        return PCMState(trainable, heads, opt, copy, jnp.int32(0), jnp.int32(0))

    def step(state, frozen, batch, key):
        del key  # each example has its own
        x0, label = data(batch)
        k_noise, k_place, *k_blur = streams(batch["keys"], 4)
        noise = noise_like(x0, k_noise)
        at = draw_point(k_place, phases.grid, nfe)
        still = jax.lax.stop_gradient(frozen)

        def seen(x, keys):
            edge, level = shifted(at.edge, shift), shifted(at.re_noised, shift)
            x = gan.renoised(x, noise_like(x, keys), edge, level)
            return blocks(still, x, level, label)

        def loss(trainable):
            pair = consistency(
                student, teacher, trainable, still, x0, noise, at, label, phases, shift
            )
            value = pair.loss.mean()
            metrics, shown = {"consistency": value}, ()
            if played:
                fake = seen(pair.made, k_blur[0])
                said = discriminator.apply(state.heads, fake)
                metrics["generator"] = gan.generator_loss(discriminator.loss, said)
                value += adversarial * metrics["generator"]
                shown = jax.lax.stop_gradient((seen(pair.wanted, k_blur[1]), fake))
            return value, (metrics, shown)

        (value, (metrics, shown)), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        moved, norm = descend(grads, state.trainable, state.opt[0], state.average, state.step)
        metrics |= {"loss": value, "grad_norm": norm}
        heads, heads_opt = state.heads, state.opt[1]
        if played:

            def told_apart(heads):
                said = (discriminator.apply(heads, blocks) for blocks in shown)
                return gan.discriminator_loss(discriminator.loss, *said)

            metrics["discriminator"], slope = jax.value_and_grad(told_apart)(heads)
            updates, heads_opt = discriminator.optimizer.update(
                collective.mean(slope), heads_opt, heads
            )
            heads = optax.apply_updates(heads, updates)
        # What a discriminator sees are the blocks of the teacher, of both ends.
        asked = teacher_nfe + 2 * played
        metrics["queries"] = jnp.float32(asked)
        opt, done = (moved.opt, heads_opt), (state.step + 1, state.queries + asked)
        return PCMState(moved.trainable, heads, opt, moved.average, *done), metrics

    return Method(init, step, lambda state: state.average, batches)


def recipe(
    task: FlowTask,
    *,
    whole: bool = False,
    gan_loss: gan.Loss = "saturating",
    **rest: Annotated[Any, Phases, Adversary, adapt.Training],
) -> Recipe:
    """A linear student that ends each of `nfe` phases in one call, from real examples.

    Args:
        task: What it is for.
        whole: Whether the way is one phase, as in consistency distillation (Song et al. 2023): each
            call leads to the data, and more of them have fresh noise in between.
        gan_loss: What student and discriminator descend; see `gan.Loss`.
        **rest: Settings of `Phases`, `gan.Adversary` and `adapt.Training`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    phases, adversary, training = grouped(rest, Phases, Adversary, adapt.Training)
    played = adversary.adversarial > 0
    head = MomentumHead(1, task.shape[-1], task.trunk.patch, curved=False)
    student = adapt.adapted(task, head, momentum_policy(), training)
    method = pcm(
        student,
        task.velocity,
        adapt.optimizer(training),
        batches=task.batches(training.batch_size),
        data=task.data,
        nfe=1 if whole else training.nfe,
        phases=phases,
        shift=task.shift,
        teacher_nfe=task.nfe,
        adversarial=adversary.adversarial,
        discriminator=gan.discriminator(task, adversary, gan_loss) if played else None,
        blocks=gan.blocks_of_teacher(task),
        ema_power=training.ema_power,
        ema_from=adapt.warmup_of(training, training.steps),
    )
    made = adapt.student_recipe(task, student, method, training)
    if played:
        made = made._replace(rates=(*made.rates, "heads_learning_rate"))
    return adapt.with_fresh_noise(made, task, student) if whole else made
