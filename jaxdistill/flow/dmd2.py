"""Distribution matching distillation: a student's examples become as likely as the teacher's.

Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis" (arXiv
2405.14867). A second network, the *critic*, learns the velocity of what the student makes. Where
it and the teacher's differ, at the student's own examples with noise, says which way these are to
go: that difference is the gradient of the KL divergence of the two distributions. A student's
states are those of its own way from noise, never noised data. On the straight path all of it is
said in velocities, and the noise level cancels.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.flow import adapt, gan
from jaxdistill.flow.gan import Adversary, Discriminator
from jaxdistill.flow.paths import Examples, Times, boundaries, expand, interpolate, shifted
from jaxdistill.flow.pcm import Phases, check_grid, consistency, draw_point
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.samplers import euler
from jaxdistill.flow.students import (
    Labels,
    Student,
    Teacher,
    check_velocity,
    chosen,
    descent,
    ended,
    mean_square,
    noise_like,
    streams,
    walked,
)
from jaxdistill.keywords import Between, Folder, Fraction, Rate, Weight, grouped
from jaxdistill.method import Batch, BatchSpec, Frozen, Method
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import FlowTask, Part, Recipe

_FLOOR = 1e-6  # of the normalizer
_STUDENT = 0x73747564  # a number that splitting an example's key does not fold into it
Interval = tuple[Annotated[float, Between(0, 1)], ...]


class Matching(NamedTuple):
    """How the two distributions are brought together.

    Attributes:
        match: Weight of the difference between the teacher without guidance and the critic.
        augment: Weight of the teacher's guidance, the other part of the gradient.
        guidance: Scale of that guidance; by default the teacher's. 1 is none.
        match_times: Lowest and highest raw time at which the two are compared.
        augment_times: Those of the guidance; by default the same draws.
        normalize: Whether the gradient of each example is divided by how far the teacher's data are
            from it, on the average of its numbers.
        transition: Between calls, `ode` goes on along the student's own velocity, as Euler's method
            does; `sde` puts fresh noise on the data that a call points to, as published.
        train_calls: Whether any of the calls is trained, drawn for a step, or the `last` alone.
        anchor: Weight of PCM's loss in the first phase, which keeps the first call what a
            consistency model makes it; it needs real examples, as PCM does.
    """

    match: Weight = 1.0
    augment: Weight = 1.0
    guidance: Annotated[float, Between(0, 100)] | None = None
    match_times: Interval = (0.02, 0.98)
    augment_times: Interval = ()
    normalize: bool = True
    transition: Literal["ode", "sde"] = "ode"
    train_calls: Literal["all", "last"] = "all"
    anchor: Weight = 0.0


class Updates(NamedTuple):
    """How the critic is trained.

    Attributes:
        critic_updates: Its steps for one of the student's.
        critic_learning_rate: Its learning rate.
        blend: Part of the student that it takes over after each of the student's steps (SenseFlow's
            implicit alignment); only for students whose output is a velocity as the critic's is.
    """

    critic_updates: Annotated[int, Between(1, 1000)] = 5
    critic_learning_rate: Rate = 1e-4
    blend: Fraction = 0.0


class Positives(NamedTuple):
    """What a discriminator is told to be real, and what it looks at.

    Attributes:
        real: Part of it that is data; the rest are examples of the teacher, made on the way.
        teacher_steps: Euler steps of the teacher, guidance included, in which those are made.
        sees: Blocks of the frozen `teacher`, or of the `critic`, which is then trained for it too.
        share: Weight of the discriminator's loss in what that critic descends.
        match_norms: Whether the adversarial gradient at the examples is brought to the norm of that
            of matching, before its weight.
    """

    real: Fraction = 1.0
    teacher_steps: Annotated[int, Between(1, 1000)] = 16
    sees: Literal["teacher", "critic"] = "teacher"
    share: Weight = 1e-2
    match_norms: bool = True


class DMD2State(NamedTuple):
    """What changes.

    Attributes:
        trainable: What the student trains.
        critic: What the critic trains.
        heads: The discriminator's parameters; empty without one.
        opt: The optimizers' states: the student's, the critic's, the heads'.
        average: The moving average of `trainable`, which the student is used with.
        step: Steps of the student done.
        queries: Network calls of the teacher so far, of each of the examples of a step.
    """

    trainable: PyTree
    critic: PyTree
    heads: PyTree
    opt: tuple[PyTree, PyTree, PyTree]
    average: PyTree
    step: Int32[Array, ""]
    queries: Int32[Array, ""]


def matching_gradient(
    x: Examples,
    noise: Examples,
    conditional: Examples,
    blank: Examples | None,
    critic: Examples | None,
    *,
    guidance: float = 1.0,
    match: float = 1.0,
    augment: float = 1.0,
    normalize: bool = True,
) -> Examples:
    """Which way each example should not go: the teacher's velocity minus the critic's.

    Equation 3 of DMD2 in velocities: of data estimates it is the difference divided by how far the
    teacher's is from the example, and the noise level is a factor of both.

    Args:
        x: The student's examples, data.
        noise: The noise that they were shown with.
        conditional: The teacher's velocity there, without guidance.
        blank: The teacher's without label; None where the guidance is 1.
        critic: The critic's; None where its part has no weight.
        guidance: Scale of classifier-free guidance.
        match: Weight of the difference between `conditional` and the critic.
        augment: Weight of what guidance adds.
        normalize: Whether it is divided.
    """
    added = jnp.zeros_like(x) if blank is None else (guidance - 1.0) * (conditional - blank)
    gradient = augment * added
    if critic is not None:
        gradient += match * (conditional - critic)
    if normalize:
        guided = conditional + added
        far = jnp.abs(guided - (noise - x)).reshape(len(x), -1).mean(1)
        gradient /= expand(jnp.maximum(far, _FLOOR), x)
    return jnp.nan_to_num(gradient)


class Game(NamedTuple):
    """The players as functions, and what they need to know of each other.

    Attributes:
        student: The student.
        teacher: `(frozen, x, t, label) -> u`, guidance included.
        plain: The same without guidance.
        critic_init: `(key, frozen) -> params`: what the critic trains, from the teacher.
        critic: `(params, frozen, x, t, label) -> u`.
        shape: The shape of one example.
        num_classes: 0 where there are no labels; it is the label itself that says nothing.
        nfe: Calls of the student.
        shift: See `paths.shifted`.
        guidance: The scale of guidance that the student learns.
        matching: How the distributions are brought together.
        updates: How the critic is trained.
        phases: Of the anchor.
        data: `batch -> (data, label)`, where real examples are needed.
        adversarial: Weight of the adversarial loss.
        positives: What the discriminator is shown.
        discriminator: Who tells real examples apart, where that weight is not 0.
        blocks: `(critic's params, frozen, x, t, label) -> blocks`: what it sees of examples.
    """

    student: Student
    teacher: Teacher
    plain: Teacher
    critic_init: Callable[[PRNGKeyArray, Frozen], PyTree]
    critic: Callable[[PyTree, Frozen, Examples, Times, Labels], Examples]
    shape: tuple[int, ...]
    num_classes: int = 0
    nfe: int = 2
    shift: float = 1.0
    guidance: float = 1.0
    matching: Matching = Matching()
    updates: Updates = Updates()
    phases: Phases = Phases()
    data: Callable[[Batch], tuple[Examples, Labels]] | None = None
    adversarial: float = 0.0
    positives: Positives = Positives()
    discriminator: Discriminator | None = None
    blocks: Callable[..., Float[Array, "depth n gh gw d"]] | None = None

    @property
    def played(self) -> bool:
        """Whether there is an adversary."""
        return self.adversarial > 0

    @property
    def guides(self) -> bool:
        """Whether guidance is a part of the gradient."""
        return self.guidance != 1.0 and self.matching.augment > 0

    @property
    def criticized(self) -> bool:
        """Whether anything asks the critic."""
        return self.matching.match > 0 or (self.played and self.positives.sees == "critic")

    @property
    def fed(self) -> bool:
        """Whether real examples are needed."""
        return self.matching.anchor > 0 or (self.played and self.positives.real > 0)

    def times(self) -> Float[Array, " boundaries"]:
        """The noise levels before the student's calls, and 0."""
        return shifted(boundaries(self.nfe), self.shift)


def rollout(
    game: Game,
    trainable: PyTree,
    frozen: Frozen,
    noise: Examples,
    label: Labels,
    keys: Key[Array, " n"],
    stop: Int32[Array, ""] | int,
) -> Examples:
    """Where the student stands after some of its calls, without gradient; see `students.walked`."""
    x = walked(
        game.student,
        jax.lax.stop_gradient(trainable),
        frozen,
        noise,
        label,
        keys,
        times=game.times(),
        stop=stop,
        fresh=game.matching.transition == "sde",
    )
    return jax.lax.stop_gradient(x)


class Begun(NamedTuple):
    """Examples before the call of the student that is trained.

    Attributes:
        x: The states, on the student's own way from noise; no gradient goes into them.
        t: Their noise levels.
        label: What is asked for.
        keys: A key for each, for what is drawn further.
    """

    x: Examples
    t: Times
    label: Labels
    keys: Key[Array, " n"]


def generated(game: Game, trainable: PyTree, frozen: Frozen, begin: Begun) -> Examples:
    """The data that the call which is trained points to."""
    data = jnp.zeros_like(begin.t)
    return ended(game.student, trainable, frozen, begin.x, begin.label, begin.t, data)


def begun(
    game: Game, trainable: PyTree, frozen: Frozen, keys: Key[Array, " n"], key: PRNGKeyArray
) -> Begun:
    """Noise, brought to the call that is trained.

    Args:
        game: The game.
        trainable: What the student trains.
        frozen: The rest.
        keys: A key for each example.
        key: Draws the call, which all examples share.
    """
    k_first, k_way, k_rest = streams(keys, 3)
    last = game.matching.train_calls == "last"
    stop = game.nfe - 1 if last else jax.random.randint(key, (), 0, game.nfe)

    def one(key):
        k_noise, k_label = jax.random.split(key)
        label = jax.random.randint(k_label, (), 0, max(game.num_classes, 1))
        return jax.random.normal(k_noise, game.shape), label

    noise, label = collective.by_example(jax.vmap(one)(k_first))
    x = rollout(game, trainable, frozen, noise, label, k_way, stop)
    return Begun(x, jnp.full(len(x), game.times()[stop]), label, k_rest)


def noised(
    x: Examples, keys: Key[Array, " n"], interval: Interval, shift: float
) -> tuple[Examples, Times, Examples]:
    """Examples with noise at levels drawn evenly in raw time: they, the levels, the noise."""
    k_noise, k_time = streams(keys, 2)
    low, high = interval
    t = shifted(low + (high - low) * jax.vmap(jax.random.uniform)(k_time), shift)
    noise = noise_like(x, k_noise)
    return collective.by_example((interpolate(x, noise, t), t, noise))


def real_examples(
    game: Game, frozen: Frozen, batch: Batch, label: Labels, keys: Key[Array, " n"]
) -> tuple[Examples, Labels]:
    """What the discriminator is told to be real: data, or what the teacher makes of the labels."""
    share = game.positives.real
    known = game.data(batch) if share > 0 else None
    if share == 1:
        return known
    k_noise, k_which = streams(keys, 2)
    noise = noise_like(jnp.zeros((len(label), *game.shape)), k_noise)
    grid = shifted(boundaries(game.positives.teacher_steps), game.shift)
    made = euler(lambda x, t: game.teacher(frozen, x, t, label), noise, grid)
    if share == 0:
        return made, label
    which = jax.vmap(jax.random.uniform)(k_which) < share
    return chosen(which, known[0], made), jnp.where(which, known[1], label)


def critic_loss(
    game: Game,
    params: PyTree,
    heads: PyTree,
    frozen: Frozen,
    begin: Begun,
    x: Examples,
    real: tuple[Examples, Labels] | None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What critic and discriminator descend, given examples of the student.

    Args:
        game: The game.
        params: What the critic trains.
        heads: The discriminator's parameters.
        frozen: The rest.
        begin: What the examples came from.
        x: The examples.
        real: What passes for real, where there is an adversary.
    """
    k_critic, k_blur = streams(begin.keys, 2)
    value, metrics = jnp.float32(0), {}
    if game.criticized:
        shown, t, noise = noised(x, k_critic, (0.0, 1.0), game.shift)
        u = game.critic(params, frozen, shown, t, begin.label)
        metrics["critic"] = mean_square(u - (noise - x)).mean()
        value += metrics["critic"]
    if game.played:
        # Both with the same noise at the same level.
        fake, t, noise = noised(x, k_blur, (0.0, 1.0), game.shift)
        pairs = (interpolate(real[0], noise, t), real[1]), (fake, begin.label)
        seen = [game.blocks(params, frozen, x, t, label) for x, label in pairs]

        def told_apart(heads, seen):
            said = [game.discriminator.apply(heads, blocks) for blocks in seen]
            return gan.discriminator_loss(game.discriminator.loss, *said)

        metrics["discriminator"] = told_apart(heads, jax.lax.stop_gradient(seen))
        value += metrics["discriminator"]
        if game.positives.sees == "critic":
            value += game.positives.share * told_apart(jax.lax.stop_gradient(heads), seen)
    return value, metrics


def matched(
    game: Game, critic: PyTree, frozen: Frozen, x: Examples, label: Labels, keys: Key[Array, " n"]
) -> Examples:
    """`matching_gradient` at examples of the student, with noise that is drawn."""
    m = game.matching

    def at(keys, interval, match, augment):
        shown, t, noise = noised(x, keys, interval, game.shift)
        blank = other = None
        if game.guides:
            blank = game.plain(frozen, shown, t, jnp.full_like(label, game.num_classes))
        if match:
            other = game.critic(critic, frozen, shown, t, label)
        return matching_gradient(
            x,
            noise,
            game.plain(frozen, shown, t, label),
            blank,
            other,
            guidance=game.guidance,
            match=match,
            augment=augment,
            normalize=m.normalize,
        )

    if not (game.guides and m.augment_times):
        return at(keys, m.match_times, m.match, m.augment)
    k_match, k_augment = streams(keys, 2)
    return at(k_match, m.match_times, m.match, 0.0) + at(k_augment, m.augment_times, 0.0, m.augment)


def pushed(
    game: Game,
    critic: PyTree,
    heads: PyTree,
    frozen: Frozen,
    x: Examples,
    label: Labels,
    keys: Key[Array, " n"],
) -> tuple[Examples, dict[str, Array]]:
    """The gradient of what the student descends, with respect to its examples.

    Args:
        game: The game.
        critic: What the critic trains.
        heads: The discriminator's parameters.
        frozen: The rest.
        x: The examples.
        label: What was asked for.
        keys: A key for each.
    """
    k_match, k_blur = streams(keys, 2)
    push, metrics = jnp.zeros_like(x), {}
    matches = game.matching.match > 0 or game.guides
    if matches:
        gradient = matched(game, critic, frozen, x, label, k_match)
        metrics["matching"] = jnp.abs(gradient).mean()
        # That of half the mean square distance to where it points.
        push = gradient / x.size
    if game.played:

        def fooled(x):
            shown, t, _ = noised(x, k_blur, (0.0, 1.0), game.shift)
            said = game.discriminator.apply(heads, game.blocks(critic, frozen, shown, t, label))
            return gan.generator_loss(game.discriminator.loss, said)

        metrics["generator"], slope = jax.value_and_grad(fooled)(x)
        if game.positives.match_norms and matches:
            size = [collective.mean(jnp.square(g).sum()) for g in (push, slope)]
            slope *= jnp.sqrt(size[0] / jnp.maximum(size[1], 1e-30))
        push += game.adversarial * slope
    return jax.lax.stop_gradient(push), metrics


class Optimizers(NamedTuple):
    """Of the two networks that are trained; heads bring their own."""

    student: optax.GradientTransformation
    critic: optax.GradientTransformation


def dmd2(
    game: Game,
    optimizers: Optimizers,
    *,
    batches: BatchSpec,
    teacher_nfe: int = 1,
    ema_power: float = 7.0,
    ema_from: int = 100,
) -> Method:
    """The training of the players: some steps of critic and discriminator, one of the student.

    Args:
        game: The players.
        optimizers: Their optimizers.
        batches: What a step is fed, `critic_updates` times the examples of one update; it must have
            `keys`, and what `game.data` asks for.
        teacher_nfe: Network calls of the guided teacher, for the count of queries.
        ema_power: See `students.power_average`.
        ema_from: Steps before the average begins.

    Raises:
        InputError: If the settings do not fit each other or, from `init`, the teacher's output has
            not the shape of the examples.
    """
    check(game, batches)
    updates, student = game.updates.critic_updates, game.student
    descend = descent(optimizers.student, power=ema_power, begin=ema_from)

    def init(key, frozen, batch):
        del batch
        x, label = jnp.zeros((1, *game.shape)), jnp.zeros(1, jnp.int32)
        check_velocity(game.teacher, frozen, x, jnp.ones(1), label)
        k_student, k_critic, k_heads = jax.random.split(key, 3)
        trainable, critic = student.init(k_student, frozen), game.critic_init(k_critic, frozen)
        heads, heads_opt = (), ()
        if game.played:
            heads = game.discriminator.init(k_heads)
            heads_opt = game.discriminator.optimizer.init(heads)
        opt = optimizers.student.init(trainable), optimizers.critic.init(critic), heads_opt
        copy = jax.tree.map(jnp.copy, trainable)
        return DMD2State(trainable, critic, heads, opt, copy, jnp.int32(0), jnp.int32(0))

    def step(state, frozen, batch, key):
        k_critic, k_student = jax.random.split(key)
        still = jax.lax.stop_gradient(frozen)

        def told(carry, part):
            """One step of critic and discriminator."""
            critic, heads, opts = carry
            batch, key = part
            begin = begun(game, state.trainable, still, batch["keys"], key)
            k_real, k_rest = streams(begin.keys, 2)
            x = generated(game, state.trainable, still, begin)
            real = real_examples(game, still, batch, begin.label, k_real) if game.played else None

            def loss(critic, heads):
                return critic_loss(game, critic, heads, still, begin._replace(keys=k_rest), x, real)

            grads, metrics = jax.grad(loss, (0, 1), has_aux=True)(critic, heads)
            grads = collective.mean(grads)
            new, opt = optimizers.critic.update(grads[0], opts[0], critic)
            critic, heads_opt = optax.apply_updates(critic, new), opts[1]
            if game.played:
                new, heads_opt = game.discriminator.optimizer.update(grads[1], heads_opt, heads)
                heads = optax.apply_updates(heads, new)
            return (critic, heads, (opt, heads_opt)), metrics

        parts = _in_parts(batch, updates)
        first = state.critic, state.heads, state.opt[1:]
        keys = jax.random.split(k_critic, updates)
        (critic, heads, opts), metrics = jax.lax.scan(told, first, (parts, keys))
        metrics = jax.tree.map(lambda x: x.mean(0), metrics)

        own = jax.tree.map(lambda x: x[0], parts)
        own["keys"] = jax.vmap(lambda k: jax.random.fold_in(k, _STUDENT))(own["keys"])
        begin = begun(game, state.trainable, still, own["keys"], k_student)
        k_push, k_anchor = streams(begin.keys, 2)

        x, back = jax.vjp(lambda p: generated(game, p, still, begin), state.trainable)
        push, said = pushed(game, critic, heads, still, x, begin.label, k_push)
        (grads,) = back(push)
        metrics |= said
        if game.matching.anchor:

            def loss(trainable):
                return _anchor(game, trainable, still, own, k_anchor)

            metrics["anchor"], slope = jax.value_and_grad(loss)(state.trainable)
            add = lambda g, s: g + game.matching.anchor * s  # noqa: E731
            grads = jax.tree.map(add, grads, slope)
        moved, metrics["grad_norm"] = descend(
            grads, state.trainable, state.opt[0], state.average, state.step
        )
        if game.updates.blend:
            part = game.updates.blend
            critic = jax.tree.map(lambda c, s: (1 - part) * c + part * s, critic, moved.trainable)
        asked = _queries(game, teacher_nfe)
        metrics["queries"] = jnp.float32(asked)
        opt, done = (moved.opt, *opts), (state.step + 1, state.queries + asked)
        return DMD2State(moved.trainable, critic, heads, opt, moved.average, *done), metrics

    return Method(init, step, lambda state: state.average, batches)


def _in_parts(batch: Batch, number: int) -> Batch:
    """A batch as so many; each device's share of it becomes a share of each."""
    size = len(jax.tree.leaves(batch)[0])
    if size % number:
        raise InputError(
            f"a device's {size} examples are no multiple of method.critic_updates={number}; give a "
            "method.batch_size that the devices divide, or parallel.backend=jit"
        )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(len(x) // number, number, *x.shape[1:]), 1, 0), batch
    )


def _anchor(
    game: Game, trainable: PyTree, frozen: Frozen, batch: Batch, keys: Key[Array, " n"]
) -> Float[Array, ""]:
    """PCM's loss in the first phase."""
    x, label = game.data(batch)
    k_noise, k_place = streams(keys, 2)
    at = draw_point(k_place, game.phases.grid, game.nfe, game.nfe - 1)
    noise = noise_like(x, k_noise)
    pair = consistency(
        game.student,
        game.teacher,
        trainable,
        frozen,
        x,
        noise,
        at,
        label,
        game.phases,
        game.shift,
    )
    return pair.loss.mean()


def _queries(game: Game, teacher_nfe: int) -> int:
    """Network calls of the teacher in a step, of each of the examples of an update."""
    m, updates = game.matching, game.updates.critic_updates
    asked = teacher_nfe * (m.anchor > 0)
    if m.match or game.guides:
        asked += (1 + game.guides) * (1 + (game.guides and bool(m.augment_times)))
    if game.played:
        asked += updates * (game.positives.real < 1) * game.positives.teacher_steps * teacher_nfe
        asked += (2 * updates + 1) * (game.positives.sees == "teacher")
    return int(asked)


def check(game: Game, batches: BatchSpec) -> None:
    """Refuses settings that do not fit each other.

    Args:
        game: The players.
        batches: What a step is fed.

    Raises:
        InputError: In such a case.
    """
    m, updates = game.matching, game.updates.critic_updates
    if not (m.match or game.guides or game.played):
        raise InputError(
            "nothing is learned: method.match and method.adversarial are 0, and no guidance is "
            "added; give one of them a weight"
        )
    for name in ("match_times", "augment_times"):
        times = getattr(m, name)
        empty = name == "augment_times" and not times
        if not empty and (len(times) != 2 or times[0] >= times[1]):
            raise InputError(f"method.{name} is {times}; give the lowest and the highest time")
    if game.guidance != 1.0 and not game.num_classes:
        raise InputError(
            f"method.guidance={game.guidance} needs a teacher that knows a label which says "
            "nothing; set method.guidance=1.0"
        )
    if game.played and game.discriminator is None:
        raise InputError(f"adversarial={game.adversarial} needs a discriminator")
    if m.anchor:
        check_grid(game.phases.grid, game.nfe)
    if game.fed and game.data is None:
        raise InputError(
            "an anchor, and a discriminator of real examples, need data; give it, or set "
            "matching.anchor=0 and positives.real=0"
        )
    if batches.size % updates:
        raise InputError(
            f"a batch of {batches.size} examples is no multiple of critic_updates={updates}"
        )


def recipe(
    task: FlowTask,
    *,
    start: Folder = None,
    modes: Annotated[int, Between(1, 1000)] = 1,
    gan_loss: gan.Loss = "logistic",
    **rest: Annotated[Any, Matching, Updates, Adversary, Positives, Phases, adapt.Training],
) -> Recipe:
    """A student whose examples become as likely as the teacher's.

    Args:
        task: What it is for.
        start: The folder of a student of the same teacher, such as PCM's, with the same modes and
            adapters; by default it starts as the teacher.
        modes: Modes of the student's head: 1 is a straight line, more are ArcFlow's curve.
        gan_loss: What student and discriminator descend; see `gan.Loss`.
        **rest: Settings of `Matching`, `Updates`, `gan.Adversary`, `Positives`, `pcm.Phases` (those
            of the anchor) and `adapt.Training`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    groups = Matching, Updates, Adversary, Positives, Phases, adapt.Training
    matching, updates, adversary, positives, phases, training = grouped(rest, *groups)
    if updates.blend and modes > 1:
        raise InputError("method.blend mixes student and critic, which are alike for modes=1 alone")
    guidance = task.guidance if matching.guidance is None else matching.guidance
    if guidance != 1.0 and task.null is None:
        raise InputError(
            f"method.guidance={guidance} needs a teacher that knows the null label; set "
            "method.guidance=1.0, or train it with teacher.label_drop above 0"
        )
    played = adversary.adversarial > 0
    line = MomentumHead(1, task.shape[-1], task.trunk.patch, curved=False)
    critic = adapt.adapted(task, line, momentum_policy(), training)
    student = critic
    if modes > 1:
        head = MomentumHead(modes, task.shape[-1], task.trunk.patch)
        student = adapt.adapted(task, head, momentum_policy(), training)
    frozen, begin, source = task.teacher, student.init, lambda: {"start_sha256": None}
    if start is not None:
        shapes = jax.eval_shape(student.init, jax.random.key(0), task.teacher.shapes)
        alpha = training.rank if training.alpha is None else training.alpha
        stored = task.student(start, shapes, float(alpha))
        frozen = Part(
            task.teacher.shapes | {"start": shapes},
            lambda: task.teacher.load() | {"start": stored.load()},
        )
        begin = lambda key, frozen: jax.tree.map(jnp.copy, frozen["start"])  # noqa: E731
        source = lambda: {"start_sha256": stored.sha256()}  # noqa: E731

    def velocity(params, frozen, x, t, label):
        field = critic.policy.begin(critic.apply(params, frozen, x, t, label), x, t, t)
        return critic.policy.velocity(field, x, t)

    known = gan.blocks_of_teacher(task)
    blocks = adapt.block_features(task, training)
    if positives.sees == "teacher":
        blocks = lambda params, *args: known(*args)  # noqa: E731

    game = Game(
        student._replace(init=begin),
        task.velocity,
        task.plain,
        critic.init,
        velocity,
        task.shape,
        task.num_classes,
        training.nfe,
        task.shift,
        guidance,
        matching,
        updates,
        phases,
        task.data,
        adversary.adversarial,
        positives,
        gan.discriminator(task, adversary, gan_loss) if played else None,
        blocks,
    )
    size = training.batch_size * updates.critic_updates
    heads = ("heads_learning_rate",) if played else ()
    slow = training._replace(learning_rate=updates.critic_learning_rate, warmup=0)
    options = {"b1": 0.0, "b2": 0.99}
    method = dmd2(
        game,
        Optimizers(
            adapt.optimizer(training, **options),
            adapt.optimizer(slow, steps=training.steps * updates.critic_updates, **options),
        ),
        batches=task.batches(size) if game.fed else BatchSpec("keys", size),
        teacher_nfe=task.nfe,
        ema_power=training.ema_power,
        ema_from=adapt.warmup_of(training, training.steps),
    )
    made = adapt.student_recipe(task, student, method, training)
    rates = "learning_rate", "critic_learning_rate", *heads
    made = made._replace(frozen=frozen, rates=rates, source=source)
    return made if matching.transition == "ode" else adapt.with_fresh_noise(made, task, student)
