"""What the training of all few-step students shares: segments, examples, averages, sampling.

A student takes a few *segments* from noise to data, with one network call in each. A step of its
training goes through the segments in sampling order, each from where the student got to.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, Key, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.flow.paths import Examples, Times, boundaries, interpolate, shifted
from jaxdistill.flow.policies import Outputs, Policy
from jaxdistill.method import Batch, BatchSpec, Frozen, Method

Labels = Int32[Array, " n"]
Teacher = Callable[[Frozen, Examples, Times, Labels], Examples]
"""`(frozen, x, t, label) -> u`: any velocity, guidance included."""


class Student(NamedTuple):
    """A network whose one call says how to go through a segment.

    Attributes:
        init: `(key, frozen) -> trainable`. What is trained; the rest stays in `frozen`.
        apply: `(trainable, frozen, x, t, label) -> outputs`, one network call.
        policy: What the outputs mean.
    """

    init: Callable[[PRNGKeyArray, Frozen], PyTree]
    apply: Callable[[PyTree, Frozen, Examples, Times, Labels], Outputs]
    policy: Policy


class Start(NamedTuple):
    """Where the examples of a training step start, and the segments they go through.

    Attributes:
        x: The states at the first boundary.
        label: What is asked for.
        raw: (segments + 1, n). Boundaries in raw time, falling.
        keys: (n,). A key for each example.
    """

    x: Examples
    label: Labels
    raw: Float[Array, "boundaries n"]
    keys: Key[Array, " n"]


class Source(NamedTuple):
    """Where examples come from: what a step is fed, and what is made of it.

    Attributes:
        batches: See `BatchSpec`.
        start: `batch -> Start`.
    """

    batches: BatchSpec
    start: Callable[[Batch], Start]


Schedule = Callable[[Key[Array, " n"]], Float[Array, "boundaries n"]]
"""Draws the boundaries of a step, in raw time, for each example from its key."""


def fixed(nfe: int, last: float = 1.0) -> Schedule:
    """The same segments always: those of sampling with that many calls; see `paths.boundaries`."""
    raw = boundaries(nfe, last)
    return lambda keys: jnp.broadcast_to(raw[:, None], (nfe + 1, keys.shape[0]))


def elastic(nfe: Sequence[int]) -> Schedule:
    """Two segments that together visit all those of sampling with any of several numbers of calls.

    For each example a number N of calls and one of its segments, from j/N to (j + 1)/N of the way,
    are drawn: the first segment leads there in one go, the second is that segment. So the cost of
    a step is that of two calls, and one student serves them all.

    Raises:
        InputError: If there is no number, or one that is not positive.
    """
    if not nfe or min(nfe) < 1:
        raise InputError(f"numbers of calls {tuple(nfe)}; give some, each at least 1")
    options = jnp.asarray(nfe)

    def one(key):
        k_calls, k_place = jax.random.split(key)
        n = jax.random.choice(k_calls, options)
        # For one call there is no second segment: it gets no length, and so no weight.
        j = jax.random.randint(k_place, (), 1, jnp.maximum(n, 2))
        return jnp.stack([jnp.ones(()), 1 - j / n, jnp.maximum(1 - (j + 1) / n, 0.0)])

    return lambda keys: jax.vmap(one)(keys).T


def from_noise(shape: Sequence[int], size: int, schedule: Schedule, num_classes: int) -> Source:
    """Examples that start from noise, with labels drawn evenly: no data at all.

    Args:
        shape: The shape of one example.
        size: Examples a step.
        schedule: The segments.
        num_classes: 0 where there are no labels; they are then all 0.
    """

    def start(batch):
        def one(key):
            k_noise, k_label = jax.random.split(key)
            label = jax.random.randint(k_label, (), 0, max(num_classes, 1))
            return jax.random.normal(k_noise, tuple(shape)), label

        keys = batch["keys"]
        k_first, k_raw, k_rest = streams(keys, 3)
        x, label = jax.vmap(one)(k_first)
        return Start(x, label, schedule(k_raw), k_rest)

    return Source(BatchSpec("keys", size), start)


def from_data(
    batches: BatchSpec,
    data: Callable[[Batch], tuple[Examples, Labels]],
    schedule: Schedule,
    shift: float,
) -> Source:
    """Examples that start on the path from noise to data, at the start of one segment.

    A raw time is drawn and the segment that it falls in is taken, so that segments come as often
    as they are long.

    Args:
        batches: What a step is fed; it must have `keys`.
        data: `batch -> (data, label)`.
        schedule: The segments.
        shift: See `paths.shifted`.
    """

    def start(batch):
        x, label = data(batch)
        k_noise, k_raw, k_place, k_rest = streams(batch["keys"], 4)
        raw = schedule(k_raw)
        # In (0, 1], as boundaries belong to the segment that starts there.
        place = 1.0 - jax.vmap(jax.random.uniform)(k_place)
        row = jnp.sum(raw[1:] >= place, 0)
        raw = jnp.take_along_axis(raw, jnp.stack([row, row + 1]), 0)
        noise = noise_like(x, k_noise)
        return Start(interpolate(x, noise, shifted(raw[0], shift)), label, raw, k_rest)

    return Source(batches, start)


def streams(keys: Key[Array, " n"], number: int) -> Key[Array, "number n"]:
    """Several keys for each example."""
    return jax.vmap(lambda k: jax.random.split(k, number), out_axes=1)(keys)


def noise_like(x: Examples, keys: Key[Array, " n"]) -> Examples:
    """Standard normal noise of the examples' shape, of each from its key."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)


def mean_square(x: Examples) -> Float[Array, " n"]:
    """The mean square of each example."""
    return jnp.square(x).reshape(x.shape[0], -1).mean(-1)


def chosen(mask: Bool[Array, " n"], x: Examples, y: Examples) -> Examples:
    """Of each example the one or the other."""
    return jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


class Segment(NamedTuple):
    """What a segment of training gives.

    Attributes:
        loss: (n,). Of each example, of which the gradient is taken.
        x: The states at the end, where the next segment starts.
        queries: Calls of the teacher, of each example.
    """

    loss: Float[Array, " n"]
    x: Examples
    queries: Array


class StudentState(NamedTuple):
    """What changes while a student is trained.

    Attributes:
        trainable: See `Student`.
        opt: The optimizer's state.
        average: The moving average of `trainable`, which is what students are used with.
        step: Steps done.
        queries: Network calls of the teacher so far, of each of the examples of a step.
    """

    trainable: PyTree
    opt: PyTree
    average: PyTree
    step: Int32[Array, ""]
    queries: Int32[Array, ""]


def check_velocity(teacher: Teacher, frozen: Frozen, x: Examples, t: Times, label: Labels) -> None:
    """Refuses a teacher whose output is no velocity of its examples.

    Raises:
        InputError: If it has another shape, or is no array.
    """
    made = jax.eval_shape(teacher, frozen, x, t, label)
    shape = getattr(made, "shape", type(made).__name__)
    if shape != x.shape:
        raise InputError(
            f"the teacher makes {shape} of examples {x.shape}; a velocity has their shape"
        )


Match = Callable[..., Segment]
"""`(field, x, raw_start, raw_end, keys, query, step) -> Segment`; `query(x, t) -> u` asks the
teacher, and the field carries the gradient."""


def student_method(
    match: Match,
    student: Student,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    *,
    source: Source,
    shift: float = 1.0,
    teacher_nfe: int = 1,
    weight_by_length: bool = True,
    ema_power: float = 7.0,
    ema_from: int = 100,
) -> Method:
    """A method that trains a student segment by segment.

    Args:
        match: What is asked of the student in a segment.
        student: The student; its outputs must have the shape of the teacher's.
        teacher: The teacher.
        optimizer: Optimizer of what is trained.
        source: Where examples come from.
        shift: See `paths.shifted`.
        teacher_nfe: Network calls of one of its velocities, for the count of queries.
        weight_by_length: Whether a segment counts by its length in raw time, as it should where
            all of a path's segments are gone through. One of no length never counts.
        ema_power: Exponent of the moving average (Karras et al. 2023): larger is shorter.
        ema_from: Steps before it begins; until then it is a copy.

    Returns:
        A method whose output is the average of what is trained.
    """
    descend = descent(optimizer, power=ema_power, begin=ema_from)

    def init(key, frozen, batch):
        first = source.start(batch)
        check_velocity(teacher, frozen, first.x, shifted(first.raw[0], shift), first.label)
        trainable = student.init(key, frozen)
        zero = jnp.int32(0)
        return StudentState(
            trainable, optimizer.init(trainable), jax.tree.map(jnp.copy, trainable), zero, zero
        )

    def step(state, frozen, batch, key):
        del key  # each example has its own
        first = source.start(batch)

        def query(x, t):
            x, t = collective.by_example((x, t))
            return collective.by_example(jax.lax.stop_gradient(teacher(frozen, x, t, first.label)))

        def objective(trainable, x, start, end, keys):
            x, t, t_end = collective.by_example((x, shifted(start, shift), shifted(end, shift)))
            outputs = student.apply(trainable, frozen, x, t, first.label)
            field = student.policy.begin(collective.by_example(outputs), x, t, t_end)
            done = match(field, x, start, end, keys, query, state.step)
            weight = start - end if weight_by_length else (start > end).astype(start.dtype)
            loss = (weight * done.loss).mean()
            return loss, (loss, done.x, done.queries)

        def segment(carry, bounds):
            x, grads = carry
            start, end, index = bounds
            keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(first.keys)
            new, (loss, x, queries) = jax.grad(objective, has_aux=True)(
                state.trainable, x, start, end, keys
            )
            return (x, jax.tree.map(jnp.add, grads, new)), (loss, queries)

        indices = jnp.arange(first.raw.shape[0] - 1)
        (_, grads), (losses, queries) = jax.lax.scan(
            segment,
            (first.x, jax.tree.map(jnp.zeros_like, state.trainable)),
            (first.raw[:-1], first.raw[1:], indices),
        )
        moved, norm = descend(grads, state.trainable, state.opt, state.average, state.step)
        asked = teacher_nfe * queries.sum().astype(jnp.int32)
        metrics = {"loss": losses.sum(), "grad_norm": norm}
        metrics["queries"] = asked.astype(jnp.float32)
        total = state.queries + asked
        return StudentState(*moved, state.step + 1, total), metrics

    return Method(init, step, lambda state: state.average, source.batches)


class Moved(NamedTuple):
    """What a step down a gradient changes, in the order in which states have it.

    Attributes:
        trainable: What is trained.
        opt: The optimizer's state.
        average: The moving average of `trainable`.
    """

    trainable: PyTree
    opt: PyTree
    average: PyTree


def descent(
    optimizer: optax.GradientTransformation, *, power: float, begin: int
) -> Callable[..., tuple[Moved, Float[Array, ""]]]:
    """The end of every student's step: the optimizer, and the moving average.

    Args:
        optimizer: The optimizer.
        power: See `power_average`.
        begin: Steps before the average begins.

    Returns:
        `(grads, trainable, opt, average, step) -> (Moved, norm of the gradients)`, where gradients
        are those of this device's examples.
    """

    def descend(grads, trainable, opt, average, step):
        grads = collective.mean(grads)
        updates, opt = optimizer.update(grads, opt, trainable)
        trainable = optax.apply_updates(trainable, updates)
        average = power_average(average, trainable, step, power=power, begin=begin)
        return Moved(trainable, opt, average), optax.tree.norm(grads)

    return descend


def power_average(
    average: PyTree, new: PyTree, step: Int32[Array, ""], *, power: float, begin: int
) -> PyTree:
    """A moving average whose window grows with the steps (Karras et al. 2023, arXiv 2312.02696).

    Args:
        average: So far.
        new: What comes in.
        step: Steps before this one.
        power: The share of the new is `1 - (1 - 1 / i) ** (power + 1)` at the i-th step.
        begin: Steps after which counting begins; before, the new is taken as it is.
    """
    i = jnp.maximum(step + 1 - begin, 1).astype(jnp.float32)
    keep = (1.0 - 1.0 / i) ** (power + 1.0)
    return jax.tree.map(lambda a, b: keep * a + (1.0 - keep) * b, average, new)


def sample(
    student: Student,
    trainable: PyTree,
    frozen: Frozen,
    noise: Examples,
    label: Labels,
    *,
    nfe: int,
    shift: float = 1.0,
    last: float = 1.0,
) -> Examples:
    """Examples made by a student, with exactly that many network calls.

    Args:
        student: The student.
        trainable: Its output of training.
        frozen: What the method was given.
        noise: Where to start.
        label: What is asked for.
        nfe: Segments, and network calls.
        shift: As in training.
        last: See `paths.boundaries`.
    """
    raw = boundaries(nfe, last)
    times = jnp.broadcast_to(shifted(raw, shift)[:, None], (nfe + 1, noise.shape[0]))

    def segment(x, ts):
        start, end = ts
        outputs = student.apply(trainable, frozen, x, start, label)
        field = student.policy.begin(outputs, x, start, end)
        return student.policy.transition(field, x, start, end), None

    return jax.lax.scan(segment, noise, (times[:-1], times[1:]))[0]


def ended(
    student: Student,
    trainable: PyTree,
    frozen: Frozen,
    x: Examples,
    label: Labels,
    t: Times,
    end: Times,
) -> Examples:
    """Where one call of a student leads from a state, at a noise level before: 0 is the data."""
    x, t, end = collective.by_example((x, t, end))
    outputs = student.apply(trainable, frozen, x, t, label)
    field = student.policy.begin(collective.by_example(outputs), x, t, end)
    return student.policy.transition(field, x, t, end)


def walked(
    student: Student,
    trainable: PyTree,
    frozen: Frozen,
    noise: Examples,
    label: Labels,
    keys: Key[Array, " n"],
    *,
    times: Float[Array, " boundaries"],
    stop: Int32[Array, ""] | int,
    fresh: bool,
) -> Examples:
    """Where a student stands after some of its calls.

    Args:
        student: The student.
        trainable: What it trains.
        frozen: The rest.
        noise: Where it starts.
        label: What is asked for.
        keys: A key for each example, where noise is fresh.
        times: Noise levels from 1 to 0.
        stop: How many calls; may be traced.
        fresh: Whether a call leads to the data, and fresh noise from there to the next level, or
            along the student's own velocity.
    """

    def call(i, x):
        t, after = (jnp.full(len(x), times[j]) for j in (i, i + 1))
        if not fresh:
            return ended(student, trainable, frozen, x, label, t, after)
        own = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), x.shape[1:]))(keys)
        data = ended(student, trainable, frozen, x, label, t, jnp.zeros_like(t))
        return interpolate(data, own, after)

    return jax.lax.fori_loop(0, stop, call, noise)


def straight_lines(calls: Float[Array, "calls n ..."], parts: int) -> Float[Array, "times n ..."]:
    """The states between those at calls, for pictures, where no policy says what they are.

    Args:
        calls: The states before each call, and the last.
        parts: States in a segment.
    """
    part = jnp.arange(1, parts + 1).reshape(-1, *(1,) * (calls.ndim - 1)) / parts
    between = (1 - part) * calls[:-1, None] + part * calls[1:, None]
    return jnp.concatenate([calls[:1], between.reshape(-1, *calls.shape[1:])])


def trace(
    student: Student,
    trainable: PyTree,
    frozen: Frozen,
    noise: Examples,
    label: Labels,
    *,
    nfe: int,
    parts: int,
    shift: float = 1.0,
    last: float = 1.0,
) -> Float[Array, "times n ..."]:
    """The states on the way of `sample`, for pictures: some in each segment, even in raw time.

    Args:
        student: The student.
        trainable: Its output of training.
        frozen: What the method was given.
        noise: Where to start.
        label: What is asked for.
        nfe: Segments, and network calls.
        parts: States in a segment.
        shift: As in training.
        last: See `paths.boundaries`.

    Returns:
        The states, the noise first: `nfe * parts + 1` of them.
    """
    raw, x, states = boundaries(nfe, last), noise, [noise]
    for start, end in itertools.pairwise(raw):
        fine = shifted(jnp.linspace(start, end, parts + 1), shift)
        times = [jnp.full(noise.shape[0], t) for t in fine]
        outputs = student.apply(trainable, frozen, x, times[0], label)
        field = student.policy.begin(outputs, x, times[0], times[-1])
        states += [student.policy.transition(field, x, times[0], t) for t in times[1:]]
        x = states[-1]
    return jnp.stack(states)
