"""UCGM-T: flow matching, EDM and continuous consistency models as one loss.

Sun, Jiang and Lin, "Unified Continuous Generative Models" (arXiv 2505.07447). The consistency ratio
says what a network learns: at 0 to say which data a point comes from on the average, at 1 where its
path ends. A few calls of the latter do what many of the former do.

Where paper and published code differ, the code is followed: its weights and distances made the
figures. Along the way of the derivative enhanced data and noise are put together, as there.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.flow import adapt
from jaxdistill.flow.paths import Examples, Times, expand, kumaraswamy
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.samplers import own_keys, ucgm_states
from jaxdistill.flow.students import (
    Labels,
    chosen,
    descent,
    mean_square,
    noise_like,
    power_average,
    streams,
)
from jaxdistill.flow.transports import (
    LINEAR,
    TRANSPORTS,
    Estimate,
    Transport,
    answer,
    denominator,
    estimates,
    of_velocity,
    point,
)
from jaxdistill.keywords import Between, Fraction, grouped
from jaxdistill.method import Batch, BatchSpec, Frozen, Method
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Recipe

_LEAST_TIME = 1e-4  # that a sine is divided by


class Unified(NamedTuple):
    """What is learned.

    Attributes:
        consistency: The ratio lambda of the time at which a network's estimate is held against that
            at the full time: 0 for flow matching or diffusion, 1 for the end of the path.
        enhancement: The factor zeta of guidance that is learned. With a consistency ratio above 0
            the teacher guides: 0 learns from the data alone, 1 from the teacher's paths, more goes
            beyond the teacher. At a ratio of 0 the network's own average guides: zeta is as
            classifier-free guidance of scale `1 / (1 - zeta)`, for which it must be below 1.
        enhanced_until: The time up to which that holds; above it the mean of data and estimate is
            learned.
        derivative: By a central difference, two calls without gradient, or forward differentiation.
        epsilon: Half the length of the difference.
        bound: What the derivative is clipped to.
        times: (a, b, c) of the times `min(c Beta(a, b), 1)`.
        weight: `cosine` of the time, as published, or `uniform`.
        distance: `huber` of the root mean square, or its `square`.
        huber: Where the Huber distance turns from square to straight; 0 is straight all along.
        cosine: Whether the cosine distance of the channels is added.
        label_drop: The share of the labels replaced by the null label.
    """

    consistency: Fraction = 1.0
    enhancement: Annotated[float, Between(-10, 10)] = 1.0
    enhanced_until: Fraction = 0.75
    derivative: Literal["difference", "jvp"] = "difference"
    epsilon: Annotated[float, Between(1e-5, 0.1)] = 0.005
    bound: Annotated[float, Between(1e-3, 1e9)] = 1.0
    times: tuple[Annotated[float, Between(1e-2, 1e2)], ...] = (0.8, 1.0, 1.0)
    weight: Literal["cosine", "uniform"] = "cosine"
    distance: Literal["huber", "square"] = "huber"
    huber: Annotated[float, Between(0, 1e6)] = 0.0
    cosine: bool = False
    label_drop: Annotated[float, Between(0, 0.99)] = 0.1


class UCGMState(NamedTuple):
    """What changes.

    Attributes:
        trainable: What is trained.
        opt: The optimizer's state.
        average: The moving average of `trainable`, which the network is used with.
        reference: The network's own average that guides it at a consistency ratio of 0; else empty.
        step: Steps done.
        queries: Network calls of the teacher so far, of each of the examples of a step.
    """

    trainable: PyTree
    opt: PyTree
    average: PyTree
    reference: PyTree
    step: Int32[Array, ""]
    queries: Int32[Array, ""]


def target(
    estimate: Estimate,
    output: Examples,
    data: Examples,
    noise: Examples,
    t: Times,
    *,
    unified: Unified,
    transport: Transport = LINEAR,
) -> Examples:
    """What the output of a network is drawn to: equations 5 and 6.

    Args:
        estimate: The network's, without gradient.
        output: Its output at the point of data, noise and t, without gradient.
        data: Data, enhanced or not.
        noise: Noise, enhanced or not; their point is that of the bare ones.
        t: Times.
        unified: What is learned.
        transport: The transport.
    """
    ratio = unified.consistency
    if ratio == 0:
        return answer(transport, data, noise, t)

    def there(t):
        return estimate(point(transport, data, noise, t), t)[0]

    if ratio == 1 and unified.derivative == "jvp":
        change = jax.jvp(there, (t,), (jnp.ones_like(t),))[1]
    elif ratio == 1:
        after, before = t + unified.epsilon, t - unified.epsilon
        # Divided first, for the sake of short number formats.
        length = 2 * unified.epsilon
        change = there(after) / length - there(before) / length
    else:
        length = expand((1 - ratio) * jnp.maximum(t, _LEAST_TIME), data)
        now = estimates(transport, point(transport, data, noise, t), t, output)[0]
        change = now / length - there(ratio * t) / length
    change = jnp.clip(change, -unified.bound, unified.bound)
    sine = jnp.sin(jnp.pi / 2 * jnp.maximum(t, _LEAST_TIME))
    scale = 4 * transport.alpha(t) / (denominator(transport, t) * sine)
    return output - expand(scale, data) * change


def enhanced(
    bare: tuple[Examples, Examples],
    known: tuple[Examples, Examples],
    from_there: tuple[Examples, Examples],
    t: Times,
    unified: Unified,
) -> tuple[Examples, Examples]:
    """Data and noise that say where guidance goes, at the same point: section 3.2.

    Args:
        bare: Those that were drawn.
        known: The estimates of them under the label.
        from_there: What the difference is taken from: the bare ones, or estimates without label.
        t: Times.
        unified: Enhancement, and the time up to which it holds.
    """
    early = t < unified.enhanced_until

    def one(x, estimate, base):
        beyond = x + unified.enhancement * (estimate - base)
        return chosen(early, beyond, (x + estimate) / 2)

    return tuple(one(*parts) for parts in zip(bare, known, from_there, strict=True))


def distance(output: Examples, wanted: Examples, unified: Unified) -> Float[Array, " n"]:
    """How far outputs are from what is wanted, of each example."""
    square = mean_square(output - wanted)
    if unified.distance == "square":
        far = square
    else:
        # The root has no slope at 0.
        far = jnp.sqrt(square + max(unified.huber**2, 1e-12)) - unified.huber
    if unified.cosine:
        far += 1 - optax.losses.cosine_similarity(output, wanted, epsilon=1e-6).reshape(
            len(output), -1
        ).mean(-1)
    return far


def draw_times(keys: Key[Array, " n"], times: tuple[float, ...]) -> Times:
    """`min(c Beta(a, b), 1)`, from a key for each."""
    a, b, c = times
    return jnp.minimum(c * jax.vmap(lambda key: jax.random.beta(key, a, b))(keys), 1.0)


def ucgm(
    init: Callable[[PRNGKeyArray, Frozen], PyTree],
    apply: Callable[[PyTree, Frozen, Examples, Times, Labels], tuple[Examples, Examples, Examples]],
    optimizer: optax.GradientTransformation,
    *,
    batches: BatchSpec,
    data: Callable[[Batch], tuple[Examples, Labels]],
    teacher: Callable[[Frozen, Examples, Times, Labels], tuple[Examples, Examples]] | None = None,
    teacher_nfe: int = 1,
    unified: Unified,
    transport: Transport = LINEAR,
    null: int | None = None,
    ema_power: float = 7.0,
    ema_from: int = 100,
) -> Method:
    """The training of a network of any transport and consistency ratio.

    Args:
        init: `(key, frozen) -> trainable`: fresh, or a teacher's.
        apply: `(trainable, frozen, x, t, label) -> (output, data, noise)`: what the transport asks
            for, and the estimates that follow from it.
        optimizer: Optimizer.
        batches: What a step is fed; it must have `keys`.
        data: `batch -> (data, label)`.
        teacher: `(frozen, x, t, label) -> (data, noise)`, the estimates that enhance the target.
        teacher_nfe: Network calls of one of them, for the count of queries.
        unified: What the network learns.
        transport: What it sees and is asked for.
        null: The label that says nothing, where there is one.
        ema_power: See `students.power_average`.
        ema_from: Steps before the average begins.

    Raises:
        InputError: If what is enhanced has nobody to be guided by.
    """
    descend = descent(optimizer, power=ema_power, begin=ema_from)
    ratio, zeta = unified.consistency, unified.enhancement
    if len(unified.times) != 3:
        raise InputError(f"times={unified.times}; give three numbers, (a, b, c)")
    own = zeta != 0 and ratio == 0
    if own and (null is None or not unified.label_drop or zeta >= 1):
        raise InputError(
            f"enhancement={zeta} with consistency=0 is guidance by the network itself: it needs "
            "labels, a label_drop above 0 and an enhancement below 1; or set enhancement=0"
        )
    if zeta != 0 and ratio > 0 and teacher is None:
        raise InputError(f"enhancement={zeta} with consistency={ratio} needs a teacher, or be 0")

    def make(key, frozen, batch):
        del batch
        trainable = init(key, frozen)
        copy = lambda: jax.tree.map(jnp.copy, trainable)  # noqa: E731
        zero = jnp.int32(0)
        return UCGMState(
            trainable, optimizer.init(trainable), copy(), copy() if own else (), zero, zero
        )

    def step(state, frozen, batch, key):
        del key  # each example has its own
        bare, label = data(batch)
        k_noise, k_time, k_drop = streams(batch["keys"], 3)
        noise = noise_like(bare, k_noise)
        t = draw_times(k_time, unified.times)
        dropped = jnp.zeros(t.shape, bool)
        if null is not None:
            dropped = jax.vmap(jax.random.uniform)(k_drop) < unified.label_drop
            label = jnp.where(dropped, null, label)
        x = point(transport, bare, noise, t)
        x, t, label = collective.by_example((x, t, label))

        def estimate(x, t):
            return apply(state.trainable, frozen, x, t, label)[1:]

        def guided(known):
            """The pair that the target is made of."""
            pair = bare, noise
            if zeta == 0:
                return pair
            if own:
                blank = jnp.full_like(label, null)
                without = apply(state.reference, frozen, x, t, blank)[1:]
                half = tuple((a + b) / 2 for a, b in zip(pair, without, strict=True))
                better = enhanced(pair, known, without, t, unified)
            else:
                half = pair
                better = enhanced(pair, teacher(frozen, x, t, label), pair, t, unified)
            return jax.tree.map(lambda a, b: chosen(dropped, b, a), better, half)

        def loss(trainable):
            output, *known = apply(trainable, frozen, x, t, label)
            still, known = jax.lax.stop_gradient((output, tuple(known)))
            pair = guided(known)
            wanted = target(estimate, still, *pair, t, transport=transport, unified=unified)
            far = distance(output, jax.lax.stop_gradient(wanted), unified)
            weight = jnp.cos(jnp.pi / 2 * t) if unified.weight == "cosine" else jnp.ones_like(t)
            return (weight * far).mean(), mean_square(output - wanted).mean()

        (value, residual), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        moved, norm = descend(grads, state.trainable, state.opt, state.average, state.step)
        reference = state.reference
        if own:
            # The code's decay d <- d + (1 - d) (0.999 - d) / 2 goes as 1 - 2 / n, as this does.
            reference = power_average(reference, moved.trainable, state.step, power=1.0, begin=0)
        asked = teacher_nfe if zeta != 0 and not own else 0
        metrics = {"loss": value, "residual": residual, "grad_norm": norm}
        metrics["queries"] = jnp.float32(asked)
        done = state.step + 1, state.queries + asked
        return UCGMState(*moved, reference, *done), metrics

    return Method(make, step, lambda state: state.average, batches)


class Sampling(NamedTuple):
    """How the network is used; see `samplers.ucgm_states`.

    Attributes:
        kappa: How far estimates are extrapolated.
        rho: The part of the noise that is drawn anew; by default the consistency ratio.
        grid: (a, b, c) of the times; see `paths.kumaraswamy`.
        gaps: How far the first call stays from noise, and the last from data.
    """

    kappa: Annotated[float, Between(0, 0.99)] = 0.0
    rho: Fraction | None = None
    grid: tuple[Annotated[float, Between(0.1, 10)], ...] = (1.0, 1.0, 1.0)
    gaps: tuple[Fraction, ...] = (0.001, 0.0)


def recipe(
    task: FlowTask,
    *,
    transport: Literal["linear", "trigflow", "edm", "triglinear", "random"] = "linear",
    fresh: bool = False,
    **rest: Annotated[Any, Unified, Sampling, adapt.Training],
) -> Recipe:
    """A network tuned from the teacher, or trained from the beginning.

    Args:
        task: What it is for.
        transport: Where the network is trained; it is one of the straight path, scaled.
        fresh: Whether it starts from nothing instead of from the teacher.
        **rest: Settings of `Unified`, `Sampling` and `adapt.Training`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    unified, sampling, training = grouped(rest, Unified, Sampling, adapt.Training)
    if fresh and training.rank:
        raise InputError("method.fresh trains the whole network; set method.rank=0 with it")
    for name, wanted in (("grid", 3), ("gaps", 2)):
        if len(getattr(sampling, name)) != wanted:
            raise InputError(f"method.{name} is {getattr(sampling, name)}; give {wanted} numbers")
    if sum(sampling.gaps) >= 1:
        raise InputError(f"method.gaps are {sampling.gaps}; together they must stay below 1")
    path = TRANSPORTS[transport]
    head = MomentumHead(1, task.shape[-1], task.trunk.patch, curved=False)
    policy = momentum_policy()
    student = adapt.adapted(task, head, policy, training)

    def init(key, frozen):
        if fresh:
            frozen = {"teacher": adapt.fresh_trunk(task.trunk, task.shape, key)}
        return student.init(key, frozen)

    def estimate(trainable, frozen, label):
        def velocity(x, t):
            outputs = student.apply(trainable, frozen, x, t, label)
            return policy.velocity(policy.begin(outputs, x, t, t), x, t)

        return of_velocity(velocity, path)

    def apply(trainable, frozen, x, t, label):
        data, noise = estimate(trainable, frozen, label)(x, t)
        return answer(path, data, noise, t), data, noise

    def teacher(frozen, x, t, label):
        return of_velocity(lambda x, t: task.velocity(frozen, x, t, label), path)(x, t)

    method = ucgm(
        init,
        apply,
        adapt.optimizer(training),
        batches=task.batches(training.batch_size),
        data=task.data,
        teacher=teacher,
        teacher_nfe=task.nfe,
        transport=path,
        unified=unified,
        null=task.num_classes or None,
        ema_power=training.ema_power,
        ema_from=adapt.warmup_of(training, training.steps),
    )
    rho = unified.consistency if sampling.rho is None else sampling.rho

    def states(output, frozen, noise, label, nfe):
        return ucgm_states(
            estimate(output, frozen, label),
            noise,
            kumaraswamy(nfe, sampling.grid, sampling.gaps),
            own_keys(noise),
            kappa=sampling.kappa,
            rho=rho,
            transport=path,
        )

    return adapt.by_states(adapt.student_recipe(task, student, method, training), states)
