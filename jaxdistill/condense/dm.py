"""DM: data-set distillation by matching the class means of random features.

Zhao and Bilen, "Dataset Condensation with Distribution Matching" (WACV 2023).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from jaxdistill import collective
from jaxdistill.condense.synthetic import (
    Budget,
    Factor,
    Features,
    ImagesByClass,
    Pixels,
    descended,
    distilled,
    initial_pixels,
    longest,
    pixels_by_class,
    present,
    real_needed,
    real_statistic,
    repeated,
    start_of,
    synthetic_outputs,
)
from jaxdistill.data.augment import parse
from jaxdistill.keywords import Count, Dtype, Fraction, Rate
from jaxdistill.method import BatchSpec, Method
from jaxdistill.task import CondenseTask, Recipe


class DMState(NamedTuple):
    """Synthetic images (classes, ipc, H, W, C) and the state of their optimizer."""

    pixels: Pixels
    pixels_opt: Any


def dm(
    features: Features,
    network_init: Callable[[PRNGKeyArray], Any],
    optimizer: optax.GradientTransformation,
    *,
    normalize: Callable[[Array], Array],
    ipc: Budget,
    factor: int = 1,
    start: str = "random",
    pixels: Pixels | None = None,
    batch_real: int = 256,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
    microbatch: int = 128,
    real_dtype: DTypeLike = jnp.float32,
) -> Method:
    """Builds the DM method: every step draws a fresh random network. `frozen` is not used.

    Args:
        features: `(params, normalized images) -> penultimate features`.
        network_init: `key -> params` of a random network.
        optimizer: Optimizer of the pixels, acting image by image; see `ncfm`.
        normalize: uint8 or [0, 1] images to normalized images.
        ipc: Synthetic images of every class, or a tuple with those of each.
        factor: Tiles per side stored in each synthetic image (1 in the paper).
        start: Initial images, see `initial_pixels`.
        pixels: Initial images given outright, instead of `start`.
        batch_real: Real images of each class per step.
        strategy: Siamese augmentation.
        microbatch: Images in one pass of the network, on each device.
        real_dtype: The network's dtype on the real images, which takes no gradient; bfloat16 halves
            what its activations move. Features and all that follows are float32.

    Returns:
        A `Method`; its output is that of `ncfm`.
    """
    needed = 1 if pixels is not None else real_needed(start, longest(ipc), factor)
    num_real, there = max(batch_real, needed), present(ipc, factor)
    augmentation = {"normalize": normalize, "strategy": strategy}

    def init(key, frozen, batch):
        del frozen
        first = initial_pixels(
            key, batch["images"], ipc=ipc, factor=factor, start=start, pixels=pixels
        )
        return DMState(first, optimizer.init(first))

    def step(state, frozen, batch, key):
        del frozen
        k_net, k_augment = jax.random.split(key)
        params = network_init(k_net)
        classes = batch["images"].shape[0]
        keys = collective.class_keys(k_augment, classes)
        target = real_statistic(
            lambda real: real.mean(1),
            features,
            params,
            batch["images"],
            keys,
            microbatch=microbatch,
            dtype=real_dtype,
            **augmentation,
        )
        target = collective.mean(target)

        def loss(pixels):
            out, rows = synthetic_outputs(
                features,
                params,
                pixels,
                keys,
                factor=factor,
                microbatch=microbatch,
                there=there,
                **augmentation,
            )
            return jnp.sum(jnp.square(rows.class_means(out) - target))

        value, grads = jax.value_and_grad(loss)(state.pixels)
        pixels, pixels_opt = descended(optimizer, grads, state.pixels_opt, state.pixels)
        return DMState(pixels, pixels_opt), {"match": value / classes}

    def output(state):
        return distilled(state.pixels, factor, ipc)

    return Method(init, step, output, BatchSpec("per_class", num_real), pixels_by_class)


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesByClass = 1,
    steps: Count = 20_000,
    factor: Factor = 1,
    start: str = "random",
    learning_rate: Rate = 0.02,
    learning_rate_decay: Fraction = 0.05,
    batch_real: Count = 256,
    real_dtype: Dtype = "float32",
    strategy: str = "color_crop_cutout_flip_scale_rotate",
) -> Recipe:
    """DM with random networks of the extractors' shape, and Adam on the pixels.

    Args:
        task: What it is for.
        ipc: Synthetic images of every class, or a tuple with those of each.
        steps: Length of the run.
        factor: Tiles per side that a synthetic image stores.
        start: `tiled`, `random`, `noise`, or the path of a `distilled.npz`.
        learning_rate: The pixels' learning rate.
        learning_rate_decay: The last learning rate over the first, by a cosine.
        batch_real: Real images of each class in a step.
        real_dtype: The network's dtype on the real images.
        strategy: Siamese augmentation; see `jaxdistill.data.augment`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    parse(strategy)
    method = dm(
        task.network.features,
        task.network.init,
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps, learning_rate_decay)),
        normalize=task.normalize,
        ipc=ipc,
        factor=factor,
        start=start,
        pixels=start_of(task, start=start, ipc=ipc, factor=factor, batch_real=batch_real),
        batch_real=batch_real,
        strategy=strategy,
        microbatch=task.microbatch,
        real_dtype=real_dtype,
    )
    return Recipe(method, steps, note=repeated(task, batch_real), separate=True)
