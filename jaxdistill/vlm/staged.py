"""Several stages of training as one run: what each trains, how fast, with moments of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Fraction, Rate
from jaxdistill.task import Language

Gradients = Callable[[PyTree], tuple[PyTree, dict[str, Any]]]
"""`params -> (gradients, metrics)` of a stage; metrics have the same names in all stages."""


class Pace(NamedTuple):
    """The settings that all stages share.

    Attributes:
        batch_size: Questions a step.
        learning_rate: Adam's learning rate, where a stage does not scale it.
        learning_rate_decay: The last learning rate of a stage over its first, by a straight line.
        warmup_fraction: Part of a stage in which the rate rises.
        clip: Global norm that gradients are clipped to.
    """

    batch_size: Annotated[int, Between(1, 10**6)] = 64
    learning_rate: Rate = 1e-3
    learning_rate_decay: Fraction = 0.1
    warmup_fraction: Fraction = 0.03
    clip: Annotated[float, Between(1e-6, 1e12)] = 1.0


class Stage(NamedTuple):
    """One of the stages.

    Attributes:
        steps: Its length.
        rate_scale: Its first learning rate over `Pace.learning_rate`.
        trains: The parts of the parameters that it trains.
    """

    steps: int
    rate_scale: float
    trains: tuple[str, ...]


def check_lengths(lengths: Mapping[str, int]) -> None:
    """Refuses a run of no steps.

    Args:
        lengths: Steps by the name of the setting.

    Raises:
        InputError: If all are 0.
    """
    if not any(lengths.values()):
        *names, last = lengths
        raise InputError(f"method.{', '.join(names)} and {last} are all 0; give a stage some steps")


def optimizer(pace: Pace) -> optax.GradientTransformation:
    """Adam's directions after clipping, without a rate."""
    return optax.chain(optax.clip_by_global_norm(pace.clip), optax.scale_by_adam(b1=0.9, b2=0.95))


def parts_of(model: Language, params: PyTree) -> PyTree:
    """A tree like the parameters of a model, of the names of what each belongs to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: model.part(path), params)


def held(params: PyTree, parts: PyTree, stage: Stage) -> PyTree:
    """The same parameters; no gradient goes into those that a stage leaves alone.

    Args:
        params: Parameters.
        parts: A tree like them, of the names of what each belongs to.
        stage: Which stage.
    """
    return jax.tree.map(
        lambda x, part: x if part in stage.trains else jax.lax.stop_gradient(x), params, parts
    )


def advance(
    stages: Sequence[Stage],
    pace: Pace,
    gradients: Sequence[Gradients],
    params: PyTree,
    opt: PyTree,
    number: Int32[Array, ""],
) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """One step of the stage that a run is in.

    Args:
        stages: All stages, in order.
        pace: What they share.
        gradients: Of each stage, by `held` parameters, on this device's examples.
        params: The parameters of all stages.
        opt: The state of `optimizer`.
        number: Steps done, of all stages.

    Returns:
        Parameters, the optimizer's state, and metrics with `grad_norm` beside the stage's own.
    """
    lengths = [stage.steps for stage in stages]
    ends, tx = jnp.cumsum(jnp.array(lengths)), optimizer(pace)
    stage = jnp.minimum(jnp.searchsorted(ends, number, side="right"), len(stages) - 1)
    grads, metrics = jax.lax.switch(stage, gradients, params)
    grads = collective.mean(grads)
    # A stage starts with moments of its own.
    length = jnp.array(lengths)[stage]
    begun = ends[stage] - length
    fresh = number == begun
    opt = jax.tree.map(lambda old, new: jnp.where(fresh, new, old), opt, tx.init(params))
    metrics["grad_norm"] = optax.tree.norm(grads)
    updates, opt = tx.update(grads, opt, params)
    scale = jnp.array([stage.rate_scale for stage in stages])[stage]
    rate = _rate(pace, scale, length, number - begun)
    # What a stage leaves alone has no gradient, and moments of 0: its updates are 0.
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params, opt, metrics


def _rate(pace: Pace, scale: Array, length: Array, done: Array) -> Array:
    """The learning rate after some steps of a stage."""
    length = jnp.maximum(length, 1)
    rising = jnp.minimum((done + 1) / jnp.maximum(pace.warmup_fraction * length, 1.0), 1.0)
    falling = 1 - (1 - pace.learning_rate_decay) * (done / length)
    return pace.learning_rate * scale * rising * falling
