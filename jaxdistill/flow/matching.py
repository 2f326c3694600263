"""Training of a teacher: rectified flow (Liu, Gong and Liu 2023; Esser et al. 2024)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.flow.paths import Examples, Times, interpolate, shifted
from jaxdistill.flow.students import Labels, noise_like, streams
from jaxdistill.method import Batch, BatchSpec, Method


class MatchingState(NamedTuple):
    """What changes while a velocity is learned.

    Attributes:
        params: The network's parameters.
        opt: The optimizer's state.
        average: The moving average of the parameters, which is what the teacher is.
        step: Steps done.
    """

    params: PyTree
    opt: PyTree
    average: PyTree
    step: Int32[Array, ""]


def flow_matching(
    init: Callable[[PRNGKeyArray], PyTree],
    velocity: Callable[[PyTree, Examples, Times, Labels], Examples],
    optimizer: optax.GradientTransformation,
    *,
    batches: BatchSpec,
    data: Callable[[Batch], tuple[Examples, Labels]],
    shift: float = 1.0,
    null: int | None = None,
    label_drop: float = 0.0,
    decay: float = 0.999,
    exact: Callable[[Examples, Times], Examples] | None = None,
) -> Method:
    """Learns a velocity from data, at logit-normal raw times.

    Args:
        init: `key -> params`.
        velocity: `(params, x, t, label) -> u`.
        optimizer: Optimizer.
        batches: What a step is fed; it must have `keys`.
        data: `batch -> (data, label)`.
        shift: See `paths.shifted`.
        null: The label that says nothing.
        label_drop: Share of the labels replaced by it, which guidance needs.
        decay: The share of itself that the moving average keeps each step.
        exact: The velocity of the data's distribution where it is known: it has the same mean as
            what is learned from without it, and no noise.

    Raises:
        InputError: If labels are to be dropped and there is no null label.
    """
    if label_drop and null is None:
        raise InputError(f"label_drop={label_drop} needs a null label; use a network with classes")

    def make(key, frozen, batch):
        del frozen, batch
        params = init(key)
        return MatchingState(params, optimizer.init(params), params, jnp.int32(0))

    def step(state, frozen, batch, key):
        del frozen, key
        x0, label = data(batch)
        k_noise, k_time, k_drop = streams(batch["keys"], 3)
        noise = noise_like(x0, k_noise)
        t = shifted(jax.nn.sigmoid(jax.vmap(jax.random.normal)(k_time)), shift)
        x = interpolate(x0, noise, t)
        if null is not None:
            dropped = jax.vmap(jax.random.uniform)(k_drop) < label_drop
            label = jnp.where(dropped, null, label)
        wanted = noise - x0 if exact is None else exact(x, t)

        def loss(params):
            return jnp.square(velocity(params, x, t, label) - wanted).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        grads = collective.mean(grads)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on, as short as the training so far.
        keep = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, b: keep * a + (1.0 - keep) * b, state.average, params)
        return MatchingState(params, opt, average, state.step + 1), {"loss": value}

    return Method(make, step, lambda state: state.average, batches)


def examples_of(batch: Batch) -> tuple[Examples, Array]:
    """The examples of a `uniform` batch in the units of a flow, and their labels.

    Args:
        batch: Its `images` are uint8, which become float32 in [-1, 1], or latents, which stay.
            Without labels all are 0.
    """
    images = batch["images"]
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 127.5 - 1.0
    return images, batch.get("labels", jnp.zeros(images.shape[0], jnp.int32))
