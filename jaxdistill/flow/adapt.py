"""Students made of their teacher: its trunk, adapted or trained whole, and a head of their own.

This is what the recipes of students share: their settings, their optimizer, how they are used.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdistill.errors import InputError
from jaxdistill.flow import students
from jaxdistill.flow.paths import boundaries, shifted
from jaxdistill.flow.policies import Policy
from jaxdistill.flow.samplers import own_keys
from jaxdistill.flow.students import Source, Student, elastic, fixed, from_data, from_noise
from jaxdistill.keywords import Between, Count, Fraction, Natural, Rate, Weight
from jaxdistill.method import Method
from jaxdistill.nn import lora
from jaxdistill.nn.discriminator import by_block
from jaxdistill.nn.momentum_head import from_output
from jaxdistill.nn.transformer2d import Transformer2D
from jaxdistill.nn.unet import UNet
from jaxdistill.task import FlowTask, Recipe

Last = Annotated[float, Between(1e-3, 1)]
"""Length of the last segment over that of the others."""

# Groups of what a student trains.
_PLAIN, _SLOW = "plain", "gammas"


class Training(NamedTuple):
    """The settings of every student.

    Attributes:
        nfe: Network calls of the student from noise to data (network function evaluations).
        steps: Length of the run.
        batch_size: Examples a step.
        learning_rate: AdamW's learning rate.
        learning_rate_decay: The last learning rate over the first, by a cosine.
        warmup: Steps in which the learning rate rises, and before the moving average begins.
        clip: Global norm that gradients are clipped to.
        ema_power: Exponent of the moving average; see `students.power_average`.
        rank: The rank of the adapters; at 0 the whole network is trained.
        alpha: Scale of the adapters times their rank; by default the rank.
        targets: Regular expressions of the layers that get adapters.
    """

    nfe: Annotated[int, Between(1, 1000)] = 2
    steps: Count = 15_000
    batch_size: Annotated[int, Between(1, 10**6)] = 256
    learning_rate: Rate = 1e-4
    learning_rate_decay: Fraction = 1.0
    warmup: Natural = 100
    clip: Annotated[float, Between(1e-6, 1e12)] = 50.0
    ema_power: Annotated[float, Between(0, 1e3)] = 7.0
    rank: Annotated[int, Between(0, 2**14)] = 0
    alpha: Weight | None = None
    targets: tuple[str, ...] = ("(up|down)$",)


class Segments(NamedTuple):
    """The settings of students that are trained segment by segment.

    Attributes:
        elastic: Numbers of calls to serve at once, such as (1, 2, 4, 8), instead of `nfe`.
        last: Length of the last segment over that of the others.
        from_data: Whether segments start from noised data instead of noise.
    """

    elastic: tuple[Annotated[int, Between(1, 1000)], ...] = ()
    last: Last = 1.0
    from_data: bool = False


def fresh_trunk(trunk: Any, shape: Sequence[int], key: PRNGKeyArray) -> PyTree:
    """Fresh parameters of a teacher's network, for examples of a shape (h, w, c)."""
    examples, t, label = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    return trunk.init(key, examples, t, label)["params"]


def adapted(
    task: FlowTask, head: Any, policy: Policy, training: Training, *, spans: bool = False
) -> Student:
    """The teacher's trunk, adapters on it, and a head.

    Args:
        task: What the student is for.
        head: A module with `modes`, of the trunk's features to the outputs of the policy. It
            starts from the teacher's output layer.
        policy: What its outputs mean.
        training: Rank, alpha and targets of the adapters.
        spans: Whether `apply` takes one more argument, how far the answer reaches, for which there
            is one more layer.

    Raises:
        InputError: If the trunk takes no adapters. What fits no layer is refused by `init`.
    """
    module, rank = task.trunk, training.rank
    features = _overlaid(training, functools.partial(module.apply, method="features"))
    if isinstance(module, UNet | Transformer2D) and spans:
        kind = type(module).__name__
        raise InputError(f"a {kind} is not told how far its answer reaches; take a DiT")
    if isinstance(module, UNet) and rank:
        raise InputError(
            "adapters go on dense layers, and a UNet does its work in others; set method.rank=0"
        )

    def trained(path):
        adapter = path.rpartition("/")[2] in ("lora_a", "lora_b")
        # A layer of variances, which some transformers have, is asked for nothing.
        return adapter if rank else not path.startswith(("output/", "variance/"))

    def init(key, frozen):
        k_head, k_noise, k_lora = jax.random.split(key, 3)
        params = frozen["teacher"]
        tokens = jnp.zeros((1, *(side // module.patch for side in task.shape[:2])))
        width = params["output"]["kernel"].shape[0]
        tokens = jnp.broadcast_to(tokens[..., None], (*tokens.shape, width))
        fresh = head.init(k_head, tokens)["params"]
        # One mode needs no noise to differ from others.
        noise = 0.0 if head.modes == 1 else 0.05
        heads = from_output(k_noise, fresh, params["output"], head.modes, noise=noise)
        if rank:
            # The head takes the place of the output layer.
            body = {name: layer for name, layer in params.items() if name != "output"}
            params = lora.add(k_lora, body, rank=rank, targets=training.targets)
        own = lora.split(params, trained)[1]
        if spans:
            own = own | {"span": _fresh_span(module, task.shape, jax.random.fold_in(key, 1))}
        trunk = jax.tree.map(lambda x: x.astype(jnp.float32), own)
        return {"trunk": trunk, "head": heads}

    def apply(trainable, frozen, x, t, label, *span):
        tokens = features(trainable, frozen, x, t, label, *span)
        said, *rest = head.apply({"params": trainable["head"]}, tokens)
        # The head begins as the teacher's last layer, which may say something else.
        return task.as_velocity(x[..., None], t, said), *rest

    return Student(init, apply, policy)


def _fresh_span(trunk: Any, shape: Sequence[int], key: PRNGKeyArray) -> PyTree:
    """Fresh parameters of the layer that says how far an answer reaches."""
    zeros = jnp.zeros(1)
    args = jnp.zeros((1, *shape)), zeros, jnp.zeros(1, jnp.int32), zeros
    return trunk.init(key, *args, method="features")["params"]["span"]


def block_features(task: FlowTask, training: Training) -> Callable[..., Array]:
    """What comes out of the blocks of a student's trunk, for discriminators.

    Args:
        task: What the student is for.
        training: Rank and alpha of its adapters.

    Returns:
        `(trainable, frozen, x, t, label) -> blocks`; see `jaxdistill.nn.discriminator.by_block`.
    """
    read = functools.partial(by_block, task.trunk)
    return _overlaid(training, lambda variables, *args: read(variables["params"], *args))


def _overlaid(training: Training, apply: Callable[..., Array]) -> Callable[..., Array]:
    """A function of a trunk's variables as one of what is trained of it and what is frozen."""
    alpha = training.rank if training.alpha is None else training.alpha
    adapted = lora.adapt(apply, alpha / max(training.rank, 1))

    def overlaid(trainable, frozen, *args):
        return adapted({"params": lora.overlay(frozen["teacher"], trainable["trunk"])}, *args)

    return overlaid


def optimizer(
    training: Training,
    *,
    steps: int | None = None,
    gamma_rate_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
) -> optax.GradientTransformation:
    """AdamW after clipping; the layer of the gammas, which is stiff, at a rate of its own.

    Args:
        training: The settings.
        steps: Over which the rate falls; by default those of the run.
        gamma_rate_scale: Learning rate of the gammas over that of the rest.
        b1: What the mean of gradients keeps of itself each step.
        b2: What that of their squares keeps.
    """
    steps = training.steps if steps is None else steps

    def adam(rate):
        schedule = optax.warmup_cosine_decay_schedule(
            1e-3 * rate,
            rate,
            warmup_of(training, steps),
            steps,
            rate * training.learning_rate_decay,
        )
        return optax.adamw(schedule, b1=b1, b2=b2, weight_decay=0.0)

    def labels(trainable):
        return {
            part: {
                layer: jax.tree.map(lambda _, s=layer == "log_gammas": _SLOW if s else _PLAIN, leaf)
                for layer, leaf in layers.items()
            }
            for part, layers in trainable.items()
        }

    rates = {_PLAIN: training.learning_rate, _SLOW: training.learning_rate * gamma_rate_scale}
    return optax.chain(
        optax.clip_by_global_norm(training.clip),
        optax.partition({name: adam(rate) for name, rate in rates.items()}, labels),
    )


def warmup_of(training: Training, steps: int) -> int:
    """Steps in which the rate rises, and after which the moving average begins."""
    return min(training.warmup, steps // 2)


def source(task: FlowTask, training: Training, segments: Segments) -> Source:
    """Where the examples of a step start, and their segments.

    Raises:
        InputError: If the settings exclude each other.
    """
    if segments.elastic and segments.from_data:
        raise InputError("method.elastic goes with segments from noise; set method.from_data=False")
    if segments.elastic and segments.last != 1.0:
        raise InputError(
            f"method.last={segments.last}: elastic students have even segments; set method.last=1.0"
        )
    schedule = fixed(training.nfe, segments.last)
    if segments.elastic:
        schedule = elastic(segments.elastic)
    size = training.batch_size
    if segments.from_data:
        return from_data(task.batches(size), task.data, schedule, task.shift)
    return from_noise(task.shape, size, schedule, task.num_classes)


def options(task: FlowTask, training: Training, segments: Segments) -> dict[str, Any]:
    """What `students.student_method` is told alike by all that go segment by segment.

    Raises:
        InputError: As `source` does.
    """
    return {
        "source": source(task, training, segments),
        "shift": task.shift,
        "teacher_nfe": task.nfe,
        "weight_by_length": not segments.from_data,
        "ema_power": training.ema_power,
        "ema_from": warmup_of(training, training.steps),
    }


def by_states(made: Recipe, states: Callable[..., Array]) -> Recipe:
    """A recipe of a student that is sampled in a way of its own, with straight lines in pictures.

    Args:
        made: The recipe.
        states: `(output, frozen, noise, label, nfe) -> (nfe, n, ...)`, those after each call.
    """

    def sample(output, frozen, noise, label, *, nfe):
        return states(output, frozen, noise, label, nfe)[-1]

    def trace(output, frozen, noise, label, *, nfe, parts):
        calls = jnp.concatenate([noise[None], states(output, frozen, noise, label, nfe)])
        return students.straight_lines(calls, parts)

    return made._replace(sample=sample, trace=trace)


def with_fresh_noise(made: Recipe, task: FlowTask, student: Student) -> Recipe:
    """A recipe of a student whose calls lead to the data, with fresh noise in between.

    Args:
        made: The recipe, as of a student that goes on along its own velocity.
        task: What it is for.
        student: The student.
    """

    def after(calls, output, frozen, noise, label, nfe):
        times = shifted(boundaries(nfe), task.shift)
        keys = own_keys(noise)
        return students.walked(
            student, output, frozen, noise, label, keys, times=times, stop=calls, fresh=True
        )

    def sample(output, frozen, noise, label, *, nfe):
        return after(nfe, output, frozen, noise, label, nfe)

    def trace(output, frozen, noise, label, *, nfe, parts):
        calls = [after(i, output, frozen, noise, label, nfe) for i in range(nfe + 1)]
        return students.straight_lines(jnp.stack(calls), parts)

    return made._replace(sample=sample, trace=trace)


def student_recipe(
    task: FlowTask, student: Student, method: Method, training: Training, *, last: float = 1.0
) -> Recipe:
    """The recipe of a student, given how it is trained.

    Args:
        task: What it is for.
        student: The student.
        method: Its training; its output is what `student.apply` takes.
        training: The settings.
        last: Length of the last segment over that of the others.

    Raises:
        InputError: If the adapters fit no layer.
    """
    made = jax.eval_shape(student.init, jax.random.key(0), task.teacher.shapes)
    # The head takes the place of the teacher's output layer.
    kept = {n: layer for n, layer in task.teacher.shapes["teacher"].items() if n != "output"}
    trained = lora.count(made)
    whole = lora.count(lora.overlay(kept, made["trunk"])) + lora.count(made["head"])
    used = {"shift": task.shift, "last": last}

    def cost(state) -> dict[str, PyTree]:
        queries = int(state.queries) * training.batch_size
        return {"trained_parameters": trained, "teacher_queries": queries}

    def sample(output, frozen, noise, label, *, nfe):
        return students.sample(student, output, frozen, noise, label, nfe=nfe, **used)

    def trace(output, frozen, noise, label, *, nfe, parts):
        return students.trace(student, output, frozen, noise, label, nfe=nfe, parts=parts, **used)

    return Recipe(
        method._replace(specs=task.specs, frozen_specs=task.specs),
        training.steps,
        task.teacher,
        card={"nfe": training.nfe, **used, "licence": "that of the teacher and its data"},
        cost=cost,
        note=f"{trained:,} of {whole:,} parameters are trained, {100 * trained / whole:.1f} %",
        sample=sample,
        trace=trace,
    )
